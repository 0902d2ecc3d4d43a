"""Answers that compare plans in, plain ASCII text out: which flavor, how far it scales, why not another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoparallel.errors import AutoParallelError, ConfigError
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import Constraints
from autoparallel.plans.words import in_words, parse_constraints
from autoparallel.report.text import clean, duration, safe, table, wrapped

if TYPE_CHECKING:
    from autoparallel.questions import FlavorAnswer, ScaleAnswer

BAR = 20
"""Characters of a full bar."""


def which_text(rows: Sequence[FlavorAnswer]) -> str:
    """The answer, then every flavor that can, then why the others cannot."""
    possible = [row for row in rows if row.step_time_s is not None]
    if not possible:
        return "\n".join(["No flavor can.", *_impossible(rows)]) + "\n"
    priced = any(row.price_per_billion_tokens is not None for row in possible)
    head = ["flavor", "devices", "step", "tokens/s", "MFU", "hours/step", "hours/1e9 tok"]
    lines = [[*head, *(["price/1e9 tok"] if priced else [])]]
    for row in possible:
        price = "-" if row.price_per_billion_tokens is None else f"{row.price_per_billion_tokens:,.2f}"
        hours = [f"{row.device_hours_per_step or 0:.4g}", f"{row.device_hours_per_billion_tokens or 0:,.1f}"]
        lines.append([clean(row.flavor), str(row.num_devices), *_speed(row), *hours, *([price] if priced else [])])
    best = possible[0]
    cheapest = "the least money" if best.price_per_billion_tokens is not None else "the fewest device-hours"
    said = wrapped(f"{clean(best.flavor)} takes {cheapest} (predicted): {best.strategy}", indent="")
    title = "Predicted; hours are those of one device, tok are tokens"
    return "\n".join([*said, "", title, table(lines, left=(0,)), *_impossible(rows)]) + "\n"


def scaling_text(rows: Sequence[ScaleAnswer]) -> str:
    """A line for each number of devices, with a bar as long as its efficiency."""
    lines = [["devices", "hosts", "batch", "step", "tokens/s", "MFU", "proved within", "efficiency", ""]]
    plans = []
    for row in rows:
        if row.step_time_s is None:
            continue
        share = row.efficiency or 0.0
        gap, bar = f"{100 * (row.gap or 0.0):.2f} %", "#" * min(BAR, round(BAR * share))
        sizes = [str(row.num_devices), str(row.num_hosts), str(row.batch_size)]
        lines.append([*sizes, *_speed(row), gap, f"{100 * share:.1f} %", bar])
        plans += wrapped(f"{row.num_devices}: {row.strategy}", indent="  ")
    if not plans:
        return "\n".join(["No number of devices can.", *_impossible(rows)]) + "\n"
    parts = ["Predicted", table(lines, left=(8,)), "", "Plans by number of devices", *plans, *_impossible(rows)]
    return "\n".join(parts) + "\n"


def why_not_text(plan: Plan, why_not: Constraints | Mapping[str, Any] | str, *, model: Any = None) -> str:
    """The best plan of a subspace beside the chosen one, term by term; or why there is none."""
    from autoparallel.questions import plan_of_subspace

    further = why_not if isinstance(why_not, Constraints) else parse_constraints(why_not)
    if not further.model_fields_set:
        raise ConfigError("there is nothing to ask for", remedy="name a constraint, as in tensor_parallel=8")
    found = plan_of_subspace(plan, further, model=model)
    title = f"Why not {safe(in_words(further))}"
    if isinstance(found, AutoParallelError):
        reasons = [found.what, *([found.why] if found.why else [])]
        return "\n".join([title, "  Nothing there is possible.", *_paragraphs(reasons)]) + "\n"
    ours, theirs = plan.estimate, found.estimate
    lines = [title, *_paragraphs([f"the best there: {found.strategy.summary()}"])]
    if found.strategy == plan.strategy:
        return "\n".join([*lines, "  It is the plan itself."]) + "\n"
    change = 100 * (theirs.step_time_s / ours.step_time_s - 1)
    said = f"predicted: {duration(theirs.step_time_s)} a step against {duration(ours.step_time_s)} ({change:+.1f} %)"
    lines.append(f"  {said}, proved within {100 * found.gap:.2f} %")
    terms, chosen = theirs.breakdown_s.model_dump(), ours.breakdown_s.model_dump()
    losses = {name: terms[name] - chosen[name] for name in terms}
    worst = max(losses, key=lambda name: losses[name])
    lines.append(f"  it loses most in {worst}" if losses[worst] > 0 else "  it loses in no term")
    rows = [["term", "chosen", "there", "difference"]]
    for name, loss in losses.items():
        if terms[name] or chosen[name]:
            rows.append([name, duration(chosen[name]), duration(terms[name]), _signed(loss)])
    difference = _signed(theirs.step_time_s - ours.step_time_s)
    rows.append(["step", duration(ours.step_time_s), duration(theirs.step_time_s), difference])
    return "\n".join([*lines, "", table(rows, left=(0,))]) + "\n"


def _speed(row: FlavorAnswer | ScaleAnswer) -> list[str]:
    return [duration(row.step_time_s or 0), f"{row.tokens_per_second or 0:,.0f}", f"{100 * (row.mfu or 0):.1f} %"]


def _impossible(rows: Sequence[FlavorAnswer] | Sequence[ScaleAnswer]) -> list[str]:
    found = [f"{clean(row.flavor)}: {safe(row.reason)}" for row in rows if row.step_time_s is None]
    return ["", "Impossible (predicted)", *_paragraphs(found)] if found else []


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in wrapped(text, indent="  ")]


def _signed(time_s: float) -> str:
    return f"{'-' if time_s < 0 else '+'}{duration(abs(time_s))}"
