"""Gradients of replicas, summed in flat buckets while backward still runs (Li et al., arXiv 2006.15704).

A gradient moves into its place in a bucket when autograd has made it, and later micro-batches add to it there; a bucket
is sent when the last backward has filled it, in the same order on every rank. What is as large as a bucket is summed
where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoparallel.cost.traffic import buckets
from autoparallel.runtime.spares import Spares


class Reduction:
    """Sums the gradients of `leaves` over `group`, once a step."""

    def __init__(self, leaves: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.leaves, self.group = list(leaves), group
        sizes = [(str(leaf.dtype), leaf.nbytes) for leaf in self.leaves]
        self._buckets = [_Bucket([self.leaves[i] for i in indices]) for indices in buckets(sizes)]
        self._place = {
            leaf: _Place(bucket, index) for bucket in self._buckets for index, leaf in enumerate(bucket.leaves)
        }
        self._users: Counter[nn.Parameter] = Counter()
        """Stages of this rank that compute with a leaf."""
        self._open = self._users
        """Those of them whose last backward is yet to come."""
        self._sent = 0
        for leaf in self.leaves:
            leaf.register_post_accumulate_grad_hook(self._arrived)

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
        for leaf, place in self._place.items():
            if leaf not in place.bucket.filled:
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
                place.bucket.adopt(place.part)
                place.bucket.filled.add(leaf)
        self._send_filled()
        for bucket in self._buckets:
            bucket.wait()

    def _arrived(self, leaf: Tensor) -> None:
        assert isinstance(leaf, nn.Parameter)
        if leaf.grad is None:
            return  # this backward leaves the weight's gradient for later
        bucket, part = self._place[leaf]
        bucket.adopt(part)
        if not self._open[leaf]:
            bucket.filled.add(leaf)
            self._send_filled()

    def _send_filled(self) -> None:
        while self._sent < len(self._buckets) and self._buckets[self._sent].is_filled:
            self._buckets[self._sent].send(self.group)
            self._sent += 1


class _Bucket:
    """Parameters whose gradients are summed together."""

    def __init__(self, leaves: list[nn.Parameter]) -> None:
        self.leaves = leaves
        self.filled: set[nn.Parameter] = set()
        self._spares = Spares()
        self._flat: Tensor | None = None
        self._parts: list[Tensor] = []
        self._work: dist.Work | None = None

    @property
    def is_filled(self) -> bool:
        return len(self.filled) == len(self.leaves)

    def begin(self) -> None:
        self.filled.clear()
        self._parts.clear()
        if len(self.leaves) == 1:
            return
        sizes, like = [leaf.numel() for leaf in self.leaves], self.leaves[0]
        self._flat = self._spares.take(torch.Size([sum(sizes)]), dtype=like.dtype, device=like.device)
        self._parts = list(self._flat.split(sizes))

    @torch.no_grad()
    def adopt(self, index: int) -> None:
        """Move a gradient into the bucket, if it is not there yet."""
        leaf = self.leaves[index]
        if not self._parts or leaf.grad is self._parts[index]:
            return
        assert leaf.grad is not None
        part = self._parts[index] = self._parts[index].view(leaf.shape)
        part.copy_(leaf.grad)
        leaf.grad = part

    def send(self, group: dist.ProcessGroup) -> None:
        whole = self._flat if self._parts else self.leaves[0].grad
        assert whole is not None
        self._work = dist.all_reduce(whole, group=group, async_op=True)

    def wait(self) -> None:
        """The gradients belong to the leaves from here on."""
        if self._work is not None:
            self._work.wait()
        self._work = self._flat = None
        self._parts.clear()


class _Place(NamedTuple):
    bucket: _Bucket
    part: int
