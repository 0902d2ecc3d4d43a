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


def offered(num_devices: int) -> list[Strategy]:
    strategies = enumerate_strategies(num_devices=num_devices, batch_size=ROWS, num_blocks=4, constraints=Constraints())
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
    assert {s.recomputation for s in strategies} == {"none", "full"}
    assert {s.distribute_param for s in strategies} == {0, 1, 2, 3}
    assert {s.schedule for s in strategies} == {"gpipe", "1f1b"}
    assert {(s.num_stages, s.distribute_param) for s in strategies} >= {(2, level) for level in range(4)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_offered_plan(family: str, num_devices: int) -> None:
    prove(family, num_devices, offered(num_devices), timeout=580)


SAMPLED = {**FAMILIES, **UNSEEN}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in UNSEEN)])
def test_a_covering_sample(family: str) -> None:
    """Two plans a family on four ranks; over the families, every kind of choice."""
    strategies = offered(4)
    index = list(SAMPLED).index(family)
    stride = len(strategies) // len(SAMPLED)
    chosen = [strategies[index * stride], strategies[-1 - index * stride]]
    prove(family, 4, chosen, timeout=120)
