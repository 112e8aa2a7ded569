"""Peers that send what no client should, each time something else."""

import random
from collections.abc import Callable

import pytest
from benchmarks import hostile
from benchmarks.attacks.attacker import attack
from benchmarks.attacks.caller import Sample
from benchmarks.attacks.cell import Cell, Latency
from benchmarks.attacks.patterns import ATTACKS
from tests.conftest import RunningServer
from tests.wire import Peer, request


@pytest.mark.parametrize("connections", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_hostile_peers_neither_stop_the_server_nor_leave_anything_behind(connections: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    seen = hostile.run(connections, seed)
    assert seen["ok"], f"seed {seed}: {seen}"


def test_after_each_attack_by_name_a_call_is_answered(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--access-log=off")
    for name in ATTACKS:
        outcome = attack(name, server.address, connections=1, seconds=0.3)
        assert outcome.connections, name
        assert not outcome.rules_broken, name
        with Peer(server.address) as peer:
            assert len(peer.call(request(2)).images.pixels) == 2 * 28 * 28, name


@pytest.mark.parametrize(
    ("connections", "before_s", "meanwhile_s", "error", "left_mib", "bars"),
    [
        (1, 0.002, 0.05, "", 31.0, 0),
        (1, 0.002, 0.06, "", 0.0, 1),
        (50, 0.002, 0.25, "", 0.0, 0),
        (70, 0.002, 0.26, "", 0.0, 1),
        (50, 0.020, 0.49, "", 0.0, 0),  # the machine is busy
        (50, 0.002, 0.26, "status 8", 33.0, 3),
    ],
)
def test_the_table_of_attacks_names_the_bars_that_are_broken(
    connections: int, before_s: float, meanwhile_s: float, error: str, left_mib: float, bars: int
) -> None:
    before, meanwhile = (Latency.of([Sample(0.0, seconds, "")] * 100) for seconds in (before_s, meanwhile_s))
    errors = {error: 1} if error else {}
    cell = Cell("padding", connections, "ganserve", 0.0, before, meanwhile, errors, 0.5, left_mib, left_mib, 30.0)
    assert len(cell.broken()) == bars
