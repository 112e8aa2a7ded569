"""What the images install is what pyproject.toml asks for, by hash."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MACHINE = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}


def _pins(lock: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / lock).read_text().replace("\\\n", " ").splitlines()
    pins = {}
    for line in lines:
        if line and not line.lstrip().startswith("#"):
            pin, *hashes = line.split("--hash=sha256:")
            assert hashes, f"{pin} has no hash"
            requirement = Requirement(pin)
            if requirement.marker is None or requirement.marker.evaluate({**MACHINE, "python_full_version": "3.11.0"}):
                pins[requirement.name] = requirement
    return pins


def _required(extras: tuple[str, ...]) -> Iterator[Requirement]:
    project = PROJECT["project"]
    for text in [
        *project["dependencies"],
        *(text for extra in extras for text in project["optional-dependencies"][extra]),
    ]:
        requirement = Requirement(text)
        if requirement.name == "ganserve":
            yield from _required(tuple(requirement.extras))
        elif requirement.marker is None or requirement.marker.evaluate(MACHINE):
            yield requirement


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("server.lock", ("server", "tracing")),
        ("gpu.lock", ("gpu", "tracing")),
        ("trainer.lock", ("trainer",)),
    ],
)
def test_a_lock_has_what_its_extras_ask_for(lock: str, extras: tuple[str, ...]) -> None:
    pins = _pins(lock)
    for requirement in [*_required(extras), Requirement("dumb-init")]:
        name = "onnxruntime" if (lock, requirement.name) == ("server.lock", "onnxruntime-gpu") else requirement.name
        assert name in pins, f"{lock} lacks {name}: run `make locks`"
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{lock} has {pins[name]}, not {requirement}: `make locks`"


def test_the_lock_of_the_build_has_what_the_project_is_built_with() -> None:
    pins = _pins("build.lock")
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        (pin,) = pins[requirement.name].specifier
        assert requirement.specifier.contains(pin.version)


def test_the_server_has_neither_torch_nor_cuda() -> None:
    assert not [name for name in _pins("server.lock") if re.match("torch|nvidia|onnxruntime-gpu", name)]


def test_the_locks_name_no_registry() -> None:
    locks = list((ROOT / "requirements").glob("*.lock"))
    assert len(locks) == 4
    for lock in locks:
        assert "://" not in lock.read_text()
