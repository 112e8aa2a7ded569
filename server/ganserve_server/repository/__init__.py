"""The model repository: finds model files, verifies them, and keeps what is served as the folder is.

Gives the services a table of queues, one for each version. May not import services, transport, auth or processes.
"""
