"""Starts the server as one process or as several, and stops it without losing a call.

Builds everything that a process needs and connects it. Only `cli` may import it. What takes long to import is imported
inside functions: a supervisor starts its workers first.
"""
