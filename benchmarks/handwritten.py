"""What an expert writes by hand for a given plan of a Llama: plain eager, DistributedDataParallel, fully_shard,
torch.distributed.pipelining with stages cut where the plan cuts, parallelize_module with the splits of the plan.

Each follows the contract of a compiled model: rank 0's batch is everyone's (one broadcast), the loss that a step
returns is that of the whole batch on every rank (one sum of a scalar where ranks have different ones), gradients are
clipped by the norm of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from autoparallel.plans.strategy import Strategy

MAX_NORM = 1.0
LEARNING_RATE = 1e-4
Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]
"""Forward, backward, clip, AdamW, zero_grad; the loss of the whole batch."""


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)


def user_loop(model: nn.Module) -> Step:
    """The loop of one device: plain eager, and what a compiled model is trained by."""
    optimizer = optimizer_of(model)

    def step(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def shared_batch(batch: Batch) -> Batch:
    """Rank 0's, in one broadcast."""
    payload = torch.stack(list(batch.values()))
    dist.broadcast(payload, src=0)
    return dict(zip(batch, payload, strict=True))


def num_targets(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def own_rows(batch: Batch) -> Batch:
    return {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in batch.items()}


def summed(loss: Tensor) -> Tensor:
    total = loss.detach()
    dist.all_reduce(total)
    return total


def ddp(model: nn.Module, strategy: Strategy) -> Step:
    """Gradients are views of the buckets and buffers stay where they are: nothing is copied that need not be."""
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    optimizer, world_size = optimizer_of(model), dist.get_world_size()

    def step(batch: Batch) -> Tensor:
        batch = shared_batch(batch)
        # The replicas' gradients are averaged, so each loss is a share of the whole batch's times their number.
        share = num_targets(batch) / world_size
        loss = replica(**own_rows(batch), use_cache=False, num_items_in_batch=share).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return summed(loss) / world_size

    return step


def fsdp(model: Any, strategy: Strategy) -> Step:
    """As torchtitan shards a Llama: embedding, each block, head; the last group stays gathered between its forward and
    its backward. Tied weights can be in one group only, the root's.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tied = model.config.tie_word_embeddings
    if not tied:
        fully_shard(model.model.embed_tokens, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    if not tied:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = optimizer_of(model)

    def step(batch: Batch) -> Tensor:
        batch = shared_batch(batch)
        loss = model(**own_rows(batch), use_cache=False, num_items_in_batch=num_targets(batch)).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return summed(loss)

    return step


class CutLlama(nn.Module):
    """Blocks `first .. end` of a Llama, with the embedding before the first one and norm and head behind the last."""

    def __init__(self, model: Any, first: int, end: int) -> None:
        super().__init__()
        whole = model.model
        self.embed_tokens = whole.embed_tokens if first == 0 else None
        self.layers = nn.ModuleList(whole.layers[first:end])
        self.rotary_emb = whole.rotary_emb
        is_last = end == len(whole.layers)
        self.norm, self.lm_head = (whole.norm, model.lm_head) if is_last else (None, None)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            hidden = self.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        if self.norm is not None and self.lm_head is not None:
            return self.lm_head(self.norm(hidden))
        return hidden


def blocks_of_stages(strategy: Strategy, num_blocks: int) -> list[tuple[int, int]]:
    """Segment 0 of a plan is the embedding, segment i + 1 is block i."""
    return [(max(stage.first_segment - 1, 0), min(stage.last_segment, num_blocks)) for stage in strategy.stages or ()]


def pipeline(model: Any, strategy: Strategy) -> Step:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    config = model.config
    first_block, end = blocks_of_stages(strategy, config.num_hidden_layers)[rank]
    module = CutLlama(model, first_block, end)
    optimizer = optimizer_of(module)
    tied = model.get_input_embeddings().weight if config.tie_word_embeddings else None
    targets = 1

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        return F.cross_entropy(logits.flatten(0, 1).float(), shifted, reduction="sum") / targets

    stage = PipelineStage(module, rank, last + 1, torch.device("cpu"))
    schedule = Schedule1F1B(stage, strategy.num_micro_batches, loss_fn=loss_of, scale_grads=False)

    def step(batch: Batch) -> Tensor:
        nonlocal targets
        batch = shared_batch(batch)
        targets = num_targets(batch)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(batch["input_ids"], return_outputs=False)
        else:
            schedule.step(target=batch["labels"], losses=losses, return_outputs=False)
        if tied is not None:
            dist.all_reduce(tied.grad)
        clip_over_stages(module, counts=lambda p: p is not tied or rank == 0)
        optimizer.step()
        optimizer.zero_grad()
        return summed(torch.stack(losses).sum() if losses else torch.zeros(()))

    return step


def clip_over_stages(module: nn.Module, *, counts: Callable[[nn.Parameter], bool]) -> None:
    """By the norm over all stages, a tied weight once."""
    mine = [p.grad for p in module.parameters() if p.grad is not None and counts(p)]
    squared = get_total_norm(mine) ** 2
    dist.all_reduce(squared)
    clip_grads_with_norm_(module.parameters(), MAX_NORM, squared.sqrt())


def tensor_parallel(model: Any, strategy: Strategy) -> Step:
    """Megatron-LM's splits as far as the plan has them; embedding, head and loss by vocabulary."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert strategy.splits is not None
    heads = any("self_attn" in split for split in strategy.splits[1])
    block: dict[str, Any] = {
        "mlp": shared_input(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    if heads:
        block |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        block |= {"self_attn.o_proj": RowwiseParallel(), "self_attn": shared_input("hidden_states")}
    tied = model.config.tie_word_embeddings
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        parallelize_module(layer, mesh, block)
    optimizer = optimizer_of(model)

    def step(batch: Batch) -> Tensor:
        batch = shared_batch(batch)
        with loss_parallel():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted, reduction="sum") / num_targets(batch)
            loss.backward()
        clip_two_kinds(model)
        optimizer.step()
        optimizer.zero_grad()
        return whole(loss.detach())

    return step


def shared_input(name: str | None = None) -> PrepareModuleInput:
    """Several projections read one input: the gradients that they give it are summed before they are reduced."""
    whole = Replicate()
    if name is None:
        return PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
    return PrepareModuleInput(input_kwarg_layouts={name: whole}, desired_input_kwarg_layouts={name: whole})


def clip_two_kinds(model: nn.Module) -> None:
    """Sharded and replicated parameters: torch's function takes tensors of one kind only."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norms = [whole(get_total_norm(sharded)), get_total_norm([g for g in gradients if not isinstance(g, DTensor)])]
    total = torch.stack(norms).norm()
    for kind in (DTensor, Tensor):
        chosen = [p for p in model.parameters() if isinstance(p, DTensor) == (kind is DTensor)]
        clip_grads_with_norm_(chosen, MAX_NORM, total)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def eager(model: nn.Module, strategy: Strategy) -> Step:
    return user_loop(model)


PROGRAMS: dict[str, Callable[[Any, Strategy], Step]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "pipeline": pipeline,
    "tensor": tensor_parallel,
    "eager": eager,
}
