"""A progress bar for people: on stderr where that is a terminal, and not in CI; rich honours NO_COLOR."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]
"""One more is done; the note stands beside the bar, an empty one leaves the last."""


def is_shown() -> bool:
    """Whether somebody watches."""
    return sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("CI")


@contextmanager
def progress(description: str, *, total: int | None) -> Iterator[Advance]:
    """Show `description`, how many of `total` are done (of an unknown number where it is None), and a note."""
    if not is_shown():
        yield lambda note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(note: str) -> None:
            if note:
                bar.update(task, note=note)
            bar.advance(task)

        yield advance
