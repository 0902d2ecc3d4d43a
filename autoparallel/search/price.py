"""One strategy in; its stages, or why it is impossible, then its price out.

The parts of a price are those of the pipeline rank that ends the step (`step.run_step`); they sum to the step time.
"""

from __future__ import annotations

from collections.abc import Hashable

from autoparallel.cost.compute import peak_flops_per_s
from autoparallel.cost.memory import capacity_bytes, rank_memory, segment_parameters
from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.estimate import Breakdown, Estimate, Rejection, StageEstimate
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, StagePlan, Strategy
from autoparallel.search.cuts import Found, Shortfall, TooLarge, TooSlow, find_cuts
from autoparallel.search.problem import Local, Problem
from autoparallel.search.stage_costs import UNLIMITED_BYTES
from autoparallel.search.stage_times import StageSeconds, stage_seconds
from autoparallel.search.step import run_step
from autoparallel.search.windows import UNLIMITED_S

GIB = 2**30


def solve(problem: Problem, strategy: Strategy, within_s: float = UNLIMITED_S, *, polished: bool = False) -> Candidate:
    """The strategy with its stages and its price, or with the reason why it is impossible, or slower than a limit.
    Stages that are given are kept.
    """
    workload = problem.workload
    check_strategy(workload, strategy, has_split=bool(problem.locals(strategy)))
    if strategy.total_stages > max(1, workload.num_blocks):
        reason = f"{strategy.total_stages} stages need a block each, and the model has {workload.num_blocks}"
        return Candidate(strategy=strategy, rejection=Rejection(reason=reason, kind="layers"))
    if strategy.tensor_parallel in workload.impossible_degrees:
        reason = workload.impossible_degrees[strategy.tensor_parallel]
        return Candidate(strategy=strategy, rejection=Rejection(reason=reason, kind="split"))
    tried = [_under_split(local, strategy, within_s, polished=polished) for local in problem.locals(strategy)]
    priced = [candidate for candidate in tried if candidate.estimate is not None]
    if priced:
        best = min(priced, key=lambda candidate: _step_time_s(candidate))
        return best.model_copy(update={"bound_s": min(c.bound_s for c in tried if not _is_impossible(c))})
    slow = [candidate for candidate in tried if not _is_impossible(candidate)]
    return min(slow, key=lambda c: c.bound_s) if slow else min(tried, key=_shortfall_bytes)


def _under_split(local: Local, strategy: Strategy, within_s: float, *, polished: bool) -> Candidate:
    """One candidate, of one split."""
    workload, split = local.workload, strategy.model_copy(update={"splits": local.splits})
    found: Found | Shortfall | TooSlow | TooLarge
    if split.stages:
        found = _given_stages(workload, split)
    else:
        found = find_cuts(workload, split, costs=local.costs(split), within_s=within_s, polished=polished)
    if isinstance(found, TooSlow):
        rejection = Rejection(reason=f"no step is shorter than {found.limit_s:.6g} s", kind="time")
        return Candidate(strategy=strategy, rejection=rejection, bound_s=found.limit_s)
    if isinstance(found, TooLarge):
        return Candidate(strategy=strategy, rejection=Rejection(reason="no cut fits into memory", kind="memory"))
    if isinstance(found, Shortfall):
        return Candidate(strategy=strategy, rejection=_memory_rejection(workload, split, found))
    cut = _with_levels_of_stages(split.model_copy(update={"stages": found.stages}))
    estimate = _price(workload, cut)
    return Candidate(strategy=cut, estimate=estimate, bound_s=min(found.bound_s, estimate.step_time_s))


def _with_levels_of_stages(strategy: Strategy) -> Strategy:
    """The highest and the least level that some block has, instead of those that were allowed."""
    levels = sorted(
        {name for plan in strategy.stages or () for name in plan.levels}, key=RECOMPUTATION_LEVELS.__getitem__
    )
    least = levels[0] if len(levels) > 1 else None
    return strategy.model_copy(update={"recomputation": levels[-1], "least_recomputation": least})


def _is_impossible(candidate: Candidate) -> bool:
    return candidate.rejection is not None and candidate.rejection.kind != "time"


def _step_time_s(candidate: Candidate) -> float:
    return candidate.estimate.step_time_s if candidate.estimate is not None else UNLIMITED_S


def _shortfall_bytes(candidate: Candidate) -> int:
    assert candidate.rejection is not None
    return candidate.rejection.shortfall_bytes


def cut_and_price(workload: Workload, strategy: Strategy) -> Estimate:
    """Price a strategy that somebody named, cut where the closed form is least unless it has stages. Memory is
    told, not checked.
    """
    check_strategy(workload, strategy, has_split=bool(workload.under(strategy)))
    if strategy.tensor_parallel in workload.impossible_degrees:
        raise ConfigError(
            f"the model cannot be split over {strategy.tensor_parallel} tensor-parallel ranks",
            why=workload.impossible_degrees[strategy.tensor_parallel],
            remedy="choose a degree that divides one of these",
        )
    if strategy.stages:
        local, strategy = workload.under(strategy)[0]
        _check_stages(local, strategy)
        return _price(local, strategy)
    if strategy.total_stages > max(1, workload.num_blocks):
        raise ConfigError(
            f"a model of {workload.num_blocks} blocks cannot be cut into {strategy.total_stages} stages",
            why="a stage holds at least one block",
            remedy=f"choose num_stages × virtual_stages up to {max(1, workload.num_blocks)}",
        )
    local, strategy = workload.under(strategy)[0]
    found = find_cuts(local, strategy, limit_bytes=UNLIMITED_BYTES, polished=False)
    assert isinstance(found, Found)
    return _price(local, strategy.model_copy(update={"stages": found.stages}))


def check_strategy(workload: Workload, strategy: Strategy, *, has_split: bool) -> None:
    """Raise ConfigError for a strategy that is not one of this workload's."""
    have = {"devices": workload.flavor.num_devices, "rows a step": workload.batch_size}
    for what, asked in (("devices", strategy.num_devices), ("rows a step", strategy.batch_size)):
        if asked != have[what]:
            raise ConfigError(
                f"the strategy ({strategy.summary()}) is for {asked} {what}, not {have[what]}",
                why="devices = num_stages × tensor_parallel × context_parallel × data_parallel; "
                "rows = data_parallel × batch_per_device × num_micro_batches",
                remedy="change these so that both products match the flavor and the batch size",
            )
    assert strategy.batch_per_device in workload.costs, f"no costs for batch_per_device {strategy.batch_per_device}"
    if strategy.sequence_parallel and (workload.seq_len % strategy.tensor_parallel or strategy.tensor_parallel == 1):
        raise ConfigError(
            f"sequence_parallel over {strategy.tensor_parallel} tensor-parallel ranks",
            why=f"{workload.seq_len} tokens are divided over the ranks of tensor parallelism",
            remedy="choose a tensor_parallel degree above 1 that divides the sequence length",
        )
    known = strategy.tensor_parallel == 1 or strategy.tensor_parallel in workload.impossible_degrees
    if not known and not has_split:
        raise ConfigError(
            f"the strategy ({strategy.summary()}) has no such split",
            why=f"splits {strategy.splits} are not among those that cost least",
            remedy="leave splits out: they are chosen by cost",
        )


def _check_stages(workload: Workload, strategy: Strategy) -> None:
    """Raise ConfigError for given stages that are none of this model."""
    assert strategy.stages is not None
    bounds = [(plan.first_segment, plan.last_segment) for plan in strategy.stages]
    expected = [0, *(last + 1 for _, last in bounds)]
    whole = [first for first, _ in bounds] == expected[:-1] and expected[-1] == len(workload.segment_classes)
    if not whole or any(first > last for first, last in bounds) or len(bounds) != strategy.total_stages:
        raise ConfigError(
            f"the stages {bounds} are not a cut of the model into {strategy.total_stages}",
            why=f"stages are runs of segments that follow each other from 0 to {len(workload.segment_classes) - 1}",
            remedy="leave stages out: the search cuts the model itself",
        )
    for plan in strategy.stages:
        names, num_blocks = plan.recomputation, len(plan.blocks(len(workload.segment_classes)))
        if isinstance(names, tuple) and len(names) != num_blocks:
            raise ConfigError(
                f"{len(names)} recomputation levels are given for the {num_blocks} blocks of segments "
                f"{plan.first_segment} to {plan.last_segment}",
                why="a stage takes one level for all of its blocks, or one for each",
                remedy="give as many as there are blocks; embedding and head are never recomputed",
            )


def _given_stages(workload: Workload, strategy: Strategy) -> Found | Shortfall:
    _check_stages(workload, strategy)
    assert strategy.stages is not None
    needed = [sum(rank_memory(workload, strategy, rank=rank).values()) for rank in range(strategy.num_stages)]
    excess_bytes = max(needed) - capacity_bytes(workload)
    if excess_bytes <= 0:
        return Found(strategy.stages, _price(workload, strategy).step_time_s)
    return Shortfall(rank=needed.index(max(needed)), stages=strategy.stages, excess_bytes=excess_bytes)


def _memory_rejection(workload: Workload, strategy: Strategy, shortfall: Shortfall) -> Rejection:
    cut = strategy.model_copy(update={"stages": shortfall.stages})
    parts = rank_memory(workload, cut, rank=shortfall.rank)
    assert sum(parts.values()) == capacity_bytes(workload) + shortfall.excess_bytes
    largest = sorted(parts, key=lambda part: -parts[part])[:3]
    held = ", ".join(f"{plan.first_segment} to {plan.last_segment}" for plan in cut.stages_of(shortfall.rank))
    reason = (
        f"stage {shortfall.rank} of {strategy.num_stages} (segments {held}) "
        f"needs {sum(parts.values()) / GIB:.2f} of {capacity_bytes(workload) / GIB:.2f} GiB per device in the best cut"
        ": " + ", ".join(f"{part} {parts[part] / GIB:.2f}" for part in largest)
    )
    return Rejection(reason=reason, kind="memory", shortfall_bytes=shortfall.excess_bytes)


def price(workload: Workload, strategy: Strategy) -> Estimate:
    """Predict the step time and memory of a strategy with stages."""
    local, _ = workload.under(strategy)[0]
    return _price(local, strategy)


def _price(workload: Workload, strategy: Strategy) -> Estimate:
    """The same, of a workload under the strategy's split."""
    assert strategy.stages is not None, "only strategies with stages have a price"
    step = run_step(workload, strategy, _all_seconds(workload, strategy, strategy.stages))
    rank, timeline, ties = step.ranks[step.critical], step.timeline, step.ties
    breakdown = Breakdown(
        compute=strategy.num_micro_batches * (rank.forward_s + rank.backward_s),
        recompute=strategy.num_micro_batches * rank.recompute_s,
        tp_comm=strategy.num_micro_batches * (rank.forward_tensor_s + rank.backward_tensor_s),
        dp_comm=strategy.num_micro_batches * rank.comm_s + rank.start_s + rank.reduce_s,
        pp_comm=timeline.transfer_s[step.critical] + step.blocked_s[step.critical] + ties.tie_s[step.critical],
        bubble=timeline.idle_s[step.critical] - timeline.transfer_s[step.critical] + ties.wait_s[step.critical],
        optimizer=rank.optimizer_s,
        core_sharing=step.core_sharing_s,
    )
    return Estimate(
        step_time_s=step.step_time_s,
        interval_s=_interval_s(workload, step.step_time_s),
        tokens_per_second=workload.batch_size * workload.seq_len / step.step_time_s if step.step_time_s > 0 else 0.0,
        mfu=_mfu(workload, strategy, step.step_time_s),
        breakdown_s=breakdown,
        hidden_comm_s=strategy.num_micro_batches * rank.hidden_s + rank.hidden_step_s,
        replicated_s=strategy.num_micro_batches * rank.replicated_s,
        stages=tuple(_stage_estimate(workload, strategy, i, rank) for i, rank in enumerate(step.ranks)),
    )


def _all_seconds(workload: Workload, strategy: Strategy, plans: tuple[StagePlan, ...]) -> list[StageSeconds]:
    """Of every stage, once for those that are alike."""
    shared = {segment for parameters in workload.shared for segment in parameters.segments}
    found: dict[Hashable, StageSeconds] = {}
    keys: list[Hashable] = []
    for plan in plans:
        segments = slice(plan.first_segment, plan.last_segment + 1)
        alone = shared.isdisjoint(range(plan.first_segment, plan.last_segment + 1))
        of_segments = (workload.segment_classes[segments], workload.parameters[segments], workload.addends[segments])
        keys.append((*of_segments, plan.recomputation) if alone else plan)
        if keys[-1] not in found:
            found[keys[-1]] = stage_seconds(workload, strategy, plan)
    return [found[key] for key in keys]


def _interval_s(workload: Workload, step_time_s: float) -> tuple[float, float] | None:
    spread = workload.table.step_time_spread
    return None if spread is None else (step_time_s / (1 + spread.value), step_time_s * (1 + spread.value))


def _mfu(workload: Workload, strategy: Strategy, step_time_s: float) -> float:
    peak = peak_flops_per_s(workload.table, workload.precision.compute_dtype) * strategy.num_devices
    return workload.step_flops / (peak * step_time_s) if peak * step_time_s > 0 else 0.0


def _stage_estimate(workload: Workload, strategy: Strategy, rank: int, seconds: StageSeconds) -> StageEstimate:
    """Of all stages of one pipeline rank."""
    counts = segment_parameters(workload, *strategy.stages_of(rank))
    parts = rank_memory(workload, strategy, rank=rank)
    return StageEstimate(
        forward_s=seconds.forward_s,
        backward_s=seconds.backward_s + seconds.recompute_s,
        parameters=sum(count.trainable + count.frozen for count in counts),
        peak_memory_bytes=sum(parts.values()),
        memory_parts_bytes=parts,
    )
