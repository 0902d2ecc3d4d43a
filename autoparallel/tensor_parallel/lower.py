"""An analysed segment and a set of atoms to shard in, the program of one rank out: local shapes, and the collectives.

A value is in one of five placements over the tensor-parallel group:

    whole       the same on every rank, and so is its gradient
    shared      the same on every rank, but its gradient is a partial sum: what only sharded work reads
    sharded     by the chosen atoms
    sequence    by tokens (sequence parallelism, arXiv 2205.05198): norms, residuals, dropout between sharded regions
    partial     every rank holds an addend; reduced as late as possible

Wherever an op needs another placement than its input has, a conversion (`ir.ops.CONVERSIONS`) is inserted, once per
value. Each is right for values and for gradients; `shared` parameters are summed once a step by the runtime instead.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from math import prod

from autoparallel.ir.dims import Dim as SymbolicDim
from autoparallel.ir.dims import Shape, evaluate
from autoparallel.ir.graph import DTYPE_BYTES, Argument, Graph, Op, Ref, SavedTensor, TensorSpec
from autoparallel.ir.ops import ATTENTION, CONVERSIONS, VOCABULARY_CROSS_ENTROPY, VOCABULARY_EMBEDDING
from autoparallel.tensor_parallel.analysis import BATCH, SEQ, Analysis, leaving
from autoparallel.tensor_parallel.layout import Dim, Layout, ParameterSplit, Sharding, flat, leaves, size
from autoparallel.tensor_parallel.rules import CROSS_ENTROPY, GETITEM, base_name, bounds

ADD = "aten.add.Tensor"


class Illegal(Exception):
    """These atoms cannot be sharded together."""


class Placement(Enum):
    WHOLE = "whole"
    SHARED = "shared"
    SHARDED = "sharded"
    SEQUENCE = "sequence"
    PARTIAL = "partial"


@dataclass(frozen=True)
class Addend:
    """An addition put off until the partial sum it waits for is reduced."""

    op: Op
    other: Value
    other_index: int


@dataclass(frozen=True)
class Value:
    """A tensor of the lowered program."""

    spec: TensorSpec
    """Local shape."""
    layout: Layout
    placement: Placement
    owner: str
    """The value whose storage it shares."""
    pending: tuple[Addend, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class LoweredSegment:
    """One segment as one rank runs it."""

    ops: tuple[Op, ...]
    """With local shapes; conversions have targets of `ir.ops.CONVERSIONS`."""
    results: dict[str, Value]
    """What holds each tensor that later segments read, or the program returns."""
    entering: tuple[TensorSpec, ...]
    parameters: dict[str, Layout]
    shared_parameters: frozenset[str]
    """Whole on every rank, their gradients partial sums: to be summed over the group once a step."""
    sharding: Sharding
    replicated: frozenset[str]
    """Ops that every rank runs on the same whole tensors."""
    without_rule: frozenset[str]
    """Targets of the ops that no rule fits."""

    def split_of(self, parameter: str) -> ParameterSplit:
        return ParameterSplit(self.parameters[parameter], self.sharding)


@dataclass
class Lowering:
    """The state of one lowering; `lower` runs it."""

    graph: Graph
    segment: int
    analysis: Analysis
    sharding: Sharding
    sequence_parallel: bool
    rank: int
    ops: list[Op] = field(default_factory=list)
    values: dict[str, list[Value]] = field(default_factory=dict)
    conversions: dict[tuple[str, str], Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.degree = self.sharding.degree
        self.made = {op.name for op in self.analysis.ops}
        self.entering_names = {spec.name for spec in self.graph.boundaries[self.segment]}
        self.shapes: dict[str, Shape] = {}
        self.leaving = [spec.name for spec in leaving(self.graph, self.segment, self.made)]
        self.uses = Counter(spec.name for op in self.analysis.ops for spec in op.inputs)
        self.uses.update([*self.leaving, *self.graph.outputs])
        self.users: dict[str, list[Op]] = {}
        for op in self.analysis.ops:
            for name in {spec.name for spec in op.inputs}:
                self.users.setdefault(name, []).append(op)
        self.weights = set(self.analysis.parameters)
        """Parameters, and what is computed from nothing else."""
        for op in self.analysis.ops:
            if all(spec.name in self.weights for spec in op.inputs if spec.requires_grad):
                self.weights.add(op.name)
        self.split = {op.name for op in self.analysis.ops if self.is_split(op)}
        self.by_sequence = {op.name for op in self.analysis.ops if self.is_by_sequence(op)}
        self.wanted = self.find_wanted()

    # -------------------------------------------------------------------------------- what runs how

    def is_split(self, op: Op) -> bool:
        """Whether some output is sharded or a partial sum."""
        outputs = self.analysis.layouts[op.name]
        for layout in outputs:
            if sum(map(self.sharding.count, layout)) > 1:
                raise Illegal(f"{op.name} would be sharded twice")
        sharded = any(map(self.sharding.is_sharded, outputs))
        summed = [dim for dim in self.analysis.summed[op.name] if self.sharding.count(dim)]
        if any(self.sharding.is_mixed(dim) for dim in summed):
            raise Illegal(f"{op.name} would add up replicated parts of {op.name} more than once")
        if sharded and summed:
            raise Illegal(f"{op.name} would be sharded and a partial sum")
        return sharded or bool(summed)

    def is_by_sequence(self, op: Op) -> bool:
        """Whether the op can work on this rank's tokens alone."""
        if not self.sequence_parallel or op.name in self.split or op.name in self.analysis.whole_sequence:
            return False
        outputs = self.analysis.layouts[op.name]
        inputs = [
            self.analysis.input_layout(op, i)
            for i, spec in enumerate(op.inputs)
            if spec.name in self.made or spec.name in self.entering_names
        ]
        summed = [[dim] for dim in self.analysis.summed[op.name]]
        clean = all(self.sequence_position(layout) is not None or not self.has_sequence(layout) for layout in inputs)
        return (
            clean
            and all(self.sequence_position(layout) is not None for layout in outputs)
            and not any(map(self.has_sequence, summed))
        )

    def has_sequence(self, layout: Layout) -> bool:
        return any(leaf is self.analysis.seq for dim in layout for leaf in leaves(dim))

    def sequence_position(self, layout: Layout) -> int | None:
        """The dim that is the sequence, if exactly one dim holds it and nothing else."""
        found = [k for k, dim in enumerate(layout) if any(leaf is self.analysis.seq for leaf in leaves(dim))]
        return found[0] if len(found) == 1 and self.analysis.is_sequence(layout[found[0]]) else None

    def find_wanted(self) -> set[str]:
        """Parameters, and ops with a single differentiable input, that only work with partial gradients reads: their
        gradient is left a partial sum, so that one reduction at their source serves all readers.
        """
        wanted: set[str] = set()
        for op in reversed(self.analysis.ops):
            if op.name in self.split or op.name in self.by_sequence:
                continue
            differentiable = [spec for spec in op.inputs if spec.requires_grad]
            kept = op.name in self.leaving or op.name in self.graph.outputs
            if len(differentiable) != 1 or kept or op.name not in self.users:
                continue
            cheap = _numel(differentiable[0]) <= _numel(op.outputs[0]) or differentiable[0].name in wanted
            if cheap and all(self.reads_in_part(user, op.name, wanted) for user in self.users[op.name]):
                wanted.add(op.name)
        tied = {p.name for p in self.graph.parameters if len(p.segments) > 1}
        for name in self.analysis.parameters.keys() - tied:  # elsewhere a tied one may be read whole
            if all(self.reads_in_part(user, name, wanted) for user in self.users[name]):
                wanted.add(name)
        return wanted

    def reads_in_part(self, user: Op, name: str, wanted: set[str]) -> bool:
        """Whether the gradient that `user` returns for `name` is a partial sum."""
        if user.name in self.split:
            bias = self.deferred_bias(user)
            return bias is None or user.inputs[bias].name != name or self.adds_by_sequence(user)
        return user.name in self.by_sequence or user.name in wanted

    def deferred_bias(self, op: Op) -> int | None:
        """The input that is added once the partial sum is reduced, not by every rank."""
        if not any(self.sharding.count(dim) for dim in self.analysis.summed[op.name]):
            return None
        bias = op.argument("bias") if base_name(op) == "linear" else op.argument("self")
        return bias.index if base_name(op) in ("linear", "addmm") and isinstance(bias, Ref) else None

    def adds_by_sequence(self, op: Op) -> bool:
        """Whether the bias of a partial sum is added to sequence shards, views between them passed over."""
        while self.uses[op.name] == 1 and self.users.get(op.name) and _keeps_last_dim(self.users[op.name][0]):
            op = self.users[op.name][0]
        return self.sequence_parallel and self.sequence_position(self.analysis.layouts[op.name][0]) is not None

    # -------------------------------------------------------------------------------- values

    def value(self, op: Op, index: int) -> Value:
        spec = op.inputs[index]
        if spec.name in self.values:
            found = self.values[spec.name]
            item = op.argument("index") if op.target == GETITEM else 0
            assert isinstance(item, int)
            return found[item]
        layout = self.analysis.input_layout(op, index)
        if spec.name in self.analysis.parameters:
            placement = Placement.SHARED if spec.name in self.wanted else Placement.WHOLE
            placement = Placement.SHARDED if self.sharding.is_sharded(layout) else placement
            self.values[spec.name] = [Value(self.localized(spec, layout, placement), layout, placement, spec.name)]
        elif spec.name in self.entering_names:
            self.values[spec.name] = [self.entering(spec)]
        else:
            return Value(spec, layout, Placement.WHOLE, spec.name)  # free: each reader has a layout of its own for it
        return self.values[spec.name][0]

    def localized(self, spec: TensorSpec, layout: Layout, placement: Placement) -> TensorSpec:
        shape = tuple(self.local_size(n, dim, placement) for n, dim in zip(spec.shape, layout, strict=True))
        return replace(spec, shape=shape)

    def local_size(self, symbolic: SymbolicDim, dim: Dim, placement: Placement) -> SymbolicDim:
        """Of a dim, as an expression: what the ranks of this placement hold of it."""
        by_tokens = placement is Placement.SEQUENCE and self.analysis.is_sequence(dim)
        if not by_tokens and not self.sharding.count(dim):
            return symbolic
        if isinstance(symbolic, int):
            return self.sharding.local_size(dim, self.rank)
        return f"({symbolic})//{self.degree}"

    # -------------------------------------------------------------------------------- conversions

    def convert(self, source: Value, kind: str, layout: Layout, placement: Placement, **arguments: Argument) -> Value:
        """Insert a conversion after `source`, or find the one that is there."""
        key = (kind + str(sorted(arguments.items())), source.name)
        if key not in self.conversions:
            name = f"{source.name.replace('.', '_')}_{kind}"
            if arguments and kind == "narrow":
                name += "_" + "_".join(str(value) for value in arguments.values())
            whole = TensorSpec(
                name, self.shape_of(source, layout, placement), source.spec.dtype, source.spec.requires_grad
            )
            is_view, target = kind in ("copy", "narrow"), f"tensor_parallel.{kind}"
            op = Op(
                name=name,
                target=target,
                inputs=(source.spec,),
                outputs=(whole,),
                arguments=(("input", Ref(0)), *arguments.items()),
                segment=self.segment,
                is_view=is_view,
                is_pointwise=False,
                saved=(),
                kept=(SavedTensor(name, _numel_text(whole.shape), whole.dtype),) if CONVERSIONS[target].forward else (),
                module="",
                source="",
            )
            self.append(op)
            owner = source.owner if is_view else name
            self.conversions[key] = Value(whole, layout, placement, owner)
        return self.conversions[key]

    def shape_of(self, source: Value, layout: Layout, placement: Placement) -> Shape:
        """The local shape of a conversion's result, from the whole sizes that the source stands for."""
        whole = self.whole_shape(source)
        return tuple(self.local_size(n, dim, placement) for n, dim in zip(whole, layout, strict=True))

    def whole_shape(self, value: Value) -> Shape:
        if value.placement is not Placement.SEQUENCE:
            return value.spec.shape
        at = self.sequence_position(value.layout)
        return tuple("seq" if k == at else n for k, n in enumerate(value.spec.shape))

    def reduced(self, name: str, item: int = 0) -> Value:
        """The value called `name` with its addends from all ranks, and what was put off until then."""
        value = self.values[name][item]
        if value.placement is not Placement.PARTIAL:
            return value
        at = self.sequence_position(value.layout) if self.sequence_parallel else None
        plain = replace(value, pending=())
        if at is None:
            result = self.convert(plain, "all_reduce", value.layout, Placement.WHOLE)
        else:
            result = self.convert(plain, "reduce_scatter", value.layout, Placement.SEQUENCE, dim=at)
        for addend in value.pending:
            inputs = [result, result]
            inputs[addend.other_index] = self.enter(addend.other, result.placement)
            summed = replace(addend.op.outputs[0], shape=value.spec.shape)
            result = self.emit(replace(addend.op, outputs=(summed,)), inputs, [value.layout], result.placement)[0]
        self.values[name][item] = result
        return result

    def enter(self, value: Value, placement: Placement) -> Value:
        """`value` as an op that runs in `placement` reads it."""
        in_part = placement is not Placement.WHOLE
        at = self.sequence_position(value.layout) if placement is Placement.SEQUENCE else None
        differentiable = value.spec.requires_grad
        if value.placement is Placement.SHARED and differentiable and not in_part:
            raise Illegal(f"{value.name} has a partial gradient, and what reads it would return a whole one")
        if value.placement is Placement.SEQUENCE:
            if placement is Placement.SEQUENCE:
                return value
            dim = self.sequence_position(value.layout)
            kind, gathered = ("all_gather", Placement.SHARED) if in_part else ("all_gather_whole", Placement.WHOLE)
            return self.convert(value, kind, value.layout, gathered, dim=dim)
        if value.placement is Placement.SHARDED:
            if placement not in (Placement.SHARDED, Placement.SHARED):
                raise Illegal(f"{value.name} is sharded, and what reads it needs it whole")
            return value
        if not differentiable:
            return self.narrowed(value, placement, at)
        if value.placement is Placement.WHOLE and in_part:
            if at is not None:
                return self.convert(value, "scatter", value.layout, Placement.SEQUENCE, dim=at)
            return self.convert(value, "copy", value.layout, Placement.SHARED)
        if value.placement is Placement.SHARED and at is not None:
            return self.narrowed(value, placement, at)
        return value

    def narrowed(self, value: Value, placement: Placement, at: int | None) -> Value:
        """This rank's part of a tensor that every rank has whole."""
        if at is not None:
            return self.convert(value, "narrow", value.layout, Placement.SEQUENCE, dim=at, length=None, inner=1)
        sharded = [k for k, dim in enumerate(value.layout) if self.sharding.count(dim)]
        for k in sharded if placement is Placement.SHARDED else []:
            factors = flat(value.layout[k])
            (position,) = (i for i, atom in enumerate(factors) if self.sharding.count([atom]))
            if factors[position].kind == "sum":
                raise Illegal(f"{value.name} is concatenated from sharded and whole parts")
            inner = size(factors[position + 1 :])
            value = self.convert(
                value, "narrow", value.layout, Placement.SHARDED, dim=k, length=factors[position].size, inner=inner
            )
        return value

    # -------------------------------------------------------------------------------- ops

    def run(self) -> LoweredSegment:
        for op in self.analysis.ops:
            self.lower(op)
        results = {name: self.leave(name) for name in self.leaving}
        if self.segment == self.graph.num_segments - 1:
            loss, logits = (self.reduced(name) for name in self.graph.outputs)
            logits = logits if logits.placement is Placement.SHARDED else self.enter(logits, Placement.WHOLE)
            results.update(zip(self.graph.outputs, (self.enter(loss, Placement.WHOLE), logits), strict=True))
        shared = [name for name, held in self.values.items() if held[0].placement is Placement.SHARED]
        return LoweredSegment(
            ops=tuple(self.ops),
            results=results,
            entering=tuple(self.entering(spec).spec for spec in self.graph.boundaries[self.segment]),
            parameters=self.analysis.parameters,
            shared_parameters=frozenset(shared) & self.analysis.parameters.keys(),
            sharding=self.sharding,
            replicated=frozenset(name for name, held in self.values.items() if name in self.made and _is_whole(held)),
            without_rule=frozenset(op.target for op in self.analysis.ops if op.name in self.analysis.unknown),
        )

    def entering(self, spec: TensorSpec) -> Value:
        """What the segment before leaves: sequence shards where there is a sequence, whole otherwise."""
        layout = self.analysis.layouts[spec.name][0]
        by_tokens = self.sequence_parallel and self.sequence_position(layout) is not None
        placement = Placement.SEQUENCE if by_tokens else Placement.WHOLE
        return Value(self.localized(spec, layout, placement), layout, placement, spec.name)

    def leave(self, name: str) -> Value:
        """As `entering` of the next segment expects it."""
        value = self.reduced(name)
        by_tokens = self.sequence_parallel and self.sequence_position(value.layout) is not None
        return self.enter(value, Placement.SEQUENCE if by_tokens else Placement.WHOLE)

    def lower(self, op: Op) -> None:
        if op.target == GETITEM:
            self.item(op)
            return
        inputs = [self.value(op, index) for index in range(len(op.inputs))]
        if self.is_reducing_loss(op, inputs):
            self.cross_entropy(op, inputs)
            return
        if self.defers(op, inputs) or self.sums_partials(op, inputs) or self.passes(op, inputs):
            return
        inputs = [self.settled(op, index) for index in range(len(op.inputs))]
        placement = self.placement_of(op, inputs)
        if placement is Placement.PARTIAL:
            self.contraction(op, inputs)
            return
        entered = [self.enter(value, placement) for value in inputs]
        self.finish(op, self.emit(op, entered, self.analysis.layouts[op.name], placement))

    def settled(self, op: Op, index: int) -> Value:
        spec = op.inputs[index]
        if spec.name in self.values and op.target != GETITEM:
            self.reduced(spec.name)
        return self.value(op, index)

    def placement_of(self, op: Op, inputs: list[Value]) -> Placement:
        if op.name in self.split:
            sharded = any(map(self.sharding.is_sharded, self.analysis.layouts[op.name]))
            return Placement.SHARDED if sharded else Placement.PARTIAL
        activations = [v for v in inputs if v.name not in self.weights]
        if any(v.placement is Placement.SHARDED for v in activations):
            return Placement.SHARED  # a whole segment cut out of a mixed tensor
        if any(v.placement is Placement.SHARED and v.spec.requires_grad for v in activations):
            return Placement.SHARED
        if op.name in self.by_sequence:
            return Placement.SEQUENCE
        shared = any(v.placement is Placement.SHARED and v.spec.requires_grad for v in inputs)
        return Placement.SHARED if shared or op.name in self.wanted else Placement.WHOLE

    def finish(self, op: Op, values: list[Value]) -> None:
        self.values[op.name] = values
        if values and values[0].placement is Placement.PARTIAL and self.uses[op.name] != 1:
            self.reduced(op.name)

    def item(self, op: Op) -> None:
        """One of several outputs; those that are whole among sharded ones have partial gradients."""
        value = self.value(op, 0)
        layout = self.analysis.layouts[op.name][0]
        placement = value.placement
        if placement is Placement.SHARDED and not self.sharding.is_sharded(layout):
            placement = Placement.SHARED
        source = replace(value.spec, name=self.values[op.inputs[0].name][0].name)
        spec = replace(value.spec, name=op.name)
        self.append(replace(op, inputs=(source,), outputs=(spec,)))
        self.values[op.name] = [Value(spec, layout, placement, value.owner)]

    def emit(self, op: Op, inputs: list[Value], layouts: list[Layout], placement: Placement) -> list[Value]:
        """Append the op with local shapes and literals."""
        outputs = []
        for spec, layout in zip(op.outputs, layouts, strict=True):
            own = placement
            if placement is Placement.SHARDED and not self.sharding.is_sharded(layout):
                own = Placement.SHARED
            outputs.append(Value(self.localized(spec, layout, placement), layout, own, op.name))
        if op.is_view and inputs:
            outputs = [replace(value, owner=inputs[0].owner) for value in outputs]
        local = replace(
            op,
            inputs=tuple(value.spec for value in inputs),
            outputs=tuple(value.spec for value in outputs),
            arguments=self.local_arguments(op, inputs, outputs),
            saved=self.local_storages(op.saved, op, inputs, outputs),
            kept=self.local_storages(op.kept, op, inputs, outputs),
        )
        if base_name(op) in ("split", "chunk") and self.sharding.is_sharded(inputs[0].layout):
            local = self.as_split_with_sizes(local)
        self.append(_drawing_apart(local, placement))
        return outputs

    def append(self, op: Op) -> None:
        self.ops.append(op)
        self.shapes.update((spec.name, spec.shape) for spec in op.outputs)

    # -------------------------------------------------------------------------------- partial sums

    def contraction(self, op: Op, inputs: list[Value]) -> None:
        """A contraction over a sharded dim: its bias waits for the reduction, a mean is rescaled."""
        bias = self.deferred_bias(op)
        layouts = self.analysis.layouts[op.name]
        entered = [v if i == bias else self.enter(v, Placement.SHARDED) for i, v in enumerate(inputs)]
        if base_name(op) == "embedding":
            first = self.sharding.chunk(flat(self.analysis.summed[op.name][0])[0], self.rank).start
            op = replace(op, target=VOCABULARY_EMBEDDING, arguments=(*op.arguments, ("first", first)))
        pending: tuple[Addend, ...] = ()
        if bias is not None:
            pending = (Addend(_addition(f"{op.name}_bias", op), inputs[bias], 1),)
            op, entered = _without(op, entered, bias)
        (value,) = self.emit(op, entered, layouts, Placement.PARTIAL)
        if base_name(op) == "mean":
            scale = _scaling(f"{op.name}_scaled", value.spec, self.degree, op)
            (value,) = self.emit(scale, [value], layouts, Placement.PARTIAL)
        self.finish(op, [replace(value, pending=pending)])

    def defers(self, op: Op, inputs: list[Value]) -> bool:
        """partial + whole, to be added to another partial sum next: one reduction serves both."""
        partial = [i for i, v in enumerate(inputs) if v.placement is Placement.PARTIAL]
        users = self.users.get(op.name, [])
        next_is_addition = self.uses[op.name] == 1 and len(users) == 1 and _is_plain_addition(users[0])
        if len(partial) != 1 or len(inputs) != 2 or not _is_plain_addition(op) or not next_is_addition:
            return False
        waiting, other = inputs[partial[0]], self.settled(op, 1 - partial[0])
        if other.placement not in (Placement.WHOLE, Placement.SEQUENCE) or _numel(op.outputs[0]) != _numel(
            waiting.spec
        ):
            return False
        addend = Addend(op, other, 1 - partial[0])
        self.values[op.name] = [replace(waiting, pending=(*waiting.pending, addend))]
        return True

    def sums_partials(self, op: Op, inputs: list[Value]) -> bool:
        """partial + partial."""
        if len(inputs) != 2 or not _is_plain_addition(op) or any(v.placement is not Placement.PARTIAL for v in inputs):
            return False
        if inputs[0].name == inputs[1].name or inputs[0].spec.shape != inputs[1].spec.shape:
            return False
        pending = inputs[0].pending + inputs[1].pending
        (value,) = self.emit(op, inputs, self.analysis.layouts[op.name], Placement.PARTIAL)
        self.finish(op, [replace(value, pending=pending)])
        return True

    def passes(self, op: Op, inputs: list[Value]) -> bool:
        """Linear ops of one partial sum, the reduction still to come."""
        partial = [i for i, v in enumerate(inputs) if v.placement is Placement.PARTIAL]
        if partial != [0] or op.name in self.split or not _is_linear(op):
            return False
        if inputs[0].pending and not (_keeps_last_dim(op) and all(len(a.other.layout) == 1 for a in inputs[0].pending)):
            return False
        others = inputs[1:]
        if any(v.placement not in (Placement.WHOLE, Placement.SEQUENCE) for v in others):
            return False
        if base_name(op) in ("mul", "div") and any(4 * _numel(v.spec) > _numel(inputs[0].spec) for v in others):
            return False
        entered = [inputs[0], *(self.enter(value, Placement.SHARED) for value in others)]
        (value,) = self.emit(op, entered, self.analysis.layouts[op.name], Placement.PARTIAL)
        self.finish(op, [replace(value, pending=inputs[0].pending)])
        return True

    def is_reducing_loss(self, op: Op, inputs: list[Value]) -> bool:
        return op.target == CROSS_ENTROPY and self.sharding.is_sharded(inputs[0].layout)

    def cross_entropy(self, op: Op, inputs: list[Value]) -> None:
        """Over sharded classes: the emitted op brings its own reductions."""
        logits, target = inputs
        if logits.placement is not Placement.SHARDED:
            raise Illegal("sharded classes of whole logits")
        first = self.sharding.chunk(flat(logits.layout[1])[0], self.rank).start
        arguments = (("self", Ref(0)), ("target", Ref(1)), ("first", first))
        ignored = op.argument("ignore_index", -100)
        kept = SavedTensor(f"{op.name}:0", _numel_text(logits.spec.shape), logits.spec.dtype)
        lowered = replace(
            op, target=VOCABULARY_CROSS_ENTROPY, inputs=(logits.spec, target.spec),
            arguments=(*arguments, ("ignore_index", ignored)), saved=(kept,),
        )  # fmt: skip
        self.append(lowered)
        self.values[op.name] = [Value(op.outputs[0], [], Placement.WHOLE, op.name)]

    # -------------------------------------------------------------------------------- literals

    def local_arguments(self, op: Op, inputs: list[Value], outputs: list[Value]) -> tuple[tuple[str, Argument], ...]:
        """Sizes, bounds and counts, as the rank's shapes want them."""
        arguments = dict(op.arguments)
        kind = base_name(op)
        for name in ("size", "shape"):
            sizes = arguments.get(name)
            if isinstance(sizes, tuple) and kind in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to"):
                wholes, locals_ = op.outputs[0].shape, outputs[0].spec.shape
                sized = zip(sizes, wholes, locals_, strict=True)
                arguments[name] = tuple(given if given == -1 or whole == n else n for given, whole, n in sized)
        if kind in ("slice", "select") and self.sharding.is_sharded(inputs[0].layout):
            self.localize_bounds(op, arguments, inputs[0])
        if kind == "repeat_interleave" and isinstance(arguments.get("dim"), int):
            k = arguments["dim"]
            assert isinstance(k, int)
            before = self.sharding.local_size(inputs[0].layout[k], self.rank)
            arguments["repeats"] = self.sharding.local_size(outputs[0].layout[k], self.rank) // before
        return tuple(arguments.items())

    def localize_bounds(self, op: Op, arguments: dict[str, Argument], source: Value) -> None:
        k = op.argument("dim", 0)
        assert isinstance(k, int)
        dim = source.layout[k]
        if not self.sharding.count(dim):
            return
        held = self.sharding.global_indices(dim, self.rank)
        if base_name(op) == "select":
            index = op.argument("index")
            assert isinstance(index, int)
            arguments["index"] = int((held < index % size(dim)).sum())
            return
        start, end = bounds(op, size(dim))
        if op.argument("step", 1) != 1:
            arguments["end"] = len(held)
            return
        arguments["start"], arguments["end"] = int((held < start).sum()), int((held < end).sum())

    def as_split_with_sizes(self, op: Op) -> Op:
        k = op.argument("dim", 0)
        assert isinstance(k, int)
        sizes = tuple(spec.shape[k] for spec in op.outputs)
        arguments = (("self", Ref(0)), ("split_sizes", sizes), ("dim", k))
        return replace(op, target="aten.split_with_sizes.default", arguments=arguments)

    # -------------------------------------------------------------------------------- what autograd keeps

    def local_storages(
        self, storages: tuple[SavedTensor, ...], op: Op, inputs: list[Value], outputs: list[Value]
    ) -> tuple[SavedTensor, ...]:
        """Storages by their owners in the lowered program; what only the kernel sees shrinks as the output does."""
        owners = {spec.name: value for spec, value in zip(op.inputs, inputs, strict=True)} if inputs else {}
        originals = {self.original_owner(name): value for name, value in owners.items()}
        saved = []
        for kept in storages:
            if kept.storage == op.name:
                saved.append(replace(kept, numel=_numel_text(outputs[0].spec.shape)))
            elif kept.storage in originals:
                owner = originals[kept.storage].owner
                saved.append(SavedTensor(owner, self.storage_numel(owner, kept), kept.dtype))
            else:
                shrunk = Fraction(_numel(outputs[0].spec), _numel(op.outputs[0]))
                saved.append(replace(kept, numel=_scaled(kept.numel, shrunk)))
        return tuple(saved)

    def original_owner(self, name: str) -> str:
        """The tensor of the graph whose storage `name` shares."""
        ops = self.graph.dag.nodes
        while name in ops and ops[name]["op"].is_view and ops[name]["op"].inputs:
            name = ops[name]["op"].inputs[0].name
        return name

    def storage_numel(self, owner: str, kept: SavedTensor) -> SymbolicDim:
        """Elements of a lowered storage; those of free tensors and of other segments are as they were."""
        if owner in self.shapes:
            return _numel_text(self.shapes[owner])
        if owner in self.values:
            return _numel_text(self.values[owner][0].spec.shape)
        return kept.numel


def lower(
    graph: Graph, segment: int, analysis: Analysis, sharding: Sharding, *, sequence_parallel: bool, rank: int = 0
) -> LoweredSegment:
    """The segment's program of one rank; raises `Illegal` where these atoms cannot be sharded together."""
    check_chunks(analysis, sharding)
    return Lowering(graph, segment, analysis, sharding, sequence_parallel, rank).run()


def check_chunks(analysis: Analysis, sharding: Sharding) -> None:
    """Unequal chunks are only followed through dims that are nothing but the vocabulary."""
    uneven = [atom for atom in sharding.atoms if atom.size % sharding.degree]
    layouts = [*analysis.parameters.values(), *(layout for found in analysis.layouts.values() for layout in found)]
    for atom in uneven:
        alone = all(flat(dim) == [atom] for layout in layouts for dim in layout if atom in leaves(dim))
        if not atom.uneven or not alone or len(sharding.chunk(atom, sharding.degree - 1)) == 0:
            raise Illegal(f"{atom.size} does not divide by {sharding.degree}")


def _is_whole(values: list[Value]) -> bool:
    return all(value.placement in (Placement.WHOLE, Placement.SHARED) for value in values)


def _drawing_apart(op: Op, placement: Placement) -> Op:
    """Ranks that hold different parts draw different random numbers; ranks that hold the same draw the same."""
    probability = op.argument("p" if base_name(op) == "dropout" else "dropout", 0.0)
    draws = (base_name(op) == "dropout" or op.target == ATTENTION) and probability != 0.0
    if not draws or placement not in (Placement.SHARDED, Placement.SEQUENCE):
        return op
    return replace(op, arguments=(*op.arguments, ("apart", True)))


def _is_plain_addition(op: Op) -> bool:
    return base_name(op) == "add" and op.argument("alpha", 1) == 1 and len(op.inputs) == 2


_LINEAR = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
    "expand", "slice", "select", "index", "alias", "contiguous", "clone", "detach", "neg", "sum", "mul", "div",
}  # fmt: skip


def _keeps_last_dim(op: Op) -> bool:
    """A view that regroups other dims than the last one, so that a bias may be added before or after it."""
    regroups = base_name(op) in ("view", "reshape", "_unsafe_view", "alias", "contiguous", "clone")
    return regroups and len(op.inputs) == 1 and op.inputs[0].shape[-1] == op.outputs[0].shape[-1]


def _is_linear(op: Op) -> bool:
    """In its first input, all others fixed."""
    if base_name(op) == "dropout":
        return op.argument("p") == 0.0
    if base_name(op) == "to":
        return DTYPE_BYTES[op.outputs[0].dtype] <= DTYPE_BYTES[op.inputs[0].dtype]
    return base_name(op) in _LINEAR


def _addition(name: str, like: Op) -> Op:
    """`like`'s output plus something of its own, as an op."""
    spec = replace(like.outputs[0], name=name)
    return replace(
        like, name=name, target=ADD, inputs=(like.outputs[0], like.outputs[0]), outputs=(spec,),
        arguments=(("self", Ref(0)), ("other", Ref(1))), is_view=False, is_pointwise=True, saved=(), kept=(),
    )  # fmt: skip


def _scaling(name: str, spec: TensorSpec, divisor: int, like: Op) -> Op:
    return replace(
        like, name=name, target="aten.div.Tensor", inputs=(spec,), outputs=(replace(like.outputs[0], name=name),),
        arguments=(("self", Ref(0)), ("other", divisor)), is_view=False, is_pointwise=True, saved=(), kept=(),
    )  # fmt: skip


def _without(op: Op, inputs: list[Value], bias: int) -> tuple[Op, list[Value]]:
    """The contraction alone: linear without bias, mm for addmm."""
    kept = [value for index, value in enumerate(inputs) if index != bias]
    specs = tuple(spec for index, spec in enumerate(op.inputs) if index != bias)
    if base_name(op) == "linear":
        arguments = tuple((n, v) for n, v in op.arguments if n != "bias")
        return replace(op, inputs=specs, arguments=arguments), kept
    arguments = (("self", Ref(0)), ("mat2", Ref(1)))
    return replace(op, target="aten.mm.default", inputs=specs, arguments=arguments), kept


def _numel(spec: TensorSpec) -> int:
    """At the stand-in sizes, made divisible."""
    return prod(evaluate(dim, batch=BATCH, seq=SEQ * 27720) for dim in spec.shape)


def _numel_text(shape: Shape) -> SymbolicDim:
    if all(isinstance(n, int) for n in shape):
        return prod(n for n in shape if isinstance(n, int))
    return "*".join(f"({n})" for n in shape)


def _scaled(numel: SymbolicDim, factor: Fraction) -> SymbolicDim:
    if factor == 1:
        return numel
    return f"({numel})*{factor.numerator}//{factor.denominator}"
