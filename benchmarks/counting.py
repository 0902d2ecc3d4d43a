"""What one step of a program asks of torch on this rank, without noise: operators, collectives, allocated bytes.

Operators: every call that reaches a kernel below autograd, seen by a TorchDispatchMode; backward of CPU tensors runs in
the thread that calls it, so forward, backward, clipping and optimizer are all seen, DistributedDataParallel's own among
them. Of an operator on DTensors only its local operators count. Collectives are counted apart, by kind and bytes of the
whole tensor. Allocated: the sum of all requests to torch's allocator, freed or not, inside operators too; scratch
memory of gloo's own threads is in neither program's count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional
# Kind, and which argument (or the result) is the whole tensor.
COLLECTIVES: dict[Any, tuple[str, int | str]] = {
    _c10d.allreduce_.default: ("all_reduce", 0),
    _c10d.allgather_.default: ("all_gather", 0),
    _c10d._allgather_base_.default: ("all_gather", 0),
    _c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
    _c10d.broadcast_.default: ("broadcast", 0),
    _c10d.send.default: ("send", 0),
    _c10d.recv_.default: ("recv", 0),
    _functional.all_reduce.default: ("all_reduce", 0),
    _functional.all_reduce_.default: ("all_reduce", 0),
    _functional.all_gather_into_tensor.default: ("all_gather", "result"),
    _functional.reduce_scatter_tensor.default: ("reduce_scatter", 0),
}
_NEITHER = ("profiler::", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::barrier")


@dataclass(frozen=True)
class Counts:
    """Of one rank and one step."""

    operators: int
    collectives: int
    collective_bytes: int
    allocated_bytes: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Calls(TorchDispatchMode):
    """The operators and collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.collectives: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operators come here next
        result = func(*args, **(kwargs or {}))
        if func in COLLECTIVES:
            kind, whole = COLLECTIVES[func]
            moved = result if whole == "result" else args[whole]
            self.collectives[kind, sum(tensor.nbytes for tensor in _tensors(moved))] += 1
        elif not func._schema.name.startswith(_NEITHER):
            assert not func._schema.name.startswith(("c10d::", "_c10d_functional::")), f"{func} is not counted"
            self.operators[str(func)] += 1
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def calls_of(step: Callable[[], Any]) -> Calls:
    with Calls() as calls:
        step()
    return calls


def allocated_bytes(step: Callable[[], Any]) -> int:
    """Sum of what the step asks of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kineto = profiler.profiler
    assert kineto is not None
    events = kineto.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def counts_of(step: Callable[[], Any]) -> tuple[Counts, Calls]:
    """Two steps are run: one for the calls, one for the bytes."""
    calls = calls_of(step)
    found = Counts(
        operators=sum(calls.operators.values()),
        collectives=sum(calls.collectives.values()),
        collective_bytes=sum(size * times for (_, size), times in calls.collectives.items()),
        allocated_bytes=allocated_bytes(step),
    )
    return found, calls
