"""ParallelModule: the user's own model object, whose forward is the emitted program. The loop around it stays that of
one device.

`forward(labels=...)` runs the whole schedule, backward passes included; `loss.backward()` deposits the gradients, so
accumulation and `(loss * k).backward()` are autograd's own. Every rank returns the same loss. Parameters keep their
names and their identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from autoparallel.errors import ContractError, WorkerError
from autoparallel.plans.plan import Plan
from autoparallel.runtime.batch import Batch, agree_on_batch
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | float | None = None,
        **other: Any,
    ) -> Any:
        """The step of the whole batch: loss in training, (loss, logits) under `no_grad`; the same on every rank."""
        assert isinstance(self, nn.Module)
        _check_inputs(input_ids, use_cache, other)
        assert input_ids is not None
        state = self._parallel
        wants_gradients = torch.is_grad_enabled()
        if wants_gradients and labels is None and self.training:
            raise ContractError(
                "a training forward without labels",
                why="the loss is part of the program that runs over the pipeline",
                remedy="pass labels=, with -100 where a token is to be ignored; for inference use torch.no_grad()",
            )
        batch = agree_on_batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            num_items=num_items_in_batch,
            device=state.device,
        )
        if state.engine is None and not (wants_gradients and labels is not None):
            return self._evaluate_unplaced(batch, return_dict)
        engine = state.engine or state.start(self, batch)
        engine.train_mode(self.training)
        if wants_gradients and batch.labels is not None:
            loss, gradients = engine.train(batch)
            masters = [p.master for p in engine.parameters.trained()]
            output: Any = TrainingOutput(loss=_Deposit.apply(loss, gradients, *masters))
        else:
            loss, logits = engine.evaluate(batch)
            output = CausalLMOutput(loss=loss if batch.labels is not None else None, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def _evaluate_unplaced(self, batch: Batch, return_dict: bool | None) -> Any:
        """Before the first training step there is no plan and every rank holds the whole model: it evaluates rank 0's
        batch itself.
        """
        forward = super().forward  # type: ignore[misc]
        mask = batch.attention_mask
        return forward(
            input_ids=batch.input_ids,
            attention_mask=mask,
            labels=batch.labels,
            use_cache=False,
            return_dict=return_dict,
        )

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
        stage = self._placed_engine("program").stage
        parts = [stage.print_readable(print_output=False)]
        seen: set[str] = set()
        for name, child in stage.named_modules():
            if child is not stage and isinstance(child, torch.fx.GraphModule):
                text = child.print_readable(print_output=False)
                parts += [] if text in seen else [f"# {name}\n{text}"]
                seen.add(text)
        return "\n".join(parts)

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
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if self._parallel.engine is not None:
            _fill_in(self, state, self._parallel.engine, keep=True)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a whole model's state; each rank takes its pieces."""
        engine = self._parallel.engine
        if engine is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        with _whole_shapes(engine):
            result = super().load_state_dict(state_dict, strict=strict)  # type: ignore[misc]
            loaded = {p.name: p.master.data for p in engine.parameters.placed}
        for p in engine.parameters.placed:
            if p.name in state_dict or strict:
                engine.parameters.load(p, loaded[p.name])
        return result

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write a plain HF directory: rank 0 gathers and writes, everyone waits for it."""
        assert isinstance(self, nn.Module)
        engine = self._parallel.engine
        state = kwargs.pop("state_dict", None)
        if state is None:
            state = super().state_dict()  # type: ignore[misc]
            if engine is not None:
                _fill_in(self, state, engine, keep=dist.get_rank() == 0)
        failure = [""]
        if dist.get_rank() == 0:
            try:
                super().save_pretrained(save_directory, state_dict=state, **kwargs)  # type: ignore[misc]
            except Exception as error:
                failure = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise WorkerError(
                f"rank 0 could not save to {save_directory}",
                why=failure[0],
                remedy="free space or choose another folder",
            )

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
        self._start, self.device = start, device
        self.engine: Engine | None = None

    def start(self, model: nn.Module, batch: Batch) -> Engine:
        self.engine = self._start(model, batch)
        return self.engine


def parallelize(model: nn.Module, start: EngineFactory, *, device: torch.device) -> nn.Module:
    """Give `model` the parallel forward, in place, by a subclass of its class under the same name (checkpoints record
    the name).
    """
    cls = type(model)
    model.__dict__["_parallel"] = _State(start, device)
    model.__class__ = type(
        cls.__name__, (ParallelModule, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )
    return model


class _Deposit(torch.autograd.Function):
    """Hands the gradients that the schedule made to autograd when the user calls `backward()`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *masters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise ContractError(
                "backward() a second time on one loss", why="its gradients were handed over the first time"
            )
        for gradient in gradients:
            gradient.mul_(grad_output.to(gradient.dtype))
        return (None, None, *gradients)


def _check_inputs(input_ids: Tensor | None, use_cache: bool | None, other: Mapping[str, Any]) -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ContractError(
            "the model is called under autocast",
            why="all micro-batches run backward inside this call, and backward must not run under autocast",
            remedy="load the model in the dtype you want instead: from_pretrained(..., dtype=torch.bfloat16)",
        )
    if input_ids is None:
        raise ContractError(
            "the model is called without input_ids", remedy="pass input_ids=, attention_mask= and labels="
        )
    given = {
        name: value
        for name, value in other.items()
        if value is not None and value is not False and name != "logits_to_keep"
    }
    positions = given.pop("position_ids", None)
    if positions is not None and not torch.equal(
        positions.expand_as(input_ids), torch.arange(input_ids.shape[1]).expand_as(input_ids)
    ):
        given["position_ids"] = positions
    given.pop("cache_position", None)
    if use_cache and "past_key_values" in given:
        given = {"past_key_values": given["past_key_values"]}
    if given:
        raise ContractError(
            f"the parallel program takes no {', '.join(sorted(given))}",
            why="it is captured for input_ids, attention_mask and labels",
            remedy="leave them out (use_cache=False for generation)",
        )


def _fill_in(model: Any, state: dict[str, Tensor], engine: Engine, *, keep: bool) -> None:
    """Replace this rank's pieces in a state dict by whole tensors; where `keep` is False they are gathered and
    dropped.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for p in engine.parameters.placed:
        whole = engine.parameters.full(p)
        for name in names[id(p.master)]:
            if name in state:
                state[name] = whole if keep else whole.new_empty(0)


@contextmanager
def _whole_shapes(engine: Engine) -> Any:
    """Lend every master a whole tensor, so that torch's own loading checks names and shapes."""
    pieces = {p.name: p.master.data for p in engine.parameters.placed}
    try:
        for p in engine.parameters.placed:
            p.master.data = engine.parameters.full(p).clone()
        yield
    finally:
        for p in engine.parameters.placed:
            p.master.data = pieces[p.name]
