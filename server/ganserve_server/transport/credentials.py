"""What a transport needs for TLS. `auth` implements it; the transport knows only this interface."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of the certificate files when they were last usable together."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Credentials(Protocol):
    """The current certificates, in both forms. The functions are called for each new connection."""

    @property
    def context(self) -> Callable[[], ssl.SSLContext] | None:
        """Returns the context for a new connection; None without TLS."""

    @property
    def pem(self) -> Callable[[], Pem] | None:
        """Returns the same as PEM, for a transport that does TLS itself; None without TLS."""
