"""Claim: step time and memory of published training runs, from cost tables alone, closer than a fitted constant rate.

In: a file of published runs (default: those carried over into `published/`). Out: errors by source and by GPU beside
the baseline's, memory, plan choice, and each bar with what was found.

    make bench-accuracy
    python benchmarks/accuracy.py --runs benchmarks/published/layouts.json --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script, its own folder is on the path, and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import Progress

from benchmarks.published.rows import Run, Unread, read_runs
from benchmarks.scores.answers import Answer, Price, TableWithout, answer
from benchmarks.scores.held_out import tables_without
from benchmarks.scores.price import price
from benchmarks.scores.ratios import ratios
from benchmarks.scores.report import Report, as_json, report_of
from benchmarks.scores.tables import print_report

PUBLISHED = Path(__file__).parent / "published"
QUALITIES = ("good", "fair", "")
"""Scored; rows of other qualities are counted only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 whatever is found: figures, not verdicts, are the output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=PUBLISHED / "runs.json", help="a file of published runs")
    parser.add_argument("--json", action="store_true", help="everything, one line a row, for machines")
    parser.add_argument("--source", default="", help="only sources with this text in their name")
    options = parser.parse_args(arguments)
    runs, unread = read_runs(options.runs)
    chosen = [run for run in runs if options.source.casefold() in run.source.name.casefold()]
    report = score_runs(chosen, unread, price=price, table_without=tables_without(PUBLISHED / "held_out.json"))
    if options.json:
        json.dump(as_json(report), sys.stdout, indent=1)
        print()
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def score_runs(
    runs: Sequence[Run], unread: Sequence[Unread], *, price: Price, table_without: TableWithout | None = None
) -> Report:
    """Answers to all rows of a scored quality, to the sweep that is never fitted, to the known out-of-memory cases, and
    the published ratios.
    """
    scored = [run for run in runs if run.quality.casefold() in QUALITIES]
    asked = {run.id for run in scored}
    since = [run for run in read_runs(PUBLISHED / "more.json")[0] if run.id not in asked]
    apart = [run for run in read_runs(PUBLISHED / "layouts.json")[0] if run.id not in asked]
    limits, _ = read_runs(PUBLISHED / "limits.json")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("pricing published runs", total=len(scored) + len(since) + len(apart) + len(limits))

        def answered(run: Run, without: TableWithout | None) -> Answer:
            progress.advance(task)
            return answer(run, price=price, table_without=without)

        answers = [answered(run, table_without) for run in scored]
        more = [answered(run, table_without) for run in since]
        never_fitted = [answered(run, None) for run in apart]
        failures = [answered(run, None) for run in limits]
        shapes = ratios(PUBLISHED / "ratios.json", price=price)
    return report_of(
        answers, unread, more=more, apart=never_fitted, limits=failures, ratios=shapes, unscored=len(runs) - len(scored)
    )


if __name__ == "__main__":
    sys.exit(main())
