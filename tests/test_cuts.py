"""Stage cuts against brute force over all partitions; the range arrays against the formulas they stand for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoparallel.cost.memory import capacity_bytes, rank_memory
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Constraints, StagePlan, Strategy
from autoparallel.search.cuts import EVENNESS_STEPS, Shortfall, find_cuts, has_block, least_formula
from autoparallel.search.polish import Cuts
from autoparallel.search.price import price
from autoparallel.search.ranges import PICO, Ranges
from autoparallel.search.stage_times import stage_seconds
from autoparallel.space.candidates import enumerate_strategies
from tests.workloads import GIB, gpus, random_workloads, segment, workload


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


def objective(ranges: Ranges, cut: tuple[StagePlan, ...]) -> tuple[int, ...]:
    """What the dynamic program minimises, in the order in which it does."""
    cost = [int(ranges.micro_batch_ps[a, b]) for a, b in bounds(cut)]
    end = [int(ranges.step_ps[a, b] - ranges.backward_before_ps[a]) for a, b in bounds(cut)]
    slowest, latest = max(cost), max(end)
    unevenness = sum((c * EVENNESS_STEPS // max(1, slowest)) ** 2 for c in cost)
    return ((ranges.strategy.num_micro_batches - 1) * slowest + latest, slowest, latest, unevenness)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Workload, Strategy]:
    drawn = draw(random_workloads())
    options = enumerate_strategies(
        num_devices=drawn.flavor.num_devices,
        batch_size=drawn.batch_size,
        num_blocks=drawn.num_blocks,
        constraints=Constraints(),
    )
    return drawn, draw(st.sampled_from([s for s in options if s.total_stages <= drawn.num_blocks]))


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_cuts_equal_brute_force(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    cuts = list(all_cuts(drawn, strategy))
    fitting = [cut for cut in cuts if excess_bytes(drawn, cut) <= 0]
    found = find_cuts(drawn, strategy)
    if not fitting:
        assert isinstance(found, Shortfall)
        assert found.excess_bytes == min(excess_bytes(drawn, cut) for cut in cuts)
        return
    assert not isinstance(found, Shortfall)
    chosen = strategy.model_copy(update={"stages": found})
    assert bounds(chosen.stages) in [bounds(cut.stages) for cut in fitting]
    assert excess_bytes(drawn, chosen) <= 0
    best_s = min(price(drawn, relaxed(drawn, cut)).step_time_s for cut in fitting)
    assert price(drawn, chosen).step_time_s == pytest.approx(best_s, rel=1e-9)


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_the_dynamic_program_minimises_its_formula(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    assume(strategy.virtual_stages == 1)
    ranges = Ranges(drawn, strategy)
    fits = [ranges.memory_bytes(stage) <= capacity_bytes(drawn) for stage in range(strategy.num_stages)]
    legal = has_block(ranges.num_segments, num_stages=strategy.num_stages)
    firsts = least_formula(ranges, [legal & mask for mask in fits])
    fitting = [cut for cut in all_cuts(drawn, strategy) if excess_bytes(drawn, cut) <= 0]
    assert (firsts is None) == (not fitting)
    if firsts is not None:
        found = next(cut for cut in fitting if tuple(a for a, _ in bounds(cut.stages)) == firsts)
        assert objective(ranges, found.stages) == min(objective(ranges, cut.stages) for cut in fitting)


@pytest.mark.parametrize("num_micro_batches", [8, 16, 64])
def test_polishing_helps_where_the_formula_is_rough(num_micro_batches: int) -> None:
    """Eight uneven stages: too many cuts to try them all."""
    costs = (segment(forward_s=1e-4), segment(forward_s=1e-3), segment(forward_s=2e-3))
    drawn = workload(gpus(8), costs=costs, num_blocks=24, batch_size=64)
    size = 64 // num_micro_batches
    strategy = Strategy(num_stages=8, num_micro_batches=num_micro_batches, batch_per_device=size)
    ranges = Ranges(drawn, strategy)
    anywhere = [has_block(26, num_stages=8)] * 8
    cuts = Cuts(drawn, strategy, anywhere, limit_bytes=2**62)
    firsts = least_formula(ranges, anywhere)
    assert firsts is not None
    stages = find_cuts(drawn, strategy)
    assert not isinstance(stages, Shortfall)
    polished_s = cuts.step_time_s(tuple(plan.first_segment for plan in stages))
    assert polished_s <= cuts.step_time_s(firsts)
    ideal_s = (num_micro_batches + 7) * size * 3 * (1e-4 + 24e-3 + 2e-3) / 8
    assert polished_s < 1.2 * ideal_s


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_range_arrays_equal_the_formulas(problem: tuple[Workload, Strategy]) -> None:
    drawn, strategy = problem
    ranges = Ranges(drawn, strategy)
    for cut in all_cuts(drawn, strategy):
        for stage, plan in enumerate(cut.stages):
            first, last = plan.first_segment, plan.last_segment
            if strategy.virtual_stages == 1:
                assert ranges.memory_bytes(stage)[first, last] == sum(rank_memory(drawn, cut, rank=stage).values())
            seconds = stage_seconds(drawn, cut, plan)
            once_s = seconds.start_s + seconds.reduce_s + seconds.optimizer_s
            tie_s = ranges.step_ps[first, last] * PICO - once_s
            micro_batch_s = seconds.forward_action_s + seconds.backward_action_s
            assert ranges.micro_batch_ps[first, last] * PICO == pytest.approx(micro_batch_s, abs=1e-10)
            whole = strategy.num_stages == 1 or not (drawn.shared and (first == 0 or last == len(drawn.parameters) - 1))
            assert tie_s == pytest.approx(0, abs=1e-10) if whole else tie_s > 0


def test_embedding_and_head_count() -> None:
    """A head as slow as two blocks takes their place in the last stage."""
    costs = (segment(forward_s=1e-6), segment(forward_s=1e-3), segment(forward_s=2e-3))
    drawn = workload(gpus(4), costs=costs, num_blocks=10, parameters=(0,) * 12)
    found = find_cuts(drawn, Strategy(num_stages=4, num_micro_batches=16))
    assert not isinstance(found, Shortfall)
    assert bounds(found) == [(0, 3), (4, 6), (7, 9), (10, 11)]


def test_early_stages_hold_more_micro_batches_and_get_fewer_blocks_when_memory_is_short() -> None:
    costs = tuple(segment(forward_s=1e-3, saved_bytes=GIB) for _ in range(3))
    roomy = workload(gpus(2), costs=costs, num_blocks=8)
    tight = workload(gpus(2, memory_bytes=10 * GIB), costs=costs, num_blocks=8, memory_ratio=1.0)
    strategy = Strategy(num_stages=2, num_micro_batches=16)
    even, shifted = find_cuts(roomy, strategy), find_cuts(tight, strategy)
    assert not isinstance(even, Shortfall)
    assert not isinstance(shifted, Shortfall)
    assert even[0].last_segment == 4
    assert shifted[0].last_segment < even[0].last_segment


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
    assert not isinstance(found[20], Shortfall)
    assert excess_bytes(drawn, strategy.model_copy(update={"stages": found[20]})) <= 0


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
    assert not isinstance(found, Shortfall)
    assert elapsed_s < 0.5
