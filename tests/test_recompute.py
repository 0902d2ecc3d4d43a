"""Blocks that run again: what backward repeats and what it does not, and that random numbers are the same again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoparallel.capture.kept import is_kept
from autoparallel.capture.program import Program, capture
from autoparallel.emit import recompute
from autoparallel.emit.recompute import Recomputed
from autoparallel.emit.stage import emit_stage, state_tensors
from autoparallel.ir.ops import is_heavy
from autoparallel.plans.strategy import StagePlan, StageRecomputation
from tests.families import make_batch, make_model
from tests.ranks import run_ranks

LEVELS: list[StageRecomputation] = ["selective", "full", ("full", "selective", "none", "selective")]
DROPOUTS = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gemma2": {"attention_dropout": 0.3},
}


def gradients(family: str, program: Program, recomputation: StageRecomputation, **changes: Any) -> dict[str, Tensor]:
    """Of the whole model in one stage, in float64, with the same random state for every call."""
    model = make_model(family, **changes)
    tensors = state_tensors(model, program)
    last = program.graph.num_segments - 1
    plan = StagePlan(first_segment=0, last_segment=last, recomputation=recomputation)
    stage = emit_stage(program, plan, lambda name: tensors[name])
    torch.manual_seed(3)
    stage(**make_batch(2, 8), num_items=torch.tensor(9))[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("family", DROPOUTS)
def test_dropout_draws_the_same_numbers_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the test can tell: without the random state of forward, gradients differ."""
    changes = DROPOUTS[family]
    program = capture(make_model(family, **changes))
    expected = gradients(family, program, "none", **changes)
    for recomputation in LEVELS:
        assert worst(gradients(family, program, recomputation, **changes), expected) < 1e-12
    monkeypatch.setattr(recompute, "checkpoint", partial(recompute.checkpoint, preserve_rng_state=False))
    for recomputation in LEVELS:
        assert worst(gradients(family, program, recomputation, **changes), expected) > 1e-6


def communicating_block(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A row-parallel linear, its sum over ranks, and an activation that keeps its result."""

    collectives, group = torch.ops._c10d_functional, dist.group.WORLD.group_name  # type: ignore[union-attr]

    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return collectives.wait_tensor(collectives.all_reduce(value, "sum", group))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    return lambda value: torch.tanh(Reduce.apply(torch.tanh(value) @ weight))


class Counted(TorchDispatchMode):
    """How often each operator runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_in_backward() -> dict[str, Counter[str]]:
    """Run on every rank: by level, the operators of the backward pass."""
    runs = {}
    for level in ("selective", "full"):
        weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        result = Recomputed(communicating_block(weight), level)(torch.ones(2, 4).requires_grad_())  # type: ignore[arg-type]
        with Counted() as counted:
            result.sum().backward()
        runs[level] = counted.runs
    return runs


def test_communication_is_kept() -> None:
    runs = run_ranks(2, count_in_backward)[0]
    selective, full = runs["selective"], runs["full"]
    for kernel in ("_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"):
        assert (selective[kernel], full[kernel]) == (0, 1)
    assert full["aten.mm.default"] - selective["aten.mm.default"] == 1
    assert selective["aten.tanh.default"] == full["aten.tanh.default"] == 2


def test_heavy_kernels_are_those_that_contract_or_communicate() -> None:
    kept = ["aten.mm.default", "aten.addmm.default", "aten.bmm.default", "_c10d_functional.wait_tensor.default"]
    kept += ["_c10d_functional.all_reduce.default", "aten._scaled_dot_product_cudnn_attention.default"]
    again = ["aten.mul.Tensor", "aten.t.default", "aten.native_dropout.default", "aten._safe_softmax.default"]
    assert all(map(is_heavy, kept))
    assert not any(map(is_heavy, again))


@pytest.mark.parametrize("variant", ["flash", "efficient", "cudnn", "fused"])
def test_an_attention_kernel_that_draws_dropout_runs_again(variant: str) -> None:
    """Kept, it would not move the generator on, and the next dropout would draw its numbers."""
    suffix = "_attention_overrideable" if variant == "fused" else "_attention"
    kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{variant}{suffix}").default
    tensors = (torch.empty(0),) * 3
    assert is_kept(kernel, tensors, {})
    assert is_kept(kernel, tensors, {"dropout_p": 0.0})
    assert not is_kept(kernel, tensors, {"dropout_p": 0.1})
