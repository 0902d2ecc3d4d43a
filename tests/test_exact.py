"""Every plan that the enumerator offers equals one device in float64: loss, gradient norm, each gradient, parameters
after three AdamW steps with clipping, evaluation logits; with rows that ignore different numbers of labels, and an
optimizer made before the plan.
"""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any

import pytest

from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.space.candidates import EMITTED, divisors, enumerate_space
from tests.equality import SEQ, check_strategies
from tests.families import FAMILIES, UNSEEN

ROWS = 8
TOLERANCE = 1e-9
PROVED = [*FAMILIES, "qwen3", "phi3"]
RECOMPUTATIONS = {"none", "selective", "full", "none to selective", "none to full"}


def offered(num_devices: int) -> list[Strategy]:
    """Recomputation at each single level, and mixed over the blocks of a stage; in every order of the mesh on four
    devices, which stand for hosts of two.
    """
    strategies: dict[Strategy, None] = {}
    for recomputation in ("auto", False, "selective", "full"):
        found = enumerate_space(
            num_devices=num_devices,
            batch_size=ROWS,
            num_blocks=4,
            constraints=Constraints(activation_recomputation=recomputation),
            tensor_degrees=divisors(num_devices),
            seq_len=SEQ,
            devices_per_host=2 if num_devices == 4 else None,
        ).listed()
        strategies |= dict.fromkeys(found)
        if recomputation == "auto":
            strategies |= {s.model_copy(update={"recomputation": "selective"}): None for s in found}
    assert {s.num_devices for s in strategies} == {num_devices}
    return [s for s in strategies if s.num_stages <= 4]


def features(strategy: Strategy) -> dict[str, object]:
    """What a strategy is made of, as far as it may matter for its numbers."""
    s = strategy
    return {
        "stages": s.num_stages,
        "tensor": (s.tensor_parallel, s.sequence_parallel),
        "replicas": s.data_parallel,
        "level": s.distribute_param,
        "shards": s.shard_group_size,
        "order": s.mesh_order,
        "schedule": (s.schedule, s.virtual_stages) if s.num_stages > 1 else None,
        "recomputation": s.recomputation_range,
        "micro-batches": min(s.num_micro_batches, 2 * s.num_stages),
    }


def pairs(strategy: Strategy) -> set[tuple[tuple[str, object], ...]]:
    return set(combinations(features(strategy).items(), 2))


def covering(strategies: list[Strategy], seed: int) -> list[Strategy]:
    """A few in which every pair of features that occurs at all occurs (greedy; who comes first is drawn by `seed`)."""
    drawn = random.Random(seed).sample(strategies, len(strategies))
    missing = set().union(*map(pairs, drawn))
    chosen = []
    while missing:
        best = max(drawn, key=lambda s: len(pairs(s) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def prove(family: str, num_devices: int, strategies: list[Strategy], timeout: float, num_blocks: int = 4) -> None:
    for results in check_strategies(family, strategies, num_blocks, num_devices=num_devices, timeout=timeout):
        assert len(results) == len(strategies)
        wrong = [(name, difference) for name, difference in results if not difference < TOLERANCE]
        assert not wrong


def test_the_offer_holds_every_kind_of_choice() -> None:
    strategies = offered(4)
    assert {s.num_stages for s in strategies} == {1, 2, 4}
    assert {s.recomputation_range for s in strategies} == RECOMPUTATIONS
    assert {s.shard_group_size for s in strategies} == {None, 2}
    assert len({s.mesh_order for s in strategies}) > 3
    assert {s.schedule for s in strategies} == set(EMITTED.schedules)
    kinds = {(s.schedule, s.recomputation_range, s.distribute_param) for s in strategies if s.num_stages == 2}
    assert kinds == set(product(EMITTED.schedules, RECOMPUTATIONS, range(4)))
    tensor = {(s.tensor_parallel, s.sequence_parallel) for s in strategies}
    assert tensor == {(1, False), (2, False), (2, True), (4, False), (4, True)}
    assert {s.distribute_param for s in strategies if s.tensor_parallel == 2} == {0, 1, 2, 3}
    assert {s.schedule for s in strategies if s.tensor_parallel == 2} == set(EMITTED.schedules)


def test_a_covering_sample_covers() -> None:
    strategies = offered(8)
    chosen = covering(strategies, seed=0)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, strategies))
    assert len(chosen) < len(strategies) / 8


SAMPLED = [*FAMILIES, *UNSEEN]


@pytest.mark.parametrize("family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in SAMPLED])
def test_a_few_plans_on_four_ranks(family: str) -> None:
    """A few of the plans in which every pair of choices occurs; `test_every_pair_of_choices` runs them all."""
    chosen = covering(offered(4), seed=0)
    prove(family, 4, chosen[SAMPLED.index(family) :: 2 * len(SAMPLED)], timeout=180)


def share(num_devices: int, family: str) -> list[Strategy]:
    """A family's part of a sample in which every pair of choices occurs: every second family's make up one, on eight
    ranks half of one.
    """
    turn, parts = PROVED.index(family) // 2, {1: 1, 2: 3, 4: 3, 8: 6}[num_devices]
    return covering(offered(num_devices), seed=turn // parts)[turn % parts :: parts]


def ci_or_not(family: str, num_devices: int) -> Any:
    """On four and eight ranks each family's share is most of a minute: CI runs three families' on each."""
    in_ci = num_devices < 4 or PROVED.index(family) % 2 == (num_devices == 8)
    return pytest.param(family, num_devices, marks=pytest.mark.slow if in_ci else pytest.mark.exhaustive)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "num_devices"), [ci_or_not(f, n) for f in PROVED for n in (1, 2, 4, 8)])
def test_every_pair_of_choices(family: str, num_devices: int) -> None:
    prove(family, num_devices, share(num_devices, family), timeout=580)


@pytest.mark.exhaustive
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("family", PROVED)
def test_every_offered_plan(family: str, num_devices: int) -> None:
    """The full product: hours, so that `make exhaustive` runs it and CI does not."""
    prove(family, num_devices, offered(num_devices), timeout=19_000)


def piped(num_stages: int, num_micro_batches: int, **fields: Any) -> Strategy:
    """Four devices."""
    return Strategy(num_stages=num_stages, data_parallel=4 // num_stages, num_micro_batches=num_micro_batches, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "llama"])
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


@pytest.mark.slow
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
