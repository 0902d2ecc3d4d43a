"""A list of blocks in, which of them do the same out: read from their modules, never from their names.

Alike are blocks with equal trees of modules: types, shapes, dtypes and `requires_grad` of all they hold, and every
plain attribute. Only a number that follows the block's place in the list, as `layer_idx` does, may differ; that its
value is never used is seen while the block is traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HELD = ("_parameters", "_buffers")


@dataclass
class Kind:
    """Blocks that are alike."""

    blocks: list[int]
    numbers: set[tuple[str, str]] = field(default_factory=set)
    """Module and attribute of the numbers that tell the blocks' places."""


def kinds_of(blocks: Sequence[nn.Module], model: nn.Module) -> list[Kind]:
    """By the first block of each kind. One that shares a tensor with any other module is a kind of its own."""
    uses = Counter(id(tensor) for tensor in _tensors(model))
    kinds: list[Kind] = []
    for number, block in enumerate(blocks):
        shares = any(uses[id(tensor)] > 1 for tensor in _tensors(block))
        for kind in kinds if not shares else ():
            first = kind.blocks[0]
            numbers = _numbers(blocks[first], block, step=number - first)
            if numbers is not None:
                kind.blocks.append(number)
                kind.numbers |= numbers
                break
        else:
            kinds.append(Kind([number]))
    return kinds


def _tensors(module: nn.Module) -> list[Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return [tensor for _, tensor in (*parameters, *module.named_buffers(remove_duplicate=False))]


def _numbers(first: nn.Module, other: nn.Module, *, step: int) -> set[tuple[str, str]] | None:
    """The attributes that differ by `step`, the distance of the two blocks; None if anything else differs."""
    mine, theirs = (list(block.named_modules(remove_duplicate=False)) for block in (first, other))
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        return None
    found: set[tuple[str, str]] = set()
    for (path, module), (_, counterpart) in zip(mine, theirs, strict=True):
        if type(module) is not type(counterpart) or vars(module).keys() != vars(counterpart).keys():
            return None
        for name, value in vars(module).items():
            against = vars(counterpart)[name]
            if name == "_modules" or (name in _HELD and _described(value) == _described(against)):
                continue
            if type(value) is int and type(against) is int and against - value == step:
                found.add((path, name))
            elif name in _HELD or not _same(value, against):
                return None
    return found


def _described(held: dict[str, Tensor | None]) -> list[Any]:
    return [(name, t if t is None else (type(t), t.shape, t.dtype, t.requires_grad)) for name, t in held.items()]


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(item, other[key]) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, partial):
        return value.func is other.func and _same([value.args, value.keywords], [other.args, other.keywords])
    if isinstance(value, PretrainedConfig):
        return _same(vars(value), vars(other))
    if isinstance(value, (set, frozenset)):
        return value == other and all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN) and bool(value == other)
