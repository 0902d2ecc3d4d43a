"""Words and numbers of reports: plain ASCII tables, durations and counts with their units.

Names from files lose their control characters, so that no plan can steer a terminal.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 110
MAX_NAME = 60


def clean(text: str) -> str:
    """`text` in one line without control, formatting or bidirectional characters, cut to a table's width."""
    kept = "".join(c for c in text if unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp"))
    return kept if len(kept) <= MAX_NAME else kept[: MAX_NAME - 3] + "..."


def count(number: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)


def duration(time_s: float) -> str:
    return (
        f"{time_s:,.2f} s"
        if time_s >= 10
        else f"{time_s * 1e3:,.1f} ms"
        if time_s >= 1e-3
        else f"{time_s * 1e6:.1f} us"
    )


def safe(text: str) -> str:
    """A whole sentence: cleaned word by word."""
    return " ".join(clean(word) for word in text.split())


def wrapped(text: str, *, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)) or [indent.rstrip()]


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; `left` names the columns that are words."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells))[:WIDTH].rstrip())
    return "\n".join(lines)
