"""A progress bar for people: on stderr where that is a terminal, and not in CI; rich honours NO_COLOR.

In: how many candidates there will be. Out: a function to call with each as it is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoparallel.plans.candidate import Candidate

Advance = Callable[[Candidate], None]


def is_shown() -> bool:
    """Whether somebody watches."""
    return sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("CI")


@contextmanager
def progress(description: str, *, total: int) -> Iterator[Advance]:
    """Show `description`, how many are done, and the fastest so far."""
    if not is_shown():
        yield lambda candidate: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
    )
    best_s = float("inf")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, best="")

        def advance(candidate: Candidate) -> None:
            nonlocal best_s
            if candidate.estimate is not None and candidate.estimate.step_time_s < best_s:
                best_s = candidate.estimate.step_time_s
                bar.update(task, best=f"best: {best_s:.4g} s a step")
            bar.advance(task)

        yield advance
