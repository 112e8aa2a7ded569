"""A server for a benchmark, its resource use, and calls from a C program (h2load), which does not limit the server."""

import json
import re
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ganserve.v1 import generation_pb2 as pb

_PATH = "/ganserve.v1.GenerationService/GenerateImages"


@dataclass(frozen=True)
class Running:
    process: "subprocess.Popen[str]"
    address: str
    metrics_address: str

    def resident_mib(self) -> float:
        """Return the resident memory of the server and its workers, in MiB."""
        return sum(_resident_kib(pid) for pid in self.pids()) / 1024

    def pids(self) -> list[int]:
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def _resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


@contextmanager
def serving(*flags: str) -> Iterator[Running]:
    """Start a server on free ports; end it, and check that it ends with status 0."""
    program = Path(sys.executable).with_name("ganserve-server")
    command = [program, "--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json"]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        log = process.stderr
        assert log is not None
        try:
            lines = []
            while (told := json.loads(log.readline() or "{}")).get("event") != "serving":
                lines.append(told)
                if not told:
                    sys.exit(f"the server says: {lines}")
            threading.Thread(target=lambda: deque(log, maxlen=0), daemon=True).start()  # a full pipe would stop it
            yield Running(process, told["address"], told["metrics_address"])
            process.terminate()
            if status := process.wait(60):
                sys.exit(f"the server ended with status {status}")
        finally:
            process.kill()


def h2load(
    address: str,
    model: str,
    *flags: str,
    count: int = 1,
    scheme: str = "http",
    encoding: pb.Encoding = pb.ENCODING_RAW,
) -> "subprocess.Popen[str]":
    """Start h2load (Debian: nghttp2-client), which calls for `count` images repeatedly."""
    request = pb.GenerateImagesRequest(model=model, count=count, seed=1, encoding=encoding)
    message = request.SerializeToString()
    with tempfile.NamedTemporaryFile(delete=False) as body:
        body.write(struct.pack(">BI", 0, len(message)) + message)
    command = ["h2load", *flags, f"--data={body.name}", "--header=content-type: application/grpc"]
    return subprocess.Popen(
        [*command, "--header=te: trailers", f"{scheme}://{address}{_PATH}"], stdout=subprocess.PIPE, text=True
    )


def counted(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """Return the number of h2load's calls that were answered, and the number that failed."""
    text = process.communicate()[0]
    found = re.search(r"requests: .*, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
    assert found, text
    return int(found[1]), int(found[2])


def metrics(running: Running) -> dict[str, float]:
    """Scrape the server; the labels are part of the names."""
    with urllib.request.urlopen(f"http://{running.metrics_address}/metrics") as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}
