"""Memory that a segment's ops hold: what autograd keeps under each level of recomputation, and what a backward needs
while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoparallel.cost.kernels import CROSS_ENTROPY, Size, boundary, drops, launched, score_elements
from autoparallel.cost.practice import Practice
from autoparallel.ir.graph import DTYPE_BYTES, Op
from autoparallel.ir.ops import ATTENTION, CONVERSIONS, DEFERRABLE, RANDOM, attention_window


def saved_bytes(ops: list[Op], entering: set[str], *, batch: int, seq: int) -> int:
    """Distinct storages that autograd keeps, made by these segments' own ops: parameters, inputs and free tensors are
    held anyway.
    """
    made = {op.name for op in ops} - entering
    kept = {
        s.storage: s.size_bytes(batch=batch, seq=seq) for op in ops for s in op.saved if s.storage.split(":")[0] in made
    }
    windowed = sum(seq * seq for op in ops if op.target == ATTENTION and 0 < attention_window(op) < seq)
    return sum(kept.values()) + windowed


def saved_under(ops: list[Op], entering: set[str], size: Size, practice: Practice) -> int:
    """`saved_bytes` of a program with other kernels: a fused one keeps what enters it and makes the rest again, and
    unfused attention keeps its probabilities (arXiv 2205.05198).
    """
    if practice.merges or practice.matmul_dtype is not None:
        total = _saved_by_kernels(ops, entering, size, practice)
    else:
        total = saved_bytes(ops, entering, **size.local)
    if not practice.keeps_gathered:
        total -= _gathered_bytes(ops, size)
    return total + attention_core_bytes(ops, size, practice)


def _gathered_bytes(ops: Sequence[Op], size: Size) -> int:
    """Of what is gathered ahead of matmuls and saved, all but the shard that is gathered."""
    saved = {s.storage for op in ops for s in op.saved}
    return sum(
        op.outputs[0].size_bytes(**size.local) - op.inputs[0].size_bytes(**size.local)
        for op in ops
        if op.target in CONVERSIONS and CONVERSIONS[op.target].forward == "all_gather" and op.name in saved
    )


def attention_core_bytes(ops: Sequence[Op], size: Size, practice: Practice) -> int:
    """What unfused attention keeps: probabilities, and with dropout its mask and what it leaves."""
    attention = [op for op in ops if op.target == ATTENTION]
    if practice.attention == "math":
        return sum(_math_bytes(op, size) for op in attention if drops(op))
    if practice.attention != "unfused":
        return 0
    total = 0
    for op in attention:
        element = DTYPE_BYTES[op.inputs[0].dtype]
        dropped = 1 + element if drops(op) else 0
        total += score_elements(op, size) * ((element if practice.fused else 4 + element) + dropped)
    return total


def _math_bytes(op: Op, size: Size) -> int:
    """Of PyTorch's own matmuls: probabilities, mask and what dropout leaves in fp32, scaled queries and keys (values
    too where they are not fp32), beside what the fused kernel keeps.
    """
    wide = max(4, DTYPE_BYTES[op.inputs[0].dtype])
    copies = 2 if DTYPE_BYTES[op.inputs[0].dtype] == wide else 3
    operands = sum(spec.numel(**size.local) for spec in op.inputs[:copies])
    return wide * (3 * score_elements(op, size) + operands)


def _saved_by_kernels(ops: list[Op], entering: set[str], size: Size, practice: Practice) -> int:
    made = {op.name for op in ops} - entering
    sources = {op.name: op.inputs[0].name for op in ops if op.is_view}
    kept: dict[tuple[str, str], int] = {}
    """By storage and copy: itself, a mask of what was dropped, or what a matmul in a low dtype reads."""
    for group in launched(ops, practice):
        if not any(op.saved for op in group):
            continue
        if len(group) == 1:
            (op,) = group
            value = op.inputs[DEFERRABLE[op.target].value].name if op.target in DEFERRABLE else ""
            for saved in op.saved:
                low = practice.matmul_dtype is not None and saved.storage in (value, _storage(value, sources))
                size_bytes = saved.size_bytes(**size.local)
                kept[saved.storage, "low" if low else ""] = (
                    size_bytes // DTYPE_BYTES[op.outputs[0].dtype] if low else size_bytes
                )
            continue
        masked = {_storage(name, sources) for name in _only_dropped(group)}
        for spec in boundary(group, ops)[0].values():
            name = _storage(spec.name, sources)
            if name in masked:
                kept[name, group[0].name] = spec.numel(**size.local)  # a byte an element says what is dropped
            elif spec.requires_grad:
                kept[name, ""] = spec.size_bytes(**size.local)
    return sum(size_bytes for (storage, _), size_bytes in kept.items() if storage.split(":")[0] in made)


def _only_dropped(group: list[Op]) -> set[str]:
    """What enters a fused group only to be dropped out of, biases added: its values are not needed again."""
    by_name = {op.name: op for op in group}
    found = {op.inputs[0].name for op in group if op.target in RANDOM}
    for op in reversed(group):
        if op.name in found and (op.is_view or not op.saved):
            found |= {spec.name for spec in op.inputs}
    return found - by_name.keys()


def _storage(name: str, sources: dict[str, str]) -> str:
    """What a view is of."""
    while name in sources:
        name = sources[name]
    return name


def kept_bytes(ops: Sequence[Op], *, batch: int, seq: int) -> int:
    """What selective recomputation keeps, each output of a contraction in a storage of its own."""
    return sum(s.size_bytes(batch=batch, seq=seq) for op in ops for s in op.kept)


def kept_under(ops: Sequence[Op], size: Size, practice: Practice) -> int:
    """`kept_bytes`, and the products of PyTorch's own matmuls where those are what attention runs."""
    matmuls = [op for op in ops if op.target == ATTENTION and drops(op)] if practice.attention == "math" else []
    products = sum(
        max(4, DTYPE_BYTES[op.inputs[0].dtype]) * (score_elements(op, size) + op.outputs[0].numel(**size.local))
        for op in matmuls
    )
    return kept_bytes(ops, **size.local) + products


def replayed(ops: list[Op]) -> list[Op]:
    """The ops of a block that recomputation reaches: it stops at the last tensor that autograd saves, before the kernel
    of the op that saves it, or after it where that is a result of the kernel.
    """
    last = max((i for i, op in enumerate(ops) if op.saved), default=-1)
    if last < 0:
        return []
    saves_result = any(s.storage.split(":")[0] == ops[last].name for s in ops[last].saved)
    return ops[: last + saves_result]


def deferred_bytes(ops: list[Op], *, batch: int, seq: int) -> int:
    """What a split backward leaves for the weights' gradients: values and output gradients, each once."""
    deferred = [op for op in ops if _is_deferrable(op)]
    values = {value.name: value for value in (op.inputs[DEFERRABLE[op.target].value] for op in deferred)}
    storages = _gradient_storages(ops, batch=batch, seq=seq)
    gradients = {storages[op.name]: op.outputs[0] for op in deferred}
    return sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in (*values.values(), *gradients.values()))


def _gradient_storages(ops: list[Op], *, batch: int, seq: int) -> dict[str, str]:
    """For each op, the last one whose output's gradient comes down to it as it is: branches that end in one sum, as the
    attention and the MLP of a parallel block, receive the same tensor.
    """
    users: dict[str, set[int]] = {}
    for i, op in enumerate(ops):
        for spec in op.inputs:
            users.setdefault(spec.name, set()).add(i)
    owner: dict[str, str] = {}
    for op in reversed(ops):
        used_by = [ops[i] for i in users.get(op.name, ())]
        passes = len(used_by) == 1 and _passes_gradient(used_by[0], op, batch=batch, seq=seq)
        owner[op.name] = owner[used_by[0].name] if passes else op.name
    return owner


def _passes_gradient(user: Op, maker: Op, *, batch: int, seq: int) -> bool:
    """Whether the gradients of what they make lie in one storage."""
    sizes = {tensor.numel(batch=batch, seq=seq) for op in (maker, user) for tensor in op.outputs}
    if len(maker.outputs) != 1 or len(user.outputs) != 1 or len(sizes) != 1:
        return False
    return user.is_view or (user.target == "aten.add.Tensor" and user.argument("alpha", 1) == 1)


def workspace_under(ops: Sequence[Op], size: Size, practice: Practice) -> int:
    """`workspace_bytes` of the largest kernel: a merged one has gradients of what enters and leaves it."""

    def of_group(group: list[Op]) -> int:
        if len(group) == 1:
            return workspace_bytes(group[0], **size.local)
        return sum(
            spec.size_bytes(**size.local)
            for side in boundary(group, ops)
            for spec in side.values()
            if spec.requires_grad
        )

    return max(map(of_group, launched(ops, practice)), default=0)


def workspace_bytes(op: Op, *, batch: int, seq: int) -> int:
    """Gradients of one op's output and of its inputs, alive together during its backward; a loss runs as log-softmax
    and selection, so that there are two of the logits' size.
    """
    if op.is_view:
        return 0
    hidden = op.inputs[0].size_bytes(batch=batch, seq=seq) if op.target == CROSS_ENTROPY else 0
    return hidden + sum(t.size_bytes(batch=batch, seq=seq) for t in (*op.outputs, *op.inputs) if t.requires_grad)


def _is_deferrable(op: Op) -> bool:
    return op.target in DEFERRABLE and op.inputs[DEFERRABLE[op.target].weight].requires_grad
