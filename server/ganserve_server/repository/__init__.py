"""The model repository: finds model files, verifies them, and serves what the folder has.

Gives the services a table of queues, one for each version. May not import services, transport, auth or processes.
"""
