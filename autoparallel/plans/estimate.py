"""What the cost model predicts for one strategy. Every field is predicted, none is measured."""

from __future__ import annotations

from autoparallel.ir.schema import Schema


class Breakdown(Schema):
    """Where the step's time goes on the critical stage, in seconds; the parts sum to the step time."""

    compute: float
    recompute: float
    tp_comm: float
    dp_comm: float
    pp_comm: float
    bubble: float
    optimizer: float
    core_sharing: float
    """Waiting for a core, where more processes than cores share a host (CPU flavors only)."""


class StageEstimate(Schema):
    """One pipeline rank with all its stages, per device."""

    forward_s: float
    backward_s: float
    """Backward of one micro-batch, recomputed forward included."""
    parameters: int
    peak_memory_bytes: int
    memory_parts_bytes: dict[str, int]
    """parameters, gradients, optimizer, activations, workspace, reserve: they sum to the peak."""


class Estimate(Schema):
    """Predicted step time and memory of one strategy."""

    step_time_s: float
    interval_s: tuple[float, float] | None = None
    """Of the step time, in which four of five measured ones are expected, by the spread of published runs around what
    is predicted for them without their source; None where the cost table states no spread.
    """
    tokens_per_second: float
    mfu: float
    """Model FLOPs (no recomputation, attention uncut by causality) over peak FLOPs of all devices (PaLM, arXiv
    2204.02311).
    """
    breakdown_s: Breakdown
    hidden_comm_s: float = 0.0
    """Collectives of data parallelism that compute hides, on the critical stage: no part of the step time."""
    replicated_s: float = 0.0
    """The part of compute that every tensor-parallel rank repeats, for want of a dim to divide."""
    stages: tuple[StageEstimate, ...]
    """By pipeline rank."""

    @property
    def peak_memory_bytes(self) -> int:
        return max(stage.peak_memory_bytes for stage in self.stages)


class Rejection(Schema):
    """Why a candidate is impossible, with the amount."""

    reason: str
    kind: str
    """`memory`, `layers`, ...: what ran out."""
    shortfall_bytes: int = 0
