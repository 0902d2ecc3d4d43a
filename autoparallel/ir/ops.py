"""The op table: each contraction once, as an einsum; its FLOPs follow from the line.

Everything that is not listed moves bytes and contracts nothing. FLOPs are counted as torch.utils.flop_counter counts
them (2 per multiply-add, matmuls and attention only) beside the FLOPs a causal kernel really executes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import Op

# `...` stands for leading dims; a `_` operand, which may be absent, takes no part in the contraction (a bias).
CONTRACTIONS: dict[str, str] = {
    "aten.linear.default": "... k, n k, _ -> ... n",
    "aten.mm.default": "m k, k n -> m n",
    "aten.addmm.default": "_, m k, k n -> m n",
    "aten.bmm.default": "b m k, b k n -> b m n",
    "aten.baddbmm.default": "_, b m k, b k n -> b m n",
    "aten.matmul.default": "... m k, ... k n -> ... m n",
    "aten._grouped_mm.default": "t k, e k n, _ -> t n",
    "transformers.grouped_mm_fallback.default": "t k, e k n, _ -> t n",
    "autoparallel.attention.default": "b h s d, b g t d, b g t e -> b s h e",
}
ATTENTION = "autoparallel.attention.default"
ATTENTION_KERNELS = "aten._scaled_dot_product_"
"""What scaled_dot_product_attention turns into: one kernel by device, dtype and mask, all under this prefix."""
COLLECTIVES = "_c10d_functional."

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What turns one placement over a tensor-parallel group into another: its collectives, forward and backward."""

    forward: CollectiveKind | None
    backward: CollectiveKind | None


# Megatron-LM's f and g (arXiv 1909.08053) and their sequence-parallel counterparts (arXiv 2205.05198).
CONVERSIONS: dict[str, Conversion] = {
    "tensor_parallel.all_reduce": Conversion("all_reduce", None),  # partial sum -> whole
    "tensor_parallel.copy": Conversion(None, "all_reduce"),  # whole -> used in parts: its gradient is a partial sum
    "tensor_parallel.reduce_scatter": Conversion("reduce_scatter", "all_gather"),  # partial sum -> sequence shards
    "tensor_parallel.all_gather": Conversion("all_gather", "reduce_scatter"),  # sequence shards -> used in parts
    "tensor_parallel.all_gather_whole": Conversion("all_gather", None),  # sequence shards -> used whole by every rank
    "tensor_parallel.scatter": Conversion(None, "all_gather"),  # whole -> sequence shards
    "tensor_parallel.narrow": Conversion(None, None),  # whole -> this rank's part; the gradient is zero elsewhere
}
# One exponential, logarithm, error function or the like for every element of the first input.
SPECIAL_FUNCTIONS = {
    f"aten.{name}"
    for name in (
        "silu.default", "gelu.default", "tanh.default", "exp.default", "erf.default", "sigmoid.default", "log.default",
        "softmax.int", "_softmax.default", "_log_softmax.default", "cross_entropy_loss.default", "logsumexp.default",
        "cos.default", "sin.default",
    )
}  # fmt: skip
RANDOM = {"aten.dropout.default", "aten.native_dropout.default"}
"""Draw a number for every element, in forward alone."""
VOCABULARY_EMBEDDING = "tensor_parallel.embedding"
VOCABULARY_CROSS_ENTROPY = "tensor_parallel.cross_entropy"
"""all_reduce of the largest logit, then of the denominator and the target's logit, one number a token each."""


class Operands(NamedTuple):
    """Argument positions of a contraction with a matrix: [out, in] as a linear layer holds it, or [in, out]."""

    value: int
    weight: int
    bias: int
    weight_is_in_out: bool


# Contractions whose weight's gradient can be made later than the gradient of their input.
DEFERRABLE = {
    "aten.linear.default": Operands(value=0, weight=1, bias=2, weight_is_in_out=False),
    "aten.addmm.default": Operands(value=1, weight=2, bias=0, weight_is_in_out=True),
    # addmm over a tensor-parallel group: its bias is added to the sum.
    "aten.mm.default": Operands(value=0, weight=1, bias=2, weight_is_in_out=True),
}


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one op: `forward`, `backward` as counted, `executed_*` as a causal, windowed, recomputing (flash)
    kernel runs them.
    """

    forward: int = 0
    backward: int = 0
    executed_forward: int = 0
    executed_backward: int = 0


def flops(op: Op, *, batch: int, seq: int) -> Flops:
    """FLOPs of `op` for one micro-batch of `batch` rows of `seq` tokens."""
    if op.target == ATTENTION:
        return _attention_flops(op, batch=batch, seq=seq)
    operands = contracted_inputs(op)
    if not operands:
        return Flops()
    shapes = [[evaluate(dim, batch=batch, seq=seq) for dim in op.inputs[i].shape] for i in operands]
    first, second = shapes[0], shapes[1]
    columns = op.outputs[0].shape[-1] if len(second) > 1 else 1
    forward = 2 * _product(first) * evaluate(columns, batch=batch, seq=seq)
    # Each operand that needs a gradient costs one contraction of the same size.
    backward = forward * sum(op.inputs[i].requires_grad for i in operands)
    return Flops(forward, backward, forward, backward)


def contracted_inputs(op: Op) -> tuple[int, ...]:
    """Positions of the tensors that `op` contracts, as its signature lists them; empty when it contracts none."""
    signature = CONTRACTIONS.get(op.target)
    if signature is None:
        return ()
    operands = signature.split("->")[0].split(",")
    return tuple(i for i, operand in enumerate(operands) if operand.strip() != "_")


def is_heavy(kernel: str) -> bool:
    """Whether a kernel contracts or communicates. Composite contractions (linear, matmul) reach kernels as the other
    lines of the table.
    """
    return kernel in CONTRACTIONS or kernel.startswith((ATTENTION_KERNELS, COLLECTIVES))


def _attention_flops(op: Op, *, batch: int, seq: int) -> Flops:
    """Scores and values, each [seq, seq] a head; backward of flash recomputes the scores: five contractions for two
    (arXiv 2307.08691).
    """
    query, _, value = op.inputs[:3]
    rows, heads, length, head_dim = (evaluate(dim, batch=batch, seq=seq) for dim in query.shape)
    value_dim = evaluate(value.shape[3], batch=batch, seq=seq)
    window = min(attention_window(op) or length, length)
    seen = window * (window + 1) // 2 + (length - window) * window  # query-key pairs under the causal window
    forward = 2 * rows * heads * length * length * (head_dim + value_dim)
    executed = 2 * rows * heads * seen * (head_dim + value_dim)
    recomputed_scores = 2 * rows * heads * seen * head_dim
    trained = any(tensor.requires_grad for tensor in op.inputs[:3])
    return Flops(forward, 2 * forward * trained, executed, (2 * executed + recomputed_scores) * trained)


def attention_window(op: Op) -> int:
    """Tokens that a query sees, itself included; 0 for all before it."""
    window = op.argument("window", 0)
    assert isinstance(window, int)
    return window


def _product(values: list[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
