"""How a program runs its operators: what published programs vary, and what ours does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from autoparallel.ir.schema import Schema

Attention = Literal["flash", "flash-1", "vendor", "unfused", "math"]
"""One kernel that never writes the scores: PyTorch's (FlashAttention-2, arXiv 2307.08691), the first of its kind (arXiv
2205.14135), or the one that the device's vendor tuned for it; or matmuls with a softmax between them, as others write
them or as PyTorch does where it has no kernel: with dropout on a CPU.
"""


class Practice(Schema):
    """The defaults are those of the program that is emitted."""

    attention: Attention = "flash"
    fused: bool = False
    """Whether element-wise ops and norms between two contractions are one kernel."""
    merged_norms: bool = False
    """Whether a normalisation is one kernel, where not all is `fused`."""
    merged_loss: bool = False
    """Whether the loss is one kernel with the cast of the logits: it makes nothing of their size but their gradient."""
    accumulates_in_matmul: bool = False
    """Whether the matmul that makes a weight's gradient adds it to those of the micro-batches before."""
    matmul_dtype: str | None = None
    """Of the operands of matmuls, where it is not the compute dtype (fp8)."""
    overlap: bool = True
    """Whether collectives of data parallelism run beside compute, where a device can do both."""
    gathers_ahead: bool = True
    """Whether parameters whose states are sharded are gathered beside the next forward, not after the optimizer."""
    gathers_each_parameter: bool = False
    """Whether sharded parameters are gathered and reduced one by one, not a block at once."""
    shards_most: bool = False
    """Whether tensor parallelism divides every parameter that it can, as Megatron-LM's does; else what is fastest."""
    keeps_gathered: bool = True
    """Whether what sequence parallelism gathers ahead of a matmul is kept for its backward; else it is gathered once
    more, beside a matmul (arXiv 2205.05198, section 4.2.2).
    """
    blocking_sends: bool = False
    """Whether a pipeline rank computes nothing while it sends, as Megatron-LM and DeepSpeed wait for both sides."""
    scatters_sends: bool = False
    """Whether each rank of a tensor-parallel group sends its part of what all of them hold, which the receivers gather
    (arXiv 2104.04473, section 4.1).
    """
    tensor_overlap: bool = False
    """Whether those of tensor parallelism run beside the matmuls next to them, piece by piece."""
    optimizer_workspace_bytes: int | None = Field(default=None, ge=0)
    """Of each trained element of a rank, while the optimizer steps; None for PyTorch's AdamW, which makes the square
    roots of all second moments at once on a GPU (`foreach`), and one tensor's on a CPU.
    """
    dispatch_s: float | None = Field(default=None, ge=0)
    """Host time to launch a kernel, where it is not the device table's."""

    @property
    def merges(self) -> bool:
        """Whether any kernel runs more than one op."""
        return self.fused or self.merged_loss or self.merged_norms


OURS = Practice()
