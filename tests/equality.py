"""The proof that training under a plan is training on one device: loss, every gradient, parameters after several
optimizer steps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autoparallel.capture.program import Program
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.engine import Engine
from autoparallel.runtime.module import ParallelModule, parallelize
from tests.families import lifted, make_batch, make_model, program_of
from tests.ranks import run_ranks
from tests.strategies import plan_for

SEQ = 8


@dataclass
class Reference:
    """What one device does: per step the loss and the gradient norm, the gradients of the first step, the final
    parameters.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None


def train(model: nn.Module, rows: int, *, steps: int, clip: float) -> Reference:
    """The user's loop, unchanged: forward, backward, clip, AdamW."""
    found = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        batch = make_batch(rows, SEQ, seed=step + 1)
        outputs = model(**batch, use_cache=False)
        loss = outputs[0]
        loss.backward()
        if step == 0:
            found.gradients = _gradients(model)
        found.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        model.zero_grad(set_to_none=True)
        found.losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        outputs = model(**make_batch(rows, SEQ, seed=99), use_cache=False)
    found.losses.append(outputs.loss.item())
    found.logits = outputs.logits
    found.parameters = {name: value.clone() for name, value in model.state_dict().items()}
    return found


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, ParallelModule):
        gathered = {name: model.gradient(name) for name, _ in model.named_parameters()}
    else:
        gathered = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.clone() for name, grad in gathered.items() if grad is not None}


def parallel(model: nn.Module, program: Program, strategy: Strategy) -> nn.Module:
    """The model under a given strategy, planned by nobody."""

    def start(model: nn.Module, batch: Any) -> Engine:
        return Engine(model, program, plan_for(program, strategy, seq_len=SEQ), device=torch.device("cpu"))

    return parallelize(model, start, device=torch.device("cpu"))


def worst_difference(reference: Reference, found: Reference) -> float:
    """The largest absolute difference of anything, shapes and names included."""
    assert reference.gradients.keys() == found.gradients.keys()
    assert reference.parameters.keys() == found.parameters.keys()
    worst = 0.0
    for ours, theirs in ((found.losses, reference.losses), (found.norms, reference.norms)):
        worst = max([worst, *(abs(a - b) for a, b in zip(ours, theirs, strict=True))])
    for name, value in reference.gradients.items():
        worst = max(worst, _distance(value, found.gradients[name]))
    for name, value in reference.parameters.items():
        worst = max(worst, _distance(value, found.parameters[name]))
    assert reference.logits is not None
    assert found.logits is not None
    return max(worst, _distance(reference.logits, found.logits))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).abs().max()) if a.numel() else 0.0


def lifted_program(family: str, **changes: Any) -> Program:
    with lifted():
        return program_of(family, dtype=torch.float64, **changes)


def check_strategies(
    family: str,
    strategies: list[Strategy],
    num_blocks: int = 4,
    changes: dict[str, Any] | None = None,
    *,
    num_devices: int,
    timeout: float = 280.0,
    steps: int = 3,
    clip: float = 0.5,
) -> list[list[tuple[str, float]]]:
    """Of every rank: each strategy's name and its worst difference to one device; `changes` are to the config."""
    changes = {"num_hidden_layers": num_blocks, **(changes or {})}
    first = functools.partial(lifted_program, family, **changes)
    return run_ranks(num_devices, _differences, family, changes, strategies, steps, clip, timeout=timeout, first=first)


def _differences(
    family: str, changes: dict[str, Any], strategies: list[Strategy], steps: int, clip: float
) -> list[tuple[str, float]]:
    results = []
    with lifted():
        plain, program = make_model(family, **changes), lifted_program(family, **changes)
        references: dict[int, Reference] = {}
        for strategy in strategies:
            rows = strategy.batch_size
            if rows not in references:
                references[rows] = _on_rank_0(
                    lambda rows=rows: train(copy.deepcopy(plain), rows, steps=steps, clip=clip)
                )
            found = train(parallel(copy.deepcopy(plain), program, strategy), rows, steps=steps, clip=clip)
            results.append((strategy.summary(), worst_difference(references[rows], found)))
    return results


def _on_rank_0(compute: Callable[[], Reference]) -> Reference:
    """One device's work, done once and told to all ranks."""
    told = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]
