"""Blocks that run again in backward instead of keeping what autograd saves, each at its own level.

`full` keeps a block's inputs (Chen et al., arXiv 1604.06174). `selective` also keeps what `capture.kept` names, so that
only cheap operators run again: as Korthikanti et al. (arXiv 2205.05198), but for all contractions and not attention
alone. Random state is put back, so that dropout draws the same numbers again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from torch import fx, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from autoparallel.capture.kept import is_kept
from autoparallel.plans.strategy import Recomputation

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around the forward of a block, and around its second run."""


def _policy(context: SelectiveCheckpointContext, operator: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS: dict[Recomputation, Callable[[], Contexts]] = {
    "selective": partial(create_selective_checkpoint_contexts, _policy),
    "full": noop_context_fn,
}


class Recomputed(nn.Module):
    """A block that runs again in backward."""

    BLOCK = "block"

    def __init__(self, block: fx.GraphModule, level: Literal["selective", "full"]) -> None:
        super().__init__()
        self.block, self.level = block, level

    def forward(self, *args: Any) -> Any:
        # The second run ends once it has made the last tensor that backward needs; `cost.segments` prices just that.
        return checkpoint(self.block, *args, use_reentrant=False, early_stop=True, context_fn=CONTEXTS[self.level])


def recomputed(block: fx.GraphModule, level: Recomputation) -> nn.Module:
    """The block as it is run at `level`."""
    return block if level == "none" else Recomputed(block, level)
