"""Identifies callers: finds a call's bearer token in the tokens file, and checks its role and its rate."""

import hashlib
import hmac
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from ganserve_server.auth.token_file import Role, Token, read_tokens
from ganserve_server.errors import PermissionDenied, RateLimited, Unauthenticated
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError

_AUTHORIZATION = re.compile(rb"bearer +([\x21-\x7e]{1,4096}) *", re.IGNORECASE)


class Principal:
    """The holder of a token, with its name, its roles and its rate. The transport knows it as `Caller`."""

    __slots__ = ("_burst", "_delayed", "_rate", "_rates", "_refused", "_slot", "name", "roles")

    def __init__(self, token: Token, rates: SharedRates, limited: Counter | None = None) -> None:
        self.name, self.roles = token.name, token.roles
        self._rate = token.images_per_s
        self._burst = token.burst_images or max(1.0, token.images_per_s or 0.0)
        self._rates = rates
        self._slot = rates.slot(token.sha256)
        # Created at once: Prometheus misses the first increment of a series that did not exist before.
        counted = None if self._rate is None else limited
        self._refused, self._delayed = (
            None if counted is None else counted.labels(self.name, outcome) for outcome in ("refused", "delayed")
        )

    @property
    def burst(self) -> float:
        """The most images that the rate allows at once; infinite without a rate."""
        return math.inf if self._rate is None else self._burst

    def check(self, role: Role) -> None:
        """Check that the token has a role.

        Raises:
            PermissionDenied: the token lacks the role.
        """
        if role not in self.roles:
            raise PermissionDenied(f"token {self.name!r} does not have the role {role!r}, which this call needs")

    def take(self, images: int) -> None:
        """Count requested images.

        Raises:
            RateLimited: there are more than the token's rate allows now.
        """
        if wait_s := self._wait_s(images, self._refused):
            raise RateLimited(
                f"token {self.name!r} may ask for {self._rate:g} images a second ({self._burst:g} at once); wait for "
                "the retry delay of this error, request fewer images, or stream them",
                wait_s,
            )

    def must_wait_s(self, images: int) -> float:
        """Count images and return 0, or count nothing and return the seconds until the token's rate allows them."""
        return self._wait_s(images, self._delayed)

    def _wait_s(self, images: int, limited: Counter | None) -> float:
        wait_s = 0.0 if self._rate is None else self._rates.take(self._slot, images, self._rate, self._burst)
        if wait_s and limited is not None:
            limited.inc()
        return wait_s


class Tokens:
    """The tokens of a file, each with its principal.

    Args:
        file: the tokens file, as `ganserve-server token` writes it: TOML, a table `[[tokens]]` for each token.
        rates: the shared memory that counts the tokens' rates.
        limited: counts refused and delayed requests, by name and outcome; None: they are not counted.

    Raises:
        StartError: the file cannot be read, or breaks a rule.
    """

    def __init__(self, file: str, rates: SharedRates, limited: Counter | None = None) -> None:
        self._file = Path(file)
        self._rates, self._limited = rates, limited
        self._tokens: dict[str, Token] = {}
        self._principals: dict[bytes, tuple[bytes, Principal]] = {}
        self.reload()

    def reload(self) -> dict[str, Any]:
        """Read the file again; return the number of tokens, and the names of changed tokens, for the log.

        Raises:
            StartError: it cannot be used; the old tokens stay.
        """
        try:
            tokens = {token.name: token for token in read_tokens(self._file)}
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise StartError(f"the tokens file {self._file} cannot be used: {text}") from error
        before, self._tokens = self._tokens, tokens
        self._principals = {}
        for token in tokens.values():
            digest = bytes.fromhex(token.sha256)
            self._principals[digest[:16]] = (digest[16:], Principal(token, self._rates, self._limited))
        differ = {
            "added": sorted(tokens.keys() - before.keys()),
            "removed": sorted(before.keys() - tokens.keys()),
            "changed": sorted(name for name in tokens.keys() & before.keys() if tokens[name] != before[name]),
        }
        return {"tokens": len(tokens)} | {how: names for how, names in differ.items() if names}

    def identify(self, metadata: Mapping[bytes, bytes]) -> Principal:
        """Return the principal of a call by its token.

        Raises:
            Unauthenticated: the call has no token, or one that is not in the file.
        """
        authorization = metadata.get(b"authorization")
        if authorization is None:
            raise Unauthenticated("a token is needed: send metadata 'authorization: Bearer TOKEN'")
        bearer = _AUTHORIZATION.fullmatch(authorization)
        # Look the token up by the first half of its hash, which no caller can choose. Compare the second half in
        # constant time.
        digest = hashlib.sha256(bearer[1] if bearer else b"").digest()
        rest, principal = self._principals.get(digest[:16], (b"", None))
        if principal is None or not hmac.compare_digest(rest, digest[16:]):
            raise Unauthenticated(
                "this server does not know the token" if bearer else "authorization must be 'Bearer TOKEN'"
            )
        return principal
