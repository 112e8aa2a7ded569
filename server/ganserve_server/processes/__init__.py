"""Starts the server as one process or as several, and stops it without losing a call.

Builds and connects all parts of a process. Only `cli` may import it. Modules that take long to import are imported
inside functions, so that a supervisor starts its workers first.
"""
