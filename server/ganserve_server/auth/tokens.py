"""Who may call: bearer tokens, of which the server knows the hashes alone, with a role and a rate for each."""

import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ganserve_server.errors import PermissionDenied, RateLimited, Unauthenticated
from ganserve_server.shared.rates import MAX_TOKENS, SharedRates
from ganserve_server.spelling import nearest
from ganserve_server.start_errors import StartError

Role = Literal["generate", "admin"]
_AUTHORIZATION = re.compile(rb"bearer +([\x21-\x7e]{1,4096}) *", re.IGNORECASE)
_TABLE = re.compile(r"^(?=[ \t]*\[\[[ \t]*tokens[ \t]*\]\])", re.MULTILINE)
_TOKEN_BYTES = 32
_TOKEN_PREFIX = "gs_"  # so that scanners for leaked secrets can know one
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


class Caller:
    """Whose token a call has."""

    __slots__ = ("_burst", "_delayed", "_rate", "_rates", "_refused", "_slot", "name", "roles")

    def __init__(self, token: Token, rates: SharedRates, limited: Counter | None = None) -> None:
        self.name, self.roles = token.name, token.roles
        self._rate = token.images_per_s
        self._burst = token.burst_images or max(1.0, token.images_per_s or 0.0)
        self._rates = rates
        self._slot = rates.slot(token.sha256)
        # Made at once: Prometheus misses the first of what is counted in a series that was not there before.
        counted = None if self._rate is None else limited
        self._refused, self._delayed = (
            None if counted is None else counted.labels(self.name, outcome) for outcome in ("refused", "delayed")
        )

    @property
    def burst(self) -> float:
        """How many images may be asked for at once, where the rate is to be kept; without one, any number."""
        return math.inf if self._rate is None else self._burst

    def check(self, role: Role) -> None:
        """Let pass who has a role.

        Raises:
            PermissionDenied: the token has it not.
        """
        if role not in self.roles:
            raise PermissionDenied(f"token {self.name!r} has not the role {role!r}, which this call needs")

    def take(self, images: int) -> None:
        """Count images that are asked for.

        Raises:
            RateLimited: they are more than the token's rate allows now.
        """
        if wait_s := self._wait_s(images, self._refused):
            raise RateLimited(
                f"token {self.name!r} may ask for {self._rate:g} images a second ({self._burst:g} at once); "
                "wait as told, ask for fewer, or stream them",
                wait_s,
            )

    def must_wait_s(self, images: int) -> float:
        """Count images and return 0, or if the token's rate does not allow them now the seconds until it may."""
        return self._wait_s(images, self._delayed)

    def _wait_s(self, images: int, limited: Counter | None) -> float:
        wait_s = 0.0 if self._rate is None else self._rates.take(self._slot, images, self._rate, self._burst)
        if wait_s and limited is not None:
            limited.inc()
        return wait_s


class Tokens:
    """The callers of a file.

    Args:
        file: as `ganserve-server token` writes it: TOML, a table `[[tokens]]` for each.
        rates: where their rates are counted.
        limited: counts what their rates refuse and delay, by name and outcome; None: nobody asks.

    Raises:
        StartError: it cannot be read, or breaks a rule.
    """

    def __init__(self, file: str, rates: SharedRates, limited: Counter | None = None) -> None:
        self._file = Path(file)
        self._rates, self._limited = rates, limited
        self._tokens: dict[str, Token] = {}
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}
        self.reload()

    def reload(self) -> dict[str, Any]:
        """Read the file again; return for the log how many tokens it has, and the names of those that differ.

        Raises:
            StartError: it cannot be used; the old tokens stay.
        """
        try:
            tokens = {token.name: token for token in read_tokens(self._file)}
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise StartError(f"the tokens file {self._file} cannot be used: {text}") from error
        before, self._tokens = self._tokens, tokens
        self._callers = {}
        for token in tokens.values():
            digest = bytes.fromhex(token.sha256)
            self._callers[digest[:16]] = (digest[16:], Caller(token, self._rates, self._limited))
        differ = {
            "added": sorted(tokens.keys() - before.keys()),
            "removed": sorted(before.keys() - tokens.keys()),
            "changed": sorted(name for name in tokens.keys() & before.keys() if tokens[name] != before[name]),
        }
        return {"tokens": len(tokens)} | {how: names for how, names in differ.items() if names}

    def identify(self, metadata: Mapping[bytes, bytes]) -> Caller:
        """Return whose token a call has.

        Raises:
            Unauthenticated: it has none, or one that is not in the file.
        """
        authorization = metadata.get(b"authorization")
        if authorization is None:
            raise Unauthenticated("a token is needed: send metadata 'authorization: Bearer TOKEN'")
        bearer = _AUTHORIZATION.fullmatch(authorization)
        # Found by the first half of its hash, which nobody can steer, and compared by the other in constant time.
        digest = hashlib.sha256(bearer[1] if bearer else b"").digest()
        rest, caller = self._callers.get(digest[:16], (b"", None))
        if caller is None or not hmac.compare_digest(rest, digest[16:]):
            raise Unauthenticated(
                "the token is none of this server's" if bearer else "authorization must be 'Bearer TOKEN'"
            )
        return caller


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
            # Without the input: it could be the token itself. A key too many tells more than the one that lacks.
            problem = min(error.errors(include_input=False), key=lambda one: one["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in problem["loc"]) or "as a whole"
            hint = nearest(key, tuple(Token.model_fields)) if problem["type"] == "extra_forbidden" else ""
            rule = _PATTERNS.get(key) if problem["type"] == "string_pattern_mismatch" else None
            raise ValueError(f"token {name!r}, {key}: {rule or problem['msg']}{hint}") from None
    for kind in ("name", "sha256"):
        values = [getattr(token, kind) for token in tokens]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"{kind} {min(twice)!r} is there twice")
    return tokens


def add(file: Path, entry: Mapping[str, object]) -> None:
    """Add a token to a file, which is made if it is not there.

    Raises:
        OSError: it cannot be read or written.
        ValueError: there is one of its name, or the file, with it, breaks a rule.
    """
    lines = ["", "[[tokens]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items()), ""]

    def with_table(content: str) -> str:
        if _TABLE.search(content) and entry["name"] in [token.name for token in _parse(content)]:
            raise ValueError(f"there is a token {entry['name']!r} already; take another name, or withdraw it first")
        newline = "\r\n" if "\r\n" in content else "\n"
        return f"{content.rstrip()}{newline}{newline.join(lines)}".lstrip()

    _rewrite(file, with_table, make=True)


def withdraw(file: Path, name: str) -> None:
    """Take a token out of a file.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the token is not there, or is the only one, or the file is not a table [[tokens]] for each.
    """

    def without(content: str) -> str:
        before = _parse(content)
        names = [token.name for token in before]
        if name not in names:
            raise ValueError(f"there is no token {name!r}{nearest(name, names)}")
        if len(names) == 1:
            raise ValueError(f"{name!r} is the only token, and a server takes no file without one; add another first")
        start, *tables = _TABLE.split(content)
        # A comment after a table's last key may be about the next one: it stays.
        left = start + "".join(
            _after_the_last_key(table) if number == names.index(name) else table for number, table in enumerate(tables)
        )
        if len(tables) != len(names) or _parse(left) != [token for token in before if token.name != name]:
            raise ValueError(f"the file is not a table [[tokens]] for each: take {name!r} out by hand")
        return left

    _rewrite(file, without)


def _after_the_last_key(table: str) -> str:
    """Return the comments at the end of a table."""
    lines = re.findall(r".*\n|.+$", table)  # not splitlines: it parts a comment at what TOML takes for a letter
    last = max(number for number, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    return "".join(lines[last + 1 :]).lstrip("\r\n")


def _rewrite(file: Path, change: Callable[[str], str], *, make: bool = False) -> None:
    """Change a file, as a whole or not at all; its comments, the ends of its lines, its owner and its mode stay."""
    file = Path(os.path.realpath(file))  # a link goes on leading to it
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of two that change it at a time, one would be lost
        before = file.stat() if os.path.lexists(file) or not make else None
        if before and not stat.S_ISREG(before.st_mode):
            raise ValueError("it is no regular file, and would be replaced by one")
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

    The token has 256 random bits: no salt, and no hash that is slow on purpose, makes it harder to find.
    """
    token = _TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    return token, hashlib.sha256(token.encode()).hexdigest()
