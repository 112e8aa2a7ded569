"""The `ganserve` program: images from a server, on the command line."""

import os
import sys
from typing import Annotated, Any

import typer

from ganserve import __version__
from ganserve._cli import bench, cards, generating, health, playground, provenance, streaming
from ganserve._cli.outcome import EXIT_STATUSES, ExitStatus, guarded, outcome
from ganserve._cli.waiting import reporting

_EPILOG = "Exit status: " + "; ".join(f"{status:d} {text}" for status, text in EXIT_STATUSES.items()) + "."

app = typer.Typer(
    help=__doc__,
    epilog=_EPILOG,
    add_completion=False,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)
for _command in (
    generating.generate,
    generating.interpolate,
    streaming.stream,
    provenance.inspect,
    provenance.reproduce,
    cards.models,
    health.health,
    bench.bench,
    playground.playground,
):
    app.command(epilog=_EPILOG)(guarded(_command))


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the program's version.")] = False,
) -> None:
    if version:
        print(f"ganserve {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitStatus.COMMAND_LINE)


def main() -> None:
    """Run the program. An error is reported in one line on standard error; the exit status tells the kind of error."""
    try:
        with reporting():
            status: Any = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        status, text = outcome(error)
        if text and sys.stderr is not None:
            print(f"ganserve: {text}", file=sys.stderr)
        _give_up_stdout()
    sys.exit(status if isinstance(status, int) else 0)


def _give_up_stdout() -> None:
    """Discard output that could not be written: otherwise Python retries at exit and reports an error."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
