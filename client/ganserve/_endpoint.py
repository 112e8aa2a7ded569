"""Where a client's servers are and how to reach them: addresses, credentials, and the options of a gRPC channel.

gRPC resolves HOST:PORT through DNS and sends the calls to all addresses of the name in turn (round robin), so that a
headless service of Kubernetes needs no proxy. It asks DNS again when a connection ends, at most every 5 s. New replicas
get calls from then on, but none as long as no connection ends.
"""

import ipaddress
import json
import os
import re
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from ganserve.errors import InvalidRequestError

DEFAULT_ADDRESS = "127.0.0.1:50051"
# The server's largest answer has 64 MiB of pixels; the rest is for seeds and labels.
MAX_ANSWER_BYTES = (64 + 16) << 20
KEEPALIVE_S = 60.0  # below the idle timeouts of load balancers (AWS 350 s, Azure 240 s)
# Also the longest time that TCP may leave sent bytes without an acknowledgement: gRPC then gives the connection up, and
# the client retries its calls elsewhere. With gRPC's default, a replica on a dead host delayed each call by 20 s.
KEEPALIVE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
DNS_MIN_INTERVAL_S = 5.0

_SCHEMES = ("dns:///", "dns://", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:///")
HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%a-z]+\]|[^\s:/,\[\]]+):(\d{1,5})")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the servers are, and how to reach them."""

    address: str
    target: str  # the address as gRPC spells it
    credentials: grpc.ChannelCredentials | None = field(repr=False)  # None: plain text
    metadata: tuple[tuple[str, str], ...] | None = field(repr=False)  # sent with every call: the token
    authority: str | None = None  # the name on the certificate, if it is not the target's host

    def of_one_address(self, target: str) -> "Endpoint":
        """Return the endpoint of one of the addresses; its certificate must still match the common name."""
        scheme, _, address = target.partition(":")
        if scheme.startswith("unix"):
            return replace(self, target=target)
        authority = self.target.partition(":")[2].lstrip("/").partition(",")[0]
        return replace(self, address=address, target=target, authority=authority)

    def options(self) -> list[tuple[str, str | int]]:
        """Return the options of a gRPC channel."""
        # With several addresses, each certificate must match the first: gRPC would expect the name of the whole list.
        authority = self.authority or (self.address.partition(",")[0].strip() if "," in self.address else None)
        return [
            *([] if authority is None else [("grpc.default_authority", authority)]),
            ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
            ("grpc.dns_min_time_between_resolutions_ms", round(DNS_MIN_INTERVAL_S * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Despite its name, this is the timeout of a connection attempt. gRPC's 20 s would also outlive the client.
            ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # ganserve-server answers any number of PINGs. Other servers may reject them; gRPC then sends fewer.
            ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", -1),  # the server enforces its own limit
            # Clients share no connections: a server serves its connections in turn, so two clients count as two
            # callers; a connection ends with its client; and a new client does not inherit another one's backoff.
            ("grpc.use_local_subchannel_pool", 1),
        ]


def endpoint(
    address: str | None,
    *,
    token: str | None,
    tls: bool | None,
    ca_file: str | os.PathLike[str] | None,
    certificate_file: str | os.PathLike[str] | None,
    key_file: str | os.PathLike[str] | None,
) -> Endpoint:
    """Build an Endpoint from arguments, and from the environment where an argument is None.

    Raises:
        InvalidRequestError: an argument is invalid, a file cannot be read, or the token would be sent in plain text.
    """
    name = "address"
    if address is None:
        address, name = os.environ.get("GANSERVE_ADDRESS") or DEFAULT_ADDRESS, "GANSERVE_ADDRESS"
    token = token or os.environ.get("GANSERVE_TOKEN") or None
    target, local = _target(address, name)
    names = ("ca_file", "certificate_file", "key_file")
    given = (ca_file, certificate_file, key_file)
    files = {
        name: value or os.environ.get(f"GANSERVE_{name.upper()}") for name, value in zip(names, given, strict=True)
    }
    if tls is None:
        tls = _switch("GANSERVE_TLS")
    if tls is False and any(given):
        raise InvalidRequestError("tls is off, but a certificate or key is given; leave one of them out")
    if token is not None and not (token.isascii() and token.isprintable() and token == token.strip()):
        # The error must not repeat the token.
        raise InvalidRequestError(
            "token has characters that a header cannot contain: leading or trailing blanks, or not ASCII"
        )
    credentials = None
    if tls or (tls is None and any(files.values())):
        credentials = _credentials(files)
    elif token is not None and tls is None and not local:
        raise InvalidRequestError(
            f"the token would go to {address} in plain text",
            advice="encrypt with {tls} (GANSERVE_TLS=1), or allow it with {no_tls} (GANSERVE_TLS=0)",
        )
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    return Endpoint(address, target, credentials, metadata)


def _switch(name: str) -> bool | None:
    value = os.environ.get(name, "").lower()
    if value and value not in _TRUE + _FALSE:
        raise InvalidRequestError(f"{name} is {value!r}; it must be 1 or 0")
    return None if not value else value in _TRUE


def _target(address: str, name: str) -> tuple[str, bool]:
    """Return gRPC's target of an address, and whether the address is on this machine; errors call it `name`."""
    if not isinstance(address, str):
        raise InvalidRequestError(f"{name} is {address!r}; it must be HOST:PORT, such as {DEFAULT_ADDRESS}")
    if address.startswith(_SCHEMES):
        return address, address.startswith("unix")
    parts = [HOST_PORT.fullmatch(part.strip()) for part in address.split(",")]
    pairs = [(part[1].strip("[]"), int(part[2])) for part in parts if part is not None]
    if len(pairs) < len(parts) or not all(0 < port < 1 << 16 for _, port in pairs):
        raise InvalidRequestError(
            f"{name} is {address!r}; it must be HOST:PORT, such as {DEFAULT_ADDRESS}, or several IP:PORT "
            "separated by commas"
        )
    addresses = [_ip(host) for host, _ in pairs]
    versions = {None if ip is None else ip.version for ip in addresses}
    if len(pairs) > 1 and (None in versions or len(versions) > 1):
        raise InvalidRequestError(
            f"{name} is {address!r}; several addresses must all be IPv4 or all IPv6; a name with several addresses "
            "needs no list"
        )
    local = all(
        host == "localhost" if ip is None else ip.is_loopback for (host, _), ip in zip(pairs, addresses, strict=True)
    )
    if addresses[0] is None:
        return f"dns:///{address}", local
    listed = ",".join(part[0] for part in parts if part is not None)
    return f"ipv{addresses[0].version}:{listed}", local


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _credentials(files: "dict[str, str | os.PathLike[str] | None]") -> grpc.ChannelCredentials:
    pem: dict[str, bytes | None] = {}
    for name, path in files.items():
        try:
            pem[name] = None if path is None else Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"{name} {str(path)!r} cannot be read: {error.strerror}") from error
    if (pem["certificate_file"] is None) != (pem["key_file"] is None):
        raise InvalidRequestError("a client's certificate needs both certificate_file and key_file")
    # gRPC reports an invalid certificate file only when it connects, and does not name the file.
    checker = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if pem["ca_file"] is not None:
            checker.load_verify_locations(cadata=pem["ca_file"].decode("latin-1"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequestError(f"ca_file {str(files['ca_file'])!r} holds no certificates in PEM") from error
    try:
        if (certificate_file := files["certificate_file"]) is not None:
            checker.load_cert_chain(certificate_file, files["key_file"], password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequestError(
            "certificate_file and key_file must be a certificate and its key, in PEM and not encrypted"
        ) from error
    return grpc.ssl_channel_credentials(pem["ca_file"], pem["key_file"], pem["certificate_file"])
