"""The one place that asks the project: a question in, `autoparallel.estimate` out."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import autoparallel
from autoparallel.cost.tables import CostTable
from autoparallel.plans.estimate import Estimate
from benchmarks.published.models import Structure
from benchmarks.published.question import Question


def price(question: Question, table: CostTable | None = None) -> Estimate:
    """By the device's own table or another one."""
    if find_spec("autoparallel.capture.depth") is None:
        from benchmarks.scores.interim import estimate

        return estimate(question, table=table)
    options = question.options
    asked: dict[str, Any] = {
        "dtype": options.dtype,
        "attention": options.attention,
        "fused": options.fused,
        "optimizer": options.optimizer,
        "gradient_dtype": options.gradient_dtype,
        "master_dtype": options.master_dtype,
        "overlap": options.overlap,
        "table": table,
    }
    return autoparallel.estimate(
        graph_of(question.structure),
        question.flavor,
        question.strategy,
        batch_size=question.batch_size,
        seq_len=question.seq_len,
        memory_ratio=1.0,
        **asked,
    )


@cache
def graph_of(structure: Structure) -> Any:
    """Captured once: seconds, where an estimate takes milliseconds."""
    from autoparallel.capture.depth import capture_graph

    return capture_graph(structure.config())
