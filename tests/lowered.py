"""The workload of one rank of a tensor-parallel strategy: the functions that price whole segments, on lowered ones."""

from __future__ import annotations

from autoparallel.cost.segments import (
    _deferred_bytes,
    _is_deferrable,
    _kept_bytes,
    _saved_bytes,
    _workspace_bytes,
)
from autoparallel.cost.tables import load_table
from autoparallel.cost.workload import ParameterCount, Precision, SegmentCost, SharedParameters, Workload
from autoparallel.ir.graph import DTYPE_BYTES, Graph
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.splits import TensorParallel
from tests.workloads import gpus


def lowered_workload(graph: Graph, strategy: Strategy, *, seq_len: int, tensor_index: int) -> Workload:
    """Bytes only: nothing is timed."""
    split = TensorParallel(strategy.tensor_parallel, strategy.sequence_parallel, strategy.splits or ())
    size = {"batch": strategy.batch_per_device, "seq": seq_len}
    costs = []
    for _, segment in sorted(graph.representatives().items()):
        lowered = split.lowered(graph, segment, rank=tensor_index)
        ops = list(lowered.ops)
        entering = {spec.name for spec in lowered.entering}
        costs.append(
            SegmentCost(
                forward_s=1.0, backward_s=1.0, weight_gradient_s=0.5, recompute_selective_s=0.1, recompute_full_s=1.0,
                saved_bytes=_saved_bytes(ops, entering, **size),
                saved_selective_bytes=_kept_bytes(ops, **size),
                deferred_bytes=_deferred_bytes([op for op in ops if _is_deferrable(op)], **size),
                input_bytes=sum(spec.size_bytes(**size) for spec in lowered.entering),
                workspace_bytes=max((_workspace_bytes(op, **size) for op in ops), default=0),
                forward_flops=1, backward_flops=1,
            )
        )  # fmt: skip
    sizes = {name: _product(held.local_shape(tensor_index)) for name, held in split.parameters(graph).items()}
    own, tied = [0] * graph.num_segments, dict[tuple[int, ...], int]()
    for p in graph.parameters:
        if len(p.segments) == 1:
            own[p.segments[0]] += sizes[p.name]
        else:
            tied[p.segments] = tied.get(p.segments, 0) + sizes[p.name]
    flavor = gpus(strategy.num_devices)
    return Workload(
        model_name=graph.model_name,
        fingerprint=graph.fingerprint,
        flavor=flavor,
        table=load_table(flavor.device),
        batch_size=strategy.batch_size,
        seq_len=seq_len,
        memory_ratio=1.0,
        precision=_one_dtype(graph.parameters[0].dtype),
        segment_classes=graph.segment_classes,
        costs={strategy.batch_per_device: tuple(costs)},
        parameters=tuple(ParameterCount(trainable=count) for count in own),
        shared=tuple(SharedParameters(segments=s, count=ParameterCount(trainable=n)) for s, n in tied.items()),
    )


def _one_dtype(dtype: str) -> Precision:
    """As the runtime computes: parameters, gradients and moments in the model's own dtype."""
    size = DTYPE_BYTES[dtype]
    return Precision(
        compute_dtype=dtype, compute_bytes=size, master_bytes=size, separate_compute_copy=False, gradient_bytes=size,
        optimizer_state_bytes=2 * size,
    )  # fmt: skip


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
