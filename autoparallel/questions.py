"""Questions around a plan (which flavor, how far it scales, why not another way): a model in, plans side by side out.

A model is captured once for all plans of a question, and not at all where the cache knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoparallel.api import Asked, FlavorLike, plan_asked, plan_graph
from autoparallel.cost.flavors import NAMED_DIES, gpu_hosts, resolve_flavor
from autoparallel.cost.tables import available_devices, load_table, nearest
from autoparallel.errors import ConfigError, NoFeasiblePlanError
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import Graph
from autoparallel.ir.schema import Schema
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import Constraints
from autoparallel.plans.words import narrowed
from autoparallel.progress import progress

Outcome = Plan | ConfigError | NoFeasiblePlanError
"""A plan, or why there is none."""
BILLION = 10**9
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)


class Answer(Schema):
    """What one flavor would take for a step; without `strategy` it cannot, and `reason` says why."""

    flavor: str
    device: str
    num_devices: int
    num_hosts: int
    reason: str = ""
    strategy: str = ""
    step_time_s: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    gap: float | None = None
    """By what share the step may exceed the shortest there is, at most."""

    @property
    def fits(self) -> bool:
        return self.step_time_s is not None


class FlavorAnswer(Answer):
    """With what the training costs there."""

    device_hours_per_step: float | None = None
    device_hours_per_billion_tokens: float | None = None
    price_per_billion_tokens: float | None = None
    """In the money of the prices that were given."""


class ScaleAnswer(Answer):
    """Of one size of a cluster."""

    batch_size: int
    efficiency: float | None = None
    """Tokens of a device in a second, over those in the smallest cluster that can."""


def which_flavor(
    model: Any,
    flavors: Sequence[FlavorLike] | None = None,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "auto",
    constraints: Constraints | None = None,
    prices: Mapping[str, float] | None = None,
    workers: int | None = None,
    budget_s: float | None = None,
) -> list[FlavorAnswer]:
    """Every flavor's best plan, the cheapest first, those that cannot last: the first row answers "which one".

    By default of MoAI's sizes and one host of each GPU. Cheapest is what takes the fewest device-hours a token, or the
    least money where `prices` (of a device-hour, by device or by flavor; what has none comes after) are given; the
    faster of equals. `budget_s` is for each plan.
    """
    resolved = [resolve_flavor(flavor) for flavor in flavors or (*NAMED_DIES, *gpu_hosts())]
    rates = _rates(prices or {}, resolved)
    asked = Asked(model)
    planned = _each(
        asked,
        [(flavor, batch_size) for flavor in resolved],
        seq_len=seq_len,
        dtype=dtype,
        constraints=constraints,
        workers=workers,
        budget_s=budget_s,
    )
    tokens = batch_size * seq_len
    rows = []
    for flavor, plan in zip(resolved, planned, strict=True):
        facts: dict[str, Any] = {}
        if isinstance(plan, Plan):
            hours = flavor.num_devices * plan.estimate.step_time_s / 3600
            rate = rates.get(flavor.name)
            facts = {
                "device_hours_per_step": hours,
                "device_hours_per_billion_tokens": hours * BILLION / tokens,
                "price_per_billion_tokens": None if rate is None else rate * hours * BILLION / tokens,
            }
        rows.append(FlavorAnswer(**_facts(flavor, plan), **facts))
    return sorted(rows, key=_cost)


def _cost(row: FlavorAnswer) -> tuple[float, ...]:
    amounts = (row.price_per_billion_tokens, row.device_hours_per_step, row.step_time_s)
    return tuple(math.inf if amount is None else amount for amount in amounts)


def _rates(prices: Mapping[str, float], flavors: Sequence[Flavor]) -> dict[str, float]:
    """Of a device-hour, by the name of the flavor."""
    known = {name.casefold(): name for name in (*available_devices(), *(flavor.name for flavor in flavors))}
    given: dict[str, float] = {}
    for name, price in prices.items():
        if name.casefold() not in known:
            close = nearest(name, tuple(known.values()))
            raise ConfigError(
                f"the price of {name!r} is of no device and of no flavor that was asked for",
                why="prices are of a device-hour, by device or by flavor",
                remedy=f"did you mean {' or '.join(close)}?" if close else "`autoparallel flavors` lists all names",
            )
        if not (math.isfinite(price) and price >= 0):
            raise ConfigError(f"{price} is no price of {name}", why="it must be 0 or more")
        given[name.casefold()] = price
    found = {flavor.name: given.get(flavor.name.casefold(), given.get(flavor.device.casefold())) for flavor in flavors}
    return {name: price for name, price in found.items() if price is not None}


def scaling(
    model: Any,
    flavor: FlavorLike,
    devices: Sequence[int] = DEVICES,
    *,
    batch_size: int | None = None,
    rows_per_device: int | None = None,
    seq_len: int,
    dtype: str = "auto",
    constraints: Constraints | None = None,
    workers: int | None = None,
    budget_s: float | None = None,
) -> list[ScaleAnswer]:
    """The best plan on each number of devices of a flavor's kind, in hosts as full as its own, the smallest first.

    `batch_size` rows a step on all of them (strong scaling), or `rows_per_device` (weak). `budget_s` is for each plan.
    """
    if (batch_size is None) == (rows_per_device is None):
        raise ConfigError(
            "scaling needs a batch",
            why="either the whole batch stays the same, or each device's share of it",
            remedy="give one of batch_size and rows_per_device",
        )
    kind = resolve_flavor(flavor)
    clusters = [_cluster(kind, count) for count in sorted(set(devices))]
    batches = [batch_size or (rows_per_device or 0) * cluster.num_devices for cluster in clusters]
    planned = _each(
        Asked(model),
        list(zip(clusters, batches, strict=True)),
        seq_len=seq_len,
        dtype=dtype,
        constraints=constraints,
        workers=workers,
        budget_s=budget_s,
    )
    rows: list[ScaleAnswer] = []
    first: float | None = None
    for cluster, rows_a_step, plan in zip(clusters, batches, planned, strict=True):
        efficiency = None
        if isinstance(plan, Plan):
            each = plan.estimate.tokens_per_second / cluster.num_devices
            first = first or each
            efficiency = each / first
        rows.append(ScaleAnswer(**_facts(cluster, plan), batch_size=rows_a_step, efficiency=efficiency))
    return rows


def _cluster(kind: Flavor, num_devices: int) -> Flavor:
    """So many devices of a flavor's kind."""
    if num_devices < 1:
        raise ConfigError(f"{num_devices} devices are no cluster", remedy="give numbers of 1 or more")
    if kind.is_cpu:
        return resolve_flavor(f"cpu:{num_devices}")
    full = int(load_table(kind.device).devices_per_host.value)
    host = min(kind.devices_per_host if kind.num_hosts > 1 else full, num_devices)
    name = f"{num_devices}x{kind.device}" if num_devices <= host else f"{-(-num_devices // host)}x{host}x{kind.device}"
    return kind.model_copy(update={"name": name, "num_devices": num_devices, "devices_per_host": host})


def _each(asked: Asked, questions: Sequence[tuple[Flavor, int]], **options: Any) -> list[Outcome]:
    """A plan for each flavor and batch, or why there is none; an error where the question fits none of them."""
    found: list[Outcome] = []
    with progress("Plans", total=len(questions)) as advance:
        for flavor, batch_size in questions:
            try:
                found.append(plan_asked(asked, flavor, batch_size=batch_size, **options))
            except (ConfigError, NoFeasiblePlanError) as error:
                found.append(error)
            advance(flavor.name)
    first = found[0] if found else None
    if isinstance(first, ConfigError) and all(isinstance(each, ConfigError) for each in found):
        raise first
    return found


def _facts(flavor: Flavor, plan: Outcome) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "flavor": flavor.name,
        "device": flavor.device,
        "num_devices": flavor.num_devices,
        "num_hosts": flavor.num_hosts,
    }
    if not isinstance(plan, Plan):
        return facts | {"reason": f"{plan.what}: {plan.why}" if plan.why else plan.what}
    estimate = plan.estimate
    return facts | {
        "strategy": plan.strategy.summary(),
        "step_time_s": estimate.step_time_s,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "gap": plan.gap,
    }


def plan_of_subspace(plan: Plan, further: Constraints, *, model: Any = None) -> Outcome:
    """The best plan of the same question under further constraints, or why there is none.

    `model` is that of the plan; a plan that was made in this process remembers it.
    """
    known = model if model is not None else plan.remembered
    if known is None:
        raise ConfigError(
            "why not another way can only be told with the model",
            why="this plan was loaded from a file, or its model is gone, and a plan holds no model",
            remedy="give model=: the model, its config or the folder of either (on the command line: --model FOLDER)",
        )
    graph = known if isinstance(known, Graph) else Asked(known).program(plan.precision).graph
    plan.check_matches(fingerprint=graph.fingerprint)
    try:
        found, _ = plan_graph(
            graph,
            plan.flavor,
            batch_size=plan.batch_size,
            seq_len=plan.seq_len,
            precision=plan.precision,
            constraints=narrowed(plan.constraints, further),
        )
    except (NoFeasiblePlanError, ConfigError) as error:
        return error
    return found


__all__ = ["Answer", "FlavorAnswer", "ScaleAnswer", "plan_of_subspace", "scaling", "which_flavor"]
