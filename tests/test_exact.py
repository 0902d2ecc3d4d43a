"""Every plan that the enumerator offers equals one device in float64: loss, gradient norm, each gradient, parameters
after three AdamW steps with clipping, evaluation logits; with rows that ignore different numbers of labels, and an
optimizer made before the plan.
"""

from __future__ import annotations

import pytest

from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.space.candidates import enumerate_strategies
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


def prove(family: str, num_devices: int, strategies: list[Strategy], timeout: float) -> None:
    for results in run_ranks(num_devices, check_strategies, family, strategies, timeout=timeout):
        assert len(results) == len(strategies)
        wrong = [(name, difference) for name, difference in results if not difference < TOLERANCE]
        assert not wrong


def test_the_offer_holds_every_kind_of_choice() -> None:
    strategies = offered(4)
    assert {s.num_stages for s in strategies} == {1, 2, 4}
    assert {s.recomputation_range for s in strategies} == RECOMPUTATIONS
    assert {s.distribute_param for s in strategies} == {0, 1, 2, 3}
    assert {s.schedule for s in strategies} == {"gpipe", "1f1b"}
    assert {(s.num_stages, s.distribute_param) for s in strategies} >= {(2, level) for level in range(4)}


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
