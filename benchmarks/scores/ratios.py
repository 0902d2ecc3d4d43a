"""Ratios that papers measured, beside ours: they hold whatever the absolute error of a cost table.

`block time`: one block's forward and backward with its collectives, the difference of two depths. `rate`: FLOP/s of a
GPU. `all_reduce`: seconds for one payload.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoparallel.cost.collectives import Topology
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.tables import load_table
from benchmarks.published.question import Question, question_of
from benchmarks.published.rows import Run
from benchmarks.scores.answers import Price

PAYLOAD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Ratio:
    """One measured ratio."""

    name: str
    what: str
    source: str
    measured: float
    ours: float | None
    reason: str = ""
    """Why there is none of ours."""


def ratios(path: Path, *, price: Price) -> list[Ratio]:
    """All of a file; what we cannot express has its reason."""
    found = []
    for group in json.loads(path.read_text(encoding="utf-8"))["ratios"]:
        for point in group["points"]:
            ours, reason = None, ""
            try:
                amounts = [_amount(group, point[side], price=price) for side in ("of", "over")]
                ours = amounts[0] / amounts[1]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            source = group["source"]["name"]
            found.append(Ratio(group["name"], point["what"], source, point["measured"], ours, reason))
    return found


def _amount(group: dict[str, Any], fields: dict[str, Any], *, price: Price) -> float:
    if group["quantity"] == "all_reduce":
        return _all_reduce_s(fields["gpu"], fields["devices"])
    question = question_of(Run.model_validate({**group["base"], **fields}))
    if group["quantity"] == "block time":
        return _block_s(question, price=price)
    tokens = question.batch_size * question.seq_len
    seconds = price(question, None).step_time_s * question.flavor.num_devices
    return tokens * question.structure.train_flops_per_token / seconds


def _block_s(question: Question, *, price: Price) -> float:
    depth = question.structure.layers
    times_s = []
    for layers in (depth, depth // 2):
        strategy = question.strategy.model_copy(update={"stages": None})
        shorter = replace(question, structure=replace(question.structure, layers=layers), strategy=strategy)
        parts = price(shorter, None).breakdown_s
        times_s.append(parts.compute + parts.recompute + parts.tp_comm)
    return (times_s[0] - times_s[1]) / (depth - depth // 2)


def _all_reduce_s(gpu: str, devices: int) -> float:
    topology = Topology(resolve_flavor(f"8x{gpu}"), load_table(gpu))
    return topology.all_reduce_s(PAYLOAD_BYTES, group_size=devices)
