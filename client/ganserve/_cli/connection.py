"""The options for the connection to the server, which all commands share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ganserve import AsyncClient, Client

_PANEL = "Server"
# These options take precedence over the environment, which the SDK reads.
_OPTIONS: dict[str, Any] = {
    "address": Annotated[
        str | None,
        typer.Option(
            help="Address of the server, HOST:PORT (or GANSERVE_ADDRESS).",
            show_default="127.0.0.1:50051",
            rich_help_panel=_PANEL,
        ),
    ],
    "timeout_s": Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.001,
            help="Maximum seconds for a call.",
            show_default="30, plus 0.02 for each image",
            rich_help_panel=_PANEL,
        ),
    ],
    "token": Annotated[
        str | None,
        typer.Option(
            help="Token to send with each call. GANSERVE_TOKEN is safer: other users can see a command line.",
            rich_help_panel=_PANEL,
        ),
    ],
    "tls": Annotated[
        bool | None,
        typer.Option("--tls/--no-tls", help="Encrypt the connection (or GANSERVE_TLS=1).", rich_help_panel=_PANEL),
    ],
    "ca_file": Annotated[
        Path | None,
        typer.Option(
            help="Certificates (PEM) of the authorities that may sign the server's certificate (or "
            "GANSERVE_CA_FILE). Implies --tls.",
            show_default="the system's",
            rich_help_panel=_PANEL,
        ),
    ],
}


@dataclass(frozen=True, slots=True)
class Connection:
    """The address of the server and how to connect; None takes the value from the environment, or the default."""

    address: str | None
    timeout_s: float | None
    token: str | None
    tls: bool | None
    ca_file: Path | None

    def client(self) -> Client:
        """Make a client."""
        return Client(**self._arguments())

    def async_client(self, *, retries: bool) -> AsyncClient:
        """Make a client for asyncio."""
        return AsyncClient(**self._arguments(), retries=retries)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `connection` with the options from which a Connection is made."""

    def run(**given: Any) -> None:
        connection = Connection(**{name: given.pop(name) for name in _OPTIONS})
        command(**given, connection=connection)

    signature = inspect.signature(command)
    own = [each for name, each in signature.parameters.items() if name != "connection"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in [*own, *more]}
    return run
