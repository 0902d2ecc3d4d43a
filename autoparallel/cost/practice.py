"""How a program runs its operators: what published programs vary, and what ours does."""

from __future__ import annotations

from typing import Literal

from autoparallel.ir.schema import Schema


class Practice(Schema):
    """The defaults are those of the program that is emitted."""

    attention: Literal["flash", "unfused"] = "flash"
    """One kernel that never writes the scores, or matmuls with a softmax between them."""
    fused: bool = False
    """Whether element-wise ops and norms between two contractions are one kernel."""
    matmul_dtype: str | None = None
    """Of the operands of matmuls, where it is not the compute dtype (fp8)."""
    overlap: bool = True
    """Whether collectives of data parallelism run beside compute, where a device can do both."""


OURS = Practice()
