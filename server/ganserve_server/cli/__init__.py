"""The `ganserve-server` program: its flags and its subcommands.

Nothing imports this package but `__main__`. Its modules import what takes long (onnxruntime, grpc) inside a command, so
that `--help` and a wrong flag answer at once.
"""
