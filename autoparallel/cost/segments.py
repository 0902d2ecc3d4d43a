"""Graph + cost table -> Workload: every segment's time, traffic and memory at each micro-batch size.

The graph is the input and there is no formula for any family: an op costs its executed FLOPs and the bytes it reads
and writes, forward and backward each on their own. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from autoparallel.cost.compute import KernelKind, kernel_s, memory_s
from autoparallel.cost.tables import CostTable
from autoparallel.cost.workload import ParameterCount, Precision, SegmentCost, SharedParameters, Workload
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op
from autoparallel.ir.ops import ATTENTION, DEFERRABLE, Flops, attention_window, contracted_inputs, flops

CROSS_ENTROPY = "aten.cross_entropy_loss.default"
# Lookups touch as many rows of their first operand as they return, not the whole table.
LOOKUPS = {"aten.embedding.default", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default"}


def precision(flavor: Flavor, *, dtype: str, model_dtype: str) -> Precision:
    """`"auto"`: bf16 compute with fp32 masters and gradients on GPUs, the model's own dtype on CPU. AdamW keeps two
    moments a master.
    """
    mixed = dtype == "auto" and not flavor.is_cpu and model_dtype == "float32"
    compute = "bfloat16" if mixed else (model_dtype if dtype == "auto" else dtype)
    master = "float32" if mixed or (compute in ("bfloat16", "float16") and model_dtype == "float32") else compute
    return Precision(
        compute_dtype=compute,
        compute_bytes=DTYPE_BYTES[compute],
        master_bytes=DTYPE_BYTES[master],
        separate_compute_copy=compute != master,
        gradient_bytes=DTYPE_BYTES[master],
        optimizer_state_bytes=2 * DTYPE_BYTES[master],
    )


def build_workload(
    graph: Graph,
    flavor: Flavor,
    table: CostTable,
    *,
    batch_size: int,
    seq_len: int,
    micro_batch_sizes: Iterable[int],
    memory_ratio: float,
    precision: Precision,
) -> Workload:
    """Price each distinct segment once per micro-batch size; the rest is bookkeeping."""
    representatives = graph.representatives()
    ops = {cls: graph.segment_ops(segment) for cls, segment in representatives.items()}
    costs = {
        size: tuple(
            _segment_cost(graph, ops[cls], segment, table, batch=size, seq=seq_len, precision=precision)
            for cls, segment in sorted(representatives.items())
        )
        for size in sorted(set(micro_batch_sizes))
    }
    own, shared = _parameters(graph)
    return Workload(
        model_name=graph.model_name,
        fingerprint=graph.fingerprint,
        flavor=flavor,
        table=table,
        batch_size=batch_size,
        seq_len=seq_len,
        memory_ratio=memory_ratio,
        precision=precision,
        segment_classes=graph.segment_classes,
        costs=costs,
        parameters=own,
        shared=shared,
    )


def _parameters(graph: Graph) -> tuple[tuple[ParameterCount, ...], tuple[SharedParameters, ...]]:
    """Counts per segment; tied parameters apart; those the loss does not depend on are held by the first stage."""
    counts = [{"trainable": 0, "frozen": 0} for _ in range(graph.num_segments)]
    tied: dict[tuple[int, ...], dict[str, int]] = {}
    for parameter in graph.parameters:
        segments = parameter.segments or (0,)
        target = counts[segments[0]] if len(segments) == 1 else tied.setdefault(segments, {"trainable": 0, "frozen": 0})
        target["trainable" if parameter.trainable and parameter.segments else "frozen"] += parameter.numel
    shared = tuple(SharedParameters(segments=s, count=ParameterCount(**c)) for s, c in sorted(tied.items()))
    return tuple(ParameterCount(**c) for c in counts), shared


def _segment_cost(
    graph: Graph, ops: list[Op], segment: int, table: CostTable, *, batch: int, seq: int, precision: Precision
) -> SegmentCost:
    size = {"batch": batch, "seq": seq}
    counted = [flops(op, **size) for op in ops]
    forward = [_forward_s(op, f, table, **size) for op, f in zip(ops, counted, strict=True)]
    again = replayed(ops)
    gradients = sum(p.numel for p in graph.parameters if p.trainable and segment in p.segments)
    # A micro-batch adds its gradients to the ones before it: two reads and a write.
    accumulate_s = memory_s(table, 3 * gradients * precision.gradient_bytes)
    entering = {spec.name for spec in graph.boundaries[segment]}
    backward = [_backward_s(op, f, table, **size) for op, f in zip(ops, counted, strict=True)]
    deferred = [(op, time_s) for op, time_s in zip(ops, backward, strict=True) if _is_deferrable(op)]
    return SegmentCost(
        forward_s=sum(forward),
        backward_s=sum(backward) + accumulate_s,
        weight_gradient_s=sum(time_s / _gradients(op) for op, time_s in deferred) + accumulate_s,
        recompute_selective_s=sum(_rebuild_s(op, table, **size) for op in again),
        recompute_full_s=sum(forward[: len(again)]),
        saved_bytes=_saved_bytes(ops, entering, **size),
        saved_selective_bytes=_kept_bytes(ops, **size),
        deferred_bytes=_deferred_bytes([op for op, _ in deferred], **size),
        input_bytes=sum(spec.size_bytes(**size) for spec in graph.boundaries[segment]),
        workspace_bytes=max((_workspace_bytes(op, **size) for op in ops), default=0),
        forward_flops=sum(f.forward for f in counted),
        backward_flops=sum(f.backward for f in counted),
    )


def _kind(op: Op) -> KernelKind:
    if op.target == ATTENTION:
        return "attention"
    return "matmul" if contracted_inputs(op) else "memory"


def _forward_s(op: Op, counted: Flops, table: CostTable, *, batch: int, seq: int) -> float:
    if op.is_view:
        return 0.0
    moved = _forward_bytes(op, batch=batch, seq=seq)
    return kernel_s(table, kind=_kind(op), flops=counted.executed_forward, moved_bytes=moved, dtype=_dtype(op))


def _backward_s(op: Op, counted: Flops, table: CostTable, *, batch: int, seq: int) -> float:
    """One kernel per operand that needs a gradient for contractions, one for everything else."""
    if op.is_view or not any(tensor.requires_grad for tensor in op.outputs):
        return 0.0
    moved = _backward_bytes(op, batch=batch, seq=seq)
    kind = _kind(op)
    kernels = _gradients(op) if kind == "matmul" else 1
    if kernels == 0:
        return 0.0
    one = kernel_s(
        table, kind=kind, flops=counted.executed_backward / kernels, moved_bytes=moved / kernels, dtype=_dtype(op)
    )
    return kernels * one


def _gradients(op: Op) -> int:
    """How many of a contraction's operands need one."""
    return sum(op.inputs[i].requires_grad for i in contracted_inputs(op))


def _is_deferrable(op: Op) -> bool:
    return op.target in DEFERRABLE and op.inputs[DEFERRABLE[op.target].weight].requires_grad


def _dtype(op: Op) -> str:
    return op.outputs[0].dtype if op.outputs else "float32"


def _forward_bytes(op: Op, *, batch: int, seq: int) -> int:
    """Every input read, every output written, and what the kernel keeps for backward beside its outputs."""
    outputs = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.outputs)
    inputs = [tensor.size_bytes(batch=batch, seq=seq) for tensor in op.inputs]
    if op.target in LOOKUPS:
        inputs[0] = outputs
    hidden = sum(s.size_bytes(batch=batch, seq=seq) for s in op.saved if s.storage.startswith(op.name + ":"))
    return sum(inputs) + outputs + hidden


def _backward_bytes(op: Op, *, batch: int, seq: int) -> int:
    """The output's gradient and the saved tensors read, the inputs' gradients written; a lookup's gradient is a dense
    table.
    """
    incoming = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.outputs)
    kept = {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.saved}
    outgoing = sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in op.inputs if tensor.requires_grad)
    return incoming + sum(kept.values()) + outgoing


def _saved_bytes(ops: list[Op], entering: set[str], *, batch: int, seq: int) -> int:
    """Distinct storages that autograd keeps, made by these segments' own ops: parameters, inputs and free tensors are
    held anyway.
    """
    made = {op.name for op in ops} - entering
    kept = {
        s.storage: s.size_bytes(batch=batch, seq=seq) for op in ops for s in op.saved if s.storage.split(":")[0] in made
    }
    windowed = sum(seq * seq for op in ops if op.target == ATTENTION and 0 < attention_window(op) < seq)
    return sum(kept.values()) + windowed


def _kept_bytes(ops: list[Op], *, batch: int, seq: int) -> int:
    """What selective recomputation keeps, each output of a contraction in a storage of its own."""
    return sum(s.size_bytes(batch=batch, seq=seq) for op in ops for s in op.kept)


def replayed(ops: list[Op]) -> list[Op]:
    """The ops of a block that recomputation reaches: it stops at the last tensor that autograd saves, before the kernel
    of the op that saves it, or after it where that is a result of the kernel.
    """
    last = max((i for i, op in enumerate(ops) if op.saved), default=-1)
    if last < 0:
        return []
    saves_result = any(s.storage.split(":")[0] == ops[last].name for s in ops[last].saved)
    return ops[: last + saves_result]


def _rebuild_s(op: Op, table: CostTable, *, batch: int, seq: int) -> float:
    """Running `op` again under selective recomputation: what it keeps is read, and only the rest is made anew."""
    if not op.kept:
        return _forward_s(op, flops(op, batch=batch, seq=seq), table, batch=batch, seq=seq)
    made = {spec.name: spec.size_bytes(batch=batch, seq=seq) for spec in op.outputs}
    made |= {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.saved if s.storage.split(":")[0] == op.name}
    kept = {s.storage: s.size_bytes(batch=batch, seq=seq) for s in op.kept}
    rebuilt_bytes = sum(size for storage, size in made.items() if storage not in kept)
    return memory_s(table, rebuilt_bytes + sum(kept.values())) if rebuilt_bytes else 0.0


def _deferred_bytes(ops: list[Op], *, batch: int, seq: int) -> int:
    """Values, each once, and output gradients."""
    values = {value.name: value for value in (op.inputs[DEFERRABLE[op.target].value] for op in ops)}
    held = [*values.values(), *(tensor for op in ops for tensor in op.outputs)]
    return sum(tensor.size_bytes(batch=batch, seq=seq) for tensor in held)


def _workspace_bytes(op: Op, *, batch: int, seq: int) -> int:
    """Gradients of one op's output and of its inputs, alive together during its backward; a loss runs as log-softmax
    and selection, so that there are two of the logits' size.
    """
    if op.is_view:
        return 0
    hidden = op.inputs[0].size_bytes(batch=batch, seq=seq) if op.target == CROSS_ENTROPY else 0
    return hidden + sum(t.size_bytes(batch=batch, seq=seq) for t in (*op.outputs, *op.inputs) if t.requires_grad)
