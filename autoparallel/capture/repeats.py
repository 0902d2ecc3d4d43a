"""While a model is traced, a block that is alike to an earlier one and is called alike is not traced again.

In its place stand two ops: `block_inputs`, which takes the tensors that the block is called with, and a `block_output`
for each tensor that it returns, of the shape of what the earlier block, its template, returned. Templates stand between
two such ops too, so `unfold` can put a template's ops where a copy of it was called. What runs between the blocks
is traced as it is, at full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from autoparallel.capture.alike import Kind, kinds_of
from autoparallel.capture.segments import block_list

BLOCK_INPUTS = "autoparallel.block_inputs.default"
BLOCK_OUTPUT = "autoparallel.block_output.default"

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class UnlikeBlocks(Exception):
    """Blocks that look alike are not: `traced` must be traced each on its own; where it is empty, all of them."""

    def __init__(self, why: str, traced: frozenset[int] = frozenset()) -> None:
        super().__init__(why)
        self.traced = traced


@dataclass(frozen=True)
class Call:
    """One call of a block while the model was traced."""

    block: int
    template: int | None
    """The earlier call that was traced in its place; None if it was traced itself."""


@torch.library.custom_op("autoparallel::block_inputs", mutates_args=())
def block_inputs(tensors: list[Tensor], call: int) -> Tensor:
    """What a block is called with. The result only names the call."""
    raise AssertionError("autoparallel::block_inputs never runs")


@block_inputs.register_fake
def _(tensors: list[Tensor], call: int) -> Tensor:
    return torch.empty((), dtype=torch.long)


@torch.library.custom_op("autoparallel::block_output", mutates_args=())
def block_output(inputs: Tensor, result: Tensor) -> Tensor:
    """What a block returns: a tensor like `result`, which its template computed."""
    raise AssertionError("autoparallel::block_output never runs")


@block_output.register_fake
def _(inputs: Tensor, result: Tensor) -> Tensor:
    return torch.empty_like(result)


block_output.register_autograd(lambda ctx, grad: (None, None))


@dataclass
class _Template:
    call: int
    leaves: list[Any]
    signature: list[Any]
    results: list[Tensor]
    returned: list[Any]
    """Of every leaf that the block returned: ("input", n), ("result", n) or ("value", it)."""
    structure: TreeSpec


@dataclass
class Repeats:
    """The calls of one trace."""

    block_list: str
    """Its name."""
    kind_of: list[int]
    hollow: frozenset[int]
    """Blocks without their modules, which must be copies."""
    calls: list[Call] = field(default_factory=list)
    unlike: dict[int, list[Any]] = field(default_factory=dict)
    """Hollow blocks that are called in a new way, and how."""
    templates: dict[int, list[_Template]] = field(default_factory=dict)
    """Of each kind."""

    def call(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        signature = [self.kind_of[number], structure, *(_described(leaf, tensors) for leaf in leaves)]
        templates = self.templates.setdefault(self.kind_of[number], [])
        template = next((t for t in templates if t.signature == signature), None)
        if template is None and number in self.hollow:
            if signature not in self.unlike.values():
                self.unlike[number] = signature
            if not templates:
                raise UnlikeBlocks(f"block {number} is called before the one it is alike to")
            template = templates[0]
        here = len(self.calls)
        entered = block_inputs(tensors, here)
        self.calls.append(Call(number, None if template is None else template.call))
        if template is None:
            returned = forward(*args, **kwargs)
            template = _template(here, leaves, tensors, signature, returned)
            templates.append(template)
        outputs = [block_output(entered, result) for result in template.results]
        filled = {"input": tensors, "result": outputs}
        return tree_unflatten(
            [value if source == "value" else filled[source][value] for source, value in template.returned],
            template.structure,
        )


def _described(leaf: Any, tensors: list[Tensor]) -> Any:
    """What two calls must have in common in one argument. Masks must be the same ones: attention reads its window from
    them.
    """
    if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point:
        place = next(k for k, tensor in enumerate(tensors) if tensor is leaf)
        return place, [str(size) for size in leaf.shape], leaf.dtype, leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else id(leaf)


def _template(call: int, leaves: list[Any], tensors: list[Tensor], signature: list[Any], returned: Any) -> _Template:
    values, structure = tree_flatten(returned)
    inputs = {id(tensor): k for k, tensor in enumerate(tensors)}
    results = list({id(v): v for v in values if isinstance(v, Tensor) and id(v) not in inputs}.values())
    made = {id(tensor): k for k, tensor in enumerate(results)}
    sources: list[Any] = []
    for value in values:
        if not isinstance(value, Tensor):
            sources.append(("value", value))
        else:
            sources.append(("input", inputs[id(value)]) if id(value) in inputs else ("result", made[id(value)]))
    return _Template(call, leaves, signature, results, sources, structure)


class _Block(nn.Module):
    """Mixed into the class of every block while a model is traced."""

    _standing_in: tuple[Repeats, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tracing, number = self._standing_in
        return tracing.call(number, super().forward, args, kwargs)


class _Number:
    """Stands for a block's number while it is traced, so that a block that uses it is found out."""

    def used(self, *_: Any) -> Any:
        raise UnlikeBlocks("a block computes with its number")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __bool__ = used
    __int__ = __float__ = __index__ = __str__ = __repr__ = __format__ = used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = used
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = used


@contextmanager
def repeating(model: nn.Module, traced: frozenset[int] | None) -> Iterator[Repeats | None]:
    """Trace the first block of each kind and those in `traced`. None where that is all of them, or `traced` is."""
    path = "" if traced is None else block_list(model)
    container = model.get_submodule(path) if path else nn.ModuleList()
    assert isinstance(container, nn.ModuleList)
    blocks = list(container)
    kinds = kinds_of(blocks, model)
    hollow = frozenset(n for kind in kinds for n in kind.blocks[1:] if n not in (traced or ()))
    if not hollow or len(set(blocks)) < len(blocks):
        yield None
        return
    kind_of = {n: k for k, kind in enumerate(kinds) for n in kind.blocks}
    tracing = Repeats(path, [kind_of[n] for n in range(len(blocks))], hollow)
    saved = [(vars(module), dict(vars(module))) for block in blocks for module in block.modules()]
    classes = [type(block) for block in blocks]
    try:
        for kind in kinds:
            _hide_numbers(blocks, kind)
        for number, block in enumerate(blocks):
            if number in hollow:
                vars(block).update(_modules={}, _parameters={}, _buffers={})
            vars(block)["_standing_in"] = (tracing, number)
            block.__class__ = type(classes[number].__name__, (_Block, classes[number]), {})
        yield tracing
    finally:
        for block, original in zip(blocks, classes, strict=True):
            block.__class__ = original
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)
    if tracing.unlike:
        raise UnlikeBlocks("blocks are called in several ways", frozenset(tracing.unlike))


def _hide_numbers(blocks: list[nn.Module], kind: Kind) -> None:
    for number in kind.blocks if len(kind.blocks) > 1 else ():
        for path, name in kind.numbers:
            vars(blocks[number].get_submodule(path))[name] = _Number()


def drop_unread_inputs(module: fx.GraphModule, calls: list[Call]) -> None:
    """Templates say which arguments of a block are read at all; the others are no inputs of its copies either."""
    nodes = list(module.graph.nodes)
    entries = {node.args[1]: node for node in nodes if str(node.target) == BLOCK_INPUTS}
    read: dict[int, list[int]] = {}
    for number, call in enumerate(calls):
        if call.template is None and number in entries:
            used = _read_by(entries[number], nodes)
            read[number] = [k for k, tensor in enumerate(entries[number].args[0]) if tensor in used]
    for number, entry in entries.items():
        template = calls[number].template
        tensors = list(entry.args[0])
        entry.update_arg(0, [tensors[k] for k in read[number if template is None else template]])
        for tensor in tensors:
            _erase_dead(module, tensor)
    module.recompile()


def _read_by(entry: fx.Node, nodes: list[fx.Node]) -> set[fx.Node]:
    """What the ops of a template, and what it returns, are made of."""
    after = nodes[nodes.index(entry) + 1 :]
    outputs = [node for node in entry.users if str(node.target) == BLOCK_OUTPUT]
    inside = after[: min(after.index(output) for output in outputs)]
    read = {parent for node in inside for parent in node.all_input_nodes}
    return read | {node.args[1] for node in outputs if isinstance(node.args[1], fx.Node)}


def _erase_dead(module: fx.GraphModule, node: fx.Node) -> None:
    if node.op not in ("call_function", "get_attr") or node.users:
        return
    parents = node.all_input_nodes
    module.graph.erase_node(node)
    for parent in parents:
        _erase_dead(module, parent)
