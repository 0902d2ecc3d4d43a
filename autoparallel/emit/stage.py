"""Program + StagePlan -> one fx GraphModule: a graph of block GraphModules, so that recomputation and sharding apply
per block. What a block holds is what `tensor_parallel` lowered: the ops that were priced, one node each.

Free nodes (masks, positions, rotary tables, sizes) are computed at the top of every stage that needs them; blocks take
them as arguments. Attention and dropout become submodules that follow `train()` and `eval()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoparallel.capture.annotate import named_arguments
from autoparallel.capture.attention import ATTENTION_TARGET, Attention
from autoparallel.capture.program import Program
from autoparallel.emit.collectives import FUNCTIONS
from autoparallel.emit.randomness import DROPOUT, Apart
from autoparallel.emit.recompute import Recomputed, recomputed
from autoparallel.ir.graph import Argument, Op, Ref
from autoparallel.plans.strategy import StagePlan
from autoparallel.tensor_parallel.layout import ParameterSplit
from autoparallel.tensor_parallel.splits import SplitGraph
from autoparallel.tensor_parallel.values import LoweredSegment

INPUTS = ("input_ids", "attention_mask", "labels", "num_items", "padding")
"""Keyword inputs of every stage. `padding` is the boolean attention mask, or None when no token is padding."""

_CAPTURED_ON = torch.device("cpu")

Tensors = Callable[[str], Tensor]
"""From a canonical parameter, buffer or constant name to the tensor that the emitted module holds."""


@dataclass(frozen=True)
class Member:
    """This rank's place in its tensor-parallel group, and how the plan splits segments over it."""

    split: SplitGraph
    rank: int = 0
    group: str = "tensor_parallel"
    """Name of the process group that the emitted collectives run on."""


def emit_stage(
    program: Program,
    stage: StagePlan,
    tensors: Tensors,
    *,
    member: Member | None = None,
    device: torch.device = _CAPTURED_ON,
) -> fx.GraphModule:
    """The module of one stage: takes the hidden states of the one before it and `INPUTS`; returns what the next one
    takes.

    Without a `member` nothing is split. The last stage returns (loss, logits), the loss being its micro-batch's share
    of the whole batch's loss, the logits this rank's part of the vocabulary.
    """
    module = _StageEmitter(program, stage, tensors, member or Member(SplitGraph(program.graph))).emit()
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _move_literals(part, device)
    return module


def inputs_read(stage: fx.GraphModule) -> set[str]:
    """Those of `INPUTS` that a stage has a use for."""
    return {str(node.target) for node in stage.graph.nodes if node.op == "placeholder" and node.users}


def readable(stage: fx.GraphModule) -> str:
    """The stage as Python text with all its blocks; `print_readable` alone stops at recomputed ones."""
    parts = [stage.print_readable(print_output=False)]
    for name, child in stage.named_children():
        if isinstance(child, Recomputed):
            parts.append(f"# {name}, {child.level} recomputation\n{child.block.print_readable(print_output=False)}")
    return "\n".join(parts)


def _move_literals(module: fx.GraphModule, device: torch.device) -> None:
    """Capture writes its own device into nodes that make tensors (positions, masks); they belong where the stage is."""
    if device == _CAPTURED_ON:
        return
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )
    module.recompile()


def boundary_names(program: Program, segment: int) -> list[str]:
    """Names of the tensors that enter `segment` from earlier ones, in the order in which stages exchange them."""
    return [spec.name for spec in program.graph.boundaries[segment]]


class _StageEmitter:
    def __init__(self, program: Program, stage: StagePlan, tensors: Tensors, member: Member) -> None:
        self.program, self.stage, self.tensors, self.member = program, stage, tensors, member
        self.nodes = {node.name: node for node in program.module.graph.nodes}
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.computed: dict[str, fx.Node] = {}
        """Free nodes by what they compute."""

    def emit(self) -> fx.GraphModule:
        first, last = self.stage.first_segment, self.stage.last_segment
        for name in boundary_names(self.program, first):
            self.env[self.nodes[name]] = self.graph.placeholder(name)
        for name in INPUTS:
            self.inputs[name] = self.graph.placeholder(name, default_value=None)
        for segment in range(first, last + 1):
            self.emit_segment(segment)
        self.graph.output(self.outputs())
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name=f"Segments{first}To{last}")

    def outputs(self) -> Any:
        last = self.stage.last_segment
        graph = self.program.graph
        names = boundary_names(self.program, last + 1) if last < graph.num_segments - 1 else graph.outputs
        return tuple(self.value(self.nodes[name]) for name in names)

    def emit_segment(self, segment: int) -> None:
        lowered = self.member.split.lowered(segment, rank=self.member.rank)
        if not lowered.ops:
            return
        block, arguments, results = _BlockEmitter(self, segment, lowered).emit(f"Segment{segment}")
        name = f"segment_{segment}"
        level = self.stage.recomputation_of(segment, num_segments=self.program.graph.num_segments)
        self.root[name] = recomputed(block, level)
        call = self.graph.call_module(name, tuple(self.value(node) for node in arguments))
        call.meta["segment"] = segment
        for index, node in enumerate(results):
            self.env[node] = call if len(results) == 1 else self.graph.call_function(_item, (call, index))

    def value(self, node: fx.Node) -> fx.Node:
        """The node of this stage that holds `node`'s value, computing free nodes on demand."""
        if node in self.env:
            return self.env[node]
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            name = self.attribute(node)
            self.root[name] = self.tensors(name)
            self.env[node] = self.graph.get_attr(name)
            return self.env[node]
        assert self.program.segments.get(node) is None, f"{node} of another segment is not free"
        parents = [self.source_of_sizes(node) or self.value(parent) for parent in node.all_input_nodes]
        if node.target is torch.ops.aten.detach.default:
            self.env[node] = parents[0]  # no gradient gets here
            return parents[0]
        copied = self.graph.node_copy(node, dict(zip(node.all_input_nodes, parents, strict=True)).__getitem__)
        # Every block has computed its own; the first one's is all blocks'.
        self.env[node] = self.computed.setdefault(f"{copied.target} {copied.args} {copied.kwargs}", copied)
        if self.env[node] is not copied:
            self.graph.erase_node(copied)
        return self.env[node]

    def source_of_sizes(self, node: fx.Node) -> fx.Node | None:
        """For a node that asks an input for its rows or tokens, which all have alike: one that is read anyway."""
        if node.target is not torch.ops.aten.sym_size.int or node.all_input_nodes[0].op != "placeholder":
            return None
        is_last = self.stage.last_segment == self.program.graph.num_segments - 1
        return self.inputs["labels" if is_last else "input_ids"]

    def attribute(self, node: fx.Node) -> str:
        """Canonical name of the parameter, buffer or constant that a get_attr node reads."""
        target = str(node.target)
        return self.program.parameter_names.get(target) or self.program.buffer_name(target) or target

    def padding_source(self, node: fx.Node) -> bool:
        """Whether `node` is the attention mask up to its dtype, which is what the `padding` input holds."""
        while node.op == "call_function" and str(node.target) in _DTYPE_CASTS:
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and node.target == "attention_mask"


_DTYPE_CASTS = {"aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default", "aten.ne.Scalar"}


def _item(values: tuple[Any, ...], index: int) -> Any:
    return values[index]


class _BlockEmitter:
    """One lowered segment as a GraphModule of its own; what it reads from outside becomes its arguments."""

    def __init__(self, stage: _StageEmitter, segment: int, lowered: LoweredSegment) -> None:
        self.stage, self.lowered, self.member = stage, lowered, stage.member
        self.originals = {op.name: op for op in stage.program.graph.segment_ops(segment)}
        self.root: dict[str, Any] = {}
        self.body = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.arguments: list[fx.Node] = []

    def emit(self, class_name: str) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        for op in self.lowered.ops:
            self.values[op.name] = self.node(op)
        results = [self.stage.nodes[name] for name in self.lowered.results]
        returned = tuple(self.values[value.name] for value in self.lowered.results.values())
        self.body.output(returned[0] if len(returned) == 1 else returned)
        self.body.lint()
        return fx.GraphModule(self.root, self.body, class_name=class_name), self.arguments, results

    def node(self, op: Op) -> fx.Node:
        """The node that computes a lowered op."""
        if op.target == ATTENTION_TARGET:
            return self.attention(op)
        if op.target == DROPOUT:
            return self.dropout(op)
        if op.target in FUNCTIONS:
            return self.tensor_parallel(op)
        captured = self.stage.nodes.get(op.name)
        original = self.originals.get(op.name)
        if captured is not None and original is not None and original.target == op.target:
            return self.copied(op, original, captured)
        operator = attrgetter(op.target)(torch.ops)
        node = self.body.call_function(operator, *self.called(op, dict(op.arguments)))
        node.meta = dict(captured.meta) if captured is not None else {}
        return node

    def copied(self, op: Op, original: Op, captured: fx.Node) -> fx.Node:
        """The captured node with this rank's literals; what has no local form (dtypes, sizes) is taken as it was."""
        given = dict(named_arguments(captured))
        wholes = dict(original.arguments)
        local = {name: self.literal(value, wholes[name], given[name]) for name, value in op.arguments}
        node = self.body.call_function(captured.target, *self.called(op, local))  # type: ignore[arg-type]
        node.meta = dict(captured.meta)
        return node

    def literal(self, local: Argument, whole: Argument, given: Any) -> Any:
        if isinstance(local, Ref):
            return local
        if local == whole:
            return self.mapped(given, local)
        if isinstance(local, tuple) and isinstance(whole, tuple):
            return tuple(self.literal(n, w, g) for n, w, g in zip(local, whole, given, strict=True))
        if isinstance(local, str):
            return self.body.call_function(operator.floordiv, (self.mapped(given, whole), self.member.split.degree))
        return local

    def mapped(self, given: Any, value: Argument) -> Any:
        """A captured argument, its tensors as `Ref`s and its sizes as nodes of this block."""
        if isinstance(value, tuple) and isinstance(given, (tuple, list)):
            return tuple(self.mapped(g, v) for g, v in zip(given, value, strict=True))
        if isinstance(value, Ref):
            return value
        return self.outside(given) if isinstance(given, fx.Node) else given

    def called(self, op: Op, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs): arguments by position as far as the schema's order allows."""
        values = {name: self.resolved(value, op) for name, value in arguments.items()}
        schema = getattr(self.operator(op), "_schema", None)
        names = [a.name for a in schema.arguments if not a.kwarg_only] if schema else list(values)
        positional = []
        for name in names:
            if name not in values:
                break
            positional.append(values.pop(name))
        return tuple(positional), values

    def operator(self, op: Op) -> Any:
        captured = self.stage.nodes.get(op.name)
        if captured is not None and str(captured.target) == op.target:
            return captured.target
        return attrgetter(op.target)(torch.ops)

    def resolved(self, value: Any, op: Op) -> Any:
        """`Ref`s replaced by the nodes that hold the op's inputs."""
        if isinstance(value, Ref):
            return self.input(op, value.index)
        return [self.resolved(item, op) for item in value] if isinstance(value, tuple) else value

    def input(self, op: Op, index: int) -> fx.Node:
        """The node of an input: made in this block, a parameter, or an argument of the block."""
        name = op.inputs[index].name
        if name not in self.values:
            self.values[name] = self.parameter(name) or self.outside(self.stage.nodes[name])
        return self.values[name]

    def parameter(self, name: str) -> fx.Node | None:
        if name not in self.lowered.parameters:
            return None
        self.root[name] = self.stage.tensors(name)
        return self.at_top(lambda: self.body.get_attr(name))

    def outside(self, node: fx.Node) -> fx.Node:
        """A tensor of another segment, a free one, or a buffer."""
        if node.name not in self.values:
            if node.op == "get_attr":
                name = self.stage.attribute(node)
                self.root[name] = self.stage.tensors(name)
                self.values[node.name] = self.at_top(lambda: self.body.get_attr(name))
            else:
                self.arguments.append(node)
                self.values[node.name] = self.at_top(lambda: self.body.placeholder(node.name))
                self.values[node.name].meta = dict(node.meta)
        return self.values[node.name]

    def at_top(self, make: Callable[[], fx.Node]) -> fx.Node:
        """Placeholders in the order of `arguments`, then attributes, then the ops."""
        first = next((n for n in self.body.nodes if n.op not in ("placeholder", "get_attr")), None)
        if first is None:
            return make()
        with self.body.inserting_before(first):
            return make()

    def tensor_parallel(self, op: Op) -> fx.Node:
        """A conversion, or an op that communicates itself."""
        given = {name: self.resolved(value, op) for name, value in op.arguments}
        tensors = tuple(given.pop(name) for name, value in op.arguments if isinstance(value, Ref))
        member: dict[str, Any] = {
            "group": self.member.group,
            "rank": self.member.rank,
            "degree": self.member.split.degree,
        }
        return self.body.call_function(FUNCTIONS[op.target], tensors, {**given, **member})

    def attention(self, op: Op) -> fx.Node:
        given: dict[str, Any] = dict(op.arguments)
        module = Attention(**{name: given[name] for name in ("scale", "window", "softcap", "dropout")})
        padding = given["padding"]
        tensors = [self.resolved(given[name], op) for name in ("query", "key", "value")]
        return self.module(
            op, module, (*tensors, self.padding(op, padding.index) if isinstance(padding, Ref) else None)
        )

    def padding(self, op: Op, index: int) -> fx.Node:
        """The stage's `padding` input where the model's padding is just the attention mask, so that None reaches the
        fast path.
        """
        node = self.stage.nodes[op.inputs[index].name]
        if not self.stage.padding_source(node):
            return self.input(op, index)
        source = self.stage.inputs["padding"]
        self.stage.env.setdefault(source, source)
        return self.outside(source)

    def dropout(self, op: Op) -> fx.Node:
        probability = op.argument("p")
        if probability == 0.0:
            return self.input(op, 0)
        return self.module(op, nn.Dropout(probability), (self.input(op, 0),))  # type: ignore[arg-type]

    def module(self, op: Op, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        self.root[op.name] = Apart(module, self.member.rank) if op.argument("apart") else module
        call = self.body.call_module(op.name, args)
        call.meta = dict(self.stage.nodes[op.name].meta)
        return call


def state_tensors(model: nn.Module, program: Program) -> Mapping[str, Tensor]:
    """Every parameter, buffer and constant a stage may hold, by canonical name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers(remove_duplicate=False))
    for node in program.module.graph.nodes:
        if (
            node.op == "get_attr"
            and str(node.target) not in program.parameter_names
            and program.buffer_name(str(node.target)) is None
        ):
            constant = attrgetter(str(node.target))(program.module)
            if isinstance(constant, Tensor):
                tensors[str(node.target)] = constant
    return tensors


def taken(whole: Tensor, split: ParameterSplit | None, rank: int) -> Tensor:
    """What a rank of the tensor-parallel group holds of a parameter."""
    for dim, indices in enumerate(split.indices(rank) if split is not None else []):
        if indices is not None:
            whole = whole.index_select(dim, torch.from_numpy(indices).to(whole.device))
    return whole


def local_tensors(program: Program, member: Member) -> dict[str, Tensor]:
    """Fake tensors of the shapes that a rank holds, by canonical name."""
    tensors = dict(state_tensors(program.exported.twin, program))
    for name, split in member.split.parameters().items():
        part = taken(tensors[name].detach(), split, member.rank)
        tensors[name] = nn.Parameter(part, requires_grad=tensors[name].requires_grad)
    return tensors


torch.fx.wrap("_item")
