"""`ganserve health`: checks whether a server, one of its models, or all of its replicas serve."""

from typing import Annotated

import typer

from ganserve import Client
from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.outcome import ExitStatus
from ganserve._cli.output import print_json
from ganserve._replicas import refusal, silent
from ganserve.errors import AuthenticationError, ServerError


@with_connection
def health(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model to check.", show_default="the server")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Check every address for this version of the model.", show_default="any"),
    ] = None,
    every_address: Annotated[
        bool,
        typer.Option(
            "--every-address", help="Check every address in the list or in DNS, instead of only the next one."
        ),
    ] = False,
    wait_s: Annotated[
        float | None,
        typer.Option("--wait", min=0.001, help="Maximum seconds to wait until it serves.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """Check whether the server, or a model, serves. The exit status is 0 if so, 1 if not, 3 if no server answers.

    Example: ganserve health cdcgan-mnist --version 2 --every-address --wait 60
    """
    if version is not None and model is None:
        raise typer.BadParameter("--version needs a MODEL")
    if every_address or version is not None:
        with connection.client() as client:
            _every_address(client, model, version, wait_s, as_json=as_json)
        return
    with connection.client() as client:
        if wait_s is not None:
            client.wait_until_ready(wait_s, model=model)
        serving = client.health(model)
    if as_json:
        print_json({"address": client.address, "model": model, "serving": serving})
    else:
        print("SERVING" if serving else "NOT SERVING")
    if not serving:
        raise typer.Exit(ExitStatus.NO)


def _every_address(
    client: Client, model: str | None, version: int | None, wait_s: float | None, *, as_json: bool
) -> None:
    try:
        found = client.replicas(model, version) if wait_s is None else client.wait_for_version(model, version, wait_s)
    except (AuthenticationError, ServerError):  # of one of them, and no use in waiting
        found = client.replicas(model, version)
    serving = all(replica.serving for replica in found)
    if as_json:
        replicas = [
            {
                "address": replica.address,
                "serving": replica.serving,
                "error": None if replica.error is None else replica.error.text,
                "request_id": None if replica.error is None else replica.error.request_id,
            }
            for replica in found
        ]
        summary = {"address": client.address, "model": model, "version": version, "serving": serving}
        print_json({**summary, "replicas": replicas})
    else:
        print("\n".join(map(str, found)))
    if (error := refusal(found)) is not None:
        raise error  # reported with advice and the request id
    if not serving:
        raise typer.Exit(ExitStatus.NO_ANSWER if silent(found) else ExitStatus.NO)
