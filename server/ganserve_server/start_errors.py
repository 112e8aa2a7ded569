"""The errors that keep the server from starting: the program logs the text and exits.

Separate from `errors`, which imports grpc: `--help` and the report of a wrong flag do not need grpc.
"""


class StartError(Exception):
    """The server cannot start; the text says why and what to do."""


class SettingsError(Exception):
    """A setting is wrong or unknown; the text names the setting, where it is set, and the nearest known name."""
