"""Memory that all worker processes read and write.

Imports nothing else from the server, so that the transport and the queues can use it without knowing the processes.
"""
