"""The search against brute force and against itself, prices, and what is said where nothing fits."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost.collectives import Topology
from autoparallel.cost.memory import capacity_bytes
from autoparallel.cost.practice import Practice
from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError, NoFeasiblePlanError
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.estimate import Estimate
from autoparallel.plans.strategy import Constraints, StagePlan, Strategy
from autoparallel.search import select
from autoparallel.search.price import cut_and_price, price, solve
from autoparallel.search.problem import Problem
from autoparallel.search.select import search, select_best_graph_from_candidates
from autoparallel.search.stage_times import Overheads
from autoparallel.space.candidates import Shape
from tests.test_cuts import all_cuts, excess_bytes, layouts, relaxed
from tests.workloads import CPU_CORES, GIB, cpus, gpus, random_workloads, segment, strategies, workload

ANY = Constraints()


def best(drawn: Workload, constraints: Constraints = ANY) -> Candidate:
    return select_best_graph_from_candidates(search(drawn, constraints, workers=0).candidates)


def best_s(drawn: Workload, constraints: Constraints = ANY) -> float:
    """Infinite where nothing is possible."""
    try:
        estimate = best(drawn, constraints).estimate
    except NoFeasiblePlanError:
        return math.inf
    assert estimate is not None
    return estimate.step_time_s


# --- the choice ---


@given(drawn=random_workloads(max_blocks=5))
@settings(max_examples=40, deadline=None)
def test_the_choice_equals_brute_force(drawn: Workload) -> None:
    """Enumerate × all cuts × all levels × price."""
    fitting = [s for s in strategies(drawn) if s.total_stages <= drawn.num_blocks]
    cuts = [cut for s in fitting for cut in all_cuts(drawn, s) if excess_bytes(drawn, cut) <= 0]
    found = search(drawn, ANY, workers=0)
    if not cuts:
        assert found.bound_s == math.inf
        with pytest.raises(NoFeasiblePlanError):
            select_best_graph_from_candidates(found.candidates)
        return
    chosen = select_best_graph_from_candidates(found.candidates)
    assert chosen.estimate is not None
    least_s = min(price(drawn, relaxed(drawn, cut)).step_time_s for cut in cuts)
    assert chosen.estimate.step_time_s == pytest.approx(least_s, rel=1e-9)
    assert found.bound_s <= least_s * (1 + 1e-9)
    assert found.bound_s == pytest.approx(least_s, rel=0.01)
    assert chosen.estimate == price(drawn, chosen.strategy)
    assert excess_bytes(drawn, chosen.strategy) <= 0


@pytest.mark.parametrize("bound", ["shape_bound_s", "layout_bound_s", "quick_bound_s"])
def test_a_wrong_bound_loses_the_best(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the brute force above would notice."""
    drawn = workload(gpus(4), num_blocks=5, parameters=(40_000_000,) * 7)
    right_s, found = best_s(drawn), getattr(Problem, bound)
    chosen = best(drawn).strategy

    def wrong(self: Problem, what: Any, *rest: Any) -> float:
        same = all(getattr(what, name) == getattr(chosen, name) for name in Shape._fields)
        return 1e12 if same else found(self, what, *rest)

    monkeypatch.setattr(Problem, bound, wrong)
    assert best_s(drawn) > right_s


@given(drawn=random_workloads(max_blocks=5), factor=st.floats(1.0, 4.0))
@settings(max_examples=40, deadline=None)
def test_more_memory_is_never_slower(drawn: Workload, factor: float) -> None:
    flavor = drawn.flavor.model_copy(update={"memory_bytes": int(factor * drawn.flavor.memory_bytes)})
    larger = drawn.model_copy(update={"flavor": flavor})
    assert best_s(larger) <= best_s(drawn) * (1 + 1e-9)


@given(drawn=random_workloads(max_blocks=5), factor=st.floats(1.0, 4.0))
@settings(max_examples=40, deadline=None)
def test_a_faster_link_is_never_slower(drawn: Workload, factor: float) -> None:
    links = drawn.table.intra_host
    figure = links.bandwidth_bytes_per_s
    faster = links.model_copy(
        update={"bandwidth_bytes_per_s": figure.model_copy(update={"value": factor * figure.value})}
    )
    table = drawn.table.model_copy(update={"intra_host": faster})
    assert best_s(drawn.model_copy(update={"table": table})) <= best_s(drawn) * (1 + 1e-9)


NARROWER: list[dict[str, Any]] = [
    {"num_stages": 1},
    {"num_micro_batches": 4},
    {"batch_per_device": 2},
    {"activation_recomputation": False},
    {"activation_recomputation": True},
    {"activation_recomputation": "selective"},
    {"distribute_parameter": True},
    {"distribute_parameter": 0},
    {"schedule": "1f1b"},
    {"data_parallel": 1},
]


@given(drawn=random_workloads(max_blocks=5), constraint=st.sampled_from(NARROWER))
@settings(max_examples=60, deadline=None)
def test_a_wider_constraint_is_never_slower(drawn: Workload, constraint: dict[str, Any]) -> None:
    try:
        narrow_s = best_s(drawn, Constraints(**constraint))
    except ConfigError:
        return  # it leaves nothing
    assert best_s(drawn) <= narrow_s * (1 + 1e-9)


@pytest.mark.parametrize("memory_bytes", [3 * GIB, 6 * GIB, 40 * GIB])
def test_the_gap_of_a_large_search_is_proved_small(memory_bytes: int) -> None:
    """Too many cuts to try them all."""
    costs = (segment(forward_s=1e-4), segment(forward_s=1e-3, saved_bytes=60_000_000), segment(forward_s=2e-3))
    drawn = workload(
        gpus(32, memory_bytes=memory_bytes), costs=costs, num_blocks=48, batch_size=64, parameters=(6_000_000,) * 50
    )
    found = search(drawn, ANY, workers=0)
    chosen = select_best_graph_from_candidates(found.candidates)
    assert chosen.estimate is not None
    assert found.bound_s <= chosen.estimate.step_time_s <= 1.01 * found.bound_s


def test_a_search_without_time_says_so() -> None:
    drawn = workload(gpus(32), num_blocks=48, batch_size=64)
    found = search(drawn, ANY, workers=0, budget_s=0.0)
    assert found.bound_s < math.inf
    assert "the time budget ended" in {group.reason for group in found.pruned}
    in_time = search(drawn, ANY, workers=0)
    assert found.bound_s <= in_time.bound_s


def test_ties_go_to_the_first() -> None:
    estimate = best(workload(gpus(1))).estimate
    tied = [Candidate(strategy=Strategy(num_micro_batches=m), estimate=estimate) for m in (4, 2, 8)]
    assert select_best_graph_from_candidates(tied) is tied[0]


def test_every_candidate_has_a_price_or_a_reason_with_an_amount() -> None:
    drawn = workload(gpus(4, memory_bytes=int(2.2 * GIB)), num_blocks=3, parameters=(20_000_000,) * 5)
    found = search(drawn, ANY, workers=0)
    assert len(found.candidates) + sum(group.count for group in found.pruned) == found.num_candidates
    assert found.num_candidates == len(strategies(drawn))
    assert all((c.estimate is None) != (c.rejection is None) for c in found.candidates)
    assert all(c.bound_s <= c.estimate.step_time_s for c in found.candidates if c.estimate is not None)
    reasons = {c.rejection.kind: c.rejection for c in found.candidates if c.rejection is not None}
    assert reasons["layers"].reason == "4 stages need a block each, and the model has 3"
    nothing = search(workload(gpus(1, memory_bytes=int(1.3 * GIB)), num_blocks=3, batch_size=2), ANY, workers=0)
    reasons |= {c.rejection.kind: c.rejection for c in nothing.candidates if c.rejection is not None}
    assert nothing.bound_s == math.inf
    assert reasons["memory"].shortfall_bytes > 0
    assert "GiB" in reasons["memory"].reason
    assert any(c.estimate is not None for c in found.candidates)


def test_log_lines_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(select.logger, "info", lambda text, *values: lines.append(text.format(*values)))
    chosen = select_best_graph_from_candidates(search(workload(gpus(2)), ANY, workers=0).candidates)
    beginnings = [
        "The number of candidates is ",
        "Parallel Graph Compile start...",
        "Elapsed Time to compile all candidates = ",
        "Parallel Graph Compile finished.",
        "The number of possible candidates is ",
        "SelectBestGraphFromCandidates start...",
        "Elapsed Time to compute cost for survived candidates = ",
        "SelectBestGraphFromCandidates finished.",
        "Configuration for parallelism is selected.",
        chosen.strategy.summary(),
    ]
    assert len(lines) == len(beginnings)
    assert all(line.startswith(beginning) for line, beginning in zip(lines, beginnings, strict=True))


# --- the price ---


def assert_consistent(estimate: Estimate) -> None:
    parts = estimate.breakdown_s.model_dump().values()
    assert sum(parts) == pytest.approx(estimate.step_time_s, rel=1e-9, abs=1e-15)
    assert all(part >= -1e-12 for part in parts)
    for stage in estimate.stages:
        assert sum(stage.memory_parts_bytes.values()) == stage.peak_memory_bytes


@given(drawn=random_workloads(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_breakdown_sums_to_the_step(drawn: Workload, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        flavor = cpus(drawn.flavor.num_devices, memory_bytes=drawn.flavor.memory_bytes)
        drawn = drawn.model_copy(update={"flavor": flavor})
    if data.draw(st.booleans()):
        drawn = drawn.model_copy(update={"practice": Practice(blocking_sends=True)})
    strategy = data.draw(st.sampled_from([s for s in strategies(drawn) if s.total_stages <= drawn.num_blocks]))
    cuts = list(all_cuts(drawn, data.draw(layouts(strategy))))
    assert_consistent(price(drawn, data.draw(st.sampled_from(cuts))))


def priced(num_devices: int, **fields: Any) -> Estimate:
    """On hosts of eight; a model whose communication counts."""
    parameters = (100_000_000,) * 10
    drawn = workload(gpus(num_devices), num_blocks=8, batch_size=64, parameters=parameters, tied=50_000_000)
    return cut_and_price(drawn, Strategy(**fields))


def test_groups_inside_hosts_gather_without_the_network() -> None:
    """Their sums over hosts move an eighth of the gradients."""
    fields: dict[str, Any] = {"data_parallel": 32, "num_micro_batches": 2, "distribute_param": 3}
    whole = priced(32, **fields)
    inside, torn = (priced(32, **fields, shard_group_size=size) for size in (8, 16))
    assert inside.breakdown_s.dp_comm < min(torn.breakdown_s.dp_comm, whole.breakdown_s.dp_comm)
    assert inside.stages[0].peak_memory_bytes > torn.stages[0].peak_memory_bytes > whole.stages[0].peak_memory_bytes


def test_groups_sum_their_gradients_once_a_step() -> None:
    """With twice the micro-batches only what groups do among themselves comes twice."""
    fields: dict[str, Any] = {"data_parallel": 16, "distribute_param": 2, "shard_group_size": 4}
    found = [priced(16, **fields, num_micro_batches=n, batch_per_device=4 // n) for n in (1, 2, 4)]
    one, two, four = (estimate.breakdown_s.dp_comm + estimate.hidden_comm_s for estimate in found)
    assert four - two == pytest.approx(2 * (two - one))
    assert two - one < one / 2


def test_pipelines_inside_hosts_send_without_the_network() -> None:
    """And leave the network to their replicas."""
    fields: dict[str, Any] = {"num_stages": 8, "data_parallel": 4, "num_micro_batches": 16}
    apart, together = priced(32, **fields), priced(32, **fields, mesh_order=("dp", "pp", "tp"))
    assert together.breakdown_s.pp_comm < apart.breakdown_s.pp_comm
    assert together.breakdown_s.dp_comm > apart.breakdown_s.dp_comm


def test_stages_that_wait_for_their_sends_take_that_longer_each_micro_batch() -> None:
    """By hand, 1f1b on two equal stages: the second is never idle after its first forward."""
    none, block = segment(forward_s=0.0), segment(forward_s=1e-3)
    drawn = workload(gpus(2), costs=(none, block, none), num_blocks=2, batch_size=16, parameters=(0,) * 4)
    strategy = Strategy(num_stages=2, num_micro_batches=16)
    blocking = drawn.model_copy(update={"practice": Practice(blocking_sends=True)})
    free, blocked = (cut_and_price(one, strategy) for one in (drawn, blocking))
    send_s = Topology(drawn.flavor, drawn.table).send_recv_s(block.input_bytes, (0, 1), group_size=2)
    assert blocked.step_time_s == pytest.approx(17 * (3e-3 + send_s))
    assert blocked.breakdown_s.pp_comm >= 16 * send_s
    assert free.step_time_s < blocked.step_time_s
    assert_consistent(blocked)
    alone = Strategy(num_micro_batches=16)
    one = drawn.model_copy(update={"flavor": gpus(1)})
    assert cut_and_price(one, alone) == cut_and_price(one.model_copy(update={"practice": blocking.practice}), alone)


def test_tensor_parallel_ranks_may_send_a_part_each_which_the_receivers_gather() -> None:
    drawn = workload(gpus(16), num_blocks=4, batch_size=16)
    strategy = Strategy(num_stages=2, tensor_parallel=8, num_micro_batches=16)
    parts = drawn.model_copy(update={"practice": Practice(scatters_sends=True)})
    whole_s, parts_s = (Overheads(one, strategy).send_s(1 << 30, stage=0) for one in (drawn, parts))
    topology = Topology(drawn.flavor, drawn.table)
    sent_s = topology.send_recv_s((1 << 30) / 8, (0, 1), group_size=2, stride=8)
    assert parts_s == pytest.approx(sent_s + topology.all_gather_s(1 << 30, group_size=8))
    assert parts_s < whole_s / 3
    divided = strategy.model_copy(update={"sequence_parallel": True})
    assert Overheads(parts, divided).send_s(1 << 30, stage=0) == whole_s, "every rank holds tokens of its own"


def test_processes_of_a_host_share_its_cores_wherever_their_stages_are() -> None:
    drawn = workload(cpus(4), num_blocks=6, batch_size=16)
    fields: dict[str, Any] = {"num_stages": 2, "data_parallel": 2, "num_micro_batches": 8}
    usual, other = (cut_and_price(drawn, Strategy(**fields, mesh_order=order)) for order in (None, ("dp", "pp", "tp")))
    assert usual == other


def test_one_stage_is_arithmetic() -> None:
    drawn = workload(gpus(1), num_blocks=4, batch_size=8, parameters=(0,) * 6)
    estimate = cut_and_price(drawn, Strategy(num_micro_batches=8, recomputation="full"))
    forward_s = 1e-4 + 4e-3 + 5e-4
    assert estimate.breakdown_s.compute == pytest.approx(8 * 3 * forward_s)
    assert estimate.breakdown_s.recompute == pytest.approx(8 * 4e-3), "neither embedding nor head is recomputed"
    assert estimate.step_time_s == pytest.approx(8 * (3 * forward_s + 4e-3))
    assert estimate.tokens_per_second == pytest.approx(8 * 128 / estimate.step_time_s)
    assert estimate.mfu == pytest.approx(drawn.step_flops / (312e12 * estimate.step_time_s))


def test_sharding_levels_pay_for_their_collectives() -> None:
    drawn = workload(gpus(4), num_blocks=4, parameters=(50_000_000,) * 6)
    drawn = drawn.model_copy(update={"practice": Practice(overlap=False)})
    costs = {
        level: cut_and_price(
            drawn, Strategy(data_parallel=4, num_micro_batches=4, distribute_param=level)
        ).breakdown_s.dp_comm
        for level in (0, 1, 2, 3)
    }
    assert 0 < costs[1] < costs[2] < costs[3]
    # gather in 2 bytes + reduce_scatter in 4 bytes once, against one all_reduce in 4 bytes: three quarters.
    assert costs[1] == pytest.approx(costs[0] * 3 / 4, rel=0.05)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_compute_hides_collectives_and_costs_nothing_itself(level: Literal[0, 1, 2, 3]) -> None:
    strategy = Strategy(data_parallel=4, num_micro_batches=4, distribute_param=level)
    shown, hiding = (
        cut_and_price(
            workload(gpus(4), num_blocks=4, parameters=(50_000_000,) * 6).model_copy(
                update={"practice": Practice(overlap=overlap)}
            ),
            strategy,
        )
        for overlap in (False, True)
    )
    assert shown.hidden_comm_s == pytest.approx(0, abs=1e-12)
    assert hiding.hidden_comm_s > 1e-6
    assert hiding.breakdown_s.dp_comm + hiding.hidden_comm_s == pytest.approx(shown.breakdown_s.dp_comm)
    assert hiding.breakdown_s.compute == shown.breakdown_s.compute
    assert_consistent(hiding)


def test_tied_parameters_are_summed_across_the_pipeline() -> None:
    free, tied = (workload(gpus(2), tied=size, parameters=(0,) * 8) for size in (0, 10_000_000))
    strategy = Strategy(num_stages=2, num_micro_batches=16)
    assert cut_and_price(tied, strategy).breakdown_s.pp_comm > cut_and_price(free, strategy).breakdown_s.pp_comm
    assert cut_and_price(tied, Strategy(data_parallel=2, num_micro_batches=8)).breakdown_s.pp_comm == 0


def test_processes_that_share_cores_wait_for_them() -> None:
    drawn = workload(cpus(4 * CPU_CORES), parameters=(0,) * 8, batch_size=8)
    shared = cut_and_price(drawn, Strategy(data_parallel=4 * CPU_CORES))
    alone = cut_and_price(
        drawn.model_copy(update={"flavor": gpus(4 * CPU_CORES)}), Strategy(data_parallel=4 * CPU_CORES)
    )
    assert alone.breakdown_s.core_sharing == 0
    assert shared.step_time_s == pytest.approx(4 * (shared.step_time_s - shared.breakdown_s.core_sharing))
    assert_consistent(shared)


def test_a_model_that_costs_nothing_has_a_finite_price() -> None:
    nothing = segment(forward_s=0.0)
    drawn = workload(gpus(1), costs=(nothing,) * 3, parameters=(0,) * 8, batch_size=1)
    estimate = cut_and_price(drawn, Strategy())
    assert (estimate.step_time_s, estimate.tokens_per_second, estimate.mfu) == (0, 0, 0)


def test_a_named_strategy_need_not_fit() -> None:
    drawn = workload(gpus(2, memory_bytes=GIB // 2))
    strategy = Strategy(num_stages=2, num_micro_batches=16)
    assert solve(Problem(drawn), strategy).rejection is not None
    estimate = cut_and_price(drawn, strategy)
    assert estimate.peak_memory_bytes > capacity_bytes(drawn)


def test_given_stages_are_kept() -> None:
    drawn = workload(gpus(2))
    bounds = ((0, 1), (2, 7))
    plans = tuple(StagePlan(first_segment=a, last_segment=b, recomputation="none") for a, b in bounds)
    strategy = Strategy(num_stages=2, num_micro_batches=16, stages=plans)
    assert solve(Problem(drawn), strategy).strategy.stages == plans
    assert (
        cut_and_price(drawn, strategy).step_time_s
        > cut_and_price(drawn, strategy.model_copy(update={"stages": None})).step_time_s
    )
    with pytest.raises(ConfigError, match="not a cut"):
        solve(Problem(drawn), strategy.model_copy(update={"stages": plans[1:]}))


def test_given_levels_are_priced_block_by_block() -> None:
    drawn = workload(gpus(1), num_blocks=4, batch_size=8, parameters=(0,) * 6)

    def recompute_s(recomputation: Any) -> float:
        plan = StagePlan(first_segment=0, last_segment=5, recomputation=recomputation)
        return cut_and_price(drawn, Strategy(num_micro_batches=8, stages=(plan,))).breakdown_s.recompute

    assert recompute_s(("full", "none", "selective", "none")) == pytest.approx(8 * (1e-3 + 1e-3 / 4))
    assert recompute_s(("full",) * 4) == recompute_s("full") == pytest.approx(8 * 4e-3)
    with pytest.raises(ConfigError, match="3 recomputation levels are given for the 4 blocks"):
        recompute_s(("full", "none", "none"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_stages": 8, "data_parallel": 1}, "8 devices, not 2"),
        ({"num_micro_batches": 4}, "8 rows a step, not 16"),
        ({"tensor_parallel": 2, "data_parallel": 1, "num_micro_batches": 16}, "has no such split"),
    ],
)
def test_a_strategy_for_something_else_is_refused(changes: dict[str, Any], words: str) -> None:
    fields = {"data_parallel": 2, "num_micro_batches": 8} | changes
    with pytest.raises(ConfigError, match=words):
        cut_and_price(workload(gpus(2)), Strategy(**fields))


# --- nothing fits ---


def refusal(drawn: Workload, constraints: Constraints = ANY) -> NoFeasiblePlanError:
    found = search(drawn, constraints, workers=0)
    with pytest.raises(NoFeasiblePlanError) as raised:
        select_best_graph_from_candidates(found.candidates, workload=drawn, constraints=constraints)
    return raised.value


def test_the_shortfall_is_the_smallest_and_names_its_parts() -> None:
    drawn = workload(gpus(1, memory_bytes=2 * GIB), num_blocks=4, parameters=(100_000_000,) * 6)
    error = refusal(drawn)
    rejected = [c.rejection for c in search(drawn, ANY, workers=0).candidates if c.rejection is not None]
    shortfall = min(rejection.shortfall_bytes for rejection in rejected)
    assert f"lacks {shortfall / GIB:.2f} GiB" in error.what
    assert "optimizer" in error.why
    assert error.exit_code == 3


def test_more_devices_are_proposed_and_fit() -> None:
    drawn = workload(gpus(1, memory_bytes=4 * GIB), num_blocks=4, parameters=(100_000_000,) * 6)
    error = refusal(drawn)
    number = int(error.remedy.split(" devices of this kind")[0].split()[-1])
    larger = drawn.model_copy(update={"flavor": gpus(number, memory_bytes=4 * GIB)})
    assert best_s(larger) < math.inf


@pytest.mark.parametrize(
    ("constraint", "name"),
    [({"activation_recomputation": False}, "activation_recomputation"), ({"distribute_parameter": 0}, "distribute_")],
)
def test_a_constraint_in_the_way_is_named(constraint: dict[str, Any], name: str) -> None:
    by_name = {
        "activation_recomputation": workload(
            gpus(1, memory_bytes=6 * GIB), costs=(segment(forward_s=1e-3, saved_bytes=GIB),) * 3, num_blocks=8
        ),
        "distribute_": workload(gpus(4, memory_bytes=4 * GIB), num_blocks=1, parameters=(50_000_000,) * 3),
    }
    constraints = Constraints(**constraint)
    assert f"leave {name}" in refusal(by_name[name], constraints).remedy
    assert best_s(by_name[name]) < math.inf


def test_a_larger_ratio_is_proposed_when_it_is_enough() -> None:
    drawn = workload(gpus(1, memory_bytes=2 * GIB), num_blocks=1, parameters=(10_000_000,) * 3, memory_ratio=0.6)
    error = refusal(drawn)
    ratio = float(error.remedy.split("memory_ratio=")[1].split()[0])
    assert best_s(drawn.model_copy(update={"memory_ratio": ratio})) < math.inf
    assert best_s(drawn.model_copy(update={"memory_ratio": ratio - 0.02})) == math.inf
