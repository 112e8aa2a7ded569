"""Starts `ganserve-server`, or says what to install."""

import os
import signal
import sys


def main() -> None:
    """Run the program."""
    # First of all, and until the loop has its own handler: a container's process 1 ignores SIGTERM without one. Not by
    # an exception: an import that it interrupts makes another of it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what it asks for is what a start does
    try:
        from ganserve_server.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ganserve"):
            raise
        sys.exit(f"ganserve-server: {error.name} is not installed; install ganserve with its extra: 'ganserve[server]'")


if __name__ == "__main__":
    main()
