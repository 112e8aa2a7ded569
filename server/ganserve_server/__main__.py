"""Starts `ganserve-server`, or names the extra to install."""

import os
import signal
import sys


def main() -> None:
    """Run the program."""
    # First of all, and until the event loop has its own handler: without one, process 1 of a container ignores SIGTERM.
    # No exception, because an import that it interrupts may turn it into another.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a start reads everything anyway
    try:
        from ganserve_server.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ganserve"):
            raise
        sys.exit(f"ganserve-server: {error.name} is not installed; install ganserve with its extra: 'ganserve[server]'")


if __name__ == "__main__":
    main()
