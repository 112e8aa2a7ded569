"""The gRPC services: convert messages to checked requests, and results back to messages.

Knows protobuf's messages and the queues, but not processes, sockets or HTTP/2: it may import only the transport's
interface. Only `processes` and `cli` may import it.
"""
