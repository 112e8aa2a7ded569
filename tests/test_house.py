"""What the house promises: fresh stubs, packages that keep apart, pages that list every setting, metric and path."""

import ast
import dataclasses
import graphlib
import importlib.metadata
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import Metric

import ganserve
from ganserve_server.observe.metrics import Load, Metrics, Standstills
from ganserve_server.settings import BUNDLED_MODELS, ENVIRONMENT_PREFIX, ServerSettings
from ganserve_trainer.settings import Settings

ROOT = Path(__file__).parent.parent


def test_the_committed_stubs_are_what_the_proto_generates(tmp_path: Path) -> None:
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs]
    subprocess.run([*command, "ganserve/v1/generation.proto", "ganserve/v1/administration.proto"], check=True)
    for generated in (tmp_path / "ganserve" / "v1").iterdir():
        committed = ROOT / "client" / "ganserve" / "v1" / generated.name
        assert committed.read_text() == generated.read_text(), f"{generated.name} is stale: run `make stubs`"


def test_the_committed_messages_of_the_inference_protocol_are_what_its_proto_says(tmp_path: Path) -> None:
    (tmp_path / "inference").mkdir()
    outputs = [f"--pyi_out={tmp_path}", f"--descriptor_set_out={tmp_path / 'inference' / 'grpc_service.binpb'}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs]
    subprocess.run([*command, "inference/grpc_service.proto"], check=True)
    for name in ("grpc_service.binpb", "grpc_service_pb2.pyi"):
        committed = ROOT / "server" / "ganserve_server" / "inference" / name
        assert committed.read_bytes() == (tmp_path / "inference" / name).read_bytes(), f"{name} is stale: `make stubs`"


def test_the_proto_passes_buf_lint() -> None:
    subprocess.run([Path(sys.executable).with_name("buf"), "lint"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("client/ganserve", {"ganserve_server", "ganserve_trainer"}),
        ("server/ganserve_server", {"ganserve_trainer", "torch"}),
        ("trainer/ganserve_trainer", {"ganserve_server"}),
    ],
)
def test_rooms_import_only_what_they_may(room: str, forbidden: set[str]) -> None:
    modules = list((ROOT / room).rglob("*.py"))
    assert modules
    for path in modules:
        for name in _imported(path):
            assert name.split(".")[0] not in forbidden, f"{path} imports {name}"
            if "client" not in room and name.split(".")[0] == "ganserve":
                shared = ("ganserve.v1", "ganserve._formats", "ganserve._cards", "ganserve._distributions")
                assert name.startswith(shared), f"{path} imports {name}"


def _imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def test_the_sdk_s_public_modules_are_those_that_users_import() -> None:
    modules = {module.name for module in pkgutil.iter_modules(ganserve.__path__)}
    assert {name for name in modules if not name.startswith("_")} == {"errors", "images", "models", "provenance", "v1"}


def test_no_public_name_of_the_sdk_hides_a_module() -> None:
    """`import ganserve.latents as m` once gave the function `latents`."""
    modules = {module.name for module in pkgutil.iter_modules(ganserve.__path__)}
    assert not modules & set(ganserve.__all__)


def test_the_sdk_is_imported_only_when_it_is_used() -> None:
    """The server imports ganserve.v1, and starts a tenth of a second sooner without the SDK's libraries."""
    code = (
        "import sys, ganserve.v1.generation_pb2, ganserve._cards\n"
        "assert not {'grpc', 'ganserve._client'} & set(sys.modules)\n"
        "assert ganserve.errors.GanserveError is ganserve.GanserveError\n"
        "assert all(getattr(ganserve, name) for name in ganserve.__all__)\n"
        "assert {'Client', 'latents'} < set(dir(ganserve)) and not hasattr(ganserve, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_module_of_the_sdk_knows_the_messages() -> None:
    modules = (path for path in (ROOT / "client" / "ganserve").rglob("*.py") if path.parent.name != "v1")
    knows = [path.name for path in modules if any(re.search(r"\.v1\b", name) for name in _imported(path))]
    assert knows == ["_messages.py"]


# What each package and top module of the server may import of the others, from the ground up. The docstring of each
# package says why.
_MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "start_errors": set(),
    "spelling": set(),
    "machine": set(),
    "inference": set(),
    "shared": set(),
    "transport": {"errors", "start_errors", "machine", "shared"},
    "settings": {"start_errors", "spelling", "transport"},
    "compute": {"machine", "settings"},
    "observe": {"errors", "machine", "settings", "transport"},
    "auth": {"errors", "start_errors", "spelling", "shared", "transport", "settings", "observe"},
    "queueing": {"errors", "shared", "compute", "observe"},
    "repository": {
        *("errors", "start_errors", "spelling", "machine", "shared", "settings", "compute", "observe", "queueing"),
    },
    "services": {
        *("errors", "machine", "inference", "transport", "settings", "compute", "observe", "queueing", "repository"),
    },
    "processes": {
        *("start_errors", "machine", "inference", "shared", "transport", "settings", "compute", "observe"),
        *("auth", "repository", "services"),
    },
    "cli": {
        *("start_errors", "machine", "shared", "transport", "settings", "compute", "auth", "repository", "services"),
        "processes",
    },
    "__main__": {"cli"},
}
# What other packages may import of the transport: `new_server`, which is in __init__, and these.
_TRANSPORT_DOORS = {"", "interface", "addresses", "credentials", "limits"}
_BEHIND_THE_DOORS = {
    ("cli.bounds", "transport.http2"),  # prints its limits
    ("services.health", "transport.answering"),  # ends calls with statuses of its own
}


def _server_imports() -> dict[str, set[str]]:
    """Return the modules of the server, each with those that it imports at any place, also for types only."""
    root = ROOT / "server" / "ganserve_server"
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in root.rglob("*.py")
    }
    imports: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, _, inner = name.partition(".")
                if package == "ganserve_server":
                    imports[module].add(inner if inner in files else inner.rpartition(".")[0])
    return imports


def test_the_packages_of_the_server_import_only_what_they_may() -> None:
    modules = _server_imports()
    assert {module.partition(".")[0] for module in modules if module} == set(_MAY_IMPORT), "a package lacks a rule"
    tuple(graphlib.TopologicalSorter(_MAY_IMPORT).static_order())  # raises CycleError
    used: dict[str, set[str]] = {package: set() for package in _MAY_IMPORT}
    for module, imported in modules.items():
        package = module.partition(".")[0]
        for other in imported:
            part, _, inner = other.partition(".")
            if part != package:
                assert part in _MAY_IMPORT[package], f"{module} imports {other}"
                used[package].add(part)
                if part == "transport" and inner not in _TRANSPORT_DOORS:
                    assert (module, other) in _BEHIND_THE_DOORS, f"{module} imports {other}, which is not public"
    assert used == _MAY_IMPORT, "a rule allows more than is needed"


def test_the_modules_of_the_server_import_each_other_in_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(_server_imports()).static_order())  # raises CycleError


def test_every_package_of_the_server_says_what_it_is_for() -> None:
    for path in (ROOT / "server" / "ganserve_server").glob("*/__init__.py"):
        if path.parent.name != "inference":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_importing_the_sdk_loads_nothing_heavy() -> None:
    code = "import sys, ganserve; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ganserve" in loaded
    heavy = {"torch", "torchvision", "onnx", "onnxruntime", "matplotlib", "PIL", "typer", "ganserve_server"}
    assert not heavy & set(loaded)


def test_the_command_line_of_the_server_loads_nothing_heavy_before_it_needs_it() -> None:
    """`--help` answers at once, and `admin` sets GRPC_VERBOSITY before grpc reads it."""
    code = "import sys, ganserve_server.cli.main; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not {"grpc", "google", "onnx", "onnxruntime", "numpy", "PIL", "prometheus_client"} & set(loaded)


@pytest.mark.parametrize("program", ["ganserve", "ganserve-server", "ganserve-trainer"])
def test_each_program_prints_its_version(program: str) -> None:
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{program} {importlib.metadata.version('ganserve')}\n"), done.stderr


def test_the_base_install_asks_for_neither_torch_nor_onnxruntime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith(("torch", "onnx"))]


@pytest.mark.parametrize("module", ["ganserve_server", "ganserve_trainer"])
def test_onnxruntime_is_told_not_to_report_its_use(module: str) -> None:
    code = f"import os, {module}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "1\n"


def test_the_reference_lists_every_setting_and_metric() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    rows = []
    for name, field in ServerSettings.model_fields.items():
        told = "the bundled models" if field.default == BUNDLED_MODELS else f"`{field.default}`"
        default = f" {told} " if field.default != "" else " "
        flag, variable = name.replace("_", "-"), (ENVIRONMENT_PREFIX + name).upper()
        rows.append(f"| `--{flag}` | `{variable}` |{default}| {field.description} |\n")
    assert "".join(rows) in page, "the table in docs/reference/settings.md should be:\n" + "".join(rows)
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    read = (Load(lambda: (0, 0)), Standstills(lambda: 0.0))
    every = itertools.chain(Metrics().registry.collect(), *(each.collect() for each in read))
    own: list[Metric] = [metric for metric in every if metric.name.startswith("ganserve_")]
    assert len(own) > 5
    for metric in own:
        suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
        assert f"`{metric.name}{suffix}`" in page
        assert metric.documentation.rstrip(".") in page, f"docs/reference/metrics.md describes {metric.name} otherwise"


def test_the_reference_has_a_row_for_every_setting_of_the_trainer() -> None:
    page = (ROOT / "docs" / "reference" / "trainer-settings.md").read_text()
    for field in dataclasses.fields(Settings):
        if field.name != "preset":
            default = "none" if field.default in (None, "") else str(field.default)
            row = f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']} |"
            assert row in page, f"docs/reference/trainer-settings.md lacks: {row}"


def _without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _without_code(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            wanted = page.parent / file if file else page
            assert wanted.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(wanted), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    named = set(re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    for page in PAGES:
        inside = page.is_relative_to(ROOT / "docs")
        name = str(page.relative_to(ROOT / "docs")) if inside else f"repository/{page.name}"
        assert ("index.md" if page.name == "README.md" and not inside else name) in named


def test_the_readme_leads_to_every_page_and_is_short() -> None:
    """The pages of one kind, such as the decision records, have a page that lists them."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1200
    linked = set(re.findall(r"\]\(([^)#]+)", _without_code(ROOT / "README.md")))
    for page in PAGES:
        if page.name != "README.md" and page.parent.name not in ("adr", "api", "operations"):
            assert str(page.relative_to(ROOT)) in linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_paths_that_a_page_names_exist(page: Path) -> None:
    rooms = "client|server|trainer|proto|tests|benchmarks|deploy|examples|docs|requirements|.ci"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def _third_party_imports(root: Path) -> set[str]:
    names = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("ganserve")}


def _canonical(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize(
    ("room", "extras"),
    [
        ("client", ("playground",)),
        ("server", ("server", "tracing")),
        ("trainer", ("trainer", "features", "parquet", "search", "wandb", "mlflow")),
    ],
)
def test_a_room_imports_nothing_but_what_its_extras_name(room: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    wanted = {_canonical(requirement) for requirement in named}
    owners = importlib.metadata.packages_distributions()
    for name in _third_party_imports(ROOT / room):
        # What is not installed here is taken for a package of its module's name, as gradio is.
        owned = {_canonical(owner) for owner in owners.get(name, [name])} | (
            {"mlflow-skinny"} if name == "mlflow" else set()
        )
        assert wanted & owned, f"{room} imports {name}, which no one installs"
