"""What each op says about the dims of its tensors: an op and its inputs' layouts in, its outputs' layouts out.

Contractions follow from the op table (`ir.ops.CONTRACTIONS`): a letter that inputs share is one dim, and sharding a
contracted one gives a partial sum. Pointwise ops broadcast. Everything else here moves or reduces dims. An op without a
rule raises `Misfit` and is computed on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autoparallel.ir.graph import Argument, Op, Ref
from autoparallel.ir.ops import ATTENTION, CONTRACTIONS
from autoparallel.tensor_parallel.layout import (
    Atom,
    Dim,
    Layout,
    Misfit,
    concatenated,
    flat,
    indices,
    leaves,
    new,
    size,
    take_inner,
    unify,
)

CROSS_ENTROPY = "aten.cross_entropy_loss.default"
GETITEM = "<built-in function getitem>"


@dataclass
class Reading:
    """One op being read; rules fill in what is summed and what must stay whole."""

    op: Op
    inputs: list[Layout]
    shapes: list[tuple[int, ...]]
    """Of the outputs."""
    fresh: Callable[[int, int], Dim]
    """A new dim for (output, position)."""
    summed: list[Dim] = field(default_factory=list)
    """Dims that the op adds up: where one is sharded, the output is a partial sum."""
    whole: list[Dim] = field(default_factory=list)
    """Dims that the op cannot work on in parts."""

    def layout(self, argument: str) -> Layout:
        value = self.op.argument(argument)
        if not isinstance(value, Ref):
            raise Misfit
        return self.inputs[value.index]

    def integer(self, argument: str, default: int | None = None) -> int:
        value = self.op.argument(argument, default)
        if not isinstance(value, int):
            raise Misfit
        return value


Rule = Callable[[Reading], list[Layout]]


def read(reading: Reading) -> list[Layout]:
    """The layouts of the op's outputs; raises Misfit where nothing is known."""
    op = reading.op
    if op.target == ATTENTION:
        return [_attention(reading)]
    if op.target in CONTRACTIONS:
        return [_contraction(reading, CONTRACTIONS[op.target])]
    if op.is_pointwise:
        return [broadcast(reading.inputs)]
    rule = RULES.get(base_name(op))
    if rule is None:
        raise Misfit
    return rule(reading)


def base_name(op: Op) -> str:
    """`view` of `aten.view.default`."""
    return "getitem" if op.target == GETITEM else op.target.split(".")[1] if op.target.startswith("aten.") else ""


def broadcast(layouts: list[Layout]) -> Layout:
    """The layout of a pointwise result: dims are aligned from the right, those of size 1 stretch."""
    result: Layout = []
    for position in range(1, max(map(len, layouts), default=0) + 1):
        dim: Dim = []
        for layout in layouts:
            if len(layout) >= position and size(layout[-position]) != 1:
                if dim:
                    unify(dim, layout[-position])
                dim = layout[-position]
        result.insert(0, dim)
    return result


def _contraction(reading: Reading, signature: str) -> Layout:
    """Letters bind dims; `...` binds the leading dims of an operand; `_` broadcasts with the result."""
    left, right = signature.split("->")
    operands = [operand.split() for operand in left.split(",")]
    bound: dict[str, Dim] = {}
    uses: dict[str, int] = {}
    leading: list[Layout] = []
    for letters, layout in zip(operands, reading.inputs, strict=False):
        if letters == ["_"]:
            continue
        named = [letter for letter in letters if letter != "..."]
        rest = len(layout) - len(named)
        if rest < 0 or (rest and "..." not in letters):
            raise Misfit
        leading += [layout[:rest]] if "..." in letters else []
        for letter, dim in zip(named, layout[rest:], strict=True):
            if letter in bound:
                unify(bound[letter], dim)
            bound[letter], uses[letter] = dim, uses.get(letter, 0) + 1
    result = right.split()
    output = [*(broadcast(leading) if leading else []), *(bound[letter] for letter in result if letter != "...")]
    for letter in bound.keys() - set(result):
        (reading.summed if uses[letter] > 1 else reading.whole).append(bound[letter])
    for letters, layout in zip(operands, reading.inputs, strict=False):
        if letters == ["_"] and layout and size(layout[-1]) == size(output[-1]):
            broadcast([output, layout])
        elif letters == ["_"]:
            reading.whole += layout
    if reading.op.target == "aten.baddbmm.default":
        reading.whole += reading.summed  # its addend would be counted by every rank
    return output


def _attention(reading: Reading) -> Layout:
    """Heads may be split; `heads = kv_heads · group`, kv_heads outside."""
    query, key, value = reading.inputs[:3]
    for layout in (query, key, value):
        reading.whole += layout[2:]
    heads, kv_heads = size(query[1]), size(key[1])
    if heads == kv_heads:
        unify(query[1], key[1])
    elif kv_heads > 1:
        unify(query[1], key[1] + new(heads // kv_heads))
    if kv_heads > 1:
        unify(key[1], value[1])
    return [broadcast([[query[0]], [key[0]], [value[0]]])[0], query[2], query[1], value[3]]


def _embedding(reading: Reading) -> list[Layout]:
    weight, ids = reading.layout("weight"), reading.layout("indices")
    _may_be_uneven(weight[0])
    reading.summed.append(weight[0])
    return [[*ids, weight[1]]]


def _cross_entropy(reading: Reading) -> list[Layout]:
    """Sum over targets. Where the classes are sharded, the emitted op reduces over ranks itself."""
    logits, target = reading.layout("self"), reading.layout("target")
    plain = reading.op.argument("weight") is None and not reading.op.argument("label_smoothing", 0.0)
    if len(logits) != 2 or not plain:
        raise Misfit
    unify(logits[0], target[0])
    reading.whole.append(logits[0])
    _may_be_uneven(logits[1])
    return [[]]


def _may_be_uneven(dim: Dim) -> None:
    factors = flat(dim)
    if len(factors) == 1 and factors[0].kind == "leaf":
        factors[0].uneven = True


def _view(reading: Reading) -> list[Layout]:
    """Inner dims of equal product are regrouped."""
    (shape,), layout = reading.shapes, reading.inputs[0]
    output: Layout = []
    i = j = 0
    while i < len(layout) or j < len(shape):
        group, targets, have, want = Dim(), [], 1, 1
        if i < len(layout):
            group, have, i = list(layout[i]), size(layout[i]), i + 1
        if j < len(shape):
            targets, want, j = [shape[j]], shape[j], j + 1
        while have != want:
            if have < want and i < len(layout):
                group, have, i = group + layout[i], have * size(layout[i]), i + 1
            elif have > want and j < len(shape):
                targets, want, j = [*targets, shape[j]], want * shape[j], j + 1
            else:
                raise Misfit
        inner: Layout = []
        for length in reversed(targets[1:]):
            group, taken = take_inner(group, length)
            inner.insert(0, taken)
        output += [group, *inner] if targets else []
    return [output]


def _unsqueeze(reading: Reading) -> list[Layout]:
    output = list(reading.inputs[0])
    position = reading.integer("dim")
    output.insert(position if position >= 0 else position + len(output) + 1, [])
    return [output]


def _transpose(reading: Reading) -> list[Layout]:
    output = list(reading.inputs[0])
    a, b = reading.integer("dim0"), reading.integer("dim1")
    output[a], output[b] = output[b], output[a]
    return [output]


def _permute(reading: Reading) -> list[Layout]:
    order = reading.op.argument("dims")
    assert isinstance(order, tuple)
    return [[reading.inputs[0][_position(k, len(order))] for k in order]]


def _position(value: Argument, rank: int) -> int:
    assert isinstance(value, int)
    return value % rank


def _reverse(reading: Reading) -> list[Layout]:
    return [reading.inputs[0][::-1]]


def _expand(reading: Reading) -> list[Layout]:
    (shape,) = reading.shapes
    layout = [Dim()] * (len(shape) - len(reading.inputs[0])) + reading.inputs[0]
    return [[d if size(d) == n else reading.fresh(0, k) for k, (d, n) in enumerate(zip(layout, shape, strict=True))]]


def bounds(op: Op, length: int) -> tuple[int, int]:
    """`start` and `end` of a slice of a dim of that length, both inside it."""
    start, end = op.argument("start"), op.argument("end")
    first = start if isinstance(start, int) else 0
    last = length if end is None else end if isinstance(end, int) else 0
    first, last = (value + length if value < 0 else value for value in (first, last))
    return max(0, min(first, length)), max(0, min(last, length))


def _slice(reading: Reading) -> list[Layout]:
    output = list(reading.inputs[0])
    k = reading.integer("dim", 0) % len(output)
    length, step = size(output[k]), reading.integer("step", 1)
    if not all(isinstance(reading.op.argument(name, 0), (int, type(None))) for name in ("start", "end")):
        raise Misfit
    start, end = bounds(reading.op, length)
    if step == 1:
        output[k] = indices(output[k], start, end)
    elif length % step == 0 and start < step and end == length:
        output[k] = take_inner(output[k], step)[0]  # x[..., i::step]: the outer factor is left
    else:
        raise Misfit
    return [output]


def _select(reading: Reading) -> list[Layout]:
    layout = list(reading.inputs[0])
    k = reading.integer("dim") % len(layout)
    index = reading.integer("index") % size(layout[k])
    indices(layout[k], index, index + 1)
    return [layout[:k] + layout[k + 1 :]]


def _split(reading: Reading) -> list[Layout]:
    layout = list(reading.inputs[0])
    k, outputs, start = reading.integer("dim", 0) % len(layout), list[Layout](), 0
    for shape in reading.shapes:
        outputs.append([*layout[:k], indices(layout[k], start, start + shape[k]), *layout[k + 1 :]])
        start += shape[k]
    return outputs


def _cat(reading: Reading) -> list[Layout]:
    layouts = reading.inputs
    k = reading.integer("dim", 0) % len(layouts[0])
    output = broadcast([[*layout[:k], [], *layout[k + 1 :]] for layout in layouts])
    output[k] = concatenated([layout[k] for layout in layouts])
    return [output]


def _stack(reading: Reading) -> list[Layout]:
    output = broadcast(reading.inputs)
    k = reading.integer("dim", 0) % (len(output) + 1)
    output.insert(k, new(len(reading.inputs), blocked=True))
    return [output]


def _repeat_interleave(reading: Reading) -> list[Layout]:
    output = list(reading.inputs[0])
    k = reading.integer("dim") % len(output)
    output[k] = output[k] + new(reading.integer("repeats"))
    return [output]


def _index(reading: Reading) -> list[Layout]:
    """Rows picked by one index tensor."""
    layout, picked = reading.layout("self"), reading.op.argument("indices")
    assert isinstance(picked, tuple)
    positions = [k for k, value in enumerate(picked) if value is not None]
    if len(positions) != 1:
        raise Misfit
    (k,) = positions
    ref = picked[k]
    assert isinstance(ref, Ref)
    reading.whole.append(layout[k])
    return [[*layout[:k], *reading.inputs[ref.index], *layout[k + 1 :]]]


def _reduce(reading: Reading) -> list[Layout]:
    """mean and sum over given dims."""
    layout, dims = reading.inputs[0], reading.op.argument("dim")
    if not isinstance(dims, tuple):
        raise Misfit
    reduced = {_position(k, len(layout)) for k in dims}
    reading.summed += [layout[k] for k in sorted(reduced)]
    keep = bool(reading.op.argument("keepdim", False))
    return [[[] if k in reduced else d for k, d in enumerate(layout) if keep or k not in reduced]]


def _along(reading: Reading) -> list[Layout]:
    """Ops that look along one whole dim; outputs may have another length there, or none."""
    layout = reading.inputs[0]
    k = reading.integer("dim", -1) % len(layout)
    reading.whole.append(layout[k])
    outputs = []
    for index, shape in enumerate(reading.shapes):
        if len(shape) == len(layout):
            inside = layout[k] if shape[k] == size(layout[k]) else reading.fresh(index, k)
            outputs.append([*layout[:k], inside, *layout[k + 1 :]])
        else:
            outputs.append([*layout[:k], *layout[k + 1 :]])
    return outputs


def _norm(reading: Reading) -> list[Layout]:
    """layer_norm and rms_norm look along the last dims."""
    layout, normalized = reading.inputs[0], reading.op.argument("normalized_shape")
    assert isinstance(normalized, tuple)
    reading.whole += layout[-len(normalized) :]
    return [broadcast(reading.inputs)]


def _like(reading: Reading) -> list[Layout]:
    return [reading.inputs[0]]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), _view),
    **dict.fromkeys(("t", "numpy_T"), _reverse),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _split),
    **dict.fromkeys(("mean", "sum"), _reduce),
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax", "topk", "sort", "cumsum", "max", "min", "argmax",
         "logsumexp", "amax", "amin"), _along,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like"), _like),
    "unsqueeze": _unsqueeze, "transpose": _transpose, "permute": _permute, "slice": _slice, "select": _select,
    "cat": _cat, "stack": _stack, "repeat_interleave": _repeat_interleave, "index": _index,
    "embedding": _embedding, "cross_entropy_loss": _cross_entropy,
}  # fmt: skip


def contains(dim: Dim, atom: Atom) -> bool:
    return any(leaf is atom for leaf in leaves(dim))
