"""Parameters in two roles. *Masters* are the user's own Parameter objects: their identity never changes, so an
optimizer made before or after the plan steps them; a rank holds only its piece of each (all, a shard, or nothing).
*Leaves* are what the stage computes with. They share the masters' storage, so an optimizer step needs no copy; where
the program computes in another dtype they are copies, made once a step, and gradients are summed beside them in fp32.

torch's fully_shard makes new parameters, which would leave an early optimizer stepping stale ones; here it may do so
with the leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from autoparallel.cost.traffic import buckets
from autoparallel.emit.recompute import Recomputed
from autoparallel.ir.precision import Precision
from autoparallel.runtime.deferred import Held, put, take
from autoparallel.runtime.mesh import Mesh
from autoparallel.runtime.reduction import Reduction
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
    hidden: bool = False
    """While an optimizer steps: whether the gradient of what this rank does not hold is taken away."""
    total: Tensor | None = None
    """This rank's gradient, in the dtype of sums; while a step runs, only where that is not the leaf's own dtype."""
    room: Tensor | None = None
    """Where the gradient belongs while a step runs, in the dtype of sums: its part of a bucket."""

    @property
    def is_copied(self) -> bool:
        """Whether the leaf has a storage of its own."""
        return self.leaf is not None and self.leaf.dtype != self.master.dtype

    @cached_property
    def nothing(self) -> Tensor:
        """The gradient on a rank that holds nothing of the parameter."""
        return self.master.new_empty(self.master.shape)

    def add(self, leaf: Tensor) -> None:
        """Move what one micro-batch left in the leaf to the sum; nothing, where its gradient is made later."""
        grad, leaf.grad = leaf.grad, None
        if grad is None:
            return
        if self.total is not None:
            self.total.add_(grad)
        else:
            self.total = grad.to(torch.float32) if self.room is None else self.room.copy_(grad)

    def collect(self, dtype: torch.dtype) -> Tensor:
        """The step's gradient, taken from the leaf; zeros where the leaf got none."""
        assert self.leaf is not None
        if self.total is None:
            grad, self.leaf.grad = self.leaf.grad, None
            piece = torch.zeros_like(self.master) if grad is None else local(grad)
            self.total = piece.to(dtype)
        return self.total

    def settle(self, dtype: torch.dtype) -> Tensor:
        """`collect`, in its room where there is one."""
        total = self.collect(dtype)
        if self.room is not None and total is not self.room:
            total = self.total = self.room.copy_(total)
        return total

    def gradient(self) -> Tensor:
        """This rank's piece of the gradient, as the optimizer takes it."""
        total, self.total, self.room = self.total, None, None
        return self.nothing if total is None else total.to(self.master.dtype)


@dataclass(eq=False)
class Parameters:
    """All parameters of the model, in its own order."""

    mesh: Mesh
    sharded: bool
    precision: Precision
    placed: list[Placed]
    tie_groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    reduction: Reduction | None = None
    """Over replicas that hold whole gradients."""

    def trained(self) -> Iterator[Placed]:
        """Those that one device would give a gradient; the same list on every rank."""
        return (p for p in self.placed if p.master.requires_grad and p.stages)

    @property
    def spread(self) -> bool:
        """Whether ranks hold different pieces; replicas do not."""
        return self.mesh.num_stages > 1 or self.mesh.tensor_parallel > 1 or self.ways > 1

    @property
    def ways(self) -> int:
        """Replicas that a parameter is cut over: the first so many hold all of it, the next ones the same again."""
        return self.mesh.shard_ways if self.sharded else 1

    def first_holder(self, placed: Placed) -> int:
        """The first rank that holds any of a parameter."""
        return self.mesh.rank_of(stage=min(placed.stages, default=0), data_index=0, tensor_index=0)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Forget the gradients of a step that nobody took, and read the masters."""
        for p in self.placed:
            p.total = p.room = None
            if p.leaf is not None:
                p.leaf.grad = None
        if self.reduction is not None:
            self.reduction.begin()
        self.refresh_copies()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """What the optimizer, or the user, wrote into the masters, into the copies that are computed with."""
        copies = [(p.leaf, p.master) for p in self.placed if p.is_copied and p.leaf is not None]
        if copies:
            leaves, masters = zip(*copies, strict=True)
            torch._foreach_copy_(leaves, masters)

    def reduce_gradients(self) -> None:
        """Sum the step's gradients over replicas, then over the stages that share a tied parameter."""
        dtype = getattr(torch, self.precision.gradient_dtype)
        if self.reduction is not None:
            self.reduction.finish()
        totals = {p.name: p.collect(dtype) for p in self.trained() if p.leaf is not None}
        mine = [p for p in self.placed if p.name in totals]
        if self.mesh.tensor_parallel > 1:
            self._sum_addends(mine, totals)
        for stages, group in self.tie_groups.items():
            _all_reduce_coalesced([totals[p.name] for p in mine if p.stages == stages], group)

    def _sum_addends(self, mine: list[Placed], totals: dict[str, Tensor]) -> None:
        """Gradients of which every rank of the tensor-parallel group has an addend, in one bucket: those of parameters
        that only sharded work reads, and the unsharded segments of fused projections.
        """
        parts = {p.name: part for p in mine if (part := self._held_by_all(p)) is not None}
        addends = [totals[p.name] for p in mine if p.shared]
        whole = [totals[name].index_select(*part) for name, part in parts.items()]
        _all_reduce_coalesced([*addends, *whole], self.mesh.tensor_group)
        for (name, part), summed in zip(parts.items(), whole, strict=True):
            totals[name].index_copy_(*part, summed)

    def counted(self, placed: Placed, piece: Tensor) -> Tensor | None:
        """What of this rank's piece adds to global sums: each element of the model on one rank only, so that replicas
        and later copies of tied parameters do not count.
        """
        first_copy = bool(placed.stages) and self.mesh.stage == placed.stages[0]
        if placed.split is None or not first_copy or self.mesh.data_index >= self.ways:
            return None
        if self.mesh.tensor_index == 0:
            return piece
        if not placed.split.is_sharded:
            return None
        part = self._held_by_all(placed)
        if part is None:
            return piece
        dim, indices = part
        others = torch.ones(piece.shape[dim], dtype=torch.bool, device=piece.device).index_fill_(0, indices, False)
        return piece.index_select(dim, others.nonzero().squeeze(1))

    def _held_by_all(self, placed: Placed) -> tuple[int, Tensor] | None:
        """The dim, and the indices of this rank's piece along it, that the whole tensor-parallel group holds though
        others are sharded; None where there are none.
        """
        split, leaf = placed.split, placed.leaf
        found = split.held_by_all(self.mesh.tensor_index) if split is not None else None
        if found is None:
            return None
        dim, held = found
        if dim == 0 and isinstance(leaf, DTensor):
            start = self.mesh.data_index % self.ways * -(-leaf.shape[0] // self.ways)
            held = held[(held >= start) & (held < start + len(placed.master))] - start
        return dim, torch.from_numpy(held).to(placed.master.device)

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
        return take(whole, self.held(placed))

    def holds(self, placed: Placed) -> bool:
        """Whether this rank's stage has a part of the parameter; every rank has what the loss does not depend on."""
        return not placed.stages or self.mesh.stage in placed.stages

    def held(self, placed: Placed, *, data_index: int | None = None, tensor_index: int | None = None) -> Held:
        """By dim, the indices of the parameter that a rank of an owning stage holds; this rank's own by default."""
        tensor_index = self.mesh.tensor_index if tensor_index is None else tensor_index
        data_index = self.mesh.data_index if data_index is None else data_index
        whole: list[NDArray[np.int64] | None] = [None] * len(placed.shape)
        indices = whole if placed.split is None else placed.split.indices(tensor_index)
        if self.sharded and placed.stages:
            rows = np.arange(placed.shape[0]) if indices[0] is None else indices[0]
            length = -(-len(rows) // self.ways)  # as fully_shard chunks: evenly, the last ones shorter
            start = data_index % self.ways * length
            indices[0] = rows[start : start + length]
        return tuple(indices)

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
            put(whole, received, tuple(split.indices(rank)))
        return whole

    def load(self, placed: Placed, value: Tensor) -> None:
        """Copy a whole parameter's value into this rank's piece."""
        with torch.no_grad():
            placed.master.copy_(self.piece(placed, value))


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
    """This rank's piece itself: to_local() makes a view of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def make_leaves(parameters: Parameters, shared: frozenset[str]) -> dict[str, nn.Parameter]:
    """Leaves of this rank's stage by name.

    `shared` are those of which each tensor-parallel rank gets an addend of the gradient.
    """
    leaves = {}
    for p in parameters.placed:
        p.shared = p.name in shared
        if parameters.mesh.stage in p.stages:
            p.leaf = leaves[p.name] = _leaf(p, parameters)
    if parameters.mesh.data_parallel > 1 and not parameters.sharded:
        mine = [p for p in parameters.trained() if p.leaf is not None]
        # Backward makes gradients about last to first.
        dtype = getattr(torch, parameters.precision.gradient_dtype)
        parameters.reduction = Reduction(mine[::-1], parameters.mesh.data_group, dtype=dtype)
    return leaves


def _leaf(p: Placed, parameters: Parameters) -> nn.Parameter:
    """fully_shard casts and sums by itself, and cuts; this rank holds no more than its shard, so what is cut is on
    meta.
    """
    value, precision = p.master.data, parameters.precision
    if parameters.sharded:
        assert p.split is not None
        shape = p.split.local_shape(parameters.mesh.tensor_index)
        return nn.Parameter(torch.empty(shape, dtype=value.dtype, device="meta"), p.master.requires_grad)
    if precision.separate_compute_copy:
        value = value.to(getattr(torch, precision.compute_dtype))
    leaf = nn.Parameter(value, requires_grad=p.master.requires_grad)
    if value.dtype.itemsize < 4 and leaf.requires_grad:
        leaf.register_post_accumulate_grad_hook(p.add)
    return leaf


def shard(
    stage: nn.Module, parameters: Parameters, *, distribute_param: int, backward: Container[str], keeps_last: bool
) -> None:
    """fully_shard every block and then the stage (FSDP2, arXiv 2304.11277), and point the masters at this rank's
    shards; over a mesh of two axes the first one's ranks hold the same.

    Segments that share a parameter stay with the stage's own group, since a parameter belongs to one group only.
    `backward` names the segments that gradients pass through. With `keeps_last` the last segment's group stays gathered
    until its backward.
    """
    mesh, precision = parameters.mesh.sharding_mesh, parameters.precision
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.compute_dtype),
        reduce_dtype=getattr(torch, precision.gradient_dtype),
        cast_forward_inputs=False,
    )
    give_back = distribute_param == 3
    children = [(name, child) for name, child in stage.named_children() if any(True for _ in child.parameters())]
    holders = Counter(id(leaf) for _, child in children for leaf in child.parameters())
    alone = {name: child for name, child in children if all(holders[id(leaf)] == 1 for leaf in child.parameters())}
    last = alone.get(children[-1][0], stage)
    for part in (*alone.values(), stage):
        stays = keeps_last and part is last
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=give_back and not stays)
    assert isinstance(stage, FSDPModule)
    _prefetch_in_order(stage, [block for name, block in alone.items() if name in backward])  # type: ignore[misc]
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
    """Give the sharded leaves their values, and the masters the leaves' memory (which may be padded)."""
    by_name = {_plain_name(name): leaf for name, leaf in stage.named_parameters()}
    mine = [p for p in parameters.placed if p.leaf is not None and p.name in by_name]
    pieces = {id(by_name[p.name]): p.master.data for p in mine}

    def filled(tensor: Tensor) -> Tensor:
        piece = pieces.pop(id(tensor), None)
        return tensor if piece is None else like(piece, tensor)  # type: ignore[arg-type]

    stage._apply(filled)  # fully_shard takes over what it finds after it
    for p in mine:
        leaf = by_name[p.name]
        assert isinstance(leaf, DTensor)
        p.leaf = leaf
        p.master.data = leaf.to_local().detach()


def _plain_name(name: str) -> str:
    """A leaf's name inside the stage without the segment (and its recomputation wrapper) that holds it."""
    parts = name.split(".")
    while parts[0].startswith("segment_") or parts[0] == Recomputed.BLOCK:
        parts = parts[1:]
    return ".".join(parts)


def _all_reduce_coalesced(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum in flat buckets, what is large where it is."""
    for indices in buckets([(str(tensor.dtype), tensor.nbytes) for tensor in tensors]):
        bucket = [tensors[i] for i in indices]
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for target, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            target.copy_(summed.view_as(target))
