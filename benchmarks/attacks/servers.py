"""The attacked servers, each started for one attack."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from benchmarks.running import Running, serving

from ganserve_server.settings import ServerSettings


@dataclass(frozen=True)
class Certificate:
    authority: Path
    chain: Path
    key: Path


def certificate(folder: Path) -> Certificate:
    """Issue a certificate for 127.0.0.1."""
    authority, files = trustme.CA(), Certificate(folder / "ca.pem", folder / "chain.pem", folder / "key.pem")
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files.authority)
    files.chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(files.key)
    return files


Start = Callable[[Certificate | None], AbstractContextManager[Running]]


def _own(*flags: str) -> Start:
    def start(tls: Certificate | None) -> AbstractContextManager[Running]:
        files = (f"--tls-certificate-file={tls.chain}", f"--tls-key-file={tls.key}") if tls else ()
        return serving("--workers=1", *flags, *files)

    return start


@contextmanager
def _aio(tls: Certificate | None) -> Iterator[Running]:
    command = [sys.executable, "-m", "benchmarks.attacks.aio_server", *((tls.chain, tls.key) if tls else ())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield Running(process, f"127.0.0.1:{int(process.stdout.readline())}", "")
        finally:
            process.kill()


OWN = "ganserve"
SERVERS: dict[str, Start] = {OWN: _own(), "grpc.aio": _aio}
if "transport" in ServerSettings.model_fields:
    SERVERS["ganserve, grpcio"] = _own("--transport=grpcio")
