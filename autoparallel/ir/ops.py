"""The op table: each contraction once, as an einsum; its FLOPs follow from the line.

Everything that is not listed moves bytes and contracts nothing. FLOPs are counted as torch.utils.flop_counter counts
them (2 per multiply-add, matmuls and attention only) beside the FLOPs a causal kernel really executes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import Op

# `...` stands for the leading dims of the first operand; a `_` operand takes no part in the contraction (a bias).
CONTRACTIONS: dict[str, str] = {
    "aten.linear.default": "... k, n k -> ... n",
    "aten.mm.default": "m k, k n -> m n",
    "aten.addmm.default": "_, m k, k n -> m n",
    "aten.bmm.default": "b m k, b k n -> b m n",
    "aten.baddbmm.default": "_, b m k, b k n -> b m n",
    "aten.matmul.default": "... m k, ... k n -> ... m n",
    "autoparallel.attention.default": "b h s d, b g t d, b g t e -> b s h e",
}
ATTENTION = "autoparallel.attention.default"


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


def _attention_flops(op: Op, *, batch: int, seq: int) -> Flops:
    """Scores and values, each [seq, seq] a head; backward of flash recomputes the scores: five contractions for two
    (arXiv 2307.08691).
    """
    query, _, value = op.inputs[:3]
    rows, heads, length, head_dim = (evaluate(dim, batch=batch, seq=seq) for dim in query.shape)
    value_dim = evaluate(value.shape[3], batch=batch, seq=seq)
    window = min(int(op.attribute("window", "0")) or length, length)
    seen = window * (window + 1) // 2 + (length - window) * window  # query-key pairs under the causal window
    forward = 2 * rows * heads * length * length * (head_dim + value_dim)
    executed = 2 * rows * heads * seen * (head_dim + value_dim)
    recomputed_scores = 2 * rows * heads * seen * head_dim
    trained = any(tensor.requires_grad for tensor in op.inputs[:3])
    return Flops(forward, 2 * forward * trained, executed, (2 * executed + recomputed_scores) * trained)


def _product(values: list[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
