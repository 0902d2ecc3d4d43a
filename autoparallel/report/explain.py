"""A plan in, plain ASCII text out: what was chosen, what it is predicted to cost, and why not each of the others.

Every time and every byte is predicted by the cost model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoparallel.ir.precision import Precision
from autoparallel.plans.candidate import Pruned
from autoparallel.plans.estimate import Breakdown, Estimate, Rejection
from autoparallel.plans.grid import AXES
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, StagePlan, Strategy
from autoparallel.report.text import clean, count, duration, safe, table, wrapped

NUM_RUNNERS_UP = 5
EXACT = 1e-6
"""A proved gap that is rounding."""
GIB = 2**30
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "reserve")
CHOICES: dict[str, Callable[[Strategy], str]] = {
    "stages": lambda s: str(s.num_stages),
    "tensor parallel": lambda s: _tensor(s),
    "micro-batches": lambda s: f"{s.num_micro_batches} of {s.batch_per_device} rows",
    "recomputation": lambda s: s.recomputation_range,
    "sharding": lambda s: f"distribute_param {_sharding(s)}",
    "schedule": lambda s: _schedule(s),
    "mesh order": lambda s: " ".join(s.mesh_order or AXES),
}

Priced = tuple[Strategy, Estimate]


def explain(plan: Plan) -> str:
    """The report; ends with a newline, no line is wider than `WIDTH`."""
    possible = _possible(plan)
    sections = [
        _question(plan),
        _choice(plan),
        _stages(plan),
        _memory(plan),
        _breakdown(plan.estimate),
        _tensor_parallel(plan),
        _notes(plan),
        _runners_up(plan, possible),
        _alternatives(plan, possible),
        _impossible(plan),
        _pruned(plan),
        _assumptions(plan),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _question(plan: Plan) -> str:
    model, flavor = plan.model, plan.flavor
    hosts = f"{flavor.num_hosts} host{'s' if flavor.num_hosts > 1 else ''}"
    capacity = f"{flavor.memory_bytes / GIB:.1f} GiB each, of which {_usable(plan) / GIB:.1f} may be used"
    parameters = f"{count(model.num_parameters)} parameters ({count(model.trainable_parameters)} trainable)"
    lines = [
        f"model   {clean(model.architecture)}, {parameters}, {model.num_blocks} blocks",
        f"flavor  {clean(flavor.name)}: {flavor.num_devices} x {clean(flavor.device)} in {hosts}, {capacity}",
        f"batch   {plan.batch_size} rows of {plan.seq_len} tokens a step, {_dtypes(plan.precision)}",
    ]
    return "\n".join([f"Plan for {clean(model.name)}", *(row for line in lines for row in wrapped(line, indent="  "))])


def _dtypes(precision: Precision) -> str:
    masters = f", masters in {precision.master_dtype}" if precision.separate_compute_copy else ""
    return f"compute in {precision.compute_dtype}{masters}"


def _choice(plan: Plan) -> str:
    estimate, count = plan.estimate, plan.num_candidates or len(plan.candidates)
    num_possible = sum(candidate.estimate is not None for candidate in plan.candidates)
    looked_at = f"{len(plan.candidates)} looked at one by one, " if count > len(plan.candidates) else ""
    speed = f"{estimate.tokens_per_second:,.0f} tokens/s, MFU {100 * estimate.mfu:.1f} %"
    lines = [
        f"Chosen, of {count} candidates ({looked_at}{num_possible} possible)",
        *wrapped(plan.strategy.summary(), indent="  "),
    ]
    lines.append(f"  predicted: {duration(estimate.step_time_s)} a step, {speed}")
    if plan.bound_s:
        proof = "none of the others is" if plan.gap < EXACT else f"others are at most {100 * plan.gap:.2f} %"
        lines.append(f"  proved: {proof} faster, by the same predictions")
    return "\n".join(lines)


def _stages(plan: Plan) -> str:
    rows = [["stage", "holds", "parameters", "forward", "backward", "recomputation"]]
    for rank, cost in enumerate(plan.estimate.stages):
        times = [duration(cost.forward_s), duration(cost.backward_s)]
        stages = plan.strategy.stages_of(rank)
        holds = _holds(stages, num_blocks=plan.model.num_blocks)
        levels = "; ".join(dict.fromkeys(_levels(stage) for stage in stages))
        rows.append([str(rank), holds, count(cost.parameters), *times, levels])
    return "Stages, per device; times predicted for one micro-batch\n" + table(rows, left=(1, 5))


def _memory(plan: Plan) -> str:
    """Peak memory by part."""
    named = {name for stage in plan.estimate.stages for name in stage.memory_parts_bytes}
    parts = [name for name in MEMORY_PARTS if name in named] + sorted(named.difference(MEMORY_PARTS))
    usable = _usable(plan)
    rows = [["stage", "peak", "of usable", *(clean(name)[:12] for name in parts)]]
    for index, stage in enumerate(plan.estimate.stages):
        sizes = [f"{stage.memory_parts_bytes.get(name, 0) / GIB:.2f}" for name in parts]
        peak = stage.peak_memory_bytes
        rows.append([str(index), f"{peak / GIB:.2f}", f"{100 * peak / usable:.0f} %", *sizes])
    return f"Predicted peak memory per device, GiB; usable: {usable / GIB:.2f}\n" + table(rows)


def _breakdown(estimate: Estimate) -> str:
    rows = [["term", "predicted", "share"]]
    step_time_s = estimate.step_time_s or 1.0
    for name, time_s in _terms(estimate.breakdown_s).items():
        if time_s:
            rows.append([name, duration(time_s), f"{100 * time_s / step_time_s:.1f} %"])
    rows.append(["step", duration(estimate.step_time_s), "100.0 %"])
    return "Predicted step time\n" + table(rows, left=(0,))


def _tensor_parallel(plan: Plan) -> str:
    """Which dims are sharded, and what every rank repeats."""
    strategy, estimate = plan.strategy, plan.estimate
    if strategy.tensor_parallel == 1:
        return ""
    lines = [f"Tensor parallelism over {strategy.tensor_parallel} ranks: the parameter dims that are divided"]
    splits = strategy.splits or ()
    of_blocks = sorted(set(plan.model.block_classes))
    names = {0: "embedding", len(splits) - 1: "head and loss"}
    for cls, split in enumerate(splits):
        kind = f"blocks ({of_blocks.index(cls) + 1} of {len(of_blocks)} kinds)" if len(of_blocks) > 1 else "blocks"
        divided = ", ".join(map(safe, split)) or "none"
        lines += wrapped(f"{names.get(cls, kind)}: {divided}", indent="  ")
    share = 100 * estimate.replicated_s / (estimate.breakdown_s.compute or 1.0)
    lines.append(f"  repeated by every rank: {duration(estimate.replicated_s)} a step, {share:.1f} % of compute")
    return "\n".join(lines)


def _notes(plan: Plan) -> str:
    lines = [line for note in plan.notes for line in wrapped(safe(note), indent="  - ")]
    return "\n".join(["Notes", *lines]) if lines else ""


def _runners_up(plan: Plan, possible: list[Priced]) -> str:
    """The next cheapest, and the term of the breakdown in which each loses most."""
    others = [(s, e) for s, e in possible if not _same(s, plan.strategy)][:NUM_RUNNERS_UP]
    if not others:
        return "Why this one\n  No other candidate is possible."
    rows = [["candidate", "predicted", "ratio", "loses most in"]]
    for strategy, estimate in others:
        ratio = estimate.step_time_s / (plan.estimate.step_time_s or 1.0)
        rows.append([_label(strategy), duration(estimate.step_time_s), f"{ratio:.3f}", _loss(plan.estimate, estimate)])
    return "Why this one: the runners-up\n" + table(rows, left=(0, 3))


def _alternatives(plan: Plan, possible: list[Priced]) -> str:
    """For each choice: the cheapest possible candidate that takes another value there."""
    rows = [["choice", "chosen", "best other", "predicted", "change", "loses most in"]]
    for name, value in CHOICES.items():
        chosen = value(plan.strategy)
        if name == "mesh order" and not any(candidate.strategy.mesh_order for candidate in plan.candidates):
            continue
        best = next(((s, e) for s, e in possible if value(s) != chosen), None)
        if best is not None:
            strategy, estimate = best
            change = 100 * (estimate.step_time_s / (plan.estimate.step_time_s or 1.0) - 1)
            costs = [duration(estimate.step_time_s), f"{change:+.1f} %", _loss(plan.estimate, estimate)]
            rows.append([name, chosen, value(strategy), *costs])
        else:
            rows.append([name, chosen, _no_alternative(plan, value, chosen), "-", "-", "-"])
    return "Each choice: the best candidate that differs in it, other choices free\n" + table(rows, left=(0, 1, 2, 5))


def _no_alternative(plan: Plan, value: Callable[[Strategy], str], chosen: str) -> str:
    """Why no other program takes another value for a choice."""
    others = [candidate for candidate in plan.candidates if value(candidate.strategy) != chosen]
    if any(candidate.estimate is not None for candidate in others):
        return "the same programs"
    if plan.pruned:
        return "none that could be faster"
    return f"none possible of {len(others)}" if others else "none tried"


def _impossible(plan: Plan) -> str:
    """Rejections by kind, each with its number, its range of shortfall and its nearest miss."""
    groups: dict[str, list[Rejection]] = {}
    for candidate in plan.candidates:
        if candidate.rejection is not None:
            groups.setdefault(candidate.rejection.kind, []).append(candidate.rejection)
    lines = []
    for kind, rejections in groups.items():
        nearest = min(rejections, key=lambda rejection: rejection.shortfall_bytes)
        sizes = sorted(r.shortfall_bytes for r in rejections if r.shortfall_bytes)
        span = " to ".join(dict.fromkeys(f"{size / GIB:.2f}" for size in (sizes[:1] + sizes[-1:])))
        amount = f", {span} GiB short on a device" if sizes else ""
        lines += wrapped(f"{len(rejections)} by {clean(kind)}{amount}; nearest: {safe(nearest.reason)}", indent="  ")
    return "\n".join(["Impossible candidates (predicted)", *lines]) if lines else ""


def _pruned(plan: Plan) -> str:
    """What was not looked at one by one, by reason."""
    groups: dict[str, list[Pruned]] = {}
    for group in plan.pruned:
        groups.setdefault(group.reason, []).append(group)
    lines = []
    for reason, members in groups.items():
        bounds = sorted(group.bound_s for group in members)
        shortest = f"; their steps take {duration(bounds[0])} or more" if bounds[0] > 0 else ""
        lines += wrapped(f"{sum(group.count for group in members)}: {safe(reason)}{shortest}", indent="  ")
    return "\n".join(["Candidates that cannot be the best (predicted)", *lines]) if lines else ""


def _assumptions(plan: Plan) -> str:
    lines = [line for assumption in plan.assumptions for line in wrapped(safe(assumption), indent="  - ")]
    return "\n".join(["Assumed figures that these predictions rest on", *lines]) if lines else ""


def _possible(plan: Plan) -> list[Priced]:
    """Possible candidates, cheapest first, each program once; ties keep the order of enumeration."""
    unique: dict[str, Priced] = {}
    for candidate in plan.candidates:
        if candidate.estimate is not None:
            unique.setdefault(_program(candidate.strategy), (candidate.strategy, candidate.estimate))
    return sorted(unique.values(), key=lambda pair: pair[1].step_time_s)


def _identity(strategy: Strategy) -> str:
    """Candidates may or may not have their stages filled in."""
    return strategy.model_copy(update={"stages": None}).model_dump_json()


def _program(strategy: Strategy) -> str:
    """What runs: equal stages are equal, whatever recomputation their strategies would have allowed."""
    if strategy.stages is None:
        return _identity(strategy)
    return strategy.model_copy(update={"recomputation": "none", "least_recomputation": None}).model_dump_json()


def _same(one: Strategy, other: Strategy) -> bool:
    return _identity(one) == _identity(other)


def _label(strategy: Strategy) -> str:
    parts = [f"pp {strategy.num_stages}", f"dp {strategy.data_parallel}", f"tp {_tensor(strategy)}"]
    parts.append(f"micro {strategy.num_micro_batches} x {strategy.batch_per_device}")
    parts += [strategy.recomputation_range, f"shard {_sharding(strategy)}", _schedule(strategy)]
    parts += [" ".join(strategy.mesh_order)] if strategy.mesh_order else []
    return ", ".join(parts)


def _schedule(strategy: Strategy) -> str:
    return f"{strategy.schedule} x {strategy.virtual_stages}" if strategy.virtual_stages > 1 else strategy.schedule


def _sharding(strategy: Strategy) -> str:
    """The level, and over how many replicas where that is not all of them."""
    groups = f" over {strategy.shard_group_size}" if strategy.shard_group_size else ""
    return f"{strategy.distribute_param}{groups}"


def _tensor(strategy: Strategy) -> str:
    return f"{strategy.tensor_parallel}, by sequence" if strategy.sequence_parallel else str(strategy.tensor_parallel)


def _loss(chosen: Estimate, other: Estimate) -> str:
    """The term where `other` is dearest against `chosen`."""
    if other.step_time_s == chosen.step_time_s:
        return "nothing: a tie"
    terms = _terms(chosen.breakdown_s)
    losses = {name: time_s - terms[name] for name, time_s in _terms(other.breakdown_s).items()}
    worst = max(losses, key=lambda name: losses[name])
    return f"{worst} +{duration(losses[worst])}" if losses[worst] > 1e-9 else "nothing"


def _terms(breakdown: Breakdown) -> dict[str, float]:
    return breakdown.model_dump()


def _holds(stages: Sequence[StagePlan], *, num_blocks: int) -> str:
    """What the stages of one pipeline rank hold; all their blocks are named together."""
    runs = [(max(stage.first_segment, 1), min(stage.last_segment, num_blocks)) for stage in stages]
    named = [str(first) if first == last else f"{first}-{last}" for first, last in runs if first <= last]
    parts = ["embedding"] if stages[0].first_segment == 0 else []
    if named:
        parts.append(("block " if named[0].isdigit() and len(named) == 1 else "blocks ") + ", ".join(named))
    if stages[-1].last_segment > num_blocks:
        parts.append("head and loss")
    return ", ".join(parts)


def _levels(stage: StagePlan) -> str:
    """`full`, or how many blocks have which level."""
    names = stage.recomputation
    if not isinstance(names, tuple):
        return names
    rising = sorted(set(names), key=RECOMPUTATION_LEVELS.__getitem__)
    return ", ".join(f"{names.count(name)} {name}" for name in reversed(rising))


def _usable(plan: Plan) -> float:
    return plan.flavor.memory_bytes * plan.constraints.usable_ratio(plan.flavor.memory_bytes)
