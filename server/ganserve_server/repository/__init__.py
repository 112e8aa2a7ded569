"""The model repository: finds model files in a folder, verifies them, and serves them.

Gives the services a table with a queue for each version. May not import services, transport, auth or processes.
"""
