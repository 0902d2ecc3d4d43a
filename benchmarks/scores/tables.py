"""The accuracy report on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.scores.errors import Average, Score, grouped, mean_of, score
from benchmarks.scores.layouts import Choice
from benchmarks.scores.report import Line, Report


def print_report(report: Report, console: Console) -> None:
    """All tables, the bars last."""
    _step_time(report, console)
    _expressed(report, console)
    _plan_choice(report, console)
    _memory(report, console)
    _ratios(report, console)
    _bars(report, console)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _percent(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.1%}"


def _step_time(report: Report, console: Console) -> None:
    columns = ("rows", "mean", "median", "bias", "baseline", "held out", "baseline h.o.", "in 80 %")
    for title, first, lines in (
        ("Step time by source: absolute error, relative", "source", report.sources),
        (
            "The same of sources found since: fitted too, of lower quality, not what the bars are about",
            "source",
            report.more,
        ),
        ("Step time by GPU", "GPU", report.gpus),
    ):
        if not lines:
            continue
        table = _table(title, first, *columns)
        for line in lines:
            table.add_row(line.name, *_cells(line))
        if first == "source":
            table.add_section()
            main = lines is report.sources
            over = report.over_sources if main else report.over_more
            table.add_row("mean over sources", *_average_cells(lines, over))
            for line in report.apart if main else ():
                table.add_row(f"never fitted: {line.name}", *_cells(line))
        console.print(table, "")
    console.print(
        "baseline: model FLOPs over a rate fitted for each GPU, dtype and level of recomputation on these very rows, "
        "which flatters it, times 1 + (stages - 1) / (micro-batches x virtual stages); "
        "held out: without the row's own source in the fit"
    )
    if report.floor is not None:
        console.print(f"floor: {report.repeated} groups of identical runs are {report.floor:.1%} from their mean")
    fitted = ", ".join(f"{device} {count}" for device, count in report.fitted.items())
    console.print(f"fitted values: {fitted}\n")


def _cells(line: Line) -> list[str]:
    return [
        *_score_cells(line.ours),
        _percent(line.baseline.mean),
        _percent(mean_of(line.held_out)),
        _percent(mean_of(line.baseline_held_out)),
        _percent(line.inside),
    ]


def _score_cells(found: Score) -> list[str]:
    return [str(found.rows), _percent(found.mean), _percent(found.median), _percent(found.bias, signed=True)]


def _average_cells(lines: Sequence[Line], over: Mapping[str, Average | None]) -> list[str]:
    means, ours = {name: _percent(mean_of(found)) for name, found in over.items()}, over["ours"]
    inside = [line.inside for line in lines if line.inside is not None]
    return [
        str(sum(line.ours.rows for line in lines)),
        means["ours"],
        _percent(None if ours is None else ours.median),
        _percent(None if ours is None else ours.bias, signed=True),
        means["baseline"],
        means["held_out"],
        means["baseline_held_out"],
        _percent(sum(inside) / len(inside) if inside else None),
    ]


def _expressed(report: Report, console: Console) -> None:
    beside = f", {report.unscored} more are of a lower quality" if report.unscored else ""
    console.print(f"expressed: {report.expressed} of {report.rows} rows{beside}")
    for reason, count in report.reasons.items():
        console.print(f"  {count:4d} not: {reason}", highlight=False)
    console.print()


def _plan_choice(report: Report, console: Console) -> None:
    choices = [(f"of {size} layouts and more", found) for size, found in report.choices.items() if found is not None]
    choices += [("never fitted", report.apart_choice)] if report.apart_choice is not None else []
    if not choices:
        console.print("plan choice: no two runs differ only in their layout\n")
        return
    title = "Plan choice among runs that differ only in their layout: measured time lost, mean (worst)"
    table = _table(title, "families", "of", "runs", "by our price", "at random", "least TPxPP, largest MB", "pairs")
    for name, found in choices:
        table.add_row(name, *_choice_cells(found))
    console.print(table)
    for family in sorted(report.families, key=lambda family: -family.ours)[:5]:
        if family.ours > 0:
            console.print(f"  {family.ours:.1%} lost: {family.name}", highlight=False)
    console.print()


def _choice_cells(found: Choice) -> list[str]:
    def both(mean: float, worst: float) -> str:
        return f"{mean:.1%} ({worst:.1%})"

    ordered = f"{found.ordered / found.pairs:.1%} of {found.pairs}" if found.pairs else "-"
    return [
        str(found.families),
        str(found.runs),
        both(found.ours, found.ours_worst),
        both(found.random, found.random_worst),
        both(found.rule, found.rule_worst),
        ordered,
    ]


def _memory(report: Report, console: Console) -> None:
    table = _table(
        "Memory of a device: error against what rows state", "source, what", "rows", "mean", "median", "bias"
    )
    for name, amounts in grouped(report.amounts, lambda amount: f"{amount.source}: {amount.what}").items():
        table.add_row(name, *_score_cells(score([amount.error for amount in amounts])))
    if report.amounts:
        console.print(table)
    console.print(
        f"of {report.ran.runs} runs that ran, {len(report.ran.wrong)} are called impossible{_some(report.ran.wrong)}"
    )
    if report.ran_since.runs:
        since = report.ran_since
        console.print(f"of {since.runs} found since, {len(since.wrong)} are{_some(since.wrong)}")
    console.print(
        f"of {report.failed.runs} that ran out of memory, {len(report.failed.wrong)} are called possible"
        f"{_some(report.failed.wrong)}"
    )
    pairs, right = report.boundary
    console.print(f"of {pairs} pairs of the two that are one step apart, {right} are called right on both sides\n")


def _some(ids: Sequence[str]) -> str:
    return f": {', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''}" if ids else ""


def _ratios(report: Report, console: Console) -> None:
    if not report.ratios:
        return
    table = _table("Shape: ratios that papers measured", "ratio", "measured", "ours")
    for ratio in report.ratios:
        ours = ratio.reason if ratio.ours is None else f"{ratio.ours:.3f}"
        table.add_row(f"{ratio.name}: {ratio.what}", f"{ratio.measured:.3f}", ours)
    console.print(table, "")


def _bars(report: Report, console: Console) -> None:
    table = _table("Asked and found", "", "asked", "found", "met")
    for bar in report.bars():
        table.add_row(bar.name, bar.asked, bar.found, {True: "yes", False: "no", None: "-"}[bar.met])
    console.print(table)
