"""The one place that asks the project: a question in, `autoparallel.estimate` out."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import autoparallel
from autoparallel.cost.tables import CostTable
from autoparallel.ir.graph import Graph
from autoparallel.plans.estimate import Estimate
from autoparallel.plans.strategy import Strategy
from benchmarks.published.models import Structure
from benchmarks.published.question import Question


def price(question: Question, table: CostTable | None = None) -> Estimate:
    """By the device's own table or another one."""
    found = _price(question, question.strategy, table)
    capacity_bytes = question.flavor.memory_bytes
    if question.if_too_large is None or all(stage.peak_memory_bytes <= capacity_bytes for stage in found.stages):
        return found
    return _price(question, question.if_too_large, table)


def _price(question: Question, strategy: Strategy, table: CostTable | None) -> Estimate:
    return autoparallel.estimate(
        graph_of(question.structure, "float16" if question.options.dtype == "float16" else "bfloat16"),
        question.flavor,
        strategy,
        batch_size=question.batch_size,
        seq_len=question.seq_len,
        table=table,
        **asdict(question.options),
    )


@cache
def graph_of(structure: Structure, dtype: str) -> Graph:
    """Captured once a structure: that takes seconds, an estimate milliseconds."""
    import torch

    from autoparallel.capture.program import capture_for_planning

    return capture_for_planning(structure.config(), dtype=getattr(torch, dtype)).graph
