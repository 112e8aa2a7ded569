"""Who may import whom in the trainer. A package may import those above it in the table that its line names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TRAINER = Path(__file__).parent.parent.parent / "trainer" / "ganserve_trainer"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "losses": set(),
    "metrics": set(),
    "model_file": set(),
    "wrap": set(),
    "weights_file": {"errors"},
    "data": {"errors", "files"},
    "settings": {"errors", "losses", "data"},
    "networks": {"errors", "wrap", "settings", "data"},
    "objectives": {"losses", "settings", "networks"},
    "report": {"errors", "files", "settings", "data"},
    "train": {"errors", "files", "metrics", "weights_file", "settings", "data", "networks", "objectives", "report"},
    "evaluation": {"errors", "files", "metrics", "model_file", "settings", "data", "networks", "report", "train"},
    "export": {"errors", "files", "model_file", "settings", "networks", "train", "evaluation"},
    "importing": {"errors", "model_file", "wrap", "weights_file", "networks", "report", "export"},
    "cli": {"errors", "wrap", "settings", "data", "report", "train", "evaluation", "export", "importing"},
    "__main__": {"cli"},
}
# These see of a data set only what its images are.
ONLY_THE_SPEC = ("networks", "report")


def imports() -> Iterator[tuple[str, str]]:
    """Give each import as the importing package and the dotted name of the imported module."""
    for path in TRAINER.rglob("*.py"):
        package = path.relative_to(TRAINER).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((package, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{path} has a relative import"
                if node.module == "ganserve_trainer":
                    yield from ((package, f"ganserve_trainer.{alias.name}") for alias in node.names)
                else:
                    yield package, node.module


def test_packages_import_only_what_they_may() -> None:
    found = [(package, name.split(".")) for package, name in imports() if name.split(".")[0] == "ganserve_trainer"]
    assert len(found) > 100
    for package, name in found:
        assert name[1] == package or name[1] in MAY_IMPORT[package], f"{package} imports {'.'.join(name)}"
        if package in ONLY_THE_SPEC and name[1] == "data":
            assert name[2] == "spec", f"{package} imports {'.'.join(name)}"


def test_the_table_has_every_package_and_no_cycle() -> None:
    there = {path.name.removesuffix(".py") for path in TRAINER.iterdir() if not path.name.startswith("__")}
    assert set(MAY_IMPORT) == there - {"py.typed"} | {"__main__"}
    above: set[str] = set()
    for package, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{package} may import what is not above it"
        above.add(package)


def test_each_package_says_what_it_is_for() -> None:
    for path in TRAINER.glob("*/__init__.py"):
        assert " import" in (ast.get_docstring(ast.parse(path.read_text())) or ""), path


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, ganserve_trainer.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ganserve_trainer" in loaded
    assert not {"torch", "torchvision", "onnx", "onnxruntime", "numpy"} & set(loaded)
