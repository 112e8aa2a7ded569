"""TLS: the server's certificate and the authorities of its callers, both renewed without a restart."""

import datetime
import os
import ssl
from pathlib import Path
from typing import Any

from ganserve_server.observe.metrics import Metrics
from ganserve_server.settings import ServerSettings
from ganserve_server.start_errors import StartError
from ganserve_server.transport.credentials import Pem

# For TLS 1.2, HTTP/2 requires forward secrecy and authenticated encryption (RFC 9113, 9.2.2). TLS 1.3 always has both.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class Certificates:
    """The certificates for new connections. Open connections keep the ones they started with.

    Args:
        settings: the settings, which name the PEM files.
        metrics: publish the expiry times; None in a process without its own metrics.

    Raises:
        StartError: a file is missing or not valid.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics | None) -> None:
        self._certificate, self._key = settings.tls_certificate_file, settings.tls_key_file
        self._client_ca = settings.tls_client_ca_file
        self._metrics = metrics
        self.asks_callers = bool(self._client_ca)
        self.context: ssl.SSLContext
        self.pem: Pem
        self.expired: dict[str, datetime.datetime]  # kind and expiry of each expired certificate
        if not (self._certificate and self._key):
            raise StartError("TLS needs both --tls-certificate-file and --tls-key-file")
        self._files = tuple(Path(file) for file in (self._certificate, self._key, self._client_ca) if file)
        self.reload()

    def reload(self) -> dict[str, Any]:
        """Read the files again; return the serial number and the expiry times for the log.

        Raises:
            StartError: they cannot be used; the old certificates stay.
        """
        try:
            context, server = self._load(), _certificates(self._certificate)
            ca = Path(self._client_ca).read_bytes() if self._client_ca else None
            pem = Pem(Path(self._certificate).read_bytes(), Path(self._key).read_bytes(), ca)
            ends = {"server": min(end for _, end in server)}
            if self._client_ca:
                ends["client_ca"] = min(end for _, end in _certificates(self._client_ca))
        except (OSError, ValueError) as error:
            raise StartError(self._explain(error)) from error
        self.context, self.pem = context, pem
        self.expired = {kind: end for kind, end in ends.items() if end < datetime.datetime.now(datetime.UTC)}
        if self._metrics is not None:
            for kind, end in ends.items():
                self._metrics.certificate_expiry.labels(kind).set(end.timestamp())
        serial, _ = server[0]
        return {"serial": serial} | {f"{kind}_ends": end.isoformat() for kind, end in ends.items()}

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        context.set_alpn_protocols(["h2"])
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(self._certificate, self._key, password=_no_password)
        if self._client_ca:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session asks for no certificate, so an expired one would still be accepted. Hence no tickets,
            # and no TLS 1.2: OpenSSL caches its sessions, which Python cannot turn off.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return context

    def _explain(self, error: Exception) -> str:
        files = ", ".join(str(file) for file in self._files)
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
            missing = [str(file) for file in self._files if not os.access(file, os.R_OK)]
            return f"{' and '.join(missing) or files} cannot be read: {error.strerror}"
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            return f"{self._key} is not the key of {self._certificate}"
        return f"{files} must contain certificates and a key in PEM ({getattr(error, 'reason', None) or error})"


def _certificates(file: str) -> list[tuple[str, datetime.datetime]]:
    """Return the serial number (in hexadecimal, as openssl prints it) and the expiry of each certificate in a file.

    Raises:
        ValueError: the file has no certificate, or one that cannot be parsed.
    """
    from cryptography import x509  # takes 16 MiB, which a server without TLS does not need

    found = []
    for certificate in x509.load_pem_x509_certificates(Path(file).read_bytes()):
        serial = f"{certificate.serial_number:X}"
        found.append((serial.zfill(len(serial) + len(serial) % 2), certificate.not_valid_after_utc))
    return found


def _no_password() -> str:
    raise ValueError("the key is encrypted; the server has no password for it")
