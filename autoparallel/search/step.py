"""The times of all stages in, one training step out, by pipeline rank:

    end of a rank  = gather + pipeline with its waits + reduction + gradients of tied parameters + optimizer
    step time      = the last end; on a CPU host at least (busy seconds of its processes) / (its cores)

Collectives of data parallelism count as far as compute does not hide them (`stage_times`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import Strategy
from autoparallel.schedule.simulate import Timeline, simulate, timetable_of
from autoparallel.search.stage_times import Overheads, StageSeconds


@dataclass(frozen=True)
class Ties:
    """By rank: when the gradients of shared parameters are summed too, what that took, and the wait for the others."""

    ready_s: list[float]
    tie_s: list[float]
    wait_s: list[float]


@dataclass(frozen=True)
class Step:
    """One training step; `critical` is the rank that ends it."""

    ranks: list[StageSeconds]
    """Of all stages of each rank together."""
    timeline: Timeline
    blocked_s: list[float]
    """Of each rank's busy time: waiting for its sends."""
    ties: Ties
    critical: int
    core_sharing_s: float
    step_time_s: float


def run_step(workload: Workload, strategy: Strategy, seconds: Sequence[StageSeconds]) -> Step:
    """Simulate a strategy with stages; `seconds` are theirs."""
    ranks = [reduce(add, seconds[rank :: strategy.num_stages]) for rank in range(strategy.num_stages)]
    timeline, blocked_s = _timeline(workload, strategy, seconds, start_s=[rank.start_s for rank in ranks])
    ready_s = [finish_s + rank.reduce_s for finish_s, rank in zip(timeline.finish_s, ranks, strict=True)]
    ties = _tie(workload, strategy, ready_s)
    ends_s = [end_s + rank.optimizer_s for end_s, rank in zip(ties.ready_s, ranks, strict=True)]
    busy_s = [
        rank_busy_s + rank.start_s + rank.reduce_s + tie_s + rank.optimizer_s
        for rank_busy_s, rank, tie_s in zip(timeline.busy_s, ranks, ties.tie_s, strict=True)
    ]
    working_s = [busy - blocked for busy, blocked in zip(busy_s, blocked_s, strict=True)]
    core_sharing_s = max(0.0, _core_bound_s(workload, strategy, working_s) - max(ends_s))
    return Step(
        ranks=ranks,
        timeline=timeline,
        blocked_s=blocked_s,
        ties=ties,
        critical=ends_s.index(max(ends_s)),
        core_sharing_s=core_sharing_s,
        step_time_s=max(ends_s) + core_sharing_s,
    )


def _timeline(
    workload: Workload, strategy: Strategy, seconds: Sequence[StageSeconds], *, start_s: list[float]
) -> tuple[Timeline, list[float]]:
    """The pipeline, from the start of the step to the last backward, and how long each rank is blocked by sends."""
    if strategy.num_stages == 1:
        (stage,) = seconds
        busy_s = strategy.num_micro_batches * (stage.forward_action_s + stage.backward_action_s)
        return Timeline([start_s], [busy_s], [0.0], [0.0], [stage.start_s + busy_s]), [0.0]
    assert strategy.stages is not None
    entering = [workload.cost(p.first_segment, strategy.batch_per_device).input_bytes for p in strategy.stages[1:]]
    overheads = Overheads(workload, strategy)
    sends_s = [overheads.send_s(size_bytes, stage=stage) for stage, size_bytes in enumerate(entering)]
    forward_s = backward_s = [0.0 for _ in seconds]
    if workload.practice.blocking_sends:  # a stage sends forwards to the next one, backwards to the one before
        forward_s, backward_s = [*sends_s, 0.0], [0.0, *sends_s]
        sends_s = [0.0 for _ in sends_s]
    timeline = simulate(
        timetable_of(strategy.schedule, strategy.num_stages, strategy.num_micro_batches, strategy.virtual_stages),
        cost_s={
            "F": [stage.forward_action_s + send_s for stage, send_s in zip(seconds, forward_s, strict=True)],
            "B": [stage.backward_action_s + send_s for stage, send_s in zip(seconds, backward_s, strict=True)],
            "I": [stage.input_gradient_action_s + send_s for stage, send_s in zip(seconds, backward_s, strict=True)],
            "W": [stage.weight_gradient_action_s for stage in seconds],
        },
        send_s=sends_s,
        start_s=start_s,
    )
    blocked_s = [
        strategy.num_micro_batches
        * sum(forward_s[rank :: strategy.num_stages] + backward_s[rank :: strategy.num_stages])
        for rank in range(strategy.num_stages)
    ]
    return timeline, blocked_s


def _tie(workload: Workload, strategy: Strategy, ready_s: list[float]) -> Ties:
    """Ranks that hold one parameter meet after their own reductions, in the order of `workload.shared`."""
    ties = Ties(list(ready_s), [0.0] * len(ready_s), [0.0] * len(ready_s))
    for shared in workload.shared:
        holders = [
            rank
            for rank in range(strategy.num_stages)
            if any(p.first_segment <= s <= p.last_segment for p in strategy.stages_of(rank) for s in shared.segments)
        ]
        tie_s = Overheads(workload, strategy).tie_s(shared, tuple(holders))
        if tie_s == 0:
            continue
        meet_s = max(ties.ready_s[rank] for rank in holders)
        for rank in holders:
            ties.wait_s[rank] += meet_s - ties.ready_s[rank]
            ties.tie_s[rank] += tie_s
            ties.ready_s[rank] = meet_s + tie_s
    return ties


def _core_bound_s(workload: Workload, strategy: Strategy, busy_s: list[float]) -> float:
    """No host does its processes' work in less than their busy seconds over its cores, however it shares them."""
    flavor = workload.flavor
    if flavor.cores_per_host is None:
        return 0.0
    hosts = [0.0] * flavor.num_hosts
    for rank in range(flavor.num_devices):
        hosts[rank // flavor.devices_per_host] += busy_s[strategy.place_of(rank).stage]
    return max(hosts) / flavor.cores_per_host
