"""ParallelModule: the user's own model object, whose forward is the emitted program. The loop around it stays that of
one device.

`forward(labels=...)` runs the whole schedule, backward passes included; `loss.backward()` deposits the gradients, so
accumulation and `(loss * k).backward()` are autograd's own. Every rank returns the same loss. Parameters keep their
names and their identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from autoparallel.emit.stage import readable
from autoparallel.errors import ContractError
from autoparallel.plans.plan import Plan
from autoparallel.runtime import saving
from autoparallel.runtime.batch import Batch, BatchExchange
from autoparallel.runtime.checks import bind, check_inputs
from autoparallel.runtime.engine import Engine

EngineFactory = Callable[[nn.Module, Batch], Engine]


class TrainingOutput(CausalLMOutput):
    """What a training forward returns: `outputs.loss`, `outputs[0]`, `outputs["loss"]`."""

    @property
    def logits(self) -> Tensor:
        raise ContractError(
            "a training forward has no logits",
            why="they live on the last stage, one micro-batch at a time, and are gone when the step ends",
            remedy="call the model under torch.no_grad() to get logits",
        )

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        """The dataclass initialises every field; there is nothing to keep."""


class ParallelModule:
    """Mixed into the class of a compiled model (`isinstance(model, autoparallel.ParallelModule)`)."""

    _parallel: _State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The step of the whole batch: loss in training, (loss, logits) under `no_grad`; the same on every rank.

        Takes what the user's own forward takes, by the same names and positions; what a pipeline cannot serve is
        refused.
        """
        assert isinstance(self, nn.Module)
        given = bind(super().forward, args, kwargs)  # type: ignore[misc]
        check_inputs(given)
        state, labels = self._parallel, given.get("labels")
        wants_gradients = torch.is_grad_enabled()
        if wants_gradients and labels is None and self.training:
            raise ContractError(
                "a training forward without labels",
                why="the loss is part of the program that runs over the pipeline",
                remedy="pass labels=, with -100 where a token is to be ignored; for inference use torch.no_grad()",
            )
        batch = state.exchange.agree(
            input_ids=given["input_ids"],
            attention_mask=given.get("attention_mask"),
            labels=labels,
            num_items=given.get("num_items_in_batch"),
        )
        if state.engine is None and not (wants_gradients and labels is not None):
            return self._evaluate_unplaced(batch, given)
        engine = state.engine or state.start(self, batch)
        engine.fingerprint.check(self)
        engine.train_mode(self.training)
        if wants_gradients and batch.labels is not None:
            output: Any = TrainingOutput(loss=training_loss(engine, batch))
        else:
            loss, logits = engine.evaluate(batch)
            logits = logits[:, -(given.get("logits_to_keep") or 0) :]
            output = CausalLMOutput(loss=loss if batch.labels is not None else None, logits=logits)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _evaluate_unplaced(self, batch: Batch, given: dict[str, Any]) -> Any:
        """Before the first training step there is no plan and every rank holds a whole model: each evaluates rank 0's
        batch.
        """
        agreed = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        return super().forward(**{**given, **agreed, "use_cache": False})  # type: ignore[misc]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the whole model, as on one device, though a rank holds only its pieces."""
        assert isinstance(self, nn.Module)
        engine = self._parallel.engine
        if engine is None:
            return int(super().num_parameters(only_trainable, exclude_embeddings))  # type: ignore[misc]
        tables = {f"{name}.weight" for name, part in self.named_modules() if isinstance(part, nn.Embedding)}
        counted = [p for p in engine.parameters.placed if p.master.requires_grad or not only_trainable]
        return sum(p.shape.numel() for p in counted if not (exclude_embeddings and p.name in tables))

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The plan recomputes where memory needs it; a second decision inside its blocks would only cost time."""
        logger.info("Activation checkpointing is left to the plan, which chooses recomputation for each block.")

    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def is_placed(self) -> bool:
        """Whether a first step has been made, after which this rank holds its pieces."""
        return self._parallel.engine is not None

    @property
    def parallel_plan(self) -> Plan:
        """The plan this model runs under."""
        return self._placed_engine("parallel_plan").plan

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient of the parameter called `name`, on every rank; call it on all ranks, as the loop does
        everything.
        """
        engine = self._placed_engine("gradient")
        placed = {p.name: p for p in engine.parameters.placed}
        return engine.parameters.full_gradient(placed[name])

    def program(self) -> str:
        """The emitted program of this rank as Python text, blocks included."""
        return "\n".join(readable(stage.module) for stage in self._placed_engine("program").stages)

    def print_readable(self) -> str:
        """Print `program()`."""
        text = self.program()
        print(text)
        return text

    def _placed_engine(self, what: str) -> Engine:
        if self._parallel.engine is None:
            raise ContractError(
                f"{what}() before the first training step", why="the plan is made there", remedy="run a step first"
            )
        return self._parallel.engine

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model's state under its original names, on every rank (collective)."""
        engine = self._parallel.engine
        if engine is None:
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]
        with engine.gathering():
            state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        _fill_in(self, state, engine, prefix=kwargs.get("prefix", args[1] if len(args) > 1 else ""))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a whole model's state; each rank takes its pieces."""
        assign = assign and not self.is_placed  # the optimizer's parameters are the model's
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a plain HF directory (collective): rank 0 gathers and writes one tensor at a time."""
        assert isinstance(self, nn.Module)
        engine, state = self._parallel.engine, kwargs.pop("state_dict", None)
        parameters = engine.parameters if engine is not None and state is None else None
        if state is None:
            with engine.gathering() if engine is not None else nullcontext():
                names = super().state_dict(keep_vars=True)  # type: ignore[misc]
            state = saving.deferred_state(self, names, parameters)
        saving.save(super().save_pretrained, save_directory, state, parameters, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.cuda()` and `.to()` place parameters freely until the plan does; afterwards only a no-op is allowed."""
        if self._parallel.engine is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        for p in self._parallel.engine.parameters.placed:
            probe = torch.empty(0, dtype=p.master.dtype, device=p.master.device)
            moved = fn(probe)
            if moved.dtype != probe.dtype or moved.device != probe.device:
                raise ContractError(
                    "the model cannot change device or dtype after its plan has placed it",
                    why=f"{p.name} would go from {probe.dtype} on {probe.device} to {moved.dtype} on {moved.device}",
                    remedy="call .to(), .cuda() or .half() before the first step",
                )
        return self


class _State:
    """What a compiled model carries: how to make its engine, and the engine once a first batch has been seen."""

    def __init__(self, start: EngineFactory, device: torch.device) -> None:
        self._start, self.exchange = start, BatchExchange(device)
        self.engine: Engine | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        raise ContractError(
            "a compiled model cannot be copied",
            why="a copy would hold this rank's pieces without the program that belongs to them",
            remedy="copy the model before it is compiled, or load state_dict() into a plain one",
        )

    def start(self, model: nn.Module, batch: Batch) -> Engine:
        self.engine = self._start(model, batch)
        return self.engine


def parallelize(model: nn.Module, start: EngineFactory, *, device: torch.device) -> nn.Module:
    """Give `model` the parallel forward, in place, by a subclass of its class under the same name (checkpoints record
    the name).
    """
    cls = type(model)

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """With the signature of the user's own, which libraries read."""
        return ParallelModule.forward(self, *args, **kwargs)

    model.__dict__["_parallel"] = _State(start, device)
    model.__class__ = type(
        cls.__name__,
        (ParallelModule, cls),
        {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward},
    )
    model.register_load_state_dict_pre_hook(_lend_whole)
    model.register_load_state_dict_post_hook(_take_pieces)
    return model


def inner(model: nn.Module) -> nn.Module:
    """The transformer that a peft model wraps, or the model itself."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


def training_loss(engine: Engine, batch: Batch) -> Tensor:
    """Run one step; the loss of the whole batch, whose `backward()` deposits the gradients that the step made."""
    loss, gradients = engine.train(batch)
    result: Tensor = _Deposit.apply(loss, gradients, *(p.master for p in engine.parameters.trained()))
    return result


class _Deposit(torch.autograd.Function):
    """Hands the gradients that the schedule made to autograd when the user calls `backward()`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *masters: Tensor) -> Tensor:
        ctx.gradients, ctx.masters = gradients, masters
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise ContractError(
                "backward() a second time on one loss", why="its gradients were handed over the first time"
            )
        _scale(gradients, grad_output)
        masters, ctx.masters = ctx.masters, None
        stores = (node for node, _ in ctx.next_functions[1:])
        return (None, None, *map(_handed_over, masters, gradients, stores))


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """In place. `loss.backward()` asks for a factor of one, which is seen where looking does not wait for a GPU."""
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1.0:
        return
    for dtype in {gradient.dtype for gradient in gradients}:
        torch._foreach_mul_([g for g in gradients if g.dtype == dtype], factor.to(dtype))


def _handed_over(master: Tensor, gradient: Tensor, store: Any) -> Tensor | None:
    """What autograd has left to do with a gradient: nothing where `store`, its node, would only set `master.grad`."""
    watched = torch.is_grad_enabled() or master._backward_hooks or master._post_accumulate_grad_hooks
    if master.grad is not None or watched or not _runs(store):
        return gradient
    master.grad = gradient
    return None


def _runs(store: Any) -> bool:
    """Whether the running backward stores a gradient: torch.autograd.grad() returns it instead, and
    backward(inputs=...) leaves some out.
    """
    try:
        return torch._C._will_engine_execute_node(store)
    except RuntimeError:  # "not supported" is how torch says that it runs torch.autograd.grad()
        return False


def _fill_in(model: Any, state: dict[str, Tensor], engine: Engine, *, prefix: str) -> None:
    """Replace this rank's pieces in a state dict by whole tensors."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(prefix + name)
    for p in engine.parameters.placed:
        whole = engine.parameters.full(p)
        for name in names[id(p.master)]:
            if name in state:
                state[name] = whole


def _lend_whole(model: Any, *state: Any) -> None:
    """Before a state dict is loaded into the model, or into a module around it: every master gets a whole tensor, so
    that torch's own loading checks names and shapes.
    """
    engine = model._parallel.engine
    if engine is not None:
        engine.lent = {p.name: p.master.data for p in engine.parameters.placed}
        for p in engine.parameters.placed:
            p.master.data = engine.parameters.full(p).clone()


def _take_pieces(model: Any, *keys: Any) -> None:
    """After it is loaded: each rank keeps its pieces of what was loaded."""
    engine = model._parallel.engine
    if engine is not None:
        for p in engine.parameters.placed:
            whole, p.master.data = p.master.data, engine.lent.pop(p.name)
            engine.parameters.load(p, whole)
