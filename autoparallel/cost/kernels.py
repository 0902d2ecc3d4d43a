"""Ops of a lowered segment -> the kernels that run them, by phase: shapes and bytes, no device and no seconds.

A contraction is one matmul forward and one backward for each operand that needs a gradient. Attention is one fused
kernel (FlashAttention, arXiv 2205.14135), or matmuls with a softmax between them. All else moves bytes: one kernel an
op, or one for each connected group between contractions where element-wise kernels are fused. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from autoparallel.cost.practice import Practice
from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import DTYPE_BYTES, Op, TensorSpec
from autoparallel.ir.ops import (
    ATTENTION,
    CONVERSIONS,
    DEFERRABLE,
    RANDOM,
    SPECIAL_FUNCTIONS,
    VOCABULARY_CROSS_ENTROPY,
    VOCABULARY_EMBEDDING,
    CollectiveKind,
    attention_window,
    contracted_inputs,
    flops,
)

KernelKind = Literal["matmul", "attention", "memory"]

CROSS_ENTROPY = "aten.cross_entropy_loss.default"
# Lookups touch as many rows of their first operand as they return, not the whole table.
LOOKUPS = {
    "aten.embedding.default",
    VOCABULARY_EMBEDDING,
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.gather.default",
}
DRAW = 8
"""Exponentials that a random number costs: ten rounds of Philox for four of them, in integer arithmetic (assumed)."""
LOSSES = {CROSS_ENTROPY, VOCABULARY_CROSS_ENTROPY}


class Kernel(NamedTuple):
    """One launch, on one device."""

    kind: KernelKind
    dtype: str
    moved_bytes: float
    """To and from device memory, each tensor once."""
    products: int = 1
    """Independent products of a batched matmul."""
    rows: int = 0
    columns: int = 0
    depth: int = 0
    """Of one product: [rows, depth] x [depth, columns]. Of attention, the keys of a row."""
    flops: float = 0.0
    """Of attention, those it really executes."""
    special: float = 0.0
    """Exponentials and the like."""
    variant: str = ""
    """Of attention: whose kernel."""


class OpKernels(NamedTuple):
    """Kernels of one op, or of a fused group of them."""

    ops: tuple[Op, ...]
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    """Those of the weight's gradient left out."""
    weight: tuple[Kernel, ...] = ()


@dataclass(frozen=True)
class Size:
    """One micro-batch on one rank."""

    batch: int
    seq: int
    context_parallel: int = 1
    """Ranks that share the tokens of a row; every size is that of one of them."""

    @property
    def local(self) -> dict[str, int]:
        return {"batch": self.batch, "seq": self.seq // self.context_parallel}

    @property
    def whole(self) -> dict[str, int]:
        return {"batch": self.batch, "seq": self.seq}


def kernels(ops: Sequence[Op], size: Size, practice: Practice) -> list[OpKernels]:
    """In program order; a fused group stands where its first op stands."""
    return [found for group in launched(ops, practice) if (found := _of_group(group, ops, size, practice)) is not None]


def launched(ops: Sequence[Op], practice: Practice) -> list[list[Op]]:
    """Ops by the kernel that runs them."""
    if not practice.merges:
        return [[op] for op in ops]
    found = groups(ops, alone=LOOKUPS if practice.merged_loss else LOOKUPS | LOSSES)
    if practice.fused:
        return found
    return [part for group in found for part in _merged(group, practice)]


def _merged(group: list[Op], practice: Practice) -> list[list[Op]]:
    """A group that could be one kernel, as far as it is one where not all are."""
    if practice.merged_loss and any(op.target in LOSSES for op in group):
        return [group]
    parts: dict[str, list[Op]] = {}
    for op in group:
        is_norm = practice.merged_norms and "norm" in op.module.rpartition(".")[2]
        parts.setdefault(op.module if is_norm else op.name, []).append(op)
    return list(parts.values())


def _of_group(group: list[Op], ops: Sequence[Op], size: Size, practice: Practice) -> OpKernels | None:
    if len(group) > 1:
        return _fused(group, ops, size)
    op = group[0]
    if op.is_view:
        return None
    if op.target == ATTENTION:
        return _attention(op, size, practice)
    if contracted_inputs(op):
        return _contraction(op, size, practice)
    return _memory(op, size)


def _memory(op: Op, size: Size) -> OpKernels:
    dtype, special = _dtype(op), _special(op, size)
    forward = Kernel("memory", dtype, forward_bytes(op, **size.local), special=special + _drawn(op, size))
    backward = Kernel("memory", dtype, backward_bytes(op, **size.local), special=special)
    trained = any(tensor.requires_grad for tensor in op.outputs)
    if op.target in CONVERSIONS:
        # A collective's blocks lie one after the other along dim 0; elsewhere a copy puts them in order.
        conversion = CONVERSIONS[op.target]
        runs, trained = _regroups(op, conversion.forward), trained and _regroups(op, conversion.backward)
        return OpKernels((op,), (forward,) if runs else (), (backward,) if trained else ())
    return OpKernels((op,), (forward,), (backward,) if trained else ())


def _regroups(op: Op, collective: CollectiveKind | None) -> bool:
    return collective in ("all_gather", "reduce_scatter") and op.argument("dim", 0) != 0


def _drawn(op: Op, size: Size) -> float:
    return float(DRAW * op.inputs[0].numel(**size.local)) if op.target in RANDOM else 0.0


def _special(op: Op, size: Size) -> float:
    return float(op.inputs[0].numel(**size.local)) if op.target in SPECIAL_FUNCTIONS else 0.0


# ------------------------------------------------------------------------------------------------- contractions


def _contraction(op: Op, size: Size, practice: Practice) -> OpKernels:
    """y = a b: the gradients are dy bT and aT dy, matmuls of the same three sizes."""
    first, second = (op.inputs[i] for i in contracted_inputs(op)[:2])
    count, rows, columns, depth = _sizes(op, first, second, size)
    element = DTYPE_BYTES[op.outputs[0].dtype]
    low = practice.matmul_dtype if op.target in DEFERRABLE else None
    dtype = low or op.outputs[0].dtype
    moved = count * (rows * depth + depth * columns + rows * columns) * element

    def product(m: int, n: int, k: int) -> Kernel:
        return Kernel("matmul", dtype, moved, count, m, n, k)

    operands = contracted_inputs(op)
    value, weight = (op.inputs[i].requires_grad for i in operands[:2])
    backward = [product(rows, depth, columns)] if value else []
    weights = [product(depth, columns, rows)] if weight else []
    bias = DEFERRABLE[op.target].bias if op.target in DEFERRABLE else len(op.inputs)
    if bias < len(op.inputs) and op.inputs[bias].requires_grad:
        weights.append(Kernel("memory", op.outputs[0].dtype, count * rows * columns * element))
    if op.target not in DEFERRABLE:
        backward, weights = backward + weights, []
    forward = [product(rows, columns, depth)]
    if low is not None:
        # Written in the low dtype twice, as it is and transposed: only rows can be contracted (arXiv 2209.05433).
        forward.insert(0, Kernel("memory", dtype, rows * depth * (element + 2)))
        backward.insert(0, Kernel("memory", dtype, rows * columns * (element + 2)))
    return OpKernels((op,), tuple(forward), tuple(backward), tuple(weights))


def _sizes(op: Op, first: TensorSpec, second: TensorSpec, size: Size) -> tuple[int, int, int, int]:
    """(products, rows, columns, depth)."""
    a = [evaluate(dim, **size.local) for dim in first.shape]
    b = [evaluate(dim, **size.local) for dim in second.shape]
    columns = evaluate(op.outputs[0].shape[-1], **size.local) if len(b) > 1 else 1
    if op.target in ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"):
        return b[0], max(1, a[0] // b[0]), columns, a[-1]
    if len(b) > 2:
        return prod(a[:-2]), a[-2], columns, a[-1]
    return 1, prod(a[:-1]), columns, a[-1]


# ---------------------------------------------------------------------------------------------------- attention


def _attention(op: Op, size: Size, practice: Practice) -> OpKernels:
    trained = any(tensor.requires_grad for tensor in op.inputs[:3])
    if practice.attention == "unfused" or (practice.attention == "math" and drops(op)):
        return _unfused_attention(op, size, practice, trained=trained)
    counted = flops(op, **size.whole)
    query, _, value = op.inputs[:3]
    width = evaluate(query.shape[3], **size.local) + evaluate(value.shape[3], **size.local)
    scores = counted.executed_forward / (2 * width) / size.context_parallel
    dtype = query.dtype
    ways, length = size.context_parallel, evaluate(query.shape[2], **size.whole)
    keys = min(attention_window(op) or length, length)
    forward = Kernel(
        "attention",
        dtype,
        forward_bytes(op, **size.local),
        depth=keys,
        flops=counted.executed_forward / ways,
        special=scores,
        variant="flash" if practice.attention == "math" else practice.attention,
    )
    backward = forward._replace(moved_bytes=backward_bytes(op, **size.local), flops=counted.executed_backward / ways)
    return OpKernels((op,), (forward,), (backward,) if trained else ())


def drops(op: Op) -> bool:
    """Whether an attention op has dropout."""
    return bool(op.argument("dropout", 0.0))


def score_elements(op: Op, size: Size) -> int:
    """Entries of the score matrices of all heads of one micro-batch."""
    batch, heads, rows, _ = (evaluate(dim, **size.local) for dim in op.inputs[0].shape)
    return batch * heads * rows * rows * size.context_parallel


def _unfused_attention(op: Op, size: Size, practice: Practice, *, trained: bool) -> OpKernels:
    """Scores, one kernel for scale, mask and softmax, dropout, values; causality is masked, not skipped."""
    query, _, value = op.inputs[:3]
    batch, heads, rows, head_dim = (evaluate(dim, **size.local) for dim in query.shape)
    keys, value_dim = rows * size.context_parallel, evaluate(value.shape[3], **size.local)
    element, dtype = DTYPE_BYTES[query.dtype], query.dtype
    scores = score_elements(op, size)

    def product(m: int, n: int, k: int) -> Kernel:
        moved = batch * heads * (m * k + k * n + m * n) * element
        return Kernel("matmul", dtype, moved, batch * heads, m, n, k)

    def passes(count: float, *, special: float = 0.0) -> Kernel:
        return Kernel("memory", dtype, count * scores, special=special)

    undrawn = [passes(2 * element + 1)] if drops(op) else []
    draws = [passes(2 * element + 1, special=DRAW * scores)] if drops(op) else []
    softmax = [passes(2 * element, special=scores)]
    if not practice.fused:  # mask added, a copy in fp32, softmax in fp32, a copy back
        softmax = [passes(2 * element), passes(element + 4), passes(8, special=scores), passes(4 + element)]
    forward = [product(rows, keys, head_dim), *softmax, *draws, product(rows, value_dim, keys)]
    backward = [
        product(rows, keys, value_dim),
        product(keys, value_dim, rows),
        *undrawn,
        *([passes(3 * element)] if practice.fused else [passes(4 + element), passes(12), passes(4 + element)]),
        product(rows, head_dim, keys),
        product(keys, head_dim, rows),
    ]
    return OpKernels((op,), tuple(forward), tuple(backward) if trained else ())


# ------------------------------------------------------------------------------------------------------- fusion


def groups(ops: Sequence[Op], *, alone: AbstractSet[str] = LOOKUPS) -> list[list[Op]]:
    """Ops that run as one kernel: connected ones that move bytes, with no contraction on a path between them. Those
    that stay `alone` are merged with nothing; no library merges lookups.
    """
    depth: dict[str, int] = {}
    """How many heavy ops a tensor is behind."""
    group_of: dict[str, list[Op]] = {}
    groups: list[list[Op]] = []
    for op in ops:
        level = max((depth.get(spec.name, 0) for spec in op.inputs), default=0)
        light = not contracted_inputs(op) and op.target not in CONVERSIONS and op.target not in alone
        depth[op.name] = level if light else level + 1
        mine = [op]
        if light:
            for spec in op.inputs:
                other = group_of.get(spec.name)
                if other is None or other is mine or depth[spec.name] != level:
                    continue
                other += mine
                for member in mine:
                    group_of[member.name] = other
                groups = [group for group in groups if group is not mine]
                mine = other
            group_of[op.name] = mine
        if mine == [op]:
            groups.append(mine)
    return groups


def boundary(group: Sequence[Op], ops: Sequence[Op]) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Tensors that enter a fused group, and those of it that others read; a view and its source are one."""
    names = {op.name for op in group}
    entering = {spec.name: spec for op in group for spec in op.inputs if spec.name not in names}
    read = {spec.name for op in ops if op.name not in names for spec in op.inputs}
    last = group[-1].name
    leaving = {op.name: op.outputs[0] for op in group if op.outputs and (op.name in read or op.name == last)}
    return entering, leaving


def _fused(group: list[Op], ops: Sequence[Op], size: Size) -> OpKernels | None:
    work = [op for op in group if not op.is_view]
    if not work:
        return None
    entering, leaving = boundary(group, ops)
    special = sum(_special(op, size) for op in work)
    read = sum(spec.size_bytes(**size.local) for spec in entering.values())
    written = sum(spec.size_bytes(**size.local) for spec in leaving.values())
    drawn = sum(_drawn(op, size) for op in work)
    forward = Kernel("memory", _dtype(work[-1]), read + written, special=special + drawn)
    if not any(spec.requires_grad for spec in leaving.values()):
        return OpKernels(tuple(group), (forward,), ())
    # The gradients of what leaves and the inputs again are read, the gradients of the inputs written.
    incoming = sum(spec.size_bytes(**size.local) for spec in leaving.values() if spec.requires_grad)
    again = read if any(op.saved for op in work) else 0
    outgoing = sum(spec.size_bytes(**size.local) for spec in entering.values() if spec.requires_grad)
    backward = Kernel("memory", _dtype(work[-1]), incoming + again + outgoing, special=special)
    return OpKernels(tuple(group), (forward,), (backward,))


# -------------------------------------------------------------------------------------------------------- bytes


def forward_bytes(op: Op, *, batch: int, seq: int) -> int:
    """Every input read, every output written, and what the kernel keeps for backward beside its outputs."""
    outputs = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.outputs)
    inputs = [tensor.size_bytes(batch=batch, seq=seq) for tensor in op.inputs]
    if op.target in LOOKUPS:
        inputs[0] = outputs
    hidden = sum(s.size_bytes(batch=batch, seq=seq) for s in op.saved if s.storage.startswith(op.name + ":"))
    return sum(inputs) + outputs + hidden


def backward_bytes(op: Op, *, batch: int, seq: int) -> int:
    """The output's gradient and the saved tensors read, the inputs' gradients written; a lookup's gradient is a dense
    table.
    """
    incoming = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.outputs)
    kept = {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.saved}
    outgoing = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.inputs if tensor.requires_grad)
    return incoming + sum(kept.values()) + outgoing


def rebuilt(op: Op, *, batch: int, seq: int) -> Iterator[Kernel]:
    """Running an op again that selective recomputation keeps something of: that is read, and only the rest is made."""
    made = {spec.name: spec.size_bytes(batch=batch, seq=seq) for spec in op.outputs}
    made |= {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.saved if s.storage.split(":")[0] == op.name}
    kept = {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.kept}
    rebuilt_bytes = sum(size for storage, size in made.items() if storage not in kept)
    if rebuilt_bytes:
        yield Kernel("memory", _dtype(op), rebuilt_bytes + sum(kept.values()))


def _dtype(op: Op) -> str:
    return op.outputs[0].dtype if op.outputs else "float32"
