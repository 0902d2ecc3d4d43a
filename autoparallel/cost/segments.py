"""Graph + cost table -> Workload: every segment's time, traffic and memory at each micro-batch size.

The graph is the input and there is no formula for any family: an op costs its executed FLOPs and the bytes it reads
and writes, forward and backward each on their own. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from autoparallel.cost.activations import (
    attention_core_bytes,
    deferred_bytes,
    kept_bytes,
    replayed,
    saved_under,
    workspace_bytes,
)
from autoparallel.cost.collectives import Topology
from autoparallel.cost.compute import Device
from autoparallel.cost.kernels import Kernel, OpKernels, Size, kernels, rebuilt
from autoparallel.cost.practice import OURS, Practice
from autoparallel.cost.splitting import local_parameters, variants
from autoparallel.cost.tables import CostTable
from autoparallel.cost.workload import SegmentCost, Workload
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op
from autoparallel.ir.ops import ATTENTION, CONVERSIONS, VOCABULARY_CROSS_ENTROPY, flops
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.splits import SplitGraph
from autoparallel.tensor_parallel.values import LoweredSegment


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
    practice: Practice = OURS,
    only: Strategy | None = None,
) -> Workload:
    """Price each distinct segment once per micro-batch size and split; the rest is bookkeeping.

    `tensor_degrees` are the sizes of tensor-parallel groups to look at, beside one. With `only`, all is of that one
    strategy.
    """
    context_parallel = 1 if only is None else only.context_parallel
    pricing = Pricing(graph, table, Topology(flavor, table), seq_len, precision, practice, context_parallel)
    sizes = sorted(set(micro_batch_sizes))
    whole = [SplitGraph(graph).lowered(segment) for _, segment in sorted(graph.representatives().items())]
    parameters, shared = local_parameters(graph, whole)
    found, impossible = variants(
        graph,
        tensor_degrees,
        micro_batch_sizes=sizes,
        seq_len=seq_len // context_parallel,
        price=pricing.segment_cost,
        sequence_parallel=None if only is None else only.sequence_parallel,
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
        practice=practice,
        segment_classes=graph.segment_classes,
        costs={size: tuple(pricing.segment_cost(part, size) for part in whole) for size in sizes}
        if only is None or only.tensor_parallel == 1
        else dict.fromkeys(sizes, ()),
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
    practice: Practice = OURS
    context_parallel: int = 1

    @cached_property
    def device(self) -> Device:
        return Device(self.table)

    def segment_cost(self, lowered: LoweredSegment, rows: int) -> SegmentCost:
        """Of one rank, for a micro-batch of `rows`."""
        practice, device, ops = self.practice, self.device, list(lowered.ops)
        size = Size(rows, self.seq_len, self.context_parallel)
        found = kernels(ops, size, practice)
        comm = {op.name: self._collectives_s(lowered, op, size) for op in ops}
        again = {op.name for op in replayed(ops)}
        replay = [part for part in found if part.ops[0].name in again]
        trainable = [p.name for p in self.graph.parameters if p.trainable and p.name in lowered.parameters]
        gradients = sum(prod(lowered.split_of(name).local_shape()) for name in trainable)
        # A micro-batch adds its gradients to the ones before it: two reads and a write.
        weight_s = device.kernels_s([k for part in found for k in part.weight])
        weight_s += device.memory_s(3 * gradients * self.precision.gradient_bytes)
        replicated = [part for part in found if part.ops[0].name in lowered.replicated]
        entering = {spec.name for spec in lowered.entering}
        return SegmentCost(
            forward_s=device.kernels_s([k for part in found for k in part.forward]),
            backward_s=device.kernels_s([k for part in found for k in part.backward]) + weight_s,
            weight_gradient_s=weight_s,
            recompute_selective_s=device.kernels_s(list(_selective(replay, size, practice))),
            recompute_full_s=device.kernels_s([k for part in replay for k in part.forward])
            + sum(forward_s for name, (forward_s, _) in comm.items() if name in again),
            saved_bytes=saved_under(ops, entering, size, practice),
            saved_selective_bytes=self._saved_selective_bytes(ops, entering, size),
            deferred_bytes=deferred_bytes(ops, **size.local),
            input_bytes=sum(spec.size_bytes(**size.local) for spec in lowered.entering),
            workspace_bytes=max((workspace_bytes(op, **size.local) for op in ops), default=0),
            forward_comm_s=sum(forward_s for forward_s, _ in comm.values()),
            backward_comm_s=sum(backward_s for _, backward_s in comm.values()),
            replicated_s=device.kernels_s([k for p in replicated for k in (*p.forward, *p.backward, *p.weight)])
            if lowered.sharding.degree > 1
            else 0.0,
        )

    def _saved_selective_bytes(self, ops: list[Op], entering: set[str], size: Size) -> int:
        if self.practice.attention == "flash":
            return kept_bytes(ops, **size.local)
        saved = saved_under(ops, entering, size, self.practice)
        return saved - attention_core_bytes(ops, size, self.practice)

    def _collectives_s(self, lowered: LoweredSegment, op: Op, size: Size) -> tuple[float, float]:
        """Of an op, forward and backward."""
        degree = lowered.sharding.degree
        if op.target == ATTENTION and size.context_parallel > 1:
            return self._context_s(op, size, stride=degree)
        if op.target == VOCABULARY_CROSS_ENTROPY:
            tokens_bytes = op.inputs[1].numel(**size.local) * DTYPE_BYTES["float32"]
            largest_s, sums_s = (self.topology.all_reduce_s(n * tokens_bytes, group_size=degree) for n in (1, 2))
            return largest_s + sums_s, 0.0
        conversion = CONVERSIONS.get(op.target)
        if conversion is None:
            return 0.0, 0.0
        payload = max(spec.size_bytes(**size.local) for spec in (*op.inputs, *op.outputs))
        times = {
            None: 0.0,
            "all_reduce": self.topology.all_reduce_s(payload, group_size=degree),
            "all_gather": self.topology.all_gather_s(payload, group_size=degree),
            "reduce_scatter": self.topology.reduce_scatter_s(payload, group_size=degree),
        }
        return times[conversion.forward], times[conversion.backward] if op.outputs[0].requires_grad else 0.0

    def _context_s(self, op: Op, size: Size, *, stride: int) -> tuple[float, float]:
        """What a ring of keys and values takes longer than the attention that hides it; their gradients go around with
        them (Liu, Zaharia, Abbeel, arXiv 2310.01889).
        """
        part = kernels([op], size, self.practice)[0]
        ring = size.context_parallel
        shard = sum(spec.size_bytes(**size.local) for spec in op.inputs[1:3])
        lap_s = self.topology.all_gather_s(shard * ring, group_size=ring, stride=stride)
        forward_s, backward_s = (self.device.kernels_s(phase) for phase in (part.forward, part.backward))
        return max(0.0, lap_s - forward_s), max(0.0, 2 * lap_s - backward_s)


def _selective(replay: list[OpKernels], size: Size, practice: Practice) -> Iterator[Kernel]:
    """What selective recomputation runs again: all that is cheap or, where attention is unfused, its core alone."""
    for part in replay:
        op = part.ops[0]
        if practice.attention == "unfused":
            yield from part.forward if op.target == ATTENTION else ()
        elif op.kept and len(part.ops) == 1:
            yield from rebuilt(op, **size.local)
        else:
            yield from part.forward
