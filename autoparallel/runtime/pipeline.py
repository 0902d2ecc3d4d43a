"""One rank's stage at work: a training step through torch's pipeline schedules, or through a plain loop when there is
one stage.

All contact with the private parts of torch.distributed.pipelining is in this file. Losses are sums over the global
count of targets, so micro-batches and replicas add up and nothing is scaled by a number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import TensorSpec
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.mesh import Mesh

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MAX_SCHEDULES = 8
"""Batch shapes whose receive buffers are kept; the oldest goes first."""
Inputs = dict[str, Tensor]


class Pipeline:
    """Runs the micro-batches of one step through this rank's stage."""

    def __init__(
        self,
        stage: nn.Module,
        strategy: Strategy,
        mesh: Mesh,
        *,
        entering: tuple[TensorSpec, ...],
        leaving: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> None:
        self.stage, self.strategy, self.mesh, self.device = stage, strategy, mesh, device
        self.entering, self.leaving = entering, leaving
        self.is_last = mesh.stage == mesh.num_stages - 1
        self._schedules: dict[tuple[int, int, int], Any] = {}

    def train(self, micro_batches: list[Inputs]) -> Tensor | None:
        """Forward and backward of all micro-batches; the summed loss on the last stage, None elsewhere."""
        if self.mesh.num_stages == 1:
            return self._train_alone(micro_batches)
        rows, seq = micro_batches[0]["input_ids"].shape
        schedule = self._schedule(len(micro_batches), rows, seq)
        losses: list[Tensor] = []
        schedule._stage.has_backward = True
        schedule._stage.clear_runtime_states()
        targets = [m["labels"] for m in micro_batches] if self.is_last else None
        schedule._step_microbatches(
            [()] * len(micro_batches),
            list(micro_batches),
            targets,
            losses if self.is_last else None,
            return_outputs=False,
        )
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    def _train_alone(self, micro_batches: list[Inputs]) -> Tensor:
        losses = []
        for index, inputs in enumerate(micro_batches):
            self._set_sharding(last=index == len(micro_batches) - 1)
            loss = self.stage(**inputs)[0]
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _set_sharding(self, *, last: bool) -> None:
        """Level 1 reduces gradients after the last micro-batch, 2 and 3 after each; only 3 gives parameters back in
        between.
        """
        if isinstance(self.stage, FSDPModule):
            level = self.strategy.distribute_param
            self.stage.set_is_last_backward(last)
            self.stage.set_requires_gradient_sync(last or level >= 2)
            self.stage.set_reshard_after_backward(last or level == 3)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        """Forward only, of one micro-batch: (loss, logits) on the last stage, None elsewhere."""
        rows, seq = inputs["input_ids"].shape
        received = [self._receive(spec, rows, seq) for spec in self.entering]
        result = self.stage(*received, **inputs)
        if self.is_last:
            return result[0], result[1]
        for tensor in result:
            dist.send(tensor.contiguous(), self._neighbour(1))
        return None

    def _receive(self, spec: TensorSpec, rows: int, seq: int) -> Tensor:
        buffer = self._empty(spec, rows, seq)
        dist.recv(buffer, self._neighbour(-1))
        return buffer

    def _neighbour(self, step: int) -> int:
        mesh = self.mesh
        return mesh.rank_of(stage=mesh.stage + step, data_index=mesh.data_index, tensor_index=mesh.tensor_index)

    def _empty(self, spec: TensorSpec, rows: int, seq: int) -> Tensor:
        shape = [evaluate(dim, batch=rows, seq=seq) for dim in spec.shape]
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)

    def _schedule(self, num_micro_batches: int, rows: int, seq: int) -> Any:
        """One schedule per batch shape: its receive buffers have fixed sizes. Shapes come from the graph, none is
        inferred at run time.
        """
        key = (num_micro_batches, rows, seq)
        if key not in self._schedules:
            arguments = [self._empty(spec, rows, seq).requires_grad_(spec.requires_grad) for spec in self.entering]
            results = [self._empty(spec, rows, seq).requires_grad_(spec.requires_grad) for spec in self.leaving]
            stage = _Stage(
                _LossOnly(self.stage) if self.is_last else self.stage,
                self.mesh.stage,
                self.mesh.num_stages,
                self.device,
                input_args=tuple(arguments),
                output_args=tuple(results),
                group=self.mesh.pipeline_group,
            )
            stage.before_backward = self._set_sharding
            # torch's 1F1B wants a micro-batch for every stage; with fewer, GPipe does the same work.
            name = self.strategy.schedule if num_micro_batches >= self.mesh.num_stages else "gpipe"
            if len(self._schedules) >= MAX_SCHEDULES:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = SCHEDULES[name](stage, num_micro_batches, loss_fn=_loss_is_output, scale_grads=False)
        return self._schedules[key]


class _LossOnly(nn.Module):
    """The last stage in training: logits die with the micro-batch instead of waiting for the end of the step."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        loss: Tensor = self.stage(*args, **inputs)[0]
        return loss


def _loss_is_output(output: Tensor, target: Tensor) -> Tensor:
    return output


class _Stage(PipelineStage):
    """torch's stage, with our rule for when gradients are reduced and parameters given back."""

    before_backward: Callable[..., None]

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        self.before_backward(last=last_backward)
        return _without_fsdp_rules(self, backward_type, bwd_kwargs, last_backward)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing is left to reduce: the last micro-batch's backward did it."""


def _without_fsdp_rules(stage: PipelineStage, backward_type: Any, bwd_kwargs: dict, last_backward: bool) -> Any:
    """The base class's backward, for which an FSDP module must not look like one (it would defer every reduction)."""
    submodule, stage.submod = stage.submod, _Opaque(stage.submod)
    try:
        return PipelineStage.backward_maybe_with_nosync(stage, backward_type, bwd_kwargs, last_backward)
    finally:
        stage.submod = submodule


class _Opaque(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
