"""The option to compile the emitted blocks: the same numbers, no graph break."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autoparallel.capture.program import capture
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.engine import Engine
from autoparallel.runtime.module import parallelize
from tests.families import make_batch, make_model
from tests.ranks import run_ranks
from tests.strategies import plan_for

ROWS, SEQ = 4, 8
PLANS = {
    "pipelined": Strategy(num_stages=2, batch_per_device=2, num_micro_batches=2, recomputation="selective"),
    "sharded": Strategy(data_parallel=2, batch_per_device=2, num_micro_batches=1, distribute_param=3),
    "tensor-parallel": Strategy(tensor_parallel=2, batch_per_device=2, num_micro_batches=2, sequence_parallel=True),
}


def losses(model: nn.Module, strategy: Strategy, *, torch_compile: bool) -> list[float]:
    program = capture(model)

    def start(model: nn.Module, batch: Any) -> Engine:
        plan = plan_for(program, strategy, seq_len=SEQ)
        return Engine(model, program, plan, device=torch.device("cpu"), torch_compile=torch_compile)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, found = parallelize(model, start, device=torch.device("cpu")), []
    for step in range(3):
        loss = model(**make_batch(ROWS, SEQ, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def check(strategy: Strategy) -> tuple[list[float], list[float], int, dict[str, int]]:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = make_model("llama", dtype=torch.float32, num_hidden_layers=2)
    plain = losses(copy.deepcopy(model), strategy, torch_compile=False)
    counters.clear()
    compiled = losses(model, strategy, torch_compile=True)
    return plain, compiled, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


SLOW = {"pipelined": pytest.mark.exhaustive, "sharded": pytest.mark.slow, "tensor-parallel": pytest.mark.exhaustive}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW[name]) for name in PLANS])
def test_compiled_blocks_compute_the_same(name: str) -> None:
    for plain, compiled, num_graphs, breaks in run_ranks(2, check, PLANS[name], timeout=280):
        assert compiled == pytest.approx(plain, rel=1e-5)
        assert num_graphs >= 2
        assert not breaks
