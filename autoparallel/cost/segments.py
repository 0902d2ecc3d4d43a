"""Graph + cost table -> Workload: every segment's time, traffic and memory at each micro-batch size.

The graph is the input and there is no formula for any family: an op costs its executed FLOPs and the bytes it reads
and writes, forward and backward each on their own. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from autoparallel.cost.collectives import Topology, distinct_strides
from autoparallel.cost.compute import Device
from autoparallel.cost.kernels import Kernel, Size
from autoparallel.cost.practice import OURS, Practice
from autoparallel.cost.splitting import local_parameters, variants
from autoparallel.cost.tables import CostTable
from autoparallel.cost.work import Call, Work, work_of
from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Workload
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import Graph
from autoparallel.ir.ops import CollectiveKind, flops
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.splits import SplitGraph
from autoparallel.tensor_parallel.values import LoweredSegment

SHOWN_BESIDE_MATMULS = 0.3
"""Of collectives of tensor parallelism that run beside matmuls piece by piece, what is not hidden: the first piece and
the slower matmuls (assumed; Jiang et al., arXiv 2402.15627, and the guide of Transformer Engine describe the practice).
"""


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

    `tensor_degrees` are the sizes of tensor-parallel groups to look at, beside one, each at every stride that spreads
    its ranks over hosts in another way. With `only`, all is of that one strategy.
    """
    if flavor.is_cpu and practice.attention == "flash":
        practice = practice.model_copy(update={"attention": "math"})
    topology, degrees = Topology(flavor, table), list(tensor_degrees)
    if only is None:
        context_parallel, pricing = 1, Pricing(graph, table, topology, seq_len, precision, practice)
        strides = {degree: distinct_strides(flavor, degree) for degree in degrees}
    else:
        context_parallel, stride = only.context_parallel, only.stride_of("dp")
        pricing = Pricing(graph, table, topology, seq_len, precision, practice, context_parallel, stride)
        strides = {degree: [only.stride_of("tp")] for degree in degrees}
    sizes = sorted(set(micro_batch_sizes))
    whole, (parameters, shared) = _whole(graph), _counts(graph)
    found, impossible = variants(
        graph,
        strides,
        micro_batch_sizes=sizes,
        seq_len=seq_len // context_parallel,
        price=pricing.segment_cost,
        sequence_parallel=None if only is None else only.sequence_parallel,
        shards_most=practice.shards_most,
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


@lru_cache(maxsize=256)
def _whole(graph: Graph) -> tuple[LoweredSegment, ...]:
    """Of every class, as one device runs it."""
    split = SplitGraph(graph)
    return tuple(split.lowered(segment) for _, segment in sorted(graph.representatives().items()))


@lru_cache(maxsize=256)
def _counts(graph: Graph) -> tuple[tuple[ParameterCount, ...], tuple[SharedParameters, ...]]:
    return local_parameters(graph, _whole(graph))


def _step_flops(graph: Graph, whole: tuple[LoweredSegment, ...], *, batch: int, seq: int) -> int:
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
    context_stride: int = 1
    """Ranks between neighbours that share a row."""

    @cached_property
    def device(self) -> Device:
        return Device(self.table, dispatch_s=self.practice.dispatch_s)

    def segment_cost(self, lowered: LoweredSegment, rows: int, tensor_stride: int = 1) -> SegmentCost:
        """Of one rank, for a micro-batch of `rows`; its tensor-parallel group's ranks are `tensor_stride` apart."""
        device, size = self.device, Size(rows, self.seq_len, self.context_parallel)
        work = work_of(self.graph, lowered, size, self.practice)
        group = {"group_size": lowered.sharding.degree, "stride": tensor_stride}
        comm = [(call, *self._collective_s(call, group)) for call in work.collectives]
        weight_s = self._weight_gradients_s(work)
        shown = SHOWN_BESIDE_MATMULS if self.practice.tensor_overlap else 1.0
        forward_comm_s = shown * sum(forward_s for _, forward_s, _ in comm)
        backward_comm_s = shown * sum(backward_s for _, _, backward_s in comm)
        replayed_comm_s = shown * sum(forward_s for call, forward_s, _ in comm if call.is_replayed)
        forward, backward, replay = work.num_collectives
        return SegmentCost(
            forward_s=device.kernels_s(work.forward, collectives=forward, waits_s=forward_comm_s),
            backward_s=device.kernels_s(work.backward, collectives=backward, waits_s=backward_comm_s) + weight_s,
            weight_gradient_s=weight_s,
            recompute_selective_s=device.kernels_s(work.selective),
            recompute_full_s=device.kernels_s(work.replay, collectives=replay, waits_s=replayed_comm_s)
            + replayed_comm_s,
            saved_bytes=work.saved_bytes,
            saved_selective_bytes=work.saved_selective_bytes,
            deferred_bytes=work.deferred_bytes,
            input_bytes=work.input_bytes,
            workspace_bytes=work.workspace_bytes,
            forward_comm_s=forward_comm_s,
            backward_comm_s=backward_comm_s,
            replicated_s=device.kernels_s(work.replicated),
        )

    def _weight_gradients_s(self, work: Work) -> float:
        """A micro-batch adds its gradients to the ones before it: two reads and a write of each, or what the matmuls
        that make them read and write more.
        """
        kernels, left = work.weight, work.gradient_elements
        if self.practice.accumulates_in_matmul:
            left -= sum(k.products * k.rows * k.columns for k in kernels if k.kind == "matmul")
            kernels = tuple(_accumulating(k, self.precision) if k.kind == "matmul" else k for k in kernels)
        return self.device.kernels_s(kernels) + self.device.stream_s(3 * left * self.precision.gradient_bytes)

    def _collective_s(self, call: Call, group: dict[str, int]) -> tuple[float, float]:
        """Forward and backward, over a tensor-parallel group."""
        if call.attention:
            return self._ring_s(call)
        times: dict[CollectiveKind | None, Callable[..., float]] = {
            None: lambda size_bytes, **_: 0.0,
            "all_reduce": self.topology.all_reduce_s,
            "all_gather": self.topology.all_gather_s,
            "reduce_scatter": self.topology.reduce_scatter_s,
        }
        forward_s, backward_s = (
            sum(times[kind](size, **group) for size in call.sizes) for kind in (call.forward, call.backward)
        )
        return forward_s, backward_s

    def _ring_s(self, call: Call) -> tuple[float, float]:
        """What a ring of keys and values takes longer than the attention that hides it; their gradients go around with
        them (Liu, Zaharia, Abbeel, arXiv 2310.01889).
        """
        (size_bytes,) = call.sizes
        lap_s = self.topology.all_gather_s(size_bytes, group_size=self.context_parallel, stride=self.context_stride)
        forward_s, backward_s = (self.device.kernels_s(phase) for phase in call.attention)
        return max(0.0, lap_s - forward_s), max(0.0, 2 * lap_s - backward_s)


def _accumulating(matmul: Kernel, precision: Precision) -> Kernel:
    """It reads the sum so far and writes it, instead of its product."""
    written = matmul.products * matmul.rows * matmul.columns
    more = written * (2 * precision.gradient_bytes - precision.compute_bytes)
    return matmul._replace(moved_bytes=matmul.moved_bytes + more)
