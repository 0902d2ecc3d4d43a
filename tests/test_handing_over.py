"""Gradients that the schedule made become `p.grad` without a copy, and still do whatever a loop may ask of autograd on
one device; batches of any size reach every rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autoparallel.capture.program import capture
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.batch import BatchExchange
from autoparallel.runtime.module import ParallelModule
from autoparallel.runtime.spares import Spares
from benchmarks.counting import calls_of
from tests.equality import parallel
from tests.families import lifted, make_batch, make_model
from tests.ranks import run_ranks

REPLICAS = Strategy(data_parallel=2, batch_per_device=1, num_micro_batches=2)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    loss: Tensor = model(**make_batch(4, 8, seed=seed), use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def accumulated(model: nn.Module) -> list[Tensor]:
    loss_of(model, 1).backward()
    (3.0 * loss_of(model, 2)).backward()
    return gradients(model)


def held_over_the_next_step(model: nn.Module) -> list[Tensor]:
    loss_of(model, 1).backward()
    held = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(model, 2).backward()
    return held + gradients(model)


def returned(model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss_of(model), list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    return list(found)


def of_one_parameter(model: nn.Module) -> list[Tensor]:
    first = next(iter(model.parameters()))
    loss_of(model).backward(inputs=[first])
    return gradients(model)


def with_hooks(model: nn.Module) -> list[Tensor]:
    first, second, *_ = model.parameters()
    seen: list[Tensor] = []
    handles = [
        first.register_hook(lambda gradient: 2 * gradient),
        second.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    loss_of(model).backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == 1
    return seen + gradients(model)


HABITS = [accumulated, held_over_the_next_step, returned, of_one_parameter, with_hooks]


def habits() -> dict[str, float]:
    """By habit, the largest difference to one device."""
    found = {}
    with lifted():
        model = make_model("llama")
        ours = parallel(copy.deepcopy(model), capture(model), REPLICAS)
        loss_of(ours).backward()
        ours.zero_grad()
        assert isinstance(ours, ParallelModule)
        loss = loss_of(ours)
        assert calls_of(loss.backward).operators.total() < 3  # the factor, which is one, and a look at it
        ours.zero_grad()
        for habit in HABITS:
            pairs = zip(habit(ours), habit(model), strict=True)
            found[habit.__name__] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


def test_gradients_serve_every_habit() -> None:
    for found in run_ranks(2, habits):
        assert max(found.values()) < 1e-12, found


def exchanged() -> list[tuple[Any, ...]]:
    """What each rank gets when every rank offers another batch, the sizes going up and down."""
    import torch.distributed as dist

    exchange, found = BatchExchange(torch.device("cpu")), []
    for turn, (rows, tokens, padded, labelled) in enumerate(
        [(2, 8, False, "same"), (4, 6, True, "own"), (1, 3, False, None), (3, 8, True, "same"), (2, 8, False, "own")]
    ):
        offered = make_batch(rows + dist.get_rank(), tokens + dist.get_rank(), seed=turn + 10 * dist.get_rank())
        ids, mask = offered["input_ids"], offered["attention_mask"]
        labels = {"same": ids, "own": offered["labels"], None: None}[labelled]
        batch = exchange.agree(
            input_ids=ids,
            attention_mask=mask if padded else None,
            labels=labels,
            num_items=0.5 if turn == 3 else None,
        )
        kept = None if batch.labels is None else batch.labels.tolist()
        found.append((batch.input_ids.tolist(), batch.attention_mask.tolist(), kept, batch.num_items.item()))
        if dist.get_rank() == 0:
            counted = 0 if labels is None else int((labels[:, 1:] != -100).sum())
            wanted = (ids, mask if padded else torch.ones_like(ids), labels)
            assert found[-1][:3] == tuple(None if tensor is None else tensor.tolist() for tensor in wanted)
            assert found[-1][3] == (0.5 if turn == 3 else counted)
    return found


def test_every_rank_gets_the_first_one_s_batch_whatever_its_size() -> None:
    first, second = run_ranks(2, exchanged)
    assert first == second


def test_memory_comes_back_when_nobody_holds_it() -> None:
    spares, shape = Spares(), torch.Size([4])
    one = spares.take(shape, dtype=torch.float32, device=torch.device("cpu"))
    address, view = one.data_ptr(), one[1:]
    del one
    two = spares.take(shape, dtype=torch.float32, device=torch.device("cpu"))
    assert two.data_ptr() != address
    del view
    three = spares.take(shape, dtype=torch.float32, device=torch.device("cpu"))
    assert three.data_ptr() == address
    assert spares.take(shape, dtype=torch.int64, device=torch.device("cpu")).dtype == torch.int64
