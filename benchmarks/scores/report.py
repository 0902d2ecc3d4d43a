"""Answers in, every figure of the accuracy report out; `tables` prints it, `as_json` is what machines read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoparallel.cost.tables import load_table
from benchmarks.published.rows import Unread
from benchmarks.scores import memory
from benchmarks.scores.answers import Answer, Timed, timed
from benchmarks.scores.baseline import Baseline
from benchmarks.scores.errors import Average, Score, average, grouped, mean_of, score, spread
from benchmarks.scores.layouts import Choice, Family, choice, families, repeated
from benchmarks.scores.ratios import Ratio


@dataclass(frozen=True)
class Line:
    """The rows of one source or one GPU: our errors, the baseline's, and both without the row's own source."""

    name: str
    ours: Score
    baseline: Score
    held_out: Score | None
    baseline_held_out: Score | None
    inside: float | None
    """Share of measured times in our 80 % intervals."""


@dataclass(frozen=True)
class Bar:
    """What is asked, beside what was found."""

    name: str
    asked: str
    found: str
    met: bool | None
    """None where there was nothing to judge."""


@dataclass(frozen=True)
class Report:
    """Everything that is printed."""

    rows: int
    unscored: int
    """Rows beside these whose quality is too low."""
    expressed: int
    reasons: dict[str, int]
    sources: list[Line]
    gpus: list[Line]
    more: list[Line]
    """Sources found since: fitted, but not among the rows that the bars are about."""
    over_more: dict[str, Average | None]
    apart: list[Line]
    """Sources that no fit has seen, and the baseline by the rates of the others."""
    apart_choice: Choice | None
    over_sources: dict[str, Average | None]
    """`ours`, `baseline`, `held_out`, `baseline_held_out`."""
    inside: float | None
    """Averaged over sources."""
    floor: float | None
    repeated: int
    families: list[Family]
    choices: dict[int, Choice | None]
    """By the least number of layouts in a family."""
    amounts: list[memory.Amount]
    ran: memory.Verdicts
    ran_since: memory.Verdicts
    failed: memory.Verdicts
    boundary: tuple[int, int]
    ratios: list[Ratio]
    fitted: dict[str, int]
    """Figures of each GPU's table that were fitted."""
    answers: list[Answer]

    @property
    def memory(self) -> Score | None:
        errors = [amount.error for amount in self.amounts]
        return score(errors) if errors else None

    def bars(self) -> list[Bar]:
        """Those of the project, in its order."""
        ours, held_out, every = self.over_sources["ours"], self.over_sources["held_out"], self.choices.get(2)
        expressed = self.expressed / self.rows if self.rows else None
        ordered = every.ordered / every.pairs if every is not None and every.pairs else None
        pairs, right = self.boundary
        return [
            _at_most("step time, mean error over sources", 0.08, mean_of(ours)),
            _at_most("step time, median error over sources", 0.05, None if ours is None else ours.median),
            _at_most("step time, mean error of the worst source", 0.15, None if ours is None else ours.worst),
            _at_most("the same without the row's source in the fit", 0.12, mean_of(held_out)),
            _at_least("rows expressed", 0.9, expressed),
            _at_least("times inside the 80 % interval, all sources", 0.7, self.inside),
            _at_most("the same, no more than", 0.9, self.inside),
            _at_most("plan choice, mean regret", 0.02, None if every is None else every.ours),
            _at_most("plan choice, worst regret", 0.08, None if every is None else every.ours_worst),
            _at_least("plan choice, pairs in order", 0.85, ordered),
            _at_most("memory, mean error", 0.08, mean_of(self.memory)),
            _counted("runs that ran called impossible", 0, len(self.ran.wrong), self.ran.runs),
            _enough("boundary pairs called right", 20, right, pairs),
            _counted("fitted values of a GPU", 8, max(self.fitted.values(), default=0), len(self.fitted)),
        ]


def _at_most(name: str, limit: float, found: float | None) -> Bar:
    met = None if found is None else found <= limit
    return Bar(name, f"at most {limit:.0%}", "-" if found is None else f"{found:.1%}", met)


def _at_least(name: str, limit: float, found: float | None) -> Bar:
    met = None if found is None else found >= limit
    return Bar(name, f"at least {limit:.0%}", "-" if found is None else f"{found:.1%}", met)


def _counted(name: str, limit: int, found: int, among: int) -> Bar:
    return Bar(name, f"at most {limit}", f"{found} of {among}" if limit == 0 else str(found), found <= limit)


def _enough(name: str, limit: int, right: int, among: int) -> Bar:
    return Bar(name, f"at least {limit}", f"{right} of {among}", right >= limit)


def report_of(
    answers: Sequence[Answer],
    unread: Sequence[Unread] = (),
    *,
    more: Sequence[Answer] = (),
    apart: Sequence[Answer] = (),
    limits: Sequence[Answer] = (),
    ratios: Sequence[Ratio] = (),
    unscored: int = 0,
) -> Report:
    """`more` are answers to rows found since, `apart` to rows that are never fitted, `limits` to rows that ran out of
    memory.
    """
    rows, since, unseen = timed(answers), timed(more), timed(apart)
    every = [*answers, *apart, *limits]
    baseline = Baseline([*rows, *since])
    sources = _lines(grouped(rows, lambda row: row.run.source.name), baseline)
    later = _lines(grouped(since, lambda row: row.run.source.name), baseline)
    found = families(rows)
    same = repeated(rows)
    reasons = Counter(answer.reason for answer in answers if answer.reason)
    reasons.update(one.reason for one in unread)
    inside = [line.inside for line in (*sources, *later) if line.inside is not None]
    devices = sorted({answer.question.flavor.device for answer in (*answers, *more) if answer.question})
    return Report(
        rows=len(answers) + len(unread),
        unscored=unscored,
        expressed=sum(answer.estimate is not None for answer in answers),
        reasons=dict(reasons.most_common()),
        sources=sources,
        gpus=_lines(grouped([*rows, *since], lambda row: row.question.flavor.device), baseline),
        more=later,
        over_more=_over(later),
        apart=_lines(grouped(unseen, lambda row: row.run.source.name), baseline) if rows else [],
        apart_choice=choice(families(unseen), at_least=2),
        over_sources=_over(sources),
        inside=sum(inside) / len(inside) if inside else None,
        floor=sum(map(spread, same)) / len(same) if same else None,
        repeated=len(same),
        families=found,
        choices={size: choice(found, at_least=size) for size in (2, 3)},
        amounts=memory.amounts(answers),
        ran=memory.ran(every),
        ran_since=memory.ran(more),
        failed=memory.failed(every),
        boundary=memory.boundary(every),
        ratios=list(ratios),
        fitted={device: _fitted(load_table(device).model_dump()) for device in devices},
        answers=list(answers),
    )


def _over(lines: Sequence[Line]) -> dict[str, Average | None]:
    return {
        "ours": average(line.ours for line in lines),
        "baseline": average(line.baseline for line in lines),
        "held_out": average(line.held_out for line in lines if line.held_out is not None),
        "baseline_held_out": average(line.baseline_held_out for line in lines if line.baseline_held_out),
    }


def _lines(groups: dict[str, list[Timed]], baseline: Baseline) -> list[Line]:
    return [_line(name, rows, baseline) for name, rows in groups.items()]


def _line(name: str, rows: Sequence[Timed], baseline: Baseline) -> Line:
    guesses = [(row, baseline.step_time_s(row.question)) for row in rows]
    blind = [(row, baseline.step_time_s(row.question, without=row.run.source.name)) for row in rows]
    held_out = [row.held_out_s / row.measured_s - 1 for row in rows if row.held_out_s is not None]
    intervals = [row.inside for row in rows if row.interval_s is not None]
    baseline_held_out = [guess_s / row.measured_s - 1 for row, guess_s in blind if guess_s is not None]
    return Line(
        name=name,
        ours=score([row.error for row in rows]),
        baseline=score([guess_s / row.measured_s - 1 for row, guess_s in guesses if guess_s is not None]),
        held_out=score(held_out) if held_out else None,
        baseline_held_out=score(baseline_held_out) if baseline_held_out else None,
        inside=sum(intervals) / len(intervals) if intervals else None,
    )


def _fitted(content: Any) -> int:
    """Figures of kind `fitted`, wherever they are in a table."""
    if isinstance(content, dict):
        return (content.get("kind") == "fitted") + sum(_fitted(part) for part in content.values())
    return sum(_fitted(part) for part in content) if isinstance(content, (list, tuple)) else 0


def as_json(report: Report) -> dict[str, Any]:
    """Plain values only; `rows` lists every row of the file with what became of it."""
    return {
        "rows_total": report.rows,
        "rows_unscored": report.unscored,
        "rows_expressed": report.expressed,
        "reasons": report.reasons,
        "bars": [asdict(bar) for bar in report.bars()],
        "over_sources": {name: _plain(found) for name, found in report.over_sources.items()},
        "sources": [asdict(line) for line in report.sources],
        "gpus": [asdict(line) for line in report.gpus],
        "found_since": [asdict(line) for line in report.more],
        "over_found_since": {name: _plain(found) for name, found in report.over_more.items()},
        "never_fitted": [asdict(line) for line in report.apart],
        "never_fitted_plan_choice": _plain(report.apart_choice),
        "inside_interval": report.inside,
        "floor": {"spread": report.floor, "groups": report.repeated},
        "plan_choice": {
            "families": [_family(family) for family in report.families],
            "at_least": {str(size): _plain(found) for size, found in report.choices.items()},
        },
        "memory": {
            "score": _plain(report.memory),
            "amounts": [asdict(amount) | {"error": amount.error} for amount in report.amounts],
            "ran": asdict(report.ran),
            "ran_found_since": asdict(report.ran_since),
            "out_of_memory": asdict(report.failed),
            "boundary_pairs": {"pairs": report.boundary[0], "right": report.boundary[1]},
        },
        "ratios": [asdict(ratio) for ratio in report.ratios],
        "fitted_values": report.fitted,
        "rows": [_row(answer) for answer in report.answers],
    }


def _plain(found: Score | Average | Choice | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _family(family: Family) -> dict[str, Any]:
    shares = {"ours": family.ours, "random": family.random, "rule": family.rule}
    return asdict(family) | {"regret": shares, "pairs": family.pairs()}


def _row(answer: Answer) -> dict[str, Any]:
    estimate, question = answer.estimate, answer.question
    found: dict[str, Any] = {
        "id": answer.run.id,
        "source": answer.run.source.name,
        "gpu": answer.run.gpu.name,
        "reason": answer.reason,
        "measured_s": answer.measured.seconds if answer.measured else None,
        "measured_by": answer.measured.how if answer.measured else None,
        "assumptions": list(question.assumptions) if question else [],
        "strategy": question.strategy.summary() if question else "",
    }
    if estimate is not None:
        found |= {
            "predicted_s": estimate.step_time_s,
            "interval_s": getattr(estimate, "interval_s", None),
            "held_out_s": answer.held_out_s,
            "breakdown_s": estimate.breakdown_s.model_dump(),
            "mfu": estimate.mfu,
            "peak_memory_bytes": max(stage.peak_memory_bytes for stage in estimate.stages),
        }
    return found
