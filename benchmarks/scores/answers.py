"""Rows in, our answer to each out: the measured step time beside the predicted one, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autoparallel.cost.tables import CostTable
from autoparallel.errors import AutoParallelError
from autoparallel.plans.estimate import Estimate
from benchmarks.published.measured import StepTime, step_time
from benchmarks.published.question import Question, question_of
from benchmarks.published.rows import Run, Unexpressed

Price = Callable[[Question, CostTable | None], Estimate]
"""`autoparallel.estimate` for a question, with the device's own table or another one."""
TableWithout = Callable[[str, str], CostTable | None]
"""The table of a device, fitted without a source; None where the shipped one owes nothing to it."""


@dataclass(frozen=True)
class Answer:
    """To one row."""

    run: Run
    question: Question | None = None
    reason: str = ""
    """Why there is no estimate; empty where there is one."""
    measured: StepTime | None = None
    estimate: Estimate | None = None
    held_out_s: float | None = None
    """Step time by tables fitted without this row's source."""


@dataclass(frozen=True)
class Timed:
    """An answer with both times."""

    run: Run
    question: Question
    measured_s: float
    estimate: Estimate
    held_out_s: float | None

    @property
    def error(self) -> float:
        """Relative, positive where we predict too much."""
        return self.estimate.step_time_s / self.measured_s - 1

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """That should hold 80 % of the measured times."""
        return getattr(self.estimate, "interval_s", None)

    @property
    def inside(self) -> bool:
        """Whether the interval holds the measured time."""
        return self.interval_s is not None and self.interval_s[0] <= self.measured_s <= self.interval_s[1]


def timed(answers: Iterable[Answer]) -> list[Timed]:
    """Those with both times."""
    return [
        Timed(
            run=a.run, question=a.question, measured_s=a.measured.seconds, estimate=a.estimate, held_out_s=a.held_out_s
        )
        for a in answers
        if a.question is not None and a.measured is not None and a.estimate is not None
    ]


def answer_all(runs: Iterable[Run], *, price: Price, table_without: TableWithout | None = None) -> list[Answer]:
    """In the order of the rows; none raises."""
    return [answer(run, price=price, table_without=table_without) for run in runs]


def answer(run: Run, *, price: Price, table_without: TableWithout | None = None) -> Answer:
    """An error of ours is a reason like any other: it is counted, and the other rows are still answered."""
    try:
        question = question_of(run)
    except Unexpressed as error:
        return Answer(run=run, reason=str(error))
    measured = step_time(run, question)
    try:
        estimate = price(question, None)
        held_out_s = None
        if measured is not None and table_without is not None:
            table = table_without(question.flavor.device, run.source.name)
            held_out_s = (estimate if table is None else price(question, table)).step_time_s
    except AutoParallelError as error:
        return Answer(run=run, question=question, measured=measured, reason=str(error).splitlines()[0])
    except Exception as error:
        reason = f"a fault of ours: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Answer(run=run, question=question, measured=measured, reason=reason)
    return Answer(run=run, question=question, measured=measured, estimate=estimate, held_out_s=held_out_s)
