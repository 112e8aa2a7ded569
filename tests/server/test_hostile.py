"""Peers that send what no client should, each time something else."""

import random

from benchmarks import hostile


def test_hostile_peers_neither_stop_the_server_nor_leave_anything_behind() -> None:
    seed = random.SystemRandom().randrange(2**32)
    seen = hostile.run(1500, seed)
    assert seen["ok"], f"seed {seed}: {seen}"
