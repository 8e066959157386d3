"""Seeded runs of whole clusters (see cluster.py for what is checked)."""

from __future__ import annotations

import os
from random import Random

import pytest

from dlmfs.model import Owner
from dlmfs.store.memory_store import Faults
from tests.engine.cluster import SimCluster

SEEDS = int(os.environ.get("DLMFS_SEEDS", "40"))


def drawn(seed: int) -> Faults:
    """Faults of a run: each kind may be absent, so that others show alone."""
    rng = Random(f"faults {seed}")

    def chance(most: float) -> float:
        return rng.choice([0.0, rng.uniform(0, most)])

    return Faults(
        delay_s=rng.choice([0.0, 0.001, 0.05]),
        watch_delay_s=rng.choice([0.0, 0.001, 0.05, 0.5]),
        lose_request=chance(0.1),
        lose_answer=chance(0.1),
        apply_late=chance(0.1),
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_calm_network(seed: int) -> None:
    rng = Random(seed)
    cluster = SimCluster(seed, nodes=rng.randint(1, 4), locks=rng.randint(1, 2))
    cluster.run(300)
    assert cluster.grants > 20
    cluster.leave_all()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_lossy_network(seed: int) -> None:
    rng = Random(seed)
    cluster = SimCluster(seed, nodes=rng.randint(2, 4), locks=rng.randint(1, 2), faults=drawn(seed))
    cluster.run(300, gaps=rng.choice([0.0, 0.02]))
    cluster.leave_all()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nodes_die_and_are_cut_off(seed: int) -> None:
    rng = Random(seed)
    cluster = SimCluster(seed, nodes=rng.randint(2, 4), locks=rng.randint(1, 2), faults=drawn(seed))
    cluster.run(
        300,
        crashes=rng.choice([0.0, 0.01]),
        cuts=rng.choice([0.0, 0.01]),
        gaps=rng.choice([0.0, 0.01]),
    )
    cluster.leave_all()


@pytest.mark.parametrize("owner", list(Owner))
def test_same_seed_same_run(owner: Owner) -> None:
    runs = []
    for _ in range(2):
        cluster = SimCluster(7, faults=drawn(7), owners=(owner,))
        cluster.run(200, crashes=0.01)
        runs.append((cluster.grants, cluster.server.revision, cluster.loop.steps))
    assert runs[0] == runs[1]
