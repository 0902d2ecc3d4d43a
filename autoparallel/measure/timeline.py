"""Each operator of a captured program, timed on a device: forward in program order, then backward in reverse, as a
training step runs them, with every activation alive in between.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from autoparallel.capture.attention import ATTENTION_TARGET, Attention
from autoparallel.capture.program import Program
from autoparallel.cost.kernels import Kernel, Size, kernels
from autoparallel.cost.practice import OURS
from autoparallel.ir.graph import Op
from autoparallel.measure.stopwatch import Stopwatch

LEAST_STEPS, MOST_STEPS = 3, 40


@dataclass(frozen=True)
class Timed:
    """Kernels that ran one after the other, and the seconds that they took together."""

    op: Op
    kernels: tuple[Kernel, ...]
    seconds: float


def timeline(program: Program, *, batch: int, seq: int, budget_s: float, watch: Stopwatch) -> list[Timed]:
    """Medians over as many steps as fit into the budget, after one that warms up; backward without what autograd
    itself takes.
    """
    end_s = time.perf_counter() + budget_s
    runner = _Runner(program, watch)
    inputs = _inputs(program, batch=batch, seq=seq, device=watch.device)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    runner.step(inputs)
    for turn in range(MOST_STEPS):
        if turn >= LEAST_STEPS and time.perf_counter() > end_s:
            break
        for key, seconds in runner.step(inputs).items():
            found[key].append(seconds)
    parts = {part.ops[0].name: part for part in kernels(list(program.graph.ops()), Size(batch, seq), OURS)}
    timed = []
    for (phase, name), samples in found.items():
        part = parts.get(name)
        if part is None:
            continue
        launched = part.forward if phase == "forward" else (*part.backward, *part.weight)
        if launched:
            overhead_s = runner.autograd_s if phase == "backward" else 0.0
            timed.append(Timed(part.ops[0], launched, max(0.0, statistics.median(samples) - overhead_s)))
    return timed


def _inputs(program: Program, *, batch: int, seq: int, device: torch.device) -> list[Tensor]:
    """One for each placeholder: one token everywhere, no padding."""
    tokens = torch.zeros(batch, seq, dtype=torch.int64, device=device)
    made = {"attention_mask": torch.ones_like(tokens), "num_items": torch.tensor(batch * seq, device=device)}
    names = [node.name for node in program.module.graph.nodes if node.op == "placeholder"]
    return [made.get(name, tokens) for name in names]


class _Runner(fx.Interpreter):
    """Runs the program with random weights, each operator on detached operands."""

    def __init__(self, program: Program, watch: Stopwatch) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.watch = watch
        self.trained = {op.name for op in program.graph.ops() if any(spec.requires_grad for spec in op.outputs)}
        self._weights: dict[str, Tensor] = {}
        self._tape: list[tuple[str, list[Tensor], Tensor]] = []
        self._seconds: dict[tuple[str, str], float] = {}
        self.autograd_s = self._autograd_s()

    def step(self, inputs: list[Tensor]) -> dict[tuple[str, str], float]:
        """Seconds by (phase, op)."""
        self._seconds, self._tape = {}, []
        with torch.enable_grad():
            self.run(*inputs)
        while self._tape:
            name, operands, result = self._tape.pop()
            grad = partial(torch.autograd.grad, result, operands, torch.ones_like(result), allow_unused=True)
            self._time("backward", name, grad)
            del operands, result, grad
        return self._seconds

    def _time(self, phase: str, name: str, call: Callable[[], Any]) -> Any:
        kept: list[Any] = []
        self._seconds[phase, name] = self.watch.once_s(lambda: kept.append(call()))
        return kept[0]

    def _autograd_s(self) -> float:
        """Of a backward pass with nothing to compute, beyond its one kernel."""
        one = torch.ones(1, device=self.watch.device, requires_grad=True)
        result = one.view(1)
        gradient = torch.ones_like(one)
        return self.watch.typical_s(
            lambda: torch.autograd.grad(result, one, gradient, retain_graph=True), budget_s=0.01
        )

    def fetch_attr(self, target: str) -> Any:
        """Random numbers where the program has no weights; one storage for one parameter."""
        if target not in self._weights:
            found = super().fetch_attr(target)
            if found.dtype.is_floating_point:
                made = torch.randn(found.shape, device=self.watch.device).mul_(0.02).to(found.dtype)
            else:
                made = torch.zeros(found.shape, dtype=found.dtype, device=self.watch.device)
            self._weights[target] = made.requires_grad_(found.requires_grad)
        return self._weights[target]

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands: list[Tensor] = []

        def detached(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            operand = value.detach().requires_grad_(value.requires_grad)
            if operand.requires_grad:
                operands.append(operand)
            return operand

        args, kwargs = fx.node.map_aggregate((args, kwargs), detached)
        run: Callable[..., Any] = n.target  # type: ignore[assignment]
        if str(n.target) == ATTENTION_TARGET:
            run = Attention(**dict(zip(("scale", "window", "softcap", "dropout"), args[4:], strict=True)))
            args = (*args[:3], None)  # nothing is padded
        result = self._time("forward", n.name, lambda: run(*args, **kwargs))
        if n.name in self.trained and operands and isinstance(result, Tensor) and result.requires_grad:
            self._tape.append((n.name, operands, result))
        return result
