"""Random numbers under tensor parallelism: ranks that hold the same tensor draw the same numbers, ranks that hold
different parts draw different ones. A group shares torch's default stream; what is drawn apart derives from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoparallel.capture.attention import ATTENTION_TARGET
from autoparallel.ir.graph import Graph

DROPOUT = "aten.dropout.default"


def draws_randomly(graph: Graph) -> bool:
    """Whether a training step draws random numbers at all."""
    probability = {DROPOUT: "p", ATTENTION_TARGET: "dropout"}
    return any(op.argument(probability[op.target], 0.0) for op in graph.ops() if op.target in probability)


@contextmanager
def drawing_apart(rank: int, device: torch.device) -> Iterator[None]:
    """Inside, each rank draws from a stream of its own, seeded from the shared one: recomputation, which restores the
    shared stream, draws the same again.
    """
    seed = int(torch.randint(1 << 62, ()))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + 0x9E3779B9 * (rank + 1)) % (1 << 62))
        yield


class Apart(nn.Module):
    """A module that draws random numbers, run on this rank's part of a tensor."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        super().__init__()
        self.module, self.rank = module, rank

    def forward(self, value: Tensor, *others: Tensor | None) -> Tensor:
        if not self.training:
            result: Tensor = self.module(value, *others)
            return result
        with drawing_apart(self.rank, value.device):
            result = self.module(value, *others)
        return result
