"""What one rank of a cluster communicates and computes in one training step: graph and strategy in, a counted list out.

Read from what is emitted: the lowered ops of each segment and their conversions, what recomputation replays, the
schedule's action lists, and how parameters are sharded and gradients reduced. No link and no time is in it; sizes are
those that `cost.collectives` takes: the gathered tensor, the tensor before it is scattered, the tensor sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

from autoparallel.cost.activations import replayed
from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op, Parameter, TensorSpec
from autoparallel.ir.ops import CONVERSIONS, DEFERRABLE, VOCABULARY_CROSS_ENTROPY, CollectiveKind, flops
from autoparallel.plans.grid import Place
from autoparallel.plans.strategy import Recomputation, StagePlan, Strategy
from autoparallel.schedule.actions import Order, actions, splits_backward
from autoparallel.tensor_parallel.layout import ParameterSplit
from autoparallel.tensor_parallel.splits import SplitGraph
from autoparallel.tensor_parallel.values import LoweredSegment

Phase = Literal["forward", "recompute", "backward", "step"]
"""`step` comes once, after the schedule."""
Axis = Literal["tensor", "data", "shard_groups", "pipeline", "tied", "world"]
"""`shard_groups`: replicas that hold the same shards under hybrid sharding."""
BUCKET_BYTES = 32 << 20
"""Gradients are summed in flat buckets: many small reductions cost latency, one huge one begins late. About the size of
those of DistributedDataParallel (Li et al., arXiv 2006.15704).
"""


class Transfer(NamedTuple):
    """One communication of a rank."""

    phase: Phase
    kind: CollectiveKind | Literal["send", "recv"]
    axis: Axis
    ranks: tuple[int, ...]
    """The group that communicates; the peer of a send or receive."""
    dtype: str
    size_bytes: int


Traffic = Counter[Transfer]
PhaseFlops = Counter[Phase]


class Shape(NamedTuple):
    """A parameter or gradient on one rank of a tensor-parallel group."""

    dims: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        return prod(self.dims) * DTYPE_BYTES[self.dtype]

    def padded(self, ways: int) -> Shape:
        """With rows that divide evenly over `ways` shards: so sharded parameters are gathered and reduced."""
        return Shape((-(-self.dims[0] // ways) * ways, *self.dims[1:]), self.dtype)

    def shard(self, ways: int, index: int) -> Shape:
        """Equal chunks of rows, the last ones shorter, as torch.chunk cuts."""
        length = -(-self.dims[0] // ways)
        rows = min((index + 1) * length, self.dims[0]) - min(index * length, self.dims[0])
        return Shape((rows, *self.dims[1:]), self.dtype)


def buckets(tensors: Sequence[tuple[str, int]], limit_bytes: int = BUCKET_BYTES) -> list[range]:
    """Consecutive tensors (dtype, bytes) of one dtype that are reduced together, up to the one that reaches the limit;
    what is as large itself is alone, and is never copied.
    """
    found: list[range] = []
    open_dtype, open_bytes = "", limit_bytes
    for index, (dtype, size_bytes) in enumerate(tensors):
        if dtype == open_dtype and open_bytes < limit_bytes and size_bytes < limit_bytes:
            found[-1] = range(found[-1].start, index + 1)
            open_bytes += size_bytes
        else:
            found.append(range(index, index + 1))
            open_dtype, open_bytes = dtype, size_bytes
    return found


@dataclass(frozen=True)
class RankStep:
    """One training step of one rank; the strategy's `stages` must be filled."""

    graph: Graph
    strategy: Strategy
    seq_len: int
    rank: int
    gradient_dtype: str
    """In which gradients are summed."""

    def traffic(self) -> Traffic:
        """Everything that the rank communicates."""
        found = self._pipeline() + self._parameters() + self._gradients()
        for segment, level in self._segments():
            lowered = self._lowered(segment)
            for transfer, count in self._conversions(lowered, level).items():
                found[transfer] += count * self.strategy.num_micro_batches
        if self.strategy.num_stages * self.strategy.data_parallel > 1:  # else every rank has the loss
            loss = self.graph.spec_of(self.graph.outputs[0])
            everyone = tuple(range(self.strategy.num_devices))
            found[Transfer("step", "all_reduce", "world", everyone, loss.dtype, DTYPE_BYTES[loss.dtype])] += 1
        return found

    def flops(self) -> PhaseFlops:
        """FLOPs of contractions, causality not subtracted."""
        found: PhaseFlops = Counter()
        for segment, level in self._segments():
            for phase, count in segment_flops(self._lowered(segment).ops, level, **self._size).items():
                found[phase] += count * self.strategy.num_micro_batches
        return found

    # -------------------------------------------------------------------------------- where the rank stands

    @cached_property
    def place(self) -> Place:
        return self.strategy.place_of(self.rank)

    @cached_property
    def split(self) -> SplitGraph:
        return SplitGraph.of_strategy(self.graph, self.strategy)

    @property
    def _size(self) -> dict[str, int]:
        return {"batch": self.strategy.batch_per_device, "seq": self.seq_len}

    @property
    def _plans(self) -> tuple[StagePlan, ...]:
        return self.strategy.stages_of(self.place.stage)

    @property
    def _order(self) -> Order:
        """The rank's actions."""
        strategy = self.strategy
        orders = actions(strategy.schedule, strategy.num_stages, strategy.num_micro_batches, strategy.virtual_stages)
        return orders[self.place.stage]

    def _segments(self) -> list[tuple[int, Recomputation]]:
        """The rank's segments with their recomputation levels."""
        return [
            (segment, plan.recomputation_of(segment, num_segments=self.graph.num_segments))
            for plan in self._plans
            for segment in range(plan.first_segment, plan.last_segment + 1)
        ]

    def _lowered(self, segment: int) -> LoweredSegment:
        """Of the first segment of the class: equal segments communicate alike."""
        return self._lowered_classes[self.graph.segment_classes[segment]]

    @cached_property
    def _lowered_classes(self) -> dict[int, LoweredSegment]:
        first = self.graph.representatives()
        return {cls: self.split.lowered(segment, rank=self.place.tensor_index) for cls, segment in first.items()}

    @property
    def _tensor_group(self) -> tuple[int, ...]:
        others = (self.place._replace(tensor_index=i) for i in range(self.strategy.tensor_parallel))
        return tuple(map(self.strategy.rank_of, others))

    def _replicas(self, indices: range) -> tuple[int, ...]:
        return tuple(self.strategy.rank_of(self.place._replace(data_index=i)) for i in indices)

    @property
    def _data_group(self) -> tuple[int, ...]:
        """Replicas that have the shards of one copy."""
        first = self.place.data_index - self._shard_index
        return self._replicas(range(first, first + self.strategy.shard_ways))

    @property
    def _shard_groups(self) -> tuple[int, ...]:
        """Replicas that hold the same shard."""
        return self._replicas(range(self._shard_index, self.strategy.data_parallel, self.strategy.shard_ways))

    @property
    def _shard_index(self) -> int:
        return self.place.data_index % self.strategy.shard_ways

    # -------------------------------------------------------------------------------- activations

    def _conversions(self, lowered: LoweredSegment, level: Recomputation) -> Traffic:
        """What tensor parallelism communicates for one micro-batch."""
        found: Traffic = Counter()
        trained = differentiated(lowered, unread=self.graph.outputs[1])
        again = {op.name for op in rerun(lowered.ops, level)}
        for op in lowered.ops:
            for phase, kind, dtype, numel in _collectives(op, **self._size):
                transfer = Transfer(phase, kind, "tensor", self._tensor_group, dtype, numel * DTYPE_BYTES[dtype])
                if phase == "forward" or op.name in trained:
                    found[transfer] += 1
                if phase == "forward" and op.name in again:
                    found[transfer._replace(phase="recompute")] += 1
        return found

    def _pipeline(self) -> Traffic:
        """Sends and receives of the rank's action list: activations to the next stage, gradients to the one before."""
        found: Traffic = Counter()
        for stage, kind, _ in self._order:
            entering, leaving = self._boundary(stage), self._boundary(stage + 1)
            if kind == "F":
                found += self._exchanged("forward", "recv", stage - 1, entering)
                found += self._exchanged("forward", "send", stage + 1, leaving)
            elif kind != "W":
                found += self._exchanged("backward", "recv", stage + 1, [s for s in leaving if s.requires_grad])
                found += self._exchanged("backward", "send", stage - 1, [s for s in entering if s.requires_grad])
        return found

    def _boundary(self, stage: int) -> tuple[TensorSpec, ...]:
        """What a stage receives from the one before it; none where the model begins and ends."""
        assert self.strategy.stages is not None
        if not 0 < stage < self.strategy.total_stages:
            return ()
        return self._lowered(self.strategy.stages[stage].first_segment).entering

    def _exchanged(
        self, phase: Phase, kind: Literal["send", "recv"], stage: int, specs: Sequence[TensorSpec]
    ) -> Traffic:
        peer = self.strategy.rank_of(self.place._replace(stage=stage % self.strategy.num_stages))
        return Counter(
            Transfer(phase, kind, "pipeline", (peer,), spec.dtype, spec.size_bytes(**self._size)) for spec in specs
        )

    # -------------------------------------------------------------------------------- parameters

    @cached_property
    def _splits(self) -> dict[str, ParameterSplit]:
        return self.split.parameters()

    def _gradient(self, parameter: Parameter) -> Shape:
        return self._shape(parameter)._replace(dtype=self.gradient_dtype)

    def _shape(self, parameter: Parameter) -> Shape:
        return Shape(self._splits[parameter.name].local_shape(self.place.tensor_index), parameter.dtype)

    def _units(self, plan: StagePlan) -> list[list[Parameter]]:
        """Parameters that are gathered and reduced together: those of a segment; segments that share one, together."""
        segments = range(plan.first_segment, plan.last_segment + 1)
        used = {s: [p for p in self.graph.parameters if s in p.segments] for s in segments}
        sharing = {s for s, held in used.items() if any(len(set(p.segments) & set(segments)) > 1 for p in held)}
        common = {p.name: p for s in sorted(sharing) for p in used[s]}
        units = [*(used[s] for s in segments if s not in sharing), list(common.values())]
        return [unit for unit in units if unit]

    def _parameters(self) -> Traffic:
        """Gathers and reductions of parameters that are sharded over data parallelism."""
        strategy = self.strategy
        found: Traffic = Counter()
        if strategy.distribute_param == 0 or strategy.data_parallel == 1:
            return found
        times = strategy.num_micro_batches if strategy.distribute_param == 3 else 1
        for stage in sorted({action.stage for action in self._order}):
            assert strategy.stages is not None
            head = self.graph.num_segments - 1 if stage == strategy.total_stages - 1 else None
            for unit in self._units(strategy.stages[stage]):
                gathered = self._sharded("forward", "all_gather", unit)
                found[gathered] += times
                kept = strategy.keeps_head and any(head in p.segments for p in unit)
                backward = any(self.graph.runs_backward(segment) for p in unit for segment in p.segments)
                if strategy.distribute_param == 3 and backward and not kept:
                    found[gathered._replace(phase="backward")] += times
                reductions = self._reduced(unit, stage)
                for reduced in reductions:
                    found[self._sharded("backward", "reduce_scatter", reduced)] += 1
                if strategy.shard_groups > 1:
                    found += self._summed_over_groups(reductions)
        return found

    def _summed_over_groups(self, reductions: list[list[Parameter]]) -> Traffic:
        """Shards of what is reduced, once a step; with each reduction where a split backward has several kinds."""
        if not splits_backward(self.strategy.schedule, self.strategy.num_stages):
            reductions = reductions[-1:]
        found: Traffic = Counter()
        for reduced in reductions:
            whole = self._sharded("backward", "reduce_scatter", reduced)
            size_bytes = whole.size_bytes // self.strategy.shard_ways
            found[Transfer("backward", "all_reduce", "shard_groups", self._shard_groups, whole.dtype, size_bytes)] += 1
        return found

    def _reduced(self, unit: list[Parameter], stage: int) -> list[list[Parameter]]:
        """What each reduction of a unit's gradients holds: where backward is split, weights' gradients come with W, and
        others wait for the next W after their I.
        """
        trained = [p for p in unit if p.trainable]
        found, fresh = [], False
        for kind in (kind for at, kind, _ in self._order if at == stage):
            fresh = fresh or kind in "IB"
            if kind in "WB":
                found.append(trained if fresh else [p for p in trained if p.name in self._deferred])
                fresh = False
        found = [trained] if self.strategy.distribute_param == 1 else found
        return [parameters for parameters in found if parameters]

    @cached_property
    def _deferred(self) -> set[str]:
        """Weights whose gradients a split backward makes in its second half."""
        ops = (op for segment, _ in self._segments() for op in self.split.lowered(segment).ops)
        return {op.inputs[DEFERRABLE[op.target].weight].name for op in ops if op.target in DEFERRABLE}

    def _sharded(self, phase: Phase, kind: CollectiveKind, unit: list[Parameter]) -> Transfer:
        ways = self.strategy.shard_ways
        shapes = [self._gradient(p) if kind == "reduce_scatter" else self._shape(p) for p in unit]
        size_bytes = sum(shape.padded(ways).size_bytes for shape in shapes)
        return Transfer(phase, kind, "data", self._data_group, shapes[0].dtype, size_bytes)

    def _gradients(self) -> Traffic:
        """Sums of gradients once a step: over replicas that hold them whole, of addends over the tensor-parallel group,
        of tied parameters over the stages that share them.
        """
        strategy = self.strategy
        found: Traffic = Counter()
        mine = [p for p in self.graph.parameters if p.trainable and self.place.stage in self._stages(p)]
        if strategy.distribute_param == 0 and strategy.data_parallel > 1:
            found += _summed([self._gradient(p) for p in reversed(mine)], "data", self._data_group)
        if strategy.tensor_parallel > 1:
            segments = [segment for segment, _ in self._segments()]
            shared = self.split.shared_parameters(segments)
            addends = [self._piece(p) for p in mine if p.name in shared]
            parts = [part for p in mine if (part := self._held_by_all(p)) is not None]
            found += _summed(addends + parts, "tensor", self._tensor_group)
        for stages in sorted({self._stages(p) for p in mine if len(self._stages(p)) > 1}):
            group = tuple(strategy.rank_of(self.place._replace(stage=stage)) for stage in stages)
            found += _summed([self._piece(p) for p in mine if self._stages(p) == stages], "tied", group)
        return found

    def _piece(self, parameter: Parameter) -> Shape:
        """What the rank holds of a parameter's reduced gradient."""
        shape = self._gradient(parameter)
        sharded = self.strategy.distribute_param > 0
        return shape.shard(self.strategy.shard_ways, self._shard_index) if sharded else shape

    def _held_by_all(self, parameter: Parameter) -> Shape | None:
        """Of the piece, the unsharded segments of a fused projection."""
        found = self._splits[parameter.name].held_by_all(self.place.tensor_index)
        if found is None:
            return None
        (dim, held), piece = found, self._piece(parameter)
        if dim == 0 and self.strategy.distribute_param > 0:
            start = self._shard_index * -(-self._shape(parameter).dims[0] // self.strategy.shard_ways)
            held = held[(held >= start) & (held < start + piece.dims[0])]
        return piece._replace(dims=(*piece.dims[:dim], len(held), *piece.dims[dim + 1 :]))

    def _stages(self, parameter: Parameter) -> tuple[int, ...]:
        """Pipeline ranks that use a parameter."""
        return tuple(sorted({self._rank_of_segment[segment] for segment in parameter.segments}))

    @cached_property
    def _rank_of_segment(self) -> dict[int, int]:
        assert self.strategy.stages is not None
        return {
            segment: index % self.strategy.num_stages
            for index, plan in enumerate(self.strategy.stages)
            for segment in range(plan.first_segment, plan.last_segment + 1)
        }


def _summed(shapes: list[Shape], axis: Axis, ranks: tuple[int, ...]) -> Traffic:
    sizes = [(shape.dtype, shape.size_bytes) for shape in shapes]
    return Counter(
        Transfer("step", "all_reduce", axis, ranks, sizes[bucket.start][0], sum(sizes[i][1] for i in bucket))
        for bucket in buckets(sizes)
    )


def segment_flops(ops: Sequence[Op], recomputation: Recomputation, *, batch: int, seq: int) -> PhaseFlops:
    """FLOPs of one segment for one micro-batch."""
    counted = {op.name: flops(op, batch=batch, seq=seq) for op in ops}
    found: PhaseFlops = Counter()
    found["forward"] = sum(f.forward for f in counted.values())
    found["recompute"] = sum(counted[op.name].forward for op in rerun(ops, recomputation))
    found["backward"] = sum(f.backward for f in counted.values())
    return found


def rerun(ops: Sequence[Op], recomputation: Recomputation) -> list[Op]:
    """The ops that backward runs again; selective recomputation keeps results of contractions and collectives."""
    again = [] if recomputation == "none" else replayed(list(ops))
    return again if recomputation == "full" else [op for op in again if not op.kept]


def differentiated(lowered: LoweredSegment, *, unread: str) -> set[str]:
    """The ops that get a gradient: all that a result depends on, but for `unread`, the logits."""
    reached = {value.name for name, value in lowered.results.items() if name != unread}
    for op in reversed(lowered.ops):
        if op.name in reached and any(spec.requires_grad for spec in op.outputs):
            reached.update(spec.name for spec in op.inputs if spec.requires_grad)
    trained = {op.name for op in lowered.ops if any(spec.requires_grad for spec in op.outputs)}
    return reached & trained


class _Collective(NamedTuple):
    phase: Phase
    kind: CollectiveKind
    dtype: str
    numel: int


def _collectives(op: Op, *, batch: int, seq: int) -> list[_Collective]:
    """What an op communicates, forward and backward: a conversion its larger side, which is the whole one."""
    if op.target == VOCABULARY_CROSS_ENTROPY:
        logits = op.inputs[0]
        dtype = logits.dtype if DTYPE_BYTES[logits.dtype] > 4 else "float32"
        tokens = evaluate(logits.shape[0], batch=batch, seq=seq)
        return [_Collective("forward", "all_reduce", dtype, n * tokens) for n in (1, 2)]
    if op.target not in CONVERSIONS:
        return []
    conversion, (source,), (result,) = CONVERSIONS[op.target], op.inputs, op.outputs
    numel = max(spec.numel(batch=batch, seq=seq) for spec in (source, result))
    phases: list[tuple[Phase, CollectiveKind | None]] = [
        ("forward", conversion.forward),
        ("backward", conversion.backward),
    ]
    return [_Collective(phase, kind, source.dtype, numel) for phase, kind in phases if kind is not None]
