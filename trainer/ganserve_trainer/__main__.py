"""Starts `ganserve-trainer`; if a package is missing, names the extra to install."""

import sys


def main() -> None:
    """Run the program."""
    try:
        from ganserve_trainer.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ganserve"):
            raise
        sys.exit(
            f"ganserve-trainer: {error.name} is not installed; install ganserve with its extra: 'ganserve[trainer]'"
        )


if __name__ == "__main__":
    main()
