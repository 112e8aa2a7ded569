"""How calls come in and answers go out: HTTP/2, gRPC, and what services see of a call. It knows no service."""
