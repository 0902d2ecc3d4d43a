"""Program + StagePlan -> one fx GraphModule: a graph of block GraphModules, so that recomputation and sharding apply
per block.

Free nodes (masks, positions, rotary tables, sizes) are computed at the top of every stage that needs them; blocks take
them as arguments. Attention and dropout become submodules that follow `train()` and `eval()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoparallel.capture.attention import ATTENTION_TARGET, Attention
from autoparallel.capture.program import Program
from autoparallel.emit.recompute import Recomputed, recomputed
from autoparallel.plans.strategy import StagePlan

INPUTS = ("input_ids", "attention_mask", "labels", "num_items", "padding")
"""Keyword inputs of every stage. `padding` is the boolean attention mask, or None when no token is padding."""

_CAPTURED_ON = torch.device("cpu")

Tensors = Callable[[str], Tensor]
"""From a canonical parameter, buffer or constant name to the tensor that the emitted module holds."""


def emit_stage(
    program: Program, stage: StagePlan, tensors: Tensors, *, device: torch.device = _CAPTURED_ON
) -> fx.GraphModule:
    """The module of one stage: takes the hidden states of the one before it and `INPUTS`; returns what the next one
    takes.

    The last stage returns (loss, logits), the loss being its micro-batch's share of the whole batch's loss.
    """
    module = _StageEmitter(program, stage, tensors).emit()
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _move_literals(part, device)
    return module


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
    def __init__(self, program: Program, stage: StagePlan, tensors: Tensors) -> None:
        self.program, self.stage, self.tensors = program, stage, tensors
        self.nodes = {node.name: node for node in program.module.graph.nodes}
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}

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
        if last < self.program.graph.num_segments - 1:
            return tuple(self.value(self.nodes[name]) for name in boundary_names(self.program, last + 1))
        output = next(node for node in self.nodes.values() if node.op == "output")
        return fx.node.map_arg(output.args[0], self.value)

    def emit_segment(self, segment: int) -> None:
        nodes = [node for node in self.program.module.graph.nodes if self.program.segments.get(node) == segment]
        if not nodes:
            return
        block, arguments, results = _BlockEmitter(self, nodes).emit(f"Segment{segment}")
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
        for parent in node.all_input_nodes:
            self.value(parent)
        self.env[node] = self.graph.node_copy(node, self.value)
        return self.env[node]

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
    """One segment as a GraphModule of its own; what it reads from outside becomes its arguments."""

    def __init__(self, stage: _StageEmitter, nodes: list[fx.Node]) -> None:
        self.stage, self.nodes = stage, nodes
        self.inside = set(nodes)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        self.arguments: list[fx.Node] = []

    def emit(self, class_name: str) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        results = [node for node in self.nodes if self.is_used_outside(node)]
        body = [(node, self.lower(node)) for node in self.nodes]
        for node, copy in body:
            self.env[node] = copy(node)
        returned = tuple(self.env[node] for node in results)
        self.graph.output(returned[0] if len(returned) == 1 else returned)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name=class_name), self.arguments, results

    def is_used_outside(self, node: fx.Node) -> bool:
        return any(user not in self.inside for user in node.users)

    def lower(self, node: fx.Node) -> Callable[[fx.Node], fx.Node]:
        if str(node.target) == ATTENTION_TARGET:
            return self.attention
        if str(node.target) == "aten.dropout.default":
            return self.dropout
        return lambda n: self.graph.node_copy(n, self.value)

    def attention(self, node: fx.Node) -> fx.Node:
        query, key, value, padding, scale, window, softcap, dropout = node.args
        module = Attention(scale=scale, window=window, softcap=softcap, dropout=dropout)  # type: ignore[arg-type]
        if isinstance(padding, fx.Node):
            padding = self.padding(padding)
        return self.module(node, module, (self.value(query), self.value(key), self.value(value), padding))  # type: ignore[arg-type]

    def padding(self, node: fx.Node) -> fx.Node:
        """The stage's `padding` input where the model's padding is just the attention mask, so that None reaches the
        fast path.
        """
        if not self.stage.padding_source(node):
            return self.value(node)
        source = self.stage.inputs["padding"]
        self.stage.env.setdefault(source, source)
        return self.argument(source)

    def dropout(self, node: fx.Node) -> fx.Node:
        value, probability, _ = node.args
        assert isinstance(value, fx.Node)
        if probability == 0.0:
            return self.value(value)
        return self.module(node, nn.Dropout(probability), (self.value(value),))  # type: ignore[arg-type]

    def module(self, node: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        self.root[node.name] = module
        call = self.graph.call_module(node.name, args)
        call.meta = dict(node.meta)
        return call

    def value(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            name = self.stage.attribute(node)
            self.root[name] = self.stage.tensors(name)
            self.env[node] = self.graph.get_attr(name)
            return self.env[node]
        return self.argument(node)

    def argument(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            self.arguments.append(node)
            self.env[node] = self.graph.placeholder(node.name)
            self.env[node].meta = dict(node.meta)
        return self.env[node]


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


torch.fx.wrap("_item")
