"""`ganserve-server config --check`: whether a server could start with its settings, and callers reach it."""

import asyncio
import contextlib
import errno
import itertools
from collections.abc import Iterator

from ganserve_server.auth.security import certificates_of, tokens_of
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.scan import MODEL_FILE_NAME, find_versions, look, require_models
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.addresses import bind, places


def problems_of(settings: ServerSettings) -> list[str]:
    """Do what a server does when it starts, up to listening; return the problems.

    Models are checked on the CPU, one after the other, in one thread and with a low priority, because a server may be
    running.
    """
    found: list[str] = []

    @contextlib.contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except StartError as error:
            found.append(str(error))

    with collecting():
        require_models(settings.models)
        found += _rejected(settings)
    with collecting():
        certificates = certificates_of(settings, None)
        files = {"server": settings.tls_certificate_file, "client_ca": settings.tls_client_ca_file}
        for kind, end in (certificates.expired if certificates else {}).items():
            found.append(f"a certificate in {files[kind]} expired on {end:%Y-%m-%d at %H:%M} UTC")
    with collecting():
        tokens_of(settings, None, SharedRates())
    addresses = {
        "--address": settings.address,
        "--metrics-address": settings.metrics_address,
        "--admin-address": settings.admin_address,
    }
    sound: dict[str, set[tuple[str, int]]] = {}
    for flag, address in addresses.items():
        if address != "off" or flag == "--address":
            with collecting():
                _try(address, flag)
                sound[flag] = {place[:2] for _, place in places(address, flag)}
    for one, other in itertools.combinations(sound, 2):
        if any(_overlap(*pair) for pair in itertools.product(sound[one], sound[other])):
            found.append(f"{one} {addresses[one]} and {other} {addresses[other]} overlap")
    return found


def _rejected(settings: ServerSettings) -> Iterator[str]:
    """Yield a line for each file that a server would not serve, with the reason."""
    seen = look(settings.models)
    for path, reason in seen.misplaced.items():
        yield f"{path} would be rejected: {reason}"
    for path, reason in seen.unreadable_paths.items():
        if path.name != MODEL_FILE_NAME:  # loading a file reports that
            yield f"{path} cannot be read: {reason}"
    prober, versions = Prober(settings.model_copy(update={"threads": 1})), find_versions(settings.models)
    with asyncio.Runner() as runner:
        for _, of_model in itertools.groupby(versions, key=lambda version: version[0]):
            served = 0
            for _, _, path in reversed(list(of_model)):
                if served == settings.most_versions:
                    break
                probed = runner.run(prober.probe(path, gently=True))
                if probed.outcome == "passed":
                    served += 1
                else:
                    yield f"{path} would be rejected: {probed.reason}"
        runner.run(prober.close())


def _try(address: str, flag: str) -> None:
    """Bind an address, unless it is in use, probably by a server that runs with these settings."""
    try:
        for bound in bind(address, flag):
            bound.close()
    except StartError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE):
            raise


def _overlap(one: tuple[str, int], other: tuple[str, int]) -> bool:
    (host, port), (other_host, other_port) = one, other
    hosts = {host, other_host}
    of_all = "::" in hosts or ("0.0.0.0" in hosts and not any(":" in each for each in hosts))
    return port == other_port != 0 and (host == other_host or of_all)
