"""What one rank does with a lowered segment, for one micro-batch: kernels by phase, collectives and bytes, before any
has a price. Found once for each segment, size and practice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from autoparallel.cost.activations import (
    attention_core_bytes,
    deferred_bytes,
    kept_under,
    replayed,
    saved_under,
    workspace_under,
)
from autoparallel.cost.kernels import Kernel, OpKernels, Size, kernels, rebuilt
from autoparallel.cost.practice import Practice
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op
from autoparallel.ir.ops import ATTENTION, CONVERSIONS, VOCABULARY_CROSS_ENTROPY, CollectiveKind
from autoparallel.tensor_parallel.values import LoweredSegment


class Call(NamedTuple):
    """Collectives of one op: of tensor parallelism, or the ring of context parallelism."""

    forward: CollectiveKind | None
    backward: CollectiveKind | None
    sizes: tuple[int, ...]
    """Bytes of each tensor, whole."""
    is_replayed: bool
    """Whether full recomputation communicates again."""
    attention: tuple[tuple[Kernel, ...], ...] = ()
    """Of a ring: what hides it, forward and backward."""


@dataclass(frozen=True)
class Work:
    """Kernels as `cost.kernels` makes them; bytes as `SegmentCost` has them."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    """Weights' gradients left out."""
    weight: tuple[Kernel, ...]
    replay: tuple[Kernel, ...]
    """What full recomputation runs again."""
    selective: tuple[Kernel, ...]
    replicated: tuple[Kernel, ...]
    """Those that every rank of a tensor-parallel group runs on the same tensors."""
    collectives: tuple[Call, ...]
    gradient_elements: int
    saved_bytes: int
    saved_selective_bytes: int
    deferred_bytes: int
    input_bytes: int
    workspace_bytes: int

    @property
    def num_collectives(self) -> tuple[int, int, int]:
        """Of tensor parallelism: forward, backward, and in what full recomputation runs again."""
        calls = [(call, len(call.sizes)) for call in self.collectives if not call.attention]
        forward = sum(count for call, count in calls if call.forward)
        backward = sum(count for call, count in calls if call.backward)
        return forward, backward, sum(count for call, count in calls if call.forward and call.is_replayed)


@lru_cache(maxsize=1 << 14)
def work_of(graph: Graph, lowered: LoweredSegment, size: Size, practice: Practice) -> Work:
    """`graph` tells which parameters are trained."""
    ops = list(lowered.ops)
    if any(op.segment == graph.num_segments - 1 for op in ops):
        practice = practice.model_copy(update={"matmul_dtype": None})  # the head's logits stay precise
    found = kernels(ops, size, practice)
    again = {op.name for op in replayed(ops)}
    replay = [part for part in found if part.ops[0].name in again]
    entering = {spec.name for spec in lowered.entering}
    saved = saved_under(ops, entering, size, practice)
    core = attention_core_bytes(ops, size, practice)
    repeated = [part for part in found if part.ops[0].name in lowered.replicated and lowered.sharding.degree > 1]
    trained = [p.name for p in graph.parameters if p.trainable and p.name in lowered.parameters]
    return Work(
        forward=tuple(k for part in found for k in part.forward),
        backward=tuple(k for part in found for k in part.backward),
        weight=tuple(k for part in found for k in part.weight),
        replay=tuple(k for part in replay for k in part.forward),
        selective=tuple(_selective(replay, size, practice)),
        replicated=tuple(k for part in repeated for k in (*part.forward, *part.backward, *part.weight)),
        collectives=tuple(_calls(ops, again, size, practice)),
        gradient_elements=sum(prod(lowered.split_of(name).local_shape()) for name in trained),
        saved_bytes=saved,
        saved_selective_bytes=saved - core if practice.attention == "unfused" else kept_under(ops, size, practice),
        deferred_bytes=deferred_bytes(ops, **size.local),
        input_bytes=sum(spec.size_bytes(**size.local) for spec in lowered.entering),
        workspace_bytes=workspace_under(ops, size, practice),
    )


def _selective(replay: list[OpKernels], size: Size, practice: Practice) -> Iterator[Kernel]:
    """What selective recomputation runs again: all that is cheap or, where attention is unfused, its core alone (arXiv
    2205.05198).
    """
    for part in replay:
        op = part.ops[0]
        if practice.attention == "unfused":
            yield from part.forward if op.target == ATTENTION else ()
        elif op.kept and len(part.ops) == 1:
            yield from rebuilt(op, **size.local)
        else:
            yield from part.forward


def _calls(ops: Sequence[Op], again: set[str], size: Size, practice: Practice) -> Iterator[Call]:
    for op in ops:
        if op.target == ATTENTION and size.context_parallel > 1:
            part = kernels([op], size, practice)[0]
            shard = sum(spec.size_bytes(**size.local) for spec in op.inputs[1:3])
            whole = (shard * size.context_parallel,)
            yield Call("all_gather", None, whole, op.name in again, (part.forward, part.backward))
        elif op.target == VOCABULARY_CROSS_ENTROPY:
            tokens = op.inputs[1].numel(**size.local) * DTYPE_BYTES["float32"]
            yield Call("all_reduce", None, (tokens, 2 * tokens), op.name in again)
        elif (conversion := CONVERSIONS.get(op.target)) is not None:
            payload = max(spec.size_bytes(**size.local) for spec in (*op.inputs, *op.outputs))
            backward = conversion.backward if op.outputs[0].requires_grad else None
            yield Call(conversion.forward, backward, (payload,), op.name in again)
