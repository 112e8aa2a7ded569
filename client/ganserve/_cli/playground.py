"""`ganserve playground`: a web page to try a server's models."""

from typing import Annotated

import typer

from ganserve import Client
from ganserve._cli.connection import Connection, with_connection
from ganserve.errors import InvalidRequestError

_TIMEOUT_S = 10.0  # a user of the page should not wait longer for an error


@with_connection
def playground(
    host: Annotated[
        str, typer.Option(help="Address of the page; with 0.0.0.0, other machines can open it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    *,
    connection: Connection,
) -> None:
    """Open a web page to try the models: drag the seed, the class and the truncation. Ctrl-C ends it.

    Needs the extra `playground` of the package. Example: ganserve playground --port 8000 --no-browser
    """
    try:
        from ganserve._playground import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ganserve"):
            raise
        raise InvalidRequestError(f"{error.name} is missing; pip install 'ganserve[playground]'") from error
    # No retries: the page shows an error at once, and asks again by itself.
    with Client(
        connection.address,
        timeout_s=connection.timeout_s or _TIMEOUT_S,
        retries=False,
        token=connection.token,
        tls=connection.tls,
        ca_file=connection.ca_file,
    ) as client:
        run(client, host=host, port=port, open_browser=browser)
