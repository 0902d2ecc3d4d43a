"""Mixed recomputation: the cheapest levels against brute force, and what a strategy's highest and least level mean."""

from __future__ import annotations

import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost.memory import capacity_bytes, rank_memory
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import Constraints, StagePlan, Strategy
from autoparallel.search.price import cut_and_price, solve
from autoparallel.search.problem import Problem
from autoparallel.search.relax import Choice, Kind, Limits, Option, Relaxation, cheapest
from autoparallel.search.select import search, select_best_graph_from_candidates
from autoparallel.space.candidates import enumerate_space
from tests.workloads import GIB, gpus, segment, workload

SAVED, KEPT = GIB, GIB // 4


def needed_bytes(options: tuple[Option, ...], *, in_flight: int, ends_bytes: int) -> int:
    return in_flight * sum(o.kept_bytes for o in options) + max(ends_bytes, *(o.transient_bytes for o in options))


@st.composite
def kinds(draw: st.DrawFn) -> tuple[tuple[Kind, int], ...]:
    """One to three kinds of up to four blocks, from full recomputation to none."""
    found: dict[Kind, int] = {}
    for _ in range(draw(st.integers(1, 3))):
        saved = draw(st.integers(0, 60))
        kept, workspace = draw(st.integers(0, saved)), draw(st.integers(0, 20))
        full_ps = draw(st.integers(0, 50))
        selective_ps = draw(st.integers(0, full_ps))
        full = Option("full", 0, workspace + saved, full_ps)
        selective = Option("selective", kept, workspace + saved - kept, selective_ps)
        found[(full, selective, Option("none", saved, workspace, 0))] = draw(st.integers(1, 3))
    return tuple(found.items())


@given(kinds=kinds(), in_flight=st.integers(1, 4), ends_bytes=st.integers(0, 80), spare_bytes=st.integers(0, 800))
@settings(max_examples=150, deadline=None)
def test_cheapest_equals_brute_force(
    kinds: tuple[tuple[Kind, int], ...], in_flight: int, ends_bytes: int, spare_bytes: int
) -> None:
    def fits(options: tuple[Option, ...]) -> bool:
        return needed_bytes(options, in_flight=in_flight, ends_bytes=ends_bytes) <= budget_bytes

    blocks = [kind for kind, count in kinds for _ in range(count)]
    leanest = tuple(kind[0] for kind in blocks)
    budget_bytes = needed_bytes(leanest, in_flight=in_flight, ends_bytes=ends_bytes) + spare_bytes
    found = cheapest(kinds, Limits(moments=((in_flight, budget_bytes),), ends_bytes=ends_bytes))
    assert found is not None
    assert fits(chosen_options(kinds, found))
    assert found.recompute_ps == sum(o.recompute_ps for o in chosen_options(kinds, found))
    assert found.recompute_ps == min(sum(o.recompute_ps for o in tried) for tried in product(*blocks) if fits(tried))


def chosen_options(kinds: tuple[tuple[Kind, int], ...], choice: Choice) -> tuple[Option, ...]:
    options = []
    for (kind, count), levels in zip(kinds, choice.levels, strict=True):
        assert len(levels) == count
        options += [next(option for option in kind if option.level == level) for level in levels]
    return tuple(options)


def tight(memory_bytes: int, *, num_devices: int = 1) -> Workload:
    """Twelve blocks that keep 1 GiB a row each, 1/4 GiB under selective recomputation."""
    costs = (
        segment(forward_s=1e-4),
        segment(forward_s=1e-3, saved_bytes=SAVED, saved_selective_bytes=KEPT),
        segment(forward_s=5e-4),
    )
    flavor = gpus(num_devices, memory_bytes=memory_bytes)
    return workload(flavor, costs=costs, num_blocks=12, batch_size=8, memory_ratio=1.0)


def plan_of(drawn: Workload, strategy: Strategy) -> StagePlan:
    stages = solve(Problem(drawn), strategy).strategy.stages
    assert stages is not None
    return stages[0]


FREE = Strategy(num_micro_batches=8, recomputation="full", least_recomputation="none")


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (20, "none"),
        (11, ("selective",) * 5 + ("none",) * 7),
        (6, ("selective",) * 11 + ("none",)),
        (3.5, ("full",) * 8 + ("selective",) * 4),
    ],
)
def test_as_much_is_kept_as_fits(gib: float, expected: object) -> None:
    """Blocks that rebuild most come first: their backward runs when the others have given up what they kept."""
    plan = plan_of(tight(int(gib * GIB)), FREE)
    assert plan.recomputation == expected


def test_the_first_stage_of_a_pipeline_keeps_least() -> None:
    drawn = tight(6 * GIB, num_devices=2)
    strategy = FREE.model_copy(update={"num_stages": 2})
    stages = solve(Problem(drawn), strategy).strategy.stages
    assert stages is not None
    cut = strategy.model_copy(update={"stages": stages})
    assert all(sum(rank_memory(drawn, cut, rank=i).values()) <= capacity_bytes(drawn) for i in range(2))
    first, last = ([p.recomputation_of(i, num_segments=14) for i in p.blocks(14)].count("none") for p in stages)
    assert first < last


def test_a_named_level_is_exact() -> None:
    roomy = tight(40 * GIB)
    for level in ("none", "selective", "full"):
        assert plan_of(roomy, Strategy(num_micro_batches=8, recomputation=level)).recomputation == level
    full = cut_and_price(roomy, Strategy(num_micro_batches=8, recomputation="full"))
    assert full.breakdown_s.recompute == pytest.approx(8 * 12e-3)
    assert cut_and_price(roomy, FREE).breakdown_s.recompute == 0


@pytest.mark.parametrize(
    ("wanted", "levels"),
    [("auto", {"none"}), (True, {"selective"}), (False, {"none"}), ("selective", {"selective"}), ("full", {"full"})],
)
def test_constraints_hold_where_memory_is_plenty(wanted: object, levels: set[str]) -> None:
    constraints = Constraints(activation_recomputation=wanted)  # type: ignore[arg-type]
    chosen = select_best_graph_from_candidates(search(tight(40 * GIB), constraints, workers=0).candidates)
    assert {plan.recomputation for plan in chosen.strategy.stages or ()} == levels


def test_a_mixed_plan_wins_where_no_single_level_is_best() -> None:
    drawn = tight(11 * GIB)
    chosen = select_best_graph_from_candidates(search(drawn, Constraints(batch_per_device=1), workers=0).candidates)
    assert chosen.estimate is not None
    single = [
        cut_and_price(drawn, Strategy(num_micro_batches=8, recomputation=level)) for level in ("selective", "full")
    ]
    assert chosen.estimate.step_time_s < min(estimate.step_time_s for estimate in single)


def test_relaxing_takes_milliseconds() -> None:
    """Two kinds of block, tight memory: nearly every stage is mixed."""
    costs = (
        segment(forward_s=1e-4),
        segment(forward_s=1e-3, saved_bytes=40_000_000, saved_selective_bytes=9_000_000),
        segment(forward_s=2e-3, saved_bytes=37_000_001, saved_selective_bytes=8_000_007),
        segment(forward_s=1e-3),
    )
    drawn = workload(gpus(16, memory_bytes=4 * GIB), costs=costs, classes=(0, *[1, 2] * 40, 3), batch_size=16)
    strategies = enumerate_space(num_devices=16, batch_size=16, num_blocks=80, constraints=Constraints()).listed()
    free = [strategy for strategy in strategies if strategy.least_recomputation is not None]
    begin = time.process_time()
    problem = Problem(drawn)
    found = [solve(problem, strategy) for strategy in free]
    elapsed_s = time.process_time() - begin
    assert sum(isinstance(p.recomputation, tuple) for c in found for p in c.strategy.stages or ()) > len(free)
    assert elapsed_s / len(free) < 0.05


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_what_is_gathered_and_reduced_beside_a_block_counts(level: int) -> None:
    """Every memory from what full recomputation needs to more than none needs, against every mix of levels."""
    saved = segment(forward_s=1e-3, saved_bytes=900_000, saved_selective_bytes=300_000, workspace_bytes=10_000)
    costs = (segment(forward_s=1e-4, saved_bytes=0), saved, segment(forward_s=1e-4, workspace_bytes=400_000))
    parameters = (50_000, 150_000, 100_000, 120_000, 90_000)
    strategy = Strategy(data_parallel=2, num_micro_batches=2, recomputation="full", distribute_param=level)
    mixed = strategy.model_copy(update={"least_recomputation": "none"})

    def of(memory_bytes: int) -> Workload:
        flavor = gpus(2, memory_bytes=memory_bytes)
        return workload(flavor, costs=costs, parameters=parameters, num_blocks=3, batch_size=4, memory_ratio=1.0)

    def needed(drawn: Workload, plan: StagePlan) -> int:
        return sum(rank_memory(drawn, strategy.model_copy(update={"stages": (plan,)}), rank=0).values())

    mixes = [
        StagePlan(first_segment=0, last_segment=4, recomputation=levels)
        for levels in product(("full", "selective", "none"), repeat=3)
    ]

    def recomputed_s(plan: StagePlan) -> float:
        return sum(saved.recompute_s(plan.recomputation_of(block, num_segments=5)) for block in (1, 2, 3))

    sizes = {mix: needed(of(80 * GIB), mix) for mix in mixes}
    for memory_bytes in range(min(sizes.values()), max(sizes.values()) + 50_000, 20_011):
        drawn = of(memory_bytes)
        whole = StagePlan(first_segment=0, last_segment=4, recomputation="full")
        (found,) = Relaxation(drawn, mixed).stages((whole,))
        assert needed(drawn, found) <= max(memory_bytes, needed(drawn, whole))
        best_s = min(recomputed_s(mix) for mix in mixes if sizes[mix] <= memory_bytes)
        assert recomputed_s(found) == pytest.approx(best_s)
