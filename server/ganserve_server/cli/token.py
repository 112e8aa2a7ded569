"""`ganserve-server token`: adds, lists and withdraws the tokens of a file."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ganserve_server.cli.problems import print_problems
from ganserve_server.settings import ServerSettings

_TokensFile = Annotated[Path | None, typer.Option(help="The tokens file.", show_default="the file of --tokens-file")]


def add_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the token: letters, digits, '.', '_' and '-'.")],
    file: _TokensFile = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="generate: request images; admin: load and unload models at --admin-address. Repeat the option for "
            "both.",
            show_default="generate",
        ),
    ] = None,
    images_per_s: Annotated[float | None, typer.Option(help="Images per second that the token may request.")] = None,
    burst_images: Annotated[
        float | None,
        typer.Option(help="Images that the token may request at once.", show_default="the images of one second"),
    ] = None,
) -> None:
    """Make a token, add its hash to a tokens file, and print the token, which is not stored anywhere."""
    from ganserve_server.auth import token_file

    token, digest = token_file.new_token()
    entry = {
        "name": name,
        "sha256": digest,
        "roles": role or ["generate"],
        "images_per_s": images_per_s,
        "burst_images": burst_images,
    }
    with _refusing(file := _tokens_file(context, file)):
        token_file.add(file, {key: value for key, value in entry.items() if value is not None})
    print(token)


def list_tokens(
    context: typer.Context,
    file: _TokensFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array of objects.")] = False,
) -> None:
    """Print the names of a file's tokens, with roles and rates. The tokens themselves are not stored anywhere."""
    from ganserve_server.auth import token_file

    with _refusing(file := _tokens_file(context, file)):
        entries = [token.model_dump(mode="json", exclude={"sha256"}) for token in token_file.read_tokens(file)]
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    rows = [("NAME", "ROLES", "IMAGES_PER_S", "BURST_IMAGES")]
    for entry in entries:
        rates = ("" if entry[key] is None else f"{entry[key]:g}" for key in ("images_per_s", "burst_images"))
        rows.append((entry["name"], ",".join(entry["roles"]), *rates))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def withdraw_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the token.")],
    file: _TokensFile = None,
) -> None:
    """Remove a token from a tokens file. Running servers read the file again, and then reject the token."""
    from ganserve_server.auth import token_file

    with _refusing(file := _tokens_file(context, file)):
        token_file.withdraw(file, name)


def _tokens_file(context: typer.Context, file: Path | None) -> Path:
    settings: ServerSettings = context.obj
    if file is None and not settings.tokens_file:
        raise typer.BadParameter("give --file, because the settings have no --tokens-file", param_hint="--file")
    return file or Path(settings.tokens_file)


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Print what is wrong with a tokens file, and exit."""
    try:
        yield
    except OSError as error:
        print_problems([f"{file}: {error.strerror}"])
        raise typer.Exit(2) from error
    except ValueError as error:
        print_problems([f"{file}: {error}; nothing was changed"])
        raise typer.Exit(2) from error


COMMANDS: dict[str, Callable[..., None]] = {"add": add_token, "list": list_tokens, "withdraw": withdraw_token}
