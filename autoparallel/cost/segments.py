"""Graph + cost table -> Workload: every segment's time, traffic and memory at each micro-batch size.

The graph is the input and there is no formula for any family: an op costs its executed FLOPs and the bytes it reads
and writes, forward and backward each on their own. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from autoparallel.cost.collectives import Topology
from autoparallel.cost.compute import KernelKind, kernel_s, memory_s
from autoparallel.cost.splitting import local_parameters, variants
from autoparallel.cost.tables import CostTable
from autoparallel.cost.workload import SegmentCost, Workload
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op
from autoparallel.ir.ops import (
    ATTENTION,
    CONVERSIONS,
    DEFERRABLE,
    VOCABULARY_CROSS_ENTROPY,
    VOCABULARY_EMBEDDING,
    CollectiveKind,
    Flops,
    attention_window,
    contracted_inputs,
    flops,
)
from autoparallel.ir.precision import Precision
from autoparallel.tensor_parallel.splits import SplitGraph
from autoparallel.tensor_parallel.values import LoweredSegment

CROSS_ENTROPY = "aten.cross_entropy_loss.default"
# Lookups touch as many rows of their first operand as they return, not the whole table.
LOOKUPS = {
    "aten.embedding.default",
    VOCABULARY_EMBEDDING,
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.gather.default",
}


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
    tensor_degrees: Iterable[int] = (),
) -> Workload:
    """Price each distinct segment once per micro-batch size and split; the rest is bookkeeping.

    `tensor_degrees` are the sizes of tensor-parallel groups to look at, beside one.
    """
    pricing = Pricing(graph, table, Topology(flavor, table), seq_len, precision)
    sizes = sorted(set(micro_batch_sizes))
    whole = [SplitGraph(graph).lowered(segment) for _, segment in sorted(graph.representatives().items())]
    parameters, shared = local_parameters(graph, whole)
    found, impossible = variants(
        graph, tensor_degrees, micro_batch_sizes=sizes, seq_len=seq_len, price=pricing.segment_cost
    )
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
        costs={size: tuple(pricing.segment_cost(part, size) for part in whole) for size in sizes},
        parameters=parameters,
        shared=shared,
        step_flops=_step_flops(graph, whole, batch=batch_size, seq=seq_len),
        variants=found,
        impossible_degrees=impossible,
    )


def _step_flops(graph: Graph, whole: list[LoweredSegment], *, batch: int, seq: int) -> int:
    of_class = []
    for part in whole:
        counted = [flops(op, batch=batch, seq=seq) for op in part.ops]
        of_class.append(sum(f.forward + f.backward for f in counted))
    return sum(of_class[cls] for cls in graph.segment_classes)


@dataclass(frozen=True)
class Pricing:
    """What the price of a lowered segment depends on beside itself and its rows."""

    graph: Graph
    table: CostTable
    topology: Topology
    seq_len: int
    precision: Precision

    def segment_cost(self, lowered: LoweredSegment, rows: int) -> SegmentCost:
        """Of one rank, for a micro-batch of `rows`."""
        table, size, ops = self.table, {"batch": rows, "seq": self.seq_len}, list(lowered.ops)
        counted = [flops(op, **size) for op in ops]
        forward = [_forward_s(op, f, table, **size) for op, f in zip(ops, counted, strict=True)]
        backward = [_backward_s(op, f, table, **size) for op, f in zip(ops, counted, strict=True)]
        comm = [self._collectives_s(lowered, op, rows) for op in ops]
        again = replayed(ops)
        deferred = [(op, time_s) for op, time_s in zip(ops, backward, strict=True) if _is_deferrable(op)]
        trainable = [p.name for p in self.graph.parameters if p.trainable and p.name in lowered.parameters]
        gradients = sum(prod(lowered.split_of(name).local_shape()) for name in trainable)
        # A micro-batch adds its gradients to the ones before it: two reads and a write.
        accumulate_s = memory_s(table, 3 * gradients * self.precision.gradient_bytes)
        return SegmentCost(
            forward_s=sum(forward),
            backward_s=sum(backward) + accumulate_s,
            weight_gradient_s=sum(time_s / _gradients(op) for op, time_s in deferred) + accumulate_s,
            recompute_selective_s=sum(_rebuild_s(op, table, **size) for op in again),
            recompute_full_s=sum(forward[: len(again)]) + sum(forward_s for forward_s, _ in comm[: len(again)]),
            saved_bytes=_saved_bytes(ops, {spec.name for spec in lowered.entering}, **size),
            saved_selective_bytes=_kept_bytes(ops, **size),
            deferred_bytes=_deferred_bytes(ops, **size),
            input_bytes=sum(spec.size_bytes(**size) for spec in lowered.entering),
            workspace_bytes=max((_workspace_bytes(op, **size) for op in ops), default=0),
            forward_comm_s=sum(forward_s for forward_s, _ in comm),
            backward_comm_s=sum(backward_s for _, backward_s in comm),
            replicated_s=sum(
                f + b for op, f, b in zip(ops, forward, backward, strict=True) if op.name in lowered.replicated
            )
            if lowered.sharding.degree > 1
            else 0.0,
        )

    def _collectives_s(self, lowered: LoweredSegment, op: Op, rows: int) -> tuple[float, float]:
        """Of an op, forward and backward."""
        size, degree = {"batch": rows, "seq": self.seq_len}, lowered.sharding.degree
        if op.target == VOCABULARY_CROSS_ENTROPY:
            tokens_bytes = op.inputs[1].numel(**size) * DTYPE_BYTES["float32"]
            largest_s, sums_s = (self.topology.all_reduce_s(n * tokens_bytes, group_size=degree) for n in (1, 2))
            return largest_s + sums_s, 0.0
        conversion = CONVERSIONS.get(op.target)
        if conversion is None:
            return 0.0, 0.0
        payload = max(spec.size_bytes(**size) for spec in (*op.inputs, *op.outputs))
        times = {
            None: 0.0,
            "all_reduce": self.topology.all_reduce_s(payload, group_size=degree),
            "all_gather": self.topology.all_gather_s(payload, group_size=degree),
            "reduce_scatter": self.topology.reduce_scatter_s(payload, group_size=degree),
        }
        return times[conversion.forward], times[conversion.backward] if op.outputs[0].requires_grad else 0.0


def _kind(op: Op) -> KernelKind:
    if op.target == ATTENTION:
        return "attention"
    return "matmul" if contracted_inputs(op) else "memory"


def _forward_s(op: Op, counted: Flops, table: CostTable, *, batch: int, seq: int) -> float:
    if op.is_view or (op.target in CONVERSIONS and not _regroups(op, CONVERSIONS[op.target].forward)):
        return 0.0
    moved = _forward_bytes(op, batch=batch, seq=seq)
    return kernel_s(table, kind=_kind(op), flops=counted.executed_forward, moved_bytes=moved, dtype=_dtype(op))


def _backward_s(op: Op, counted: Flops, table: CostTable, *, batch: int, seq: int) -> float:
    """One kernel per operand that needs a gradient for contractions, one for everything else."""
    if op.is_view or not any(tensor.requires_grad for tensor in op.outputs):
        return 0.0
    if op.target in CONVERSIONS and not _regroups(op, CONVERSIONS[op.target].backward):
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


def _regroups(op: Op, collective: CollectiveKind | None) -> bool:
    """Whether a collective's blocks must be put in order by a copy: they lie one after the other along dim 0."""
    return collective in ("all_gather", "reduce_scatter") and op.argument("dim", 0) != 0


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


def _workspace_bytes(op: Op, *, batch: int, seq: int) -> int:
    """Gradients of one op's output and of its inputs, alive together during its backward; a loss runs as log-softmax
    and selection, so that there are two of the logits' size.
    """
    if op.is_view:
        return 0
    hidden = op.inputs[0].size_bytes(batch=batch, seq=seq) if op.target == CROSS_ENTROPY else 0
    return hidden + sum(t.size_bytes(batch=batch, seq=seq) for t in (*op.outputs, *op.inputs) if t.requires_grad)
