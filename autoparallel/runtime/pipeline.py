"""One rank's stages at work: a training step by the schedule's action lists, or by a plain loop when there is no
pipeline; evaluation, forward only.

Losses are sums over the global count of targets, so micro-batches and replicas add up and nothing is scaled by a number
of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, fx

from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import TensorSpec
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.mesh import Mesh
from autoparallel.runtime.reduction import Reduction
from autoparallel.runtime.torch_schedule import Inputs, Schedule, Sharding, Stage
from autoparallel.schedule.actions import actions, splits_backward

MAX_SCHEDULES = 8
"""Batch shapes whose schedules are kept; the oldest goes first."""


@dataclass(frozen=True)
class LocalStage:
    """One stage of the model that this rank holds."""

    index: int
    """Among all stages of the model, first to last."""
    module: fx.GraphModule
    entering: tuple[TensorSpec, ...]
    leaving: tuple[TensorSpec, ...]
    """What it hands to the next stage; the loss, of the last one."""


def summed(losses: list[Tensor]) -> Tensor | None:
    """None where there are none: not every rank has the last stage."""
    if len(losses) < 2:
        return losses[0] if losses else None
    return torch.stack(losses).sum()


class Pipeline:
    """Runs the micro-batches of one step through this rank's stages."""

    def __init__(
        self,
        stages: list[LocalStage],
        strategy: Strategy,
        mesh: Mesh,
        *,
        device: torch.device,
        reduction: Reduction | None,
    ) -> None:
        self.stages, self.strategy, self.mesh, self.device = stages, strategy, mesh, device
        splits = splits_backward(strategy.schedule, strategy.num_stages)
        self.sharding = [
            Sharding(stage.module, strategy.distribute_param, splits_backward=splits, reduction=reduction)
            for stage in stages
        ]
        self._schedules: dict[tuple[int, int, int], Schedule] = {}
        self._one: Tensor | None = None

    def train(self, micro_batches: list[Inputs], *, seq_len: int) -> Tensor | None:
        """Forward and backward of all micro-batches; the summed loss where the last stage is, None elsewhere."""
        loss = self._train(micro_batches, seq_len)
        self._give_back()
        return loss

    def _give_back(self) -> None:
        for sharding in self.sharding:
            sharding.give_back()

    def _train(self, micro_batches: list[Inputs], seq_len: int) -> Tensor | None:
        if self.mesh.num_stages == 1:
            return self._train_alone(micro_batches)
        losses = self._schedule(len(micro_batches), self.strategy.batch_per_device, seq_len).run(micro_batches)
        return summed([loss.detach() for loss in losses])

    def _train_alone(self, micro_batches: list[Inputs]) -> Tensor | None:
        (stage,), (sharding,) = self.stages, self.sharding
        losses: list[Tensor] = []
        for index, inputs in enumerate(micro_batches):
            sharding.before_backward(last=index == len(micro_batches) - 1)
            loss = stage.module(**inputs)[0]
            if self._one is None:
                self._one = torch.ones_like(loss)
            loss.backward(self._one)
            losses.append(loss.detach())
        return summed(losses)

    def forward(self, micro_batches: list[Inputs], *, seq_len: int) -> list[tuple[Tensor, Tensor]]:
        """Forward only: (loss, logits) of every micro-batch where the last stage is, nothing elsewhere."""
        results: list[tuple[Tensor, Tensor]] = []
        sends: list[dist.Work | None] = []
        for stage in self.stages:
            for inputs in micro_batches:
                result = stage.module(*self._receive(stage, seq_len), **inputs)
                if stage.index == self.strategy.total_stages - 1:
                    results.append((result[0], result[1]))
                else:
                    # Sends must not block: with virtual stages the ranks form a ring.
                    sends += [dist.isend(tensor.contiguous(), self._rank_of(stage.index + 1)) for tensor in result]
        for send in sends:
            if send is not None:
                send.wait()
        self._give_back()
        return results

    def _receive(self, stage: LocalStage, seq_len: int) -> list[Tensor]:
        received = self._empty(stage.entering, self.strategy.batch_per_device, seq_len)
        for buffer in received:
            dist.recv(buffer, self._rank_of(stage.index - 1))
        return received

    def _rank_of(self, stage_index: int) -> int:
        mesh = self.mesh
        stage = stage_index % mesh.num_stages
        return mesh.rank_of(stage=stage, data_index=mesh.data_index, tensor_index=mesh.tensor_index)

    def _empty(self, specs: tuple[TensorSpec, ...], rows: int, seq: int) -> list[Tensor]:
        return [
            torch.empty(
                [evaluate(dim, batch=rows, seq=seq) for dim in spec.shape],
                dtype=getattr(torch, spec.dtype),
                device=self.device,
            ).requires_grad_(spec.requires_grad and torch.is_grad_enabled())
            for spec in specs
        ]

    def _schedule(self, num_micro_batches: int, rows: int, seq: int) -> Schedule:
        """One schedule per batch shape: what it receives has a fixed size."""
        key = (num_micro_batches, rows, seq)
        if key not in self._schedules:
            if len(self._schedules) >= MAX_SCHEDULES:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = self._make_schedule(*key)
        return self._schedules[key]

    def _make_schedule(self, num_micro_batches: int, rows: int, seq: int) -> Schedule:
        strategy = self.strategy
        stages = [
            Stage(
                stage.module,
                stage.index,
                strategy.total_stages,
                sharding=sharding,
                splits_backward=splits_backward(strategy.schedule, strategy.num_stages),
                entering=tuple(self._empty(stage.entering, rows, seq)),
                leaving=tuple(self._empty(stage.leaving, rows, seq)),
                device=self.device,
                group=self.mesh.pipeline_group,
            )
            for stage, sharding in zip(self.stages, self.sharding, strict=True)
        ]
        orders = actions(strategy.schedule, strategy.num_stages, num_micro_batches, strategy.virtual_stages)
        return Schedule(stages, orders, num_micro_batches)
