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

from dataclasses import dataclass, field, replace
from fractions import Fraction

from autoparallel.ir.dims import Dim as SymbolicDim
from autoparallel.ir.dims import Shape
from autoparallel.ir.graph import Argument, Graph, Op, Ref, SavedTensor, TensorSpec
from autoparallel.ir.ops import CONVERSIONS, VOCABULARY_CROSS_ENTROPY, VOCABULARY_EMBEDDING
from autoparallel.tensor_parallel.analysis import Analysis
from autoparallel.tensor_parallel.edits import (
    addition,
    drawing_apart,
    is_linear,
    is_plain_addition,
    keeps_last_dim,
    scaling,
    without,
)
from autoparallel.tensor_parallel.layout import Layout, Sharding, flat, leaves, size
from autoparallel.tensor_parallel.local import LocalSizes, as_split_with_sizes
from autoparallel.tensor_parallel.regions import Regions
from autoparallel.tensor_parallel.rules import CROSS_ENTROPY, GETITEM, base_name
from autoparallel.tensor_parallel.values import (
    Addend,
    Illegal,
    LoweredSegment,
    Placement,
    Value,
    numel,
    numel_text,
    scaled,
)


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
        self.regions = Regions(self.graph, self.segment, self.analysis, self.sharding, self.sequence_parallel)
        self.local = LocalSizes(self.analysis, self.sharding, self.rank)
        self.shapes: dict[str, Shape] = {}

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
            placement = Placement.SHARED if spec.name in self.regions.wanted else Placement.WHOLE
            placement = Placement.SHARDED if self.sharding.is_sharded(layout) else placement
            self.values[spec.name] = [Value(self.local.spec(spec, layout, placement), layout, placement, spec.name)]
        elif spec.name in self.regions.entering:
            self.values[spec.name] = [self.entering(spec)]
        else:
            return Value(spec, layout, Placement.WHOLE, spec.name)  # free: each reader has a layout of its own for it
        return self.values[spec.name][0]

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
                kept=(SavedTensor(name, numel_text(whole.shape), whole.dtype),) if CONVERSIONS[target].forward else (),
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
        return tuple(self.local.dim(n, dim, placement) for n, dim in zip(whole, layout, strict=True))

    def whole_shape(self, value: Value) -> Shape:
        if value.placement is not Placement.SEQUENCE:
            return value.spec.shape
        at = self.regions.sequence_position(value.layout)
        return tuple("seq" if k == at else n for k, n in enumerate(value.spec.shape))

    def reduced(self, name: str, item: int = 0) -> Value:
        """The value called `name` with its addends from all ranks, and what was put off until then."""
        value = self.values[name][item]
        if value.placement is not Placement.PARTIAL:
            return value
        at = self.regions.sequence_position(value.layout) if self.sequence_parallel else None
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
        at = self.regions.sequence_position(value.layout) if placement is Placement.SEQUENCE else None
        differentiable = value.spec.requires_grad
        if value.placement is Placement.SHARED and differentiable and not in_part:
            raise Illegal(f"{value.name} has a partial gradient, and what reads it would return a whole one")
        if value.placement is Placement.SEQUENCE:
            if placement is Placement.SEQUENCE:
                return value
            dim = self.regions.sequence_position(value.layout)
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
        results = {name: self.leave(name) for name in self.regions.leaving}
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
            replicated=frozenset(
                name for name, held in self.values.items() if name in self.regions.made and _is_whole(held)
            ),
            without_rule=frozenset(op.target for op in self.analysis.ops if op.name in self.analysis.unknown),
        )

    def entering(self, spec: TensorSpec) -> Value:
        """What the segment before leaves: sequence shards where there is a sequence, whole otherwise."""
        layout = self.analysis.layouts[spec.name][0]
        by_tokens = self.sequence_parallel and self.regions.sequence_position(layout) is not None
        placement = Placement.SEQUENCE if by_tokens else Placement.WHOLE
        return Value(self.local.spec(spec, layout, placement), layout, placement, spec.name)

    def leave(self, name: str) -> Value:
        """As `entering` of the next segment expects it."""
        value = self.reduced(name)
        by_tokens = self.sequence_parallel and self.regions.sequence_position(value.layout) is not None
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
        placement = self.regions.placement_of(op, inputs)
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

    def finish(self, op: Op, values: list[Value]) -> None:
        self.values[op.name] = values
        if values and values[0].placement is Placement.PARTIAL and self.regions.uses[op.name] != 1:
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
            outputs.append(Value(self.local.spec(spec, layout, placement), layout, own, op.name))
        if op.is_view and inputs:
            outputs = [replace(value, owner=inputs[0].owner) for value in outputs]
        local = replace(
            op,
            inputs=tuple(value.spec for value in inputs),
            outputs=tuple(value.spec for value in outputs),
            arguments=self.local.arguments(op, inputs, outputs),
            saved=self.local_storages(op.saved, op, inputs, outputs),
            kept=self.local_storages(op.kept, op, inputs, outputs),
        )
        if base_name(op) in ("split", "chunk") and self.sharding.is_sharded(inputs[0].layout):
            local = as_split_with_sizes(local)
        self.append(drawing_apart(local, placement))
        return outputs

    def append(self, op: Op) -> None:
        self.ops.append(op)
        self.shapes.update((spec.name, spec.shape) for spec in op.outputs)

    # -------------------------------------------------------------------------------- partial sums

    def contraction(self, op: Op, inputs: list[Value]) -> None:
        """A contraction over a sharded dim: its bias waits for the reduction, a mean is rescaled."""
        bias = self.regions.deferred_bias(op)
        layouts = self.analysis.layouts[op.name]
        entered = [v if i == bias else self.enter(v, Placement.SHARDED) for i, v in enumerate(inputs)]
        if base_name(op) == "embedding":
            first = self.sharding.chunk(flat(self.analysis.summed[op.name][0])[0], self.rank).start
            op = replace(op, target=VOCABULARY_EMBEDDING, arguments=(*op.arguments, ("first", first)))
        pending: tuple[Addend, ...] = ()
        if bias is not None:
            pending = (Addend(addition(f"{op.name}_bias", op), inputs[bias], 1),)
            op, entered = without(op, entered, bias)
        (value,) = self.emit(op, entered, layouts, Placement.PARTIAL)
        if base_name(op) == "mean":
            scale = scaling(f"{op.name}scaled", value.spec, self.degree, op)
            (value,) = self.emit(scale, [value], layouts, Placement.PARTIAL)
        self.finish(op, [replace(value, pending=pending)])

    def defers(self, op: Op, inputs: list[Value]) -> bool:
        """partial + whole, to be added to another partial sum next: one reduction serves both."""
        partial = [i for i, v in enumerate(inputs) if v.placement is Placement.PARTIAL]
        users = self.regions.users.get(op.name, [])
        next_is_addition = self.regions.uses[op.name] == 1 and len(users) == 1 and is_plain_addition(users[0])
        if len(partial) != 1 or len(inputs) != 2 or not is_plain_addition(op) or not next_is_addition:
            return False
        waiting, other = inputs[partial[0]], self.settled(op, 1 - partial[0])
        if other.placement not in (Placement.WHOLE, Placement.SEQUENCE) or numel(op.outputs[0]) != numel(waiting.spec):
            return False
        addend = Addend(op, other, 1 - partial[0])
        self.values[op.name] = [replace(waiting, pending=(*waiting.pending, addend))]
        return True

    def sums_partials(self, op: Op, inputs: list[Value]) -> bool:
        """partial + partial."""
        if len(inputs) != 2 or not is_plain_addition(op) or any(v.placement is not Placement.PARTIAL for v in inputs):
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
        if partial != [0] or op.name in self.regions.split or not is_linear(op):
            return False
        if inputs[0].pending and not (keeps_last_dim(op) and all(len(a.other.layout) == 1 for a in inputs[0].pending)):
            return False
        others = inputs[1:]
        if any(v.placement not in (Placement.WHOLE, Placement.SEQUENCE) for v in others):
            return False
        if base_name(op) in ("mul", "div") and any(4 * numel(v.spec) > numel(inputs[0].spec) for v in others):
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
        kept = SavedTensor(f"{op.name}:0", numel_text(logits.spec.shape), logits.spec.dtype)
        lowered = replace(
            op, target=VOCABULARY_CROSS_ENTROPY, inputs=(logits.spec, target.spec),
            arguments=(*arguments, ("ignore_index", ignored)), saved=(kept,),
        )  # fmt: skip
        self.append(lowered)
        self.values[op.name] = [Value(op.outputs[0], [], Placement.WHOLE, op.name)]

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
                saved.append(replace(kept, numel=numel_text(outputs[0].spec.shape)))
            elif kept.storage in originals:
                owner = originals[kept.storage].owner
                saved.append(SavedTensor(owner, self.storage_numel(owner, kept), kept.dtype))
            else:
                shrunk = Fraction(numel(outputs[0].spec), numel(op.outputs[0]))
                saved.append(replace(kept, numel=scaled(kept.numel, shrunk)))
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
            return numel_text(self.shapes[owner])
        if owner in self.values:
            return numel_text(self.values[owner][0].spec.shape)
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
