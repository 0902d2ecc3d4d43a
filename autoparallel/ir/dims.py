"""Symbolic tensor dims: a dim is an integer or an expression of `batch` and `seq`, such as `"batch*seq"`.

Expressions come from torch's shape propagation (capture) and are only ever evaluated in the process that captured them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

Dim = int | str
Shape = tuple[Dim, ...]


@lru_cache(maxsize=4096)
def _compiled(expression: str) -> Callable[[int, int], int]:
    names = {"__builtins__": {}, "min": min, "max": max, "abs": abs, "int": int}
    return eval(f"lambda batch, seq: {expression}", names)


def evaluate(dim: Dim, *, batch: int, seq: int) -> int:
    """The size of `dim` at a batch of `batch` rows of `seq` tokens."""
    return dim if isinstance(dim, int) else _compiled(dim)(batch, seq)


def numel(shape: Shape, *, batch: int, seq: int) -> int:
    """The number of elements of a tensor of that shape."""
    count = 1
    for dim in shape:
        count *= evaluate(dim, batch=batch, seq=seq)
    return count
