"""Starts `ganserve-server`; if a package is missing, names the extra to install."""

import os
import signal
import sys


def main() -> None:
    """Run the program."""
    # The first step, for the time until the event loop has its own handler: without a handler, process 1 of a container
    # ignores SIGTERM. The handler raises no exception, because an interrupted import may replace it by another one.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a starting server reads everything anyway
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # a supervisor blocks it for its workers
    # Otherwise a socket would get the number of a standard stream that the caller has closed, and with it the log.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    try:
        from ganserve_server.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ganserve"):
            raise
        sys.exit(f"ganserve-server: {error.name} is not installed; install ganserve with its extra: 'ganserve[server]'")


if __name__ == "__main__":
    main()
