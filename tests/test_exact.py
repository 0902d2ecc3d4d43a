"""Every plan that the enumerator offers equals one device in float64: loss, gradient norm, each gradient, parameters
after three AdamW steps with clipping, evaluation logits; with rows that ignore different numbers of labels, and an
optimizer made before the plan.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.space.candidates import EMITTED, enumerate_strategies
from tests.equality import check_strategies
from tests.families import FAMILIES, UNSEEN
from tests.ranks import run_ranks

ROWS = 8
TOLERANCE = 1e-9
RECOMPUTATIONS = {"none", "selective", "full", "none to selective", "none to full"}


def offered(num_devices: int) -> list[Strategy]:
    """Recomputation at each single level, and mixed over the blocks of a stage."""
    strategies: dict[Strategy, None] = {}
    for recomputation in ("auto", "selective", "full"):
        constraints = Constraints(activation_recomputation=recomputation)
        found = enumerate_strategies(num_devices=num_devices, batch_size=ROWS, num_blocks=4, constraints=constraints)
        strategies |= dict.fromkeys(found)
    assert {s.num_devices for s in strategies} == {num_devices}
    return [s for s in strategies if s.num_stages <= 4]


def prove(family: str, num_devices: int, strategies: list[Strategy], timeout: float, num_blocks: int = 4) -> None:
    for results in run_ranks(num_devices, check_strategies, family, strategies, num_blocks, timeout=timeout):
        assert len(results) == len(strategies)
        wrong = [(name, difference) for name, difference in results if not difference < TOLERANCE]
        assert not wrong


def test_the_offer_holds_every_kind_of_choice() -> None:
    strategies = offered(4)
    assert {s.num_stages for s in strategies} == {1, 2, 4}
    assert {s.recomputation_range for s in strategies} == RECOMPUTATIONS
    assert {s.schedule for s in strategies} == set(EMITTED.schedules)
    kinds = {(s.schedule, s.recomputation_range, s.distribute_param) for s in strategies if s.num_stages == 2}
    assert kinds == set(product(EMITTED.schedules, RECOMPUTATIONS, range(4)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_offered_plan(family: str, num_devices: int) -> None:
    prove(family, num_devices, offered(num_devices), timeout=580)


STRIDE = 27
SAMPLED = [*FAMILIES, *UNSEEN]


def sample(family: str) -> list[Strategy]:
    """Two plans on four ranks; kinds of recomputation and layouts take turns over the families."""
    chosen = []
    for turn in range(2 * SAMPLED.index(family), 2 * SAMPLED.index(family) + 2):
        recomputation = sorted(RECOMPUTATIONS)[turn % len(RECOMPUTATIONS)]
        group = [s for s in offered(4) if s.recomputation_range == recomputation]
        chosen.append(group[turn * STRIDE % len(group)])
    return chosen


def test_the_fast_sample_holds_every_kind_of_choice() -> None:
    chosen = [strategy for family in FAMILIES for strategy in sample(family)]
    recomputed = [s for s in chosen if s.recomputation != "none"]
    assert {s.recomputation_range for s in chosen} == RECOMPUTATIONS
    assert {s.num_stages for s in recomputed} == {1, 2, 4}
    assert {s.schedule for s in recomputed if s.num_stages > 1} == {"gpipe", "1f1b"}
    assert {s.distribute_param for s in recomputed} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in UNSEEN)])
def test_a_covering_sample(family: str) -> None:
    prove(family, 4, sample(family), timeout=120)


def piped(num_stages: int, num_micro_batches: int, **fields: Any) -> Strategy:
    """Four devices."""
    return Strategy(num_stages=num_stages, data_parallel=4 // num_stages, num_micro_batches=num_micro_batches, **fields)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_virtual_stages_and_split_backwards_with_sharding(family: str) -> None:
    """Tied and untied, where the hooks of sharding and recomputation meet the order of actions."""
    kinds: tuple[dict[str, Any], ...] = (
        {"schedule": "interleaved", "virtual_stages": 2},
        {"schedule": "zero_bubble"},
    )
    choices = (("none", 2), ("none", 3), ("full", 1), ("full", 3))
    strategies = [
        piped(2, 4, recomputation=recomputation, distribute_param=level, **kind)
        for kind in kinds
        for recomputation, level in choices
    ]
    prove(family, 4, strategies, timeout=120)


def test_batches_that_a_schedule_does_not_fit() -> None:
    """Fewer micro-batches than stages, and no whole groups of them: what the loop's last batch may be."""
    few = [piped(4, 2, schedule=name) for name in ("1f1b", "gpipe", "zero_bubble")]
    odd = piped(2, 3, schedule="interleaved", virtual_stages=2, distribute_param=2)
    prove("qwen2", 4, [*few, odd], timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", "llama"])
def test_deep_pipelines_of_virtual_stages(family: str) -> None:
    shapes = ((4, 4, 2), (4, 8, 2), (2, 4, 4))
    strategies = [
        piped(p, m, schedule="interleaved", virtual_stages=v, recomputation=recomputation)
        for p, m, v in shapes
        for recomputation in EMITTED.recomputations
    ]
    prove(family, 4, strategies, timeout=280, num_blocks=8)
    thirds = piped(2, 4, schedule="interleaved", virtual_stages=3, distribute_param=3)
    prove(family, 4, [thirds], timeout=120, num_blocks=6)
