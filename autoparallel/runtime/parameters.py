"""Parameters in two roles. *Masters* are the user's own Parameter objects: their identity never changes, so an
optimizer made before or after the plan steps them; a rank holds only its piece of each (all, a shard, or nothing).
*Leaves* are what the stage computes with; they share the masters' storage, so an optimizer step needs no copy.

torch's fully_shard makes new parameters, which would leave an early optimizer stepping stale ones; here it may do so
with the leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from autoparallel.cost.traffic import buckets
from autoparallel.emit.recompute import Recomputed
from autoparallel.emit.stage import taken
from autoparallel.ir.graph import Parameter
from autoparallel.runtime.mesh import Mesh
from autoparallel.tensor_parallel.layout import ParameterSplit


@dataclass
class Placed:
    """One parameter of the model on this rank."""

    name: str
    master: nn.Parameter
    shape: torch.Size
    """Of the whole parameter."""
    stages: tuple[int, ...]
    """Pipeline ranks that use it; empty when the loss does not depend on it."""
    split: ParameterSplit | None = None
    """How it is divided over the tensor-parallel group; None where the loss does not depend on it."""
    leaf: nn.Parameter | None = None
    """What this rank's stage computes with; None where the stage does not use it."""
    shared: bool = False
    """Whole on every rank of the tensor-parallel group, while each has an addend of its gradient."""

    def gradient(self) -> Tensor:
        """This rank's piece of the gradient, taken from the leaf; zeros where the leaf got none, empty where there is
        no leaf.
        """
        if self.leaf is None:
            return self.master.new_zeros(self.master.shape)
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            return torch.zeros_like(self.master)
        return local(grad)


@dataclass(eq=False)
class Parameters:
    """All parameters of the model, in its own order."""

    mesh: Mesh
    sharded: bool
    placed: list[Placed]
    tie_groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    def trained(self) -> Iterator[Placed]:
        """Those that one device would give a gradient; the same list on every rank."""
        return (p for p in self.placed if p.master.requires_grad and p.stages)

    def reduce_gradients(self) -> None:
        """Sum the leaves' gradients over replicas, then over the stages that share a tied parameter."""
        mine = [p for p in self.trained() if p.leaf is not None]
        for p in mine:
            assert p.leaf is not None
            if p.leaf.grad is None:
                p.leaf.grad = torch.zeros_like(p.leaf)
        if not self.sharded and self.mesh.data_parallel > 1:
            _all_reduce_coalesced([p.leaf.grad for p in mine], self.mesh.data_group)  # type: ignore[union-attr,misc]
        if self.mesh.tensor_parallel > 1:
            self._sum_addends(mine)
        for stages, group in self.tie_groups.items():
            tied = [local(p.leaf.grad) for p in mine if p.stages == stages]  # type: ignore[union-attr,arg-type]
            _all_reduce_coalesced(tied, group)

    def _sum_addends(self, mine: list[Placed]) -> None:
        """Gradients of which every rank of the tensor-parallel group has an addend, in one bucket: those of parameters
        that only sharded work reads, and the unsharded segments of fused projections.
        """
        addends = [local(p.leaf.grad) for p in mine if p.shared]  # type: ignore[union-attr,arg-type]
        masks = {p.name: mask for p in mine if (mask := self._held_by_all(p)) is not None}
        parts = [local(p.leaf.grad)[masks[p.name]] for p in mine if p.name in masks]  # type: ignore[union-attr,arg-type]
        _all_reduce_coalesced(addends + parts, self.mesh.tensor_group)
        for p, part in zip((p for p in mine if p.name in masks), parts, strict=True):
            local(p.leaf.grad)[masks[p.name]] = part  # type: ignore[union-attr,arg-type]

    def counted(self, placed: Placed, piece: Tensor) -> Tensor | None:
        """What of this rank's piece adds to global sums: each element of the model on one rank only, so that replicas
        and later copies of tied parameters do not count.
        """
        first_copy = bool(placed.stages) and self.mesh.stage == placed.stages[0]
        if placed.split is None or not first_copy or not (self.sharded or self.mesh.data_index == 0):
            return None
        if self.mesh.tensor_index == 0:
            return piece
        mask = self._held_by_all(placed)
        return (piece if mask is None else piece[~mask]) if placed.split.is_sharded else None

    def _held_by_all(self, placed: Placed) -> Tensor | None:
        """Mask of the elements of this rank's piece that the whole tensor-parallel group holds, though others are
        sharded; None where there are none.
        """
        rank, split = self.mesh.tensor_index, placed.split
        if split is None or not split.is_mixed:
            return None
        mask = torch.zeros(split.local_shape(rank), dtype=torch.bool, device=placed.master.device)
        for dim, indices in enumerate(split.held_by_all(rank)):
            if indices is not None:
                mask.index_fill_(dim, torch.from_numpy(indices).to(mask.device), True)
        return distribute(mask, placed.leaf) if isinstance(placed.leaf, DTensor) else mask

    def full(self, placed: Placed) -> Tensor:
        """The whole parameter on every rank (collective)."""
        return self._gathered(placed, placed.master.detach()) if placed.stages else placed.master.detach()

    def full_gradient(self, placed: Placed) -> Tensor | None:
        """The whole gradient on every rank (collective); None where one device has none either."""
        grad = placed.master.grad
        return None if grad is None else self._gathered(placed, grad)

    def whole(self, placed: Placed, piece: Tensor) -> Tensor:
        """The whole of any tensor that is laid out as the parameter, optimizer moments among them (collective)."""
        return self._gathered(placed, piece) if placed.stages else piece

    def piece(self, placed: Placed, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor laid out as the whole parameter."""
        if placed.leaf is None:
            return whole.new_empty(placed.master.shape) if placed.stages else whole
        part = taken(whole, placed.split, self.mesh.tensor_index)
        return distribute(part, placed.leaf) if isinstance(placed.leaf, DTensor) else part

    def _gathered(self, placed: Placed, piece: Tensor) -> Tensor:
        """The whole of what this rank holds `piece` of: gathered over the first owning stage, then sent to everyone."""
        part = piece
        if self.mesh.stage == placed.stages[0] and isinstance(placed.leaf, DTensor):
            part = like(piece, placed.leaf).full_tensor()
        split = placed.split
        assert split is not None
        whole = torch.empty(placed.shape, dtype=piece.dtype, device=piece.device)
        for rank in range(self.mesh.tensor_parallel if split.is_sharded else 1):
            owner = self.mesh.rank_of(stage=placed.stages[0], data_index=0, tensor_index=rank)
            received = part.contiguous() if dist.get_rank() == owner else part.new_empty(split.local_shape(rank))
            dist.broadcast(received, src=owner)
            put(whole, received, split, rank)
        return whole

    def load(self, placed: Placed, value: Tensor) -> None:
        """Copy a whole parameter's value into this rank's piece."""
        with torch.no_grad():
            placed.master.copy_(self.piece(placed, value))


def put(whole: Tensor, part: Tensor, split: ParameterSplit, rank: int) -> None:
    """Write what a rank holds into the whole parameter; at most one dim is divided."""
    divided = [(dim, indices) for dim, indices in enumerate(split.indices(rank)) if indices is not None]
    if not divided:
        whole.copy_(part)
    for dim, indices in divided:
        whole.index_copy_(dim, torch.from_numpy(indices).to(whole.device), part)


def distribute(value: Tensor, like: DTensor) -> Tensor:
    """This rank's piece of `value`, cut as `like` is: fully_shard chunks dim 0 evenly, the last ones shorter."""
    chunks = value.chunk(like.device_mesh.size(), dim=0)
    index = like.device_mesh.get_local_rank()
    return chunks[index] if index < len(chunks) else value[:0]


def like(piece: Tensor, template: DTensor) -> DTensor:
    """`piece` as the local tensor of a DTensor laid out as `template`."""
    return DTensor.from_local(
        piece,
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(
    model: nn.Module,
    table: tuple[Parameter, ...],
    stage_of_segment: list[int],
    splits: dict[str, ParameterSplit],
    mesh: Mesh,
    *,
    sharded: bool,
) -> Parameters:
    """Decide what this rank keeps of each parameter. Rank 0's values are everyone's, as under DDP, since an unseeded
    init differs.
    """
    by_name = {p.name: p for p in table}
    placed = []
    for name, master in model.named_parameters():
        dist.broadcast(master.data, src=0)
        stages = tuple(sorted({stage_of_segment[s] for s in by_name[name].segments}))
        placed.append(Placed(name, master, master.shape, stages, splits.get(name)))
    for _, buffer in model.named_buffers():
        dist.broadcast(buffer, src=0)
    ties = [p.stages for p in placed if len(p.stages) > 1]
    return Parameters(mesh, sharded, placed, mesh.stage_groups(ties))


def make_leaves(parameters: Parameters, shared: frozenset[str]) -> dict[str, nn.Parameter]:
    """Leaves of this rank's stage by name, sharing the masters' storage; the masters of other stages give up theirs.

    `shared` are those of which each tensor-parallel rank gets an addend of the gradient.
    """
    leaves = {}
    for p in parameters.placed:
        p.shared = p.name in shared
        if parameters.mesh.stage in p.stages:
            if p.split is not None and p.split.is_sharded:
                p.master.data = taken(p.master.data, p.split, parameters.mesh.tensor_index).contiguous()
                p.master.grad = None
            p.leaf = leaves[p.name] = nn.Parameter(p.master.data, requires_grad=p.master.requires_grad)
        elif p.stages:
            p.master.data = p.master.data.new_empty((0, *p.shape[1:]))
            p.master.grad = None
    return leaves


def shard(stage: nn.Module, parameters: Parameters, *, distribute_param: int, backward: Container[str]) -> None:
    """fully_shard every block and then the stage (FSDP2, arXiv 2304.11277), and point the masters at this rank's
    shards.

    Segments that share a parameter stay with the stage's own group, since a parameter belongs to one group only.
    `backward` names the segments that gradients pass through.
    """
    mesh = parameters.mesh.device_mesh["dp_shard"]
    give_back = distribute_param == 3
    children = [(name, child) for name, child in stage.named_children() if any(True for _ in child.parameters())]
    holders = Counter(id(leaf) for _, child in children for leaf in child.parameters())
    blocks = []
    for name, child in children:
        if all(holders[id(leaf)] == 1 for leaf in child.parameters()):
            block = fully_shard(child, mesh=mesh, reshard_after_forward=give_back)
            blocks += [block] if name in backward else []
    whole = fully_shard(stage, mesh=mesh, reshard_after_forward=give_back)
    _prefetch_in_order(whole, blocks)
    # Gradients are sums over the whole batch already, so nothing may be averaged. gloo has no averaging reduction at
    # all.
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _adopt_shards(stage, parameters)


def _prefetch_in_order(stage: FSDPModule, blocks: list[FSDPModule]) -> None:
    """Backward gathers the block before the one it is in, and nothing ahead of the first. Left alone, torch goes on
    with what ran before: the last block of another micro-batch, gathered for nothing and held through the step.
    """
    for index, block in enumerate(blocks):
        block.set_modules_to_backward_prefetch([blocks[max(index - 1, 0)]])
    if blocks:
        stage.set_modules_to_backward_prefetch([blocks[-1]])


def _adopt_shards(stage: nn.Module, parameters: Parameters) -> None:
    by_name = {_plain_name(name): leaf for name, leaf in stage.named_parameters()}
    for p in parameters.placed:
        if p.leaf is not None and p.name in by_name:
            leaf = by_name[p.name]
            assert isinstance(leaf, DTensor)
            p.leaf = leaf
            p.master.data = leaf.to_local().detach()
            p.master.grad = None


def _plain_name(name: str) -> str:
    """A leaf's name inside the stage without the segment (and its recomputation wrapper) that holds it."""
    parts = name.split(".")
    while parts[0].startswith("segment_") or parts[0] == Recomputed.BLOCK:
        parts = parts[1:]
    return ".".join(parts)


def _all_reduce_coalesced(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum in flat buckets."""
    for indices in buckets([(str(tensor.dtype), tensor.nbytes) for tensor in tensors]):
        bucket = [tensors[i] for i in indices]
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for target, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            target.copy_(summed.view_as(target))
