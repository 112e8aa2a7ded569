"""The gRPC services: messages to checked requests, and results back to messages.

Knows protobuf's messages and the queues, but not processes, sockets or HTTP/2: of the transport it may import the
interface. Only `processes` and `cli` may import it.
"""
