"""The examples in the SDK's docstrings run as they stand, on a real server at the address they name."""

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.conftest import RunningServer

import ganserve
from ganserve import (
    AsyncClient,
    Client,
    GanserveError,
    _async_client,
    _client,
    _latents,
    _replicas,
    errors,
    images,
    models,
    provenance,
)

MODULES = (
    ganserve,
    _client,
    _async_client,
    _latents,
    _replicas,
    errors,
    images,
    models,
    provenance,
)


def docstring_tests() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in MODULES for test in finder.find(module)]
    return [test for test in found if test.examples]


TESTS = docstring_tests()


def at(address: str, source: str) -> str:
    return source.replace("127.0.0.1:50051", address)


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_examples_run_and_give_what_they_say(
    test: doctest.DocTest, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asynchronous = any("await " in example.source or "async " in example.source for example in test.examples)
    names: dict[str, Any] = {
        **{name: getattr(ganserve, name) for name in ganserve.__all__},
        "np": np,
        "GanserveError": GanserveError,
    }
    if asynchronous:
        asyncio.run(run_all([at(server.address, example.source) for example in test.examples], names, server.address))
        return
    with Client(server.address) as names["client"]:
        for example in test.examples:
            example.source = at(server.address, example.source)
        test.globs = names
        report = io.StringIO()
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write, clear_globs=False)
    assert not failed, report.getvalue()


async def run_all(sources: list[str], names: dict[str, Any], address: str) -> None:
    """Run code with `await` outside of functions, as a notebook does."""
    async with AsyncClient(address) as names["client"]:
        for source in sources:
            with contextlib.redirect_stdout(io.StringIO()):
                code = eval(compile(source, "<example>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
                if inspect.isawaitable(code):
                    await code


def test_every_public_name_is_documented_and_both_clients_have_examples() -> None:
    for name in ganserve.__all__:
        value = getattr(ganserve, name)
        if not isinstance(value, ModuleType | str):
            document = inspect.getdoc(value) or ""
            assert document, name
            assert ">>>" in document or (isinstance(value, type) and issubclass(value, GanserveError)), name
    for twin in (Client, AsyncClient):
        public: list[tuple[str, Callable[..., Any]]] = inspect.getmembers(twin, inspect.isfunction)
        for name, method in public:
            assert name.startswith("_") or ">>>" in (method.__doc__ or ""), f"{twin.__name__}.{name}"
