"""What a program that is fixed at the first step cannot follow, noticed before it would give another number than one
device.

The stages were captured and placed once. A parameter that is unfrozen, replaced or rebound later, a hook added later
or a submodule put into eval mode alone would be ignored silently; each is one cheap comparison per forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoparallel.errors import ContractError
from autoparallel.runtime.parameters import Parameters, local

_KNOWN = {"input_ids", "attention_mask", "labels", "use_cache", "return_dict", "num_items_in_batch", "logits_to_keep"}


def bind(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the user's own forward gives them."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def check_inputs(given: Mapping[str, Any]) -> None:
    """Refuse what the captured forward does not take."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ContractError(
            "the model is called under autocast",
            why="all micro-batches run backward inside this call, and backward must not run under autocast",
            remedy='leave it out and compute in bf16 with fp32 masters: compile(model, dtype="bfloat16"), or '
            "mixed_precision=True in the one line; with HF Trainer, leave bf16 and fp16 out of TrainingArguments",
        )
    input_ids = given.get("input_ids")
    if input_ids is None:
        raise ContractError("the model is called without input_ids", remedy="pass input_ids=, attention_mask=, labels=")
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise ContractError("logits_to_keep is a tensor", remedy="pass an int, or index the logits yourself")
    other = {k: v for k, v in given.items() if k not in _KNOWN and v is not None and v is not False}
    for name in ("position_ids", "cache_position"):
        value = other.get(name)
        if isinstance(value, Tensor) and torch.equal(value.expand_as(input_ids), _positions(input_ids)):
            del other[name]
    if other:
        raise ContractError(
            f"the parallel program takes no {', '.join(sorted(other))}",
            why="it is captured for input_ids, attention_mask and labels",
            remedy="leave them out; generate() works with use_cache=False",
        )


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


class Fingerprint:
    """What the program took from the model when it was placed, to compare with what the model is at a later call."""

    def __init__(self, model: nn.Module, parameters: Parameters, *, draws: bool) -> None:
        self.parameters, self.draws = parameters, draws
        self.trainable = {p.name: p.master.requires_grad for p in parameters.placed}
        self.num_hooks = _num_hooks(model)
        self.adapters = _adapters(model)

    def check(self, model: nn.Module) -> None:
        """Raise ContractError for the first difference."""
        if _adapters(model) != self.adapters:
            raise _too_late(
                "an adapter was switched, scaled or merged", remedy="set the adapters before the first training step"
            )
        named = dict(model.named_parameters())
        placed = {p.name: p for p in self.parameters.placed}
        if named.keys() != placed.keys() or any(named[name] is not p.master for name, p in placed.items()):
            changed = sorted(named.keys() ^ placed.keys()) or [n for n, p in placed.items() if named[n] is not p.master]
            raise _too_late(f"parameter {changed[0]} was replaced, added or removed")
        for name, p in placed.items():
            if p.master.requires_grad != self.trainable[name]:
                raise _too_late(f"requires_grad of {name} changed to {p.master.requires_grad}")
            if p.leaf is not None and not p.is_copied and local(p.leaf).data_ptr() != p.master.data_ptr():
                raise _too_late(
                    f"{name}.data was rebound", remedy="write into it: p.data.copy_(...) or p.data.mul_(...)"
                )
        if _num_hooks(model) != self.num_hooks:
            raise _too_late("a forward hook was added or removed")
        for name, module in model.named_modules():
            if self.draws and module.training != model.training:
                raise ContractError(
                    f"{name} is in {'training' if module.training else 'eval'} mode and the model is not",
                    why="train() and eval() switch the whole emitted program",
                    remedy="call train() or eval() on the model; a dropout stays off with p=0 set before compiling",
                )


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _adapters(model: nn.Module) -> list[Any]:
    """What peft's layers read in their forward beside tensors; capture has made constants of it."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return [
        (bool(layer.disable_adapters), *layer.active_adapters, *layer.merged_adapters, *_scales(layer))
        for layer in layers
    ]


def _scales(layer: Any) -> list[tuple[str, float]]:
    return sorted(getattr(layer, "scaling", {}).items())


def _too_late(what: str, *, remedy: str = "change the model before its first training step") -> ContractError:
    return ContractError(
        f"{what} after the program was placed", why="the stages were captured and cut before", remedy=remedy
    )
