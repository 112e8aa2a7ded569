"""A server for a benchmark, and what it uses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    process: "subprocess.Popen[str]"
    address: str
    metrics_address: str

    def resident_mib(self) -> float:
        """Memory of the server and its workers."""
        return sum(_resident_kib(pid) for pid in self.pids()) / 1024

    def pids(self) -> list[int]:
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def _resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


@contextmanager
def serving(*flags: str) -> Iterator[Running]:
    """Start a server on free ports; end it, and see that it ends with status 0."""
    program = Path(sys.executable).with_name("ganserve-server")
    command = [program, "--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json"]
    with subprocess.Popen([*command, "--access-log=off", *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            told = json.loads(process.stderr.readline())
            if told["event"] != "serving":
                sys.exit(f"the server says: {told}")
            yield Running(process, told["address"], told["metrics_address"])
            process.terminate()
            if status := process.wait(60):
                sys.exit(f"the server ended with status {status}")
        finally:
            process.kill()
