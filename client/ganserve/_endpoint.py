"""What lies between a client and its servers: addresses, credentials, and when to try again. It makes no calls.

Addresses. HOST:PORT is asked of DNS, and the calls go to all addresses that it knows in turn (round robin), so that a
headless service of Kubernetes needs no proxy. gRPC asks DNS again when a connection ends, at most every 5 s: replicas
that are added get calls from then on, and none while all the old ones stay.

Retries. Only what is safe and may help: UNAVAILABLE, and RESOURCE_EXHAUSTED where the server says when to come back.
Every call of the SDK may be repeated: images are functions of their seeds, and where the server draws the seed any
answer is right. What bounds the retries: the call's deadline; a patience, short with an address that never answered;
and a budget of the client, so that retries never make a server's overload much worse.

What is waited for is told to the logger `ganserve`: in level INFO at first, and then ever more seldom; in DEBUG each
try.
"""

import ipaddress
import json
import logging
import os
import random
import re
import ssl
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from ganserve.errors import (
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

DEFAULT_ADDRESS = "127.0.0.1:50051"
# The server's largest answer has 256 MiB of pixels; the rest is for seeds and labels.
MAX_ANSWER_BYTES = (256 + 16) << 20
KEEPALIVE_S = 60.0  # below what load balancers allow an idle connection (AWS 350 s, Azure 240 s)
# Also how long sent bytes may be without TCP's acknowledgement: then the connection is given up, and its calls are made
# again elsewhere. With gRPC's 20 s, a replica whose host is gone held up each of its calls for as long.
KEEPALIVE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
DNS_MIN_INTERVAL_S = 5.0

_SCHEMES = ("dns:///", "dns://", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:///")
HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%a-z]+\]|[^\s:/,\[\]]+):(\d{1,5})")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 2.0
_PATIENCE_S = 60.0  # with servers that do not answer any more
_PATIENCE_WITH_STRANGERS_S = 3.0  # an address that never answered is most likely a wrong one
_BUDGET = 1000.0  # retries: the calls on a lost connection all fail at once, 500 of 200 a second to two replicas
_BUDGET_A_SECOND = 10.0
_BUDGET_A_CALL = 0.2

_TELL_AGAIN_S = 5.0  # of waiting; then whenever that has doubled

_LEAST_TRY_S = 0.1  # one with less would most likely only say that it had no time, and not what is wrong

_log = logging.getLogger("ganserve")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the servers are, and how to speak to them."""

    address: str
    target: str  # the address as gRPC spells it
    credentials: grpc.ChannelCredentials | None = field(repr=False)  # None: plain text
    metadata: tuple[tuple[str, str], ...] | None = field(repr=False)  # of every call: the token
    authority: str | None = None  # who a certificate must be for, if not for the target's host

    def alone(self, target: str) -> "Endpoint":
        """Return the way to one of the addresses; its certificate must still be for the name they have in common."""
        scheme, _, address = target.partition(":")
        if scheme.startswith("unix"):
            return replace(self, target=target)
        authority = self.target.partition(":")[2].lstrip("/").partition(",")[0]
        return replace(self, address=address, target=target, authority=authority)

    def options(self) -> list[tuple[str, str | int]]:
        """Return the arguments of a channel."""
        # Of several addresses, the certificate of each must be for the first: gRPC would want one for the whole list.
        authority = self.authority or (self.address.partition(",")[0].strip() if "," in self.address else None)
        return [
            *([] if authority is None else [("grpc.default_authority", authority)]),
            ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
            ("grpc.dns_min_time_between_resolutions_ms", round(DNS_MIN_INTERVAL_S * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Not what it is called: how long making a connection may take. gRPC's 20 s would outlive the client, too.
            ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # ganserve-server answers any number of PINGs. One that does not says so, and gRPC slows down by itself.
            ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", -1),  # the server says what it takes
            # A client's connections are its own: to a server, which takes connections in turn, two clients are two
            # callers; a connection ends with its client; and a new client need not wait where another has just failed.
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
    """Read arguments, and the environment for those that are None.

    Raises:
        InvalidRequestError: one makes no sense, a file cannot be read, or a token would be sent in plain text.
    """
    address = address or os.environ.get("GANSERVE_ADDRESS") or DEFAULT_ADDRESS
    token = token or os.environ.get("GANSERVE_TOKEN") or None
    target, local = _target(address)
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
        # The text must not repeat it.
        raise InvalidRequestError("token has characters that no header can hold: blanks around it, or not ASCII")
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


def _target(address: str) -> tuple[str, bool]:
    """Return gRPC's name of an address, and whether it is on this machine."""
    if not isinstance(address, str):
        raise InvalidRequestError(f"address is {address!r}; it must be HOST:PORT, such as {DEFAULT_ADDRESS}")
    if address.startswith(_SCHEMES):
        return address, address.startswith("unix")
    parts = [HOST_PORT.fullmatch(part.strip()) for part in address.split(",")]
    pairs = [(part[1].strip("[]"), int(part[2])) for part in parts if part is not None]
    if len(pairs) < len(parts) or not all(0 < port < 1 << 16 for _, port in pairs):
        raise InvalidRequestError(
            f"address is {address!r}; it must be HOST:PORT, such as {DEFAULT_ADDRESS}, or several IP:PORT with commas"
        )
    addresses = [_ip(host) for host, _ in pairs]
    versions = {None if ip is None else ip.version for ip in addresses}
    if len(pairs) > 1 and (None in versions or len(versions) > 1):
        raise InvalidRequestError(
            f"address is {address!r}; several addresses must be of IPv4 all, or of IPv6 all; a name with many needs "
            "no list"
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
    # gRPC tells of a file that is no certificate only when it connects, and not which.
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


class RetryBudget:
    """How many retries a client has left: a fifth of its calls, and ten a second for those that make few.

    As Finagle's RetryBudget (twitter.github.io/finagle/guide/Clients.html, 2017): a token bucket that calls and time
    fill, and retries empty. Without one, the clients of a server that fails would double and triple its load.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = _BUDGET
        self._filled_at = time.monotonic()

    def deposit(self) -> None:
        """Count a call. Two threads may lose one another's: it is not worth a lock."""
        self._left = min(_BUDGET, self._left + _BUDGET_A_CALL)

    def withdraw(self) -> bool:
        """Take a retry, if there is one."""
        with self._lock:
            now = time.monotonic()
            left = min(_BUDGET, self._left + _BUDGET_A_SECOND * (now - self._filled_at))
            self._filled_at = now
            self._left = left - 1 if left >= 1 else left
            return left >= 1


class RetryPolicy:
    """A client's: its budget, and whether its servers have ever answered."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.budget = RetryBudget()
        self.answered = False

    def succeeded(self) -> None:
        """Count a call that was answered."""
        self.answered = True
        self.budget.deposit()

    def after_fork(self) -> None:
        """Replace what another thread of the parent may have held."""
        self.budget = RetryBudget()


class Attempts:
    """The failures in a row of what one caller asks for. `policy` is the client's."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._since = 0.0  # the first of them
        self._last = ""  # what was wrong then
        self._log = WaitLog()

    def delay_s(self, error: GanserveError, deadline: float) -> float:
        """Return how long to wait before the call is made again; raise the error if it should not be.

        The deadline is the call's, by time.monotonic.

        Full jitter, as AWS's "Exponential Backoff and Jitter" (2015) found best: from 0 to a bound that doubles. What
        a server asks for comes on top, so that those it sent away do not come back all at once. The last pause is as
        short as it must be for one more try before the end.
        """
        now = time.monotonic()
        if not self._failures:
            self._since = now
        self._failures += 1
        least_s = 0.0
        if isinstance(error, OverloadedError) and error.retry_after_s is not None:
            least_s = error.retry_after_s
        elif not isinstance(error, UnavailableError):
            if isinstance(error, DeadlineExceededError) and self._last:
                error.add_text(f", tried {self._failures} times; before that: {self._last}")
            raise error
        self._last = error.text
        if isinstance(error, OverloadedError):
            self._policy.answered = True
        patience_s = _PATIENCE_S if self._policy.answered else _PATIENCE_WITH_STRANGERS_S
        until = min(deadline, self._since + patience_s)
        longest_s = until - _LEAST_TRY_S - now
        if not self._policy.enabled or longest_s <= least_s or not self._policy.budget.withdraw():
            if self._failures > 1:
                error.add_text(f", tried {self._failures} times in {now - self._since:.1f} s")
            raise error
        delay_s = min(least_s + full_jitter_s(self._failures), longest_s)
        waiting_s = now + delay_s - self._since
        self._log.waiting(f"{error.text}; trying again for up to {until - now:.0f} s", error.reason, waiting_s)
        return delay_s

    def over(self) -> None:
        """Note that a server has answered; tell it if that was waited for."""
        self._policy.answered = True
        if self._failures:
            self._log.answered(time.monotonic() - self._since)
            self._failures, self._last = 0, ""


class WaitLog:
    """Logs a wait: each try in DEBUG, but in INFO the first for each reason, and those that keep it in sight."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._reasons: set[str] = set()
        self._again_s = _TELL_AGAIN_S

    def waiting(self, text: str, reason: str, waiting_s: float) -> None:
        """Log what is waited for; `waiting_s` is for how long by the next try."""
        level = logging.DEBUG
        if reason not in self._reasons or waiting_s >= self._again_s:
            level = logging.INFO
            self._reasons.add(reason)
            self._again_s = max(_TELL_AGAIN_S, 2 * waiting_s)
        _log.log(level, text, extra={"waiting_s": waiting_s})

    def answered(self, waited_s: float) -> None:
        """Log that the wait is over."""
        _log.info("answered after %.1f s", waited_s, extra={"waiting_s": None})
        self._begin()


def full_jitter_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    return random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures - 1, 10)))


class Readiness:
    """Waits for servers that are starting: what went wrong last, and how long it may still take."""

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout_s, self._what = timeout_s, what
        self._deadline = time.monotonic() + timeout_s
        self._tries = 0
        self._log = WaitLog()

    def remaining_s(self) -> float:
        """Return what is left of the timeout, above 0."""
        return max(0.001, self._deadline - time.monotonic())

    def delay_s(self, error: GanserveError | None) -> float:
        """Return how long to wait before asking again: no longer than leaves time for one more try.

        Raises:
            DeadlineExceededError: the time is over; the text says what went wrong last.
        """
        self._tries += 1
        left_s = self._deadline - time.monotonic()
        why = "it is there, but is not serving" if error is None else error.text
        if left_s > _LEAST_TRY_S:
            delay_s = min(full_jitter_s(self._tries), left_s - _LEAST_TRY_S)
            self._log.waiting(
                f"{self._what} is not ready: {why}; asking again for up to {left_s:.0f} s",
                "" if error is None else error.reason,
                self._timeout_s - left_s + delay_s,
            )
            return delay_s
        raise DeadlineExceededError(
            f"{self._what} was not ready within {self._timeout_s:g} s: {why}",
            advice="" if error is None else error.advice,
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
            reason="not_ready",
        ) from error

    def over(self) -> None:
        """Tell that it is ready."""
        if self._tries:
            self._log.answered(self._timeout_s - (self._deadline - time.monotonic()))


# gRPC does not survive a fork while something of the parent is inside it: the child may hang, or crash (1.85).
_inside: dict[object, None] = {}
_lost_in_fork: list[str] = []  # what was inside when this process was forked off
# Of the processes that this one was forked off: their end here would be seen on connections that are not ours.
_of_parents: list[object] = []


def enter_call(call: object) -> None:
    """Note that a call is inside gRPC: a thread's number, or a stream."""
    _inside[call] = None


def leave_call(call: object) -> None:
    """Note that it no longer is."""
    _inside.pop(call, None)


def lose_in_fork(what: str) -> None:
    """Note, in a child process, that gRPC cannot be used in it."""
    _lost_in_fork.append(what)


def lost_in_fork() -> bool:
    """Say whether gRPC cannot be used in this process, for what its parent had inside."""
    return bool(_lost_in_fork)


def leave_to_parent(mine_no_more: object) -> None:
    """Keep, in a child process, what must not end here: a channel, or a call."""
    _of_parents.append(mine_no_more)


def check_fork() -> None:
    """Raise UnavailableError if this process was forked off while calls were running."""
    if _lost_in_fork:
        raise UnavailableError(
            f"this process was forked while its parent had {_lost_in_fork[0]}, which gRPC does not survive; "
            "fork before, or use multiprocessing's 'spawn' or 'forkserver'",
            reason="forked",
        )


def _after_fork_in_child() -> None:
    if _inside:
        lose_in_fork("calls or streams running")
        _inside.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
