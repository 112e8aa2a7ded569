"""Fixtures of the client's tests."""

import gc
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Threads of a test end with it; gRPC's own take a moment."""
    before = set(threading.enumerate())
    yield
    caplog.get_records("call").clear()  # they hold the frames of calls
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), f"{thread} is left"
