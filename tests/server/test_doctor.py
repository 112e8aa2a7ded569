import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.programs import run

from ganserve_server import machine
from ganserve_server.compute import cuda


def doctor(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run("ganserve-server", *arguments)


def test_the_doctor_says_what_runs_and_what_is_missing() -> None:
    done = doctor("doctor", "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    assert "provider     cpu runs on CPU\n" in done.stdout
    assert "libcublasLt.so" in done.stdout
    assert re.search(r"libnvinfer\.so\.\d+ \(TensorRT\)\n", done.stdout)
    assert f"{machine.cores().usable} threads" in done.stdout
    assert "3 threads" in doctor("--threads", "3", "doctor", "--provider", "cpu").stdout
    wrong = doctor("doctor", "--provider", "tpu")
    assert wrong.returncode == 2
    assert "auto, cuda, tensorrt or cpu" in wrong.stderr


def test_the_doctor_fails_where_cuda_is_asked_for_and_does_not_run() -> None:
    cuda.load_cuda_libraries()
    ready = cuda.nvidia_driver() and not any(cuda.cuda_libraries().values())
    for arguments in (["doctor", "--provider", "cuda"], ["--provider", "cuda", "doctor"]):
        done = doctor(*arguments)
        assert done.returncode == (0 if ready else 1)
        assert ("cuda runs on CUDA" if ready else cuda.why_no_cuda()) in done.stdout
    assert ("auto runs on CUDA" if ready else f"auto runs on CPU: {cuda.why_no_cuda()}") in doctor("doctor").stdout


def test_why_cuda_does_not_run_is_told_in_the_order_of_the_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str | None] = {}
    monkeypatch.setattr(cuda, "cuda_libraries", lambda: found)
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: True)
    assert "no CUDA provider (install onnxruntime-gpu)" in cuda.why_no_cuda()
    found |= {"libcublas.so.13": None, "libcurand.so.10": "cannot open"}
    assert cuda.why_no_cuda().startswith("libcurand.so.10 cannot be loaded (install ganserve[gpu]")
    found["libcurand.so.10"] = None
    assert "its own messages say why" in cuda.why_no_cuda()


def test_why_tensorrt_does_not_run_names_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str | None] = {}
    monkeypatch.setattr(cuda, "tensorrt_libraries", lambda: found)
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: True)
    assert "no TensorRT provider" in cuda.why_no_tensorrt()
    found |= {"libcudart.so.13": None, "libnvinfer.so.10": "cannot open"}
    assert cuda.why_no_tensorrt().startswith("libnvinfer.so.10 cannot be loaded (install TensorRT")
    found["libnvinfer.so.10"] = None
    assert "its own messages say why" in cuda.why_no_tensorrt()
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: False)
    assert "no NVIDIA driver" in cuda.why_no_tensorrt()


def test_needed_libraries_are_read_from_the_file_as_the_linker_reads_them() -> None:
    from ctypes.util import find_library

    library = Path(cuda._CUDA_PROVIDER)
    if library.is_file():
        assert "libcuda.so.1" in cuda._needed(library)
    python = Path(sys.executable).resolve()
    assert find_library("c") in cuda._needed(python)


@pytest.mark.parametrize(
    ("content", "quota", "usable"), [("max 100000", None, 2), ("150000 100000", 1.5, 2), ("50000 100000", 0.5, 1)]
)
def test_threads_follow_the_quota_of_the_cgroup(
    content: str, quota: float | None, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, {"cpu.max": content, "memory.max": "max" if quota is None else "1048576"}, "0::/\n", monkeypatch)
    assert machine.cores().quota == quota
    assert machine.cores().usable == usable
    assert machine.memory_limit() == (None if quota is None else 1 << 20)


def test_limits_of_the_groups_above_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "system.slice/cpu.max": "120000 100000",
        "system.slice/memory.max": "3000000",
        "system.slice/ganserve.service/cpu.max": "max 100000",
        "system.slice/ganserve.service/memory.max": "2000000",
        "other.slice/cpu.max": "10000 100000",
        "other.slice/memory.max": "1000",
    }
    lay_out(tmp_path, files, "0::/system.slice/ganserve.service\n", monkeypatch)
    assert machine.cores().quota == 1.2
    assert machine.memory_limit() == 2_000_000


@pytest.mark.parametrize("inside", ["/docker/1a2b", "/"])  # as the host names it, and as the container does
def test_limits_are_read_from_cgroups_of_version_1(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    own = f"4:memory:{inside}\n2:cpu,cpuacct:{inside}\n0::/\n"
    lay_out(tmp_path, files, own, monkeypatch)
    assert machine.cores().quota is None
    assert machine.memory_limit() is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1048576\n")
    assert machine.cores().quota == 1.5
    assert machine.memory_limit() == 1 << 20


def lay_out(root: Path, files: dict[str, str], own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine's cgroups, and one of them this process's."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "own").write_text(own)
    monkeypatch.setattr(machine, "_CGROUPS", root)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", root / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1})
