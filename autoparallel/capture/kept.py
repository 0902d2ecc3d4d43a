"""What selective recomputation keeps, decided for each operator that reaches a kernel: both priced and emitted.

Kept are the outputs of contractions (an attention kernel's log-sum-exp among them) and of collectives: backward
repeats no matmul, no attention and no communication. All else runs again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from autoparallel.ir.ops import is_heavy


def is_kept(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the outputs of this call stay until backward."""
    # Were the output of a kernel that draws dropout kept, the second run would skip its random numbers, and every later
    # dropout of the block would draw others than in forward.
    return is_heavy(str(operator)) and not draws(operator, args, kwargs)


def draws(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws random numbers; attention kernels do if they drop out."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" not in names or bool(given.get("dropout_p", 0.0))
