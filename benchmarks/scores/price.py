"""The one place that calls `autoparallel.estimate`."""

from __future__ import annotations

from autoparallel.cost.tables import CostTable
from autoparallel.plans.estimate import Estimate
from benchmarks.published.question import Question
from benchmarks.scores.interim import estimate


def price(question: Question, table: CostTable | None = None) -> Estimate:
    """Of a question, by the device's own table or another one."""
    return estimate(question, table=table)
