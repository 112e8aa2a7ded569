"""Runs code of the project that a generator comes from: finds a class in it, and builds the network."""

import ast
import contextlib
import importlib
import json
import logging
import operator
import shlex
import symtable
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError, one_line

_DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@contextlib.contextmanager
def in_project(*folders: Path) -> Iterator[None]:
    """Let Python find the modules of some folders, and keep what they build on the CPU."""
    sys.path[:0] = dict.fromkeys(path for folder in folders if (path := str(folder)) not in sys.path)
    with on_cpu():
        yield


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Ignore `.cuda()`, and build no extensions of torch.

    Many projects call `.cuda()` in constructors, or build extensions for a GPU although the same module computes
    without them on the CPU. Both fail where a GPU or its compiler is missing.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing GPU
    from torch.utils import cpp_extension

    tensor_cuda, module_cuda, load = Tensor.cuda, nn.Module.cuda, cpp_extension.load
    Tensor.cuda = nn.Module.cuda = _unchanged  # type: ignore[method-assign, assignment]
    cpp_extension.load = _Missing
    try:
        yield
    finally:
        Tensor.cuda, nn.Module.cuda, cpp_extension.load = tensor_cuda, module_cuda, load  # type: ignore[method-assign]


class _Missing:
    """Stands for an extension that is not built; what uses it fails."""

    def __init__(self, *_: object, **__: object) -> None:
        """Take the arguments of the build."""


def _unchanged(value: Any, *_: object, **__: object) -> Any:
    return value


def build_module(place: str, arguments: Mapping[str, Any], script_arguments: str = "") -> nn.Module:
    """Call a class or a function that returns a module.

    Args:
        place: `module:Class`, with the name or the file of a Python module; a file may be a script that trains.
        arguments: keyword arguments of the call.
        script_arguments: of the command line of a script, which may decide how the class builds its layers.

    Raises:
        TrainerError: there is no such class, or the call fails.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name:
        raise TrainerError(f"--module is {place!r}; it must be MODULE:CLASS, such as networks.dcgan:Generator")
    before = sys.argv
    sys.argv = [module_name, *shlex.split(script_arguments)]
    file = Path(module_name).resolve() if module_name.endswith(".py") else None
    folders = [Path.cwd()]
    if file is not None:
        root = file.parent
        while (root / "__init__.py").exists() and root != root.parent:
            root = root.parent
        folders = [root, *folders, file.parent]
        module_name = ".".join(file.relative_to(root).with_suffix("").parts)
    try:
        with in_project(*folders), contextlib.redirect_stdout(sys.stderr):  # many print what they build
            if file is not None and any(map(_trains, (tree := ast.parse(file.read_text("utf-8"), str(file))).body)):
                found = _run_needed(tree, name.partition(".")[0], file, module_name)
            else:
                found = _imported(module_name)
            module = operator.attrgetter(name)(found)(**arguments)
    except SystemExit as error:
        raise TrainerError(
            f"--module {place} ends the program with status {error.code}, as a script does whose arguments are wrong; "
            "add --script-arguments, those of the training"
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise TrainerError(
            f"--module {place} with --arguments {json.dumps(arguments)} fails: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    finally:
        sys.argv = before
    if not isinstance(module, nn.Module):
        raise TrainerError(f"--module {place} makes a {type(module).__name__}; it must make a torch.nn.Module")
    return module


def _imported(name: str) -> types.ModuleType:
    """Import a module; one that demands a GPU is told that there is one, for its network computes without."""
    try:
        return importlib.import_module(name)
    except AssertionError:
        available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            return importlib.import_module(name)
        finally:
            torch.cuda.is_available = available


def _run_needed(tree: ast.Module, name: str, file: Path, module_name: str) -> types.ModuleType:
    """Run what the definition of a name in a script needs."""
    module = types.ModuleType(module_name)
    module.__file__, module.__package__ = str(file), module_name.rpartition(".")[0]
    sys.modules[module_name] = module
    tree.body = _needed(tree.body, name)
    exec(compile(tree, str(file), "exec"), vars(module))
    return module


def _trains(statement: ast.stmt) -> bool:
    """Return whether a statement is one of a script: a loop, or reading the command line."""
    if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
        return False
    return isinstance(statement, ast.For | ast.While) or (
        not isinstance(statement, ast.FunctionDef | ast.ClassDef) and "ArgumentParser(" in ast.unparse(statement)
    )


def _needed(statements: list[ast.stmt], name: str) -> list[ast.stmt]:
    """Return the statements that define a name, and what its code refers to.

    Those after the definition count only if they define something without a call.
    """
    places = [index for index, each in enumerate(statements) if getattr(each, "name", None) == name]
    last = places[-1] if places else len(statements)
    candidates = [each for index, each in enumerate(statements) if index <= last or _defines(each)]
    changed = {id(each): _names_changed(each) for each in candidates}
    wanted, kept, before = {name, "sys", "*"}, set[int](), -1
    while len(kept) > before:
        before = len(kept)
        for each in candidates:
            if id(each) not in kept and changed[id(each)] & wanted:
                kept.add(id(each))
                wanted |= _names_read(each)
    return [each for each in candidates if id(each) in kept]


def _defines(statement: ast.stmt) -> bool:
    without_call = not any(isinstance(each, ast.Call) for each in ast.walk(statement))
    return isinstance(statement, _DEFINITIONS) or (isinstance(statement, ast.Assign | ast.AnnAssign) and without_call)


def _names_changed(statement: ast.stmt) -> set[str]:
    """Return the names that a statement defines, or whose objects it changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    names = set()
    for each in ast.walk(statement):
        if isinstance(each, ast.alias):
            names.add((each.asname or each.name).partition(".")[0])
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            names.add(each.id)
        elif isinstance(each, ast.FunctionDef | ast.ClassDef):
            names.add(each.name)
        elif isinstance(each, ast.Expr) and isinstance(each.value, ast.Call):
            names.add(_root(each.value.func))
        elif isinstance(each, ast.Attribute | ast.Subscript) and isinstance(each.ctx, ast.Store):
            names.add(_root(each))
    return names


def _root(expression: ast.expr) -> str:
    """Return the name that an expression begins with, as `parser` in parser.add_argument."""
    while isinstance(expression, ast.Attribute | ast.Subscript | ast.Call):
        expression = expression.func if isinstance(expression, ast.Call) else expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


def _names_read(statement: ast.stmt) -> set[str]:
    """Return the names of a module that a statement, or what it defines, refers to."""
    tables = [symtable.symtable(ast.unparse(statement), "script", "exec")]
    names: set[str] = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        outermost = table.get_type() == "module"
        names |= {
            each.get_name() for each in table.get_symbols() if each.is_global() or (outermost and each.is_referenced())
        }
    return names
