"""torch's pipeline stages and schedule runtime under our rules: our action lists, our moments for reducing gradients
and giving parameters back, buffers and sent tensors that live no longer than they are needed.

All contact with the private parts of torch.distributed.pipelining and of fully_shard is in this file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from autoparallel.emit.deferred import DeferredContraction
from autoparallel.runtime.reduction import Reduction
from autoparallel.runtime.spares import Spares
from autoparallel.schedule.actions import Order

MAX_SENDS = 2
"""Sends of a stage that may be on their way; the next one waits for the oldest."""
Inputs = dict[str, Tensor]


class Sharding:
    """When a stage's gradients are reduced over replicas, and its parameters given back."""

    def __init__(
        self,
        stage: nn.Module,
        distribute_param: int,
        *,
        splits_backward: bool = False,
        reduction: Reduction | None = None,
    ) -> None:
        self.stage, self.level, self.reduction = stage, distribute_param, reduction
        self.splits_backward = splits_backward
        self.leaves = list(stage.parameters())
        if reduction is not None:
            reduction.add_user(self.leaves)

    def before_backward(self, *, last: bool) -> None:
        """Level 1 reduces gradients after the last micro-batch, 2 and 3 after each; only 3 gives parameters back in
        between. Groups that hold the same shards sum theirs after the last, or with each half of a split backward.
        """
        self._set(is_last=last, reduces=last or self.level >= 2, gives_back=last or self.level == 3)
        if last and self.reduction is not None:
            self.reduction.make_final(self.leaves)

    def before_input_gradient(self) -> None:
        """The first half of a backward reduces nothing: the weights' gradients are yet to come."""
        self._set(is_last=False, reduces=False, gives_back=self.level == 3)

    def make_weight_gradients(self, *, last: bool) -> None:
        """The second half, block by block: gradients of the oldest micro-batch's contractions, reduced by the rule of
        `before_backward`.
        """
        self.before_backward(last=last)
        sharded = isinstance(self.stage, FSDPModule)
        # A block's parts come after it among modules(), so that the reversed order ends with the block.
        for part in reversed(list(self.stage.modules())):
            if isinstance(part, DeferredContraction):
                part.make_weight_gradient()
            elif sharded and isinstance(part, FSDPModule):
                for group in part._get_fsdp_state()._fsdp_param_groups:
                    group.post_backward()
        if sharded and (last or self.level >= 2):
            self.stage._get_fsdp_state()._root_post_backward_final_callback()  # type: ignore[operator]

    def give_back(self) -> None:
        """At the end of a step nothing stays gathered. torch gives back what has run backward only, and would compute
        with old values where frozen parameters, or an evaluation, are followed by a change to the shards.
        """
        for part in self.stage.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def forget_weight_gradients(self) -> None:
        """Drop what a step that failed half way has left."""
        for part in self.stage.modules():
            if isinstance(part, DeferredContraction):
                part.pending.clear()

    def _set(self, *, is_last: bool, reduces: bool, gives_back: bool) -> None:
        if isinstance(self.stage, FSDPModule):
            self.stage.set_is_last_backward(is_last)
            self.stage.set_requires_gradient_sync(reduces)
            # torch keeps what waits for its sum as one flat tensor, and each half of a split backward fills another.
            self.stage.set_requires_all_reduce(is_last or self.splits_backward)
            self.stage.set_reshard_after_backward(gives_back)


class Stage(PipelineStage):
    """torch's stage for one batch shape. Shapes are given, none is inferred at run time; the last stage returns its
    loss alone, so that logits die with the micro-batch.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        *,
        sharding: Sharding,
        splits_backward: bool,
        entering: tuple[Tensor, ...],
        leaving: tuple[Tensor, ...],
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        self.sharding = sharding
        self._sending: deque[list[dist.Work]] = deque()
        self._spares = Spares()
        super().__init__(
            # torch has rules of its own for an FSDP module that it can see; inside another module it sees none.
            _LossOnly(module) if index == num_stages - 1 else _Inside(module),
            index,
            num_stages,
            device,
            input_args=entering,
            output_args=leaving,
            group=group,
            dw_builder=_nothing_more if splits_backward else None,
        )

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if self.dw_builder is None:
            self.sharding.before_backward(last=last_backward)
        else:
            self.sharding.before_input_gradient()
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.sharding.make_weight_gradients(last=last_backward)

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.sharding.forget_weight_gradients()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        _drop_buffers(self.args_recv_info)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        _drop_buffers(self.grad_recv_info)

    def _get_recv_ops(self, recv_infos: tuple[Any, ...]) -> list[dist.P2POp]:
        for info in recv_infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = self._spares.take(meta.shape, dtype=meta.dtype, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        _drop_buffers({fwd_chunk_id: self.args_recv_info[fwd_chunk_id]})
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)
        _drop_buffers({bwd_chunk_id: self.grad_recv_info[bwd_chunk_id]})
        return received

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Send at once and leave nothing to torch, which would keep all that a step sends until its end."""
        self.finish_sends(but=MAX_SENDS - 1)
        self._sending.append([dist.isend(op.tensor, op.peer, group=op.group) for op in ops])  # type: ignore[misc]
        return []

    def finish_sends(self, *, but: int = 0) -> None:
        """Wait until at most `but` sends are on their way."""
        while len(self._sending) > but:
            for work in self._sending.popleft():
                work.wait()


def _drop_buffers(recv_infos: dict[int, Any]) -> None:
    """torch keeps a buffer for every micro-batch; here each lives from its receive to its use."""
    for infos in recv_infos.values():
        for info in infos:
            info.buffer = None


def _nothing_more() -> Any:
    """What torch is to run for a micro-batch's weight gradients; `Sharding` makes them."""
    return lambda: None


class _Inside(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.stage(*args, **inputs)


class _LossOnly(_Inside):
    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        loss: Tensor = self.stage(*args, **inputs)[0]
        return loss


class Schedule(_PipelineScheduleRuntime):
    """This rank's part of one step for one batch shape. Losses are summed, so nothing is scaled."""

    def __init__(self, stages: list[Stage], orders: Sequence[Order], num_micro_batches: int) -> None:
        self._own_stages = stages
        super().__init__(stages, num_micro_batches, loss_fn=_loss_is_output, scale_grads=False)
        self._prepare_schedule_with_comms(
            {rank: [_Action.from_str(repr(action)) for action in order] for rank, order in enumerate(orders)}
        )

    def _warmup_p2p(self, stages: list[Stage], has_backward: bool, p2p_done: bool) -> None:  # type: ignore[override]
        """torch's vote on whether to infer shapes opens the connections between stages; shapes are given, so its
        outcome is known and not read.
        """
        passed: Tensor | None = None
        for stage in stages:
            passed = stage._warmup_forward_vote(has_backward, received_acc=passed)
        for stage in reversed(stages):
            passed = stage._warmup_backward_result(received_result=passed)
            stage._inference_mode = InferenceMode.STATIC

    def run(self, micro_batches: list[Inputs]) -> list[Tensor]:
        """Forward and backward of all micro-batches; their losses where the last stage is, nothing elsewhere."""
        losses: list[Tensor] = []
        for stage in self._own_stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        self._step_microbatches(
            [()] * len(micro_batches),
            list(micro_batches),
            [None] * len(micro_batches),
            losses,
            return_outputs=False,
        )
        for stage in self._own_stages:
            stage.finish_sends()
        return losses


def _loss_is_output(output: Tensor, target: None) -> Tensor:
    return output
