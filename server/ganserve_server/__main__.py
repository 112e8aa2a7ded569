"""Starts `ganserve-server`, or says what to install."""

import sys


def main() -> None:
    """Run the program."""
    try:
        from ganserve_server.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ganserve"):
            raise
        sys.exit(f"ganserve-server: {error.name} is not installed; install ganserve with its extra: 'ganserve[server]'")


if __name__ == "__main__":
    main()
