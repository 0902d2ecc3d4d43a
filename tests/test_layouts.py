"""Hybrid sharding, and a mesh whose axes lie in any order, equal one device; so do their checkpoints."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from autoparallel.plans.grid import AXES
from autoparallel.plans.strategy import Strategy
from tests.equality import check_strategies
from tests.strategies import in_turn

TOLERANCE = 1e-9
GROUPS: dict[str, Any] = {"data_parallel": 4, "shard_group_size": 2}
SPLIT: dict[str, Any] = {"num_stages": 2, "tensor_parallel": 2, "data_parallel": 2, "num_micro_batches": 2}


def prove(family: str, strategies: list[Strategy], changes: dict[str, Any] | None = None) -> None:
    (num_devices,) = {strategy.num_devices for strategy in strategies}
    for results in check_strategies(family, strategies, changes=changes, num_devices=num_devices, timeout=240):
        assert len(results) == len(strategies)
        assert not [(name, difference) for name, difference in results if not difference < TOLERANCE]


def test_groups_of_replicas_hold_equal_shards() -> None:
    prove("qwen2", [Strategy(**GROUPS, num_micro_batches=2, distribute_param=3, recomputation="full")])


def test_tensor_parallel_ranks_may_be_far_apart() -> None:
    prove("llama", [Strategy(tensor_parallel=2, data_parallel=2, mesh_order=("pp", "tp", "dp"), distribute_param=1)])


@pytest.mark.parametrize(("family", "level"), in_turn(["llama", "qwen2"], [1, 2, 3]))
def test_hybrid_sharding_on_four_ranks(family: str, level: int) -> None:
    """Untied and tied; one and several micro-batches, of which level 1 reduces the last and the others each."""
    counts = [(1, "none"), (3, "selective"), (4, "full")]
    prove(family, [Strategy(**GROUPS, num_micro_batches=n, recomputation=r, distribute_param=level) for n, r in counts])


PIPED: dict[str, Any] = GROUPS | {"num_stages": 2, "num_micro_batches": 4}
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "1f1b", "recomputation": "full"},
    {"schedule": "gpipe"},
    {"schedule": "interleaved", "virtual_stages": 2},
    {"schedule": "zero_bubble"},
]


@pytest.mark.parametrize(("family", "level"), in_turn(["llama", "qwen2"], [1, 2, 3]))
def test_hybrid_sharding_in_a_pipeline(family: str, level: int) -> None:
    """Replicas far apart and, for every second schedule, next to each other."""
    orders = [None, ("dp", "pp", "tp")]
    strategies = [
        Strategy(**PIPED, **schedule, distribute_param=level, mesh_order=orders[(turn + level) % 2])
        for turn, schedule in enumerate(SCHEDULES)
    ]
    prove(family, strategies)


@pytest.mark.parametrize(("family", "level"), in_turn(["llama", "qwen2", "gpt2", "phi3"], [1, 2, 3]))
def test_hybrid_sharding_of_tensor_parallel_shards(family: str, level: int) -> None:
    """With fused projections among them, of which ranks hold parts in common."""
    tensor: dict[str, Any] = GROUPS | {"tensor_parallel": 2, "num_micro_batches": 2, "distribute_param": level}
    orders = [None, ("pp", "tp", "dp")]
    strategies = [
        Strategy(**tensor, sequence_parallel=divided, mesh_order=orders[(divided + level) % 2])
        for divided in (False, True)
    ]
    prove(family, strategies, changes={"num_key_value_heads": 1} if family == "phi3" else {})


@pytest.mark.parametrize(("family", "order"), in_turn(["llama", "qwen2"], list(permutations(AXES))[1:]))
def test_every_order_of_the_axes(family: str, order: Any) -> None:
    choices: list[dict[str, Any]] = [
        {"distribute_param": 0},
        {"distribute_param": 1, "sequence_parallel": True, "recomputation": "full"},
        {"distribute_param": 2, "schedule": "zero_bubble"},
        {"distribute_param": 3, "schedule": "interleaved", "virtual_stages": 2},
    ]
    prove(family, [Strategy(**SPLIT, **choice, mesh_order=order) for choice in choices])
