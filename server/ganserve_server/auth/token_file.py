"""The tokens file: TOML, a table `[[tokens]]` for each token, with its hash, its roles and its rate.

The file holds only hashes of the tokens: reading it does not allow anyone to call.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ganserve_server.shared.rates import MAX_TOKENS
from ganserve_server.spelling import nearest

Role = Literal["generate", "admin"]
_TABLE = re.compile(r"^(?=[ \t]*\[\[[ \t]*tokens[ \t]*\]\])", re.MULTILINE)
_TOKEN_BYTES = 32
_TOKEN_PREFIX = "gs_"  # so that scanners for leaked secrets recognise a token
_LEAST_RATE, _MOST_IMAGES = 0.001, 1e9

_PATTERNS = {
    "name": "it must be 1 to 64 letters, digits, '.', '_' and '-'",
    "sha256": "it must be 64 hexadecimal digits in lower case",
}


class Token(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    images_per_s: Annotated[float, Field(strict=True, ge=_LEAST_RATE, le=_MOST_IMAGES)] | None = None
    burst_images: Annotated[float, Field(strict=True, ge=1, le=_MOST_IMAGES)] | None = None

    @model_validator(mode="after")
    def _check_burst(self) -> "Token":
        if self.burst_images is not None and self.images_per_s is None:
            raise ValueError("burst_images needs images_per_s")
        return self


def read_tokens(file: Path) -> list[Token]:
    """Read a tokens file.

    Raises:
        OSError: it cannot be read.
        ValueError: it breaks a rule; the text names the token and the key.
    """
    return _parse(file.read_text("utf-8"))


def _parse(text: str) -> list[Token]:
    try:
        content = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    for key in content.keys() - {"tokens"}:
        raise ValueError(f"there is no key {key!r}{nearest(key, ('tokens',))}; each token is a table [[tokens]]")
    entries = content.get("tokens", [])
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_TOKENS:
        raise ValueError(f"it must have 1 to {MAX_TOKENS} tables [[tokens]]")
    tokens: list[Token] = []
    for number, entry in enumerate(entries, 1):
        name = entry.get("name", f"number {number}") if isinstance(entry, dict) else f"number {number}"
        try:
            tokens.append(Token.model_validate(entry))
        except ValidationError as error:
            # Without the input, which could be the token itself. Report an unknown key rather than a missing one.
            problem = min(error.errors(include_input=False), key=lambda one: one["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in problem["loc"]) or "as a whole"
            hint = nearest(key, tuple(Token.model_fields)) if problem["type"] == "extra_forbidden" else ""
            rule = _PATTERNS.get(key) if problem["type"] == "string_pattern_mismatch" else None
            raise ValueError(f"token {name!r}, {key}: {rule or problem['msg']}{hint}") from None
    for kind in ("name", "sha256"):
        values = [getattr(token, kind) for token in tokens]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"{kind} {min(twice)!r} occurs twice")
    return tokens


def add(file: Path, entry: Mapping[str, object]) -> None:
    """Add a token to a file; create the file if it does not exist.

    Raises:
        OSError: it cannot be read or written.
        ValueError: its name is taken, or adding it would break a rule of the file.
    """
    lines = ["", "[[tokens]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items()), ""]

    def with_table(content: str) -> str:
        if _TABLE.search(content) and entry["name"] in [token.name for token in _parse(content)]:
            raise ValueError(
                f"token {entry['name']!r} already exists; choose another name, or withdraw that token first"
            )
        newline = "\r\n" if "\r\n" in content else "\n"
        return f"{content.rstrip()}{newline}{newline.join(lines)}".lstrip()

    _rewrite(file, with_table, make=True)


def withdraw(file: Path, name: str) -> None:
    """Remove a token from a file.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the token is not in the file, or is the only one, or not every token has a table [[tokens]].
    """

    def without(content: str) -> str:
        before = _parse(content)
        names = [token.name for token in before]
        if name not in names:
            raise ValueError(f"there is no token {name!r}{nearest(name, names)}")
        if len(names) == 1:
            raise ValueError(
                f"{name!r} is the only token, and a tokens file must have at least one; add another token first"
            )
        start, *tables = _TABLE.split(content)
        # A comment after the last key of a table may be about the next table: it stays.
        left = start + "".join(
            _after_the_last_key(table) if number == names.index(name) else table for number, table in enumerate(tables)
        )
        if len(tables) != len(names) or _parse(left) != [token for token in before if token.name != name]:
            raise ValueError(f"not every token in the file has its own table [[tokens]]: remove {name!r} by hand")
        return left

    _rewrite(file, without)


def _after_the_last_key(table: str) -> str:
    """Return the lines after the last key of a table: comments."""
    lines = re.findall(r".*\n|.+$", table)  # not splitlines, which also splits at characters that are letters in TOML
    last = max(number for number, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    return "".join(lines[last + 1 :]).lstrip("\r\n")


def _rewrite(file: Path, change: Callable[[str], str], *, make: bool = False) -> None:
    """Change a file atomically; keep its comments, line endings, owner and mode."""
    file = Path(os.path.realpath(file))  # a link stays a link
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # otherwise one of two concurrent changes would be lost
        before = file.stat() if os.path.lexists(file) or not make else None
        if before and not stat.S_ISREG(before.st_mode):
            raise ValueError("it is not a regular file, and this command would replace it with one")
        text = change(file.read_bytes().decode("utf-8") if before else "")
        _parse(text)
        beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(text.encode("utf-8"))
                if before is not None:
                    os.fchown(new.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(new.fileno(), before.st_mode & 0o777)
                new.flush()
                os.fsync(new.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    finally:
        os.close(folder)


def new_token() -> tuple[str, str]:
    """Return a new token, and its hash.

    The token has 256 random bits, so neither a salt nor a slow hash would make it harder to guess.
    """
    token = _TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    return token, hashlib.sha256(token.encode()).hexdigest()
