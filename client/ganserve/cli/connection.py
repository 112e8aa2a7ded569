"""The options that say how to reach the server, the same for every command, and what helps with wrong names."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from ganserve.client import AsyncClient, Client
from ganserve.errors import GanserveError, InvalidRequestError, ModelNotFoundError

_PANEL = "Server"
# The SDK reads the environment: what is given here goes before it.
_OPTIONS: dict[str, Any] = {
    "address": Annotated[
        str | None,
        typer.Option(help="HOST:PORT, or GANSERVE_ADDRESS.", show_default="127.0.0.1:50051", rich_help_panel=_PANEL),
    ],
    "timeout_s": Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.001,
            help="Seconds a call may take.",
            show_default="30, and 0.02 more an image",
            rich_help_panel=_PANEL,
        ),
    ],
    "token": Annotated[
        str | None,
        typer.Option(
            help="Sent with each call. Better GANSERVE_TOKEN: others see a command line.", rich_help_panel=_PANEL
        ),
    ],
    "tls": Annotated[
        bool | None,
        typer.Option("--tls/--no-tls", help="Encrypt, or GANSERVE_TLS=1.", rich_help_panel=_PANEL),
    ],
    "ca_file": Annotated[
        Path | None,
        typer.Option(
            help="Certificates (PEM) of who may sign the server's, or GANSERVE_CA_FILE. With it, --tls is meant.",
            show_default="the system's",
            rich_help_panel=_PANEL,
        ),
    ],
}


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is and how to speak to it; None leaves it to the environment and to defaults."""

    address: str | None
    timeout_s: float | None
    token: str | None
    tls: bool | None
    ca_file: Path | None

    @contextmanager
    def client(self, model: str | None = None, labels: Sequence[str] = ()) -> Iterator[Client]:
        """Open a client; where the server does not know the model or a label, the error gets a "did you mean"."""
        with Client(**self._arguments()) as client:
            try:
                yield client
            except (ModelNotFoundError, InvalidRequestError) as error:
                _suggest(client, error, model, labels)
                raise

    def async_client(self, *, retries: bool) -> AsyncClient:
        """Make a client for asyncio."""
        return AsyncClient(**self._arguments(), retries=retries)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `connection` by the options that make one."""

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


def _suggest(client: Client, error: GanserveError, model: str | None, labels: Sequence[str]) -> None:
    if model is None:
        return
    try:
        if isinstance(error, ModelNotFoundError):
            wrong, known = [model], [each.name for each in client.models()]
        else:
            known = list(client.model(model).class_names)
            wrong = [label for label in labels if not label.isdecimal() and label not in known]
            if wrong and error.code is None:
                error.code = grpc.StatusCode.INVALID_ARGUMENT  # the SDK refused, but by the server's card
    except GanserveError:
        return  # what went wrong first is what the user must read
    for name in wrong:
        close = closest(name, known)
        if close is not None and close != name:
            error.add_note(f"did you mean {close!r}?")


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return the name that was probably meant, whatever its case, or None."""
    by_folded = {each.casefold(): each for each in known}
    wanted = name.casefold()
    found = difflib.get_close_matches(wanted, by_folded, n=1) or [each for each in by_folded if wanted in each]
    return by_folded[found[0]] if found else None
