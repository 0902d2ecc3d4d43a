"""Gradients of replicas, summed in flat buckets while backward still runs (Li et al., arXiv 2006.15704).

A gradient moves into its place in a bucket when autograd has made it, and later micro-batches add to it there; a bucket
is sent when the last backward has filled it, in the same order on every rank. What is as large as a bucket is summed
where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoparallel.cost.traffic import buckets
from autoparallel.runtime.spares import Spares

if TYPE_CHECKING:
    from autoparallel.runtime.parameters import Placed


class Reduction:
    """Sums the gradients of `placed` over `group`, once a step."""

    def __init__(self, placed: Sequence[Placed], group: dist.ProcessGroup, *, dtype: torch.dtype) -> None:
        self.group = group
        sizes = [(str(dtype), p.master.numel() * dtype.itemsize) for p in placed]
        self._buckets = [_Bucket([placed[i] for i in indices], dtype) for indices in buckets(sizes)]
        self._users: Counter[nn.Parameter] = Counter()
        """Stages of this rank that compute with a leaf."""
        self._open = self._users
        """Those of them whose last backward is yet to come."""
        self._sent = 0
        for bucket in self._buckets:
            for p in bucket.placed:
                assert p.leaf is not None
                p.leaf.register_post_accumulate_grad_hook(partial(self._arrived, bucket, p))

    def add_user(self, leaves: Iterable[nn.Parameter]) -> None:
        """One more stage computes with `leaves`."""
        self._users.update(leaves)

    def begin(self) -> None:
        """Before the first micro-batch."""
        self._open = self._users.copy()
        self._sent = 0
        for bucket in self._buckets:
            bucket.begin()

    def make_final(self, leaves: Iterable[nn.Parameter]) -> None:
        """The backward that comes now is a stage's last one; `leaves` are the stage's."""
        self._open.subtract(leaves)

    def finish(self) -> None:
        """After the last micro-batch: send what is left, zeros where backward reached nothing, and wait."""
        for bucket in self._buckets[self._sent :]:
            bucket.settle()
            bucket.send(self.group)
        for bucket in self._buckets:
            bucket.wait()

    @torch.no_grad()
    def _arrived(self, bucket: _Bucket, p: Placed, leaf: Tensor) -> None:
        if leaf.grad is None and p.total is None:
            return  # this backward leaves the weight's gradient for later
        if p.room is not None and leaf.grad is not None and leaf.grad is not p.room:
            leaf.grad = p.room.copy_(leaf.grad)
        if not self._open[p.leaf]:  # type: ignore[index]
            bucket.missing.discard(p.name)
            while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
                self._buckets[self._sent].send(self.group)
                self._sent += 1


class _Bucket:
    """Parameters whose gradients are summed together."""

    def __init__(self, placed: list[Placed], dtype: torch.dtype) -> None:
        self.placed, self.dtype = placed, dtype
        self.missing: set[str] = set()
        """Parameters whose last gradient is yet to come."""
        self._spares = Spares()
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None
        self._sizes = [p.master.numel() for p in placed]
        if len(placed) > 1:
            self._buffer().zero_()  # a system gives memory when it is written first, which no step shall wait for

    def _buffer(self) -> Tensor:
        size, device = torch.Size([sum(self._sizes)]), self.placed[0].master.device
        return self._spares.take(size, dtype=self.dtype, device=device)

    def begin(self) -> None:
        self.missing = {p.name for p in self.placed}
        if len(self.placed) == 1:
            return
        self._flat = self._buffer()
        for p, part in zip(self.placed, self._flat.split(self._sizes), strict=True):
            p.room = part.view(p.master.shape)

    def settle(self) -> None:
        for p in self.placed:
            p.settle(self.dtype)

    def send(self, group: dist.ProcessGroup) -> None:
        whole = self._flat if self._flat is not None else self.placed[0].collect(self.dtype)
        self._work = dist.all_reduce(whole, group=group, async_op=True)

    def wait(self) -> None:
        """The gradients belong to the parameters from here on."""
        if self._work is not None:
            self._work.wait()
        self._work = self._flat = None
