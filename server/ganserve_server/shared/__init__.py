"""Memory that all worker processes read and write.

Imports nothing of the server, so that the transport and the queues can use it without knowing the processes.
"""
