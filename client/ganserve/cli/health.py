"""`ganserve health`: whether a server, or one of its models, serves."""

from typing import Annotated

import typer

from ganserve.cli.connection import Connection, with_connection
from ganserve.cli.outcome import ExitStatus
from ganserve.cli.output import print_json


@with_connection
def health(
    model: Annotated[str | None, typer.Argument(help="Ask for this model.", show_default="the server")] = None,
    wait_s: Annotated[
        float | None,
        typer.Option("--wait", min=0.001, help="Wait so many seconds for it to serve.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """Say whether the server, or a model, serves: exit status 0 if so, 1 if not, 3 if nobody answers.

    Example: ganserve health cdcgan-mnist --wait 60
    """
    with connection.client(model) as client:
        if wait_s is not None:
            client.wait_until_ready(wait_s, model=model)
        serving = client.health(model)
    if as_json:
        print_json({"address": client.address, "model": model, "serving": serving})
    else:
        print("SERVING" if serving else "NOT SERVING")
    if not serving:
        raise typer.Exit(ExitStatus.NO)
