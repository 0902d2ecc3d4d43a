"""Stage cuts and bounds against brute force over all partitions; vectors over runs against what they stand for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoparallel.cost.memory import capacity_bytes, rank_memory
from autoparallel.cost.workload import Workload
from autoparallel.plans.grid import AXES
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, StagePlan, Strategy
from autoparallel.search.cuts import Found, Shortfall, find_cuts
from autoparallel.search.price import price
from autoparallel.search.problem import Problem
from autoparallel.search.runs import RunCosts, runs_of
from autoparallel.search.stage_costs import StageCosts
from autoparallel.search.stage_times import stage_seconds
from autoparallel.space.candidates import Shape, divisors
from tests.workloads import GIB, gpus, random_workloads, segment, strategies, workload


def all_cuts(workload: Workload, strategy: Strategy) -> Iterator[Strategy]:
    """Every way to cut, with a block in every stage."""
    segments, blocks = len(workload.segment_classes), workload.num_blocks
    for cut in combinations(range(2, blocks + 1), strategy.total_stages - 1):
        bounds = zip((0, *cut), (*cut, segments), strict=True)
        plans = tuple(
            StagePlan(first_segment=a, last_segment=b - 1, recomputation=strategy.recomputation) for a, b in bounds
        )
        yield strategy.model_copy(update={"stages": plans})


def relaxed(workload: Workload, cut: Strategy) -> Strategy:
    """Each stage with the levels of least recompute time among all that the strategy allows and memory holds; a rank's
    stages one after the other.
    """
    for stage in range(cut.total_stages):
        levels = _best_levels(workload, cut, stage)
        cut = cut.model_copy(update={"stages": (*cut.stages[:stage], levels, *cut.stages[stage + 1 :])})
    return cut


def _best_levels(workload: Workload, cut: Strategy, stage: int) -> StagePlan:
    plan, least = cut.stages[stage], cut.least_recomputation or cut.recomputation
    names = [n for n, level in RECOMPUTATION_LEVELS.items() if level <= RECOMPUTATION_LEVELS[cut.recomputation]]
    names = names[RECOMPUTATION_LEVELS[least] :]
    best, best_s = plan, stage_seconds(workload, cut, plan).recompute_s
    for levels in product(names, repeat=len(plan.blocks(len(workload.segment_classes)))):
        tried = StagePlan(
            first_segment=plan.first_segment, last_segment=plan.last_segment, recomputation=levels or plan.recomputation
        )
        stages = (*cut.stages[:stage], tried, *cut.stages[stage + 1 :])
        memory = rank_memory(workload, cut.model_copy(update={"stages": stages}), rank=stage % cut.num_stages)
        tried_s = stage_seconds(workload, cut, tried).recompute_s
        if sum(memory.values()) <= capacity_bytes(workload) and tried_s < best_s:
            best, best_s = tried, tried_s
    return best


def bounds(plans: tuple[StagePlan, ...]) -> list[tuple[int, int]]:
    return [(plan.first_segment, plan.last_segment) for plan in plans]


def excess_bytes(workload: Workload, cut: Strategy) -> int:
    """By how much the worst rank misses the capacity; negative where all fit."""
    peaks = [sum(rank_memory(workload, cut, rank=rank).values()) for rank in range(cut.num_stages)]
    return max(peaks) - capacity_bytes(workload)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Workload, Strategy]:
    drawn = draw(random_workloads())
    return drawn, draw(st.sampled_from([s for s in strategies(drawn) if s.total_stages <= drawn.num_blocks]))


def cut_times(drawn: Workload, strategy: Strategy) -> list[float]:
    """Step times of all cuts that fit, each with its cheapest levels."""
    fitting = [cut for cut in all_cuts(drawn, strategy) if excess_bytes(drawn, cut) <= 0]
    return [price(drawn, relaxed(drawn, cut)).step_time_s for cut in fitting]


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_cuts_equal_brute_force(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    times = cut_times(drawn, strategy)
    found = find_cuts(drawn, strategy)
    if not times:
        assert isinstance(found, Shortfall)
        assert found.excess_bytes == min(excess_bytes(drawn, cut) for cut in all_cuts(drawn, strategy))
        return
    assert isinstance(found, Found)
    chosen = strategy.model_copy(update={"stages": found.stages})
    assert excess_bytes(drawn, chosen) <= 0
    assert price(drawn, chosen).step_time_s == pytest.approx(min(times), rel=1e-9)


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_no_cut_undercuts_the_bounds(problem: tuple[Workload, Strategy]) -> None:
    """Of the strategy, of its cuts, and of those that a limit leaves out."""
    drawn, strategy = problem
    least_s = min(cut_times(drawn, strategy), default=math.inf)
    everything = Problem(drawn)
    shape = Shape(*(getattr(strategy, name) for name in Shape._fields))
    assert everything.shape_bound_s(shape) <= everything.quick_bound_s(strategy) * (1 + 1e-9)
    assert everything.quick_bound_s(strategy) <= least_s * (1 + 1e-9)
    if everything.is_too_large(strategy) or not everything.holds_states(strategy):
        assert least_s == math.inf
    found = find_cuts(drawn, strategy, polished=False)
    if isinstance(found, Found):
        assert found.bound_s <= least_s * (1 + 1e-9)
    if least_s < math.inf:
        assert isinstance(find_cuts(drawn, strategy, within_s=least_s * (1 + 1e-9)), Found)


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_one_stage_is_bounded_by_itself(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    assume(strategy.num_stages == 1)
    found = find_cuts(drawn, strategy, polished=False)
    if isinstance(found, Found):
        step_time_s = price(drawn, strategy.model_copy(update={"stages": found.stages})).step_time_s
        assert found.bound_s == pytest.approx(step_time_s, rel=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
@pytest.mark.parametrize("num_micro_batches", [8, 16, 64])
def test_the_closed_form_is_near_the_simulation(num_micro_batches: int, schedule: Any) -> None:
    """Eight stages: too many cuts to try them all."""
    costs = (segment(forward_s=1e-4), segment(forward_s=1e-3), segment(forward_s=2e-3))
    drawn = workload(gpus(8), costs=costs, num_blocks=24, batch_size=64)
    size = 64 // num_micro_batches
    strategy = Strategy(num_stages=8, num_micro_batches=num_micro_batches, batch_per_device=size, schedule=schedule)
    found = find_cuts(drawn, strategy)
    assert isinstance(found, Found)
    step_time_s = price(drawn, strategy.model_copy(update={"stages": found.stages})).step_time_s
    assert found.bound_s <= step_time_s <= 1.03 * found.bound_s


@st.composite
def layouts(draw: st.DrawFn, strategy: Strategy) -> Strategy:
    """The strategy in any order of the mesh's axes, sharded over any groups."""
    fields: dict[str, Any] = {"mesh_order": draw(st.permutations(AXES).map(tuple))}
    if strategy.distribute_param > 0:
        fields["shard_group_size"] = draw(st.sampled_from(divisors(strategy.num_replicas)[1:] or [None]))
    return Strategy(**strategy.model_dump() | fields)


@given(problem=problems(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_runs_equal_the_formulas(problem: tuple[Workload, Strategy], data: st.DataObject) -> None:
    """Of every run of segments that some cut has: seconds of `stage_seconds`, bytes of `rank_memory`."""
    drawn, strategy = problem[0], data.draw(layouts(problem[1]))
    runs = runs_of(drawn)
    costs = RunCosts(drawn, strategy, runs)
    level = strategy.recomputation
    stages = StageCosts(drawn, strategy, runs, costs, capacity_bytes(drawn))
    for cut in all_cuts(drawn, strategy):
        for stage, plan in enumerate(cut.stages):
            run = int(runs.ids[plan.first_segment, plan.last_segment])
            if strategy.virtual_stages == 1:
                assert stages.bytes_at(stage)[run] == sum(rank_memory(drawn, cut, rank=stage).values())
            seconds = stage_seconds(drawn, cut, plan)
            found = (
                costs.forward_s[run],
                costs.input_gradient_s[run] + costs.recompute_s(level)[run],
                costs.weight_gradient_s[run],
                costs.start_s[run],
                costs.end_s[run],
            )
            expected = (
                seconds.forward_action_s,
                seconds.input_gradient_action_s,
                seconds.weight_gradient_action_s,
                seconds.start_s,
                seconds.reduce_s + seconds.optimizer_s,
            )
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_a_run_recomputes_no_less_than_its_bound(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    assume(strategy.virtual_stages == 1 and strategy.least_recomputation is not None)
    runs = runs_of(drawn)
    stages = StageCosts(drawn, strategy, runs, RunCosts(drawn, strategy, runs), capacity_bytes(drawn))
    for stage in range(strategy.num_stages):
        bound_s = stages.recompute_s(stage).copy()
        fitting = np.flatnonzero(stages.fits(stage))
        for run in fitting:
            stages.learn(stage, int(run))
        assert (bound_s[fitting] <= stages.recompute_s(stage)[fitting] + 1e-12).all()


def test_embedding_and_head_count() -> None:
    """A head as slow as two blocks takes their place in the last stage."""
    costs = (segment(forward_s=1e-6), segment(forward_s=1e-3), segment(forward_s=2e-3))
    drawn = workload(gpus(4), costs=costs, num_blocks=10, parameters=(0,) * 12)
    found = find_cuts(drawn, Strategy(num_stages=4, num_micro_batches=16))
    assert isinstance(found, Found)
    assert bounds(found.stages) == [(0, 3), (4, 6), (7, 9), (10, 11)]


def test_early_stages_hold_more_micro_batches_and_get_fewer_blocks_when_memory_is_short() -> None:
    costs = tuple(segment(forward_s=1e-3, saved_bytes=GIB) for _ in range(3))
    roomy = workload(gpus(2), costs=costs, num_blocks=8)
    tight = workload(gpus(2, memory_bytes=10 * GIB), costs=costs, num_blocks=8, memory_ratio=1.0)
    strategy = Strategy(num_stages=2, num_micro_batches=16)
    even, shifted = find_cuts(roomy, strategy), find_cuts(tight, strategy)
    assert isinstance(even, Found)
    assert isinstance(shifted, Found)
    assert even.stages[0].last_segment == 4
    assert shifted.stages[0].last_segment < even.stages[0].last_segment


def test_shortfall_is_of_the_worst_rank_in_the_best_cut() -> None:
    drawn = workload(gpus(2, memory_bytes=GIB), num_blocks=4)
    found = find_cuts(drawn, Strategy(num_stages=2, num_micro_batches=16))
    assert isinstance(found, Shortfall)
    cut = Strategy(num_stages=2, num_micro_batches=16, stages=found.stages)
    peak = sum(rank_memory(drawn, cut, rank=found.rank).values())
    assert found.excess_bytes == peak - capacity_bytes(drawn) > 0


INTERLEAVED: dict[str, Any] = {"schedule": "interleaved", "virtual_stages": 4}


def test_no_rank_of_virtual_stages_exceeds_its_memory() -> None:
    """Too many cuts to try all; each stage alone would fit into less."""
    costs = tuple(segment(forward_s=1e-3, saved_bytes=GIB // 8) for _ in range(3))
    strategy = Strategy(num_stages=4, num_micro_batches=16, **INTERLEAVED)
    found = {}
    for limit in (6, 20):
        drawn = workload(gpus(4, memory_bytes=limit * GIB), costs=costs, num_blocks=48, memory_ratio=1.0)
        found[limit] = find_cuts(drawn, strategy)
    assert isinstance(found[6], Shortfall)
    assert isinstance(found[20], Found)
    assert excess_bytes(drawn, strategy.model_copy(update={"stages": found[20].stages})) <= 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distribute_param": 3},
        {"recomputation": "full", "distribute_param": 1},
        {"schedule": "zero_bubble"},
        INTERLEAVED,
    ],
)
def test_a_large_model_is_cut_in_a_fraction_of_a_second(changes: dict[str, Any]) -> None:
    drawn = workload(gpus(128), num_blocks=126, batch_size=512, tied=1_000_000)
    strategy = Strategy(num_stages=16, data_parallel=8, num_micro_batches=64, **changes)
    begin = time.process_time()
    found = find_cuts(drawn, strategy)
    elapsed_s = time.process_time() - begin
    assert isinstance(found, Found)
    assert elapsed_s < 0.5
