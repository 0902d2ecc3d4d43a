"""Wrong numbers without an error: each known way to get them, and a proof that its mend is what prevents it.

Every case runs twice on two ranks, or on four: as it is, where it must equal one device, and with the mend taken out,
where it must not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoparallel.plans.strategy import Strategy
from autoparallel.runtime import batch as batch_module
from autoparallel.runtime import parameters as parameters_module
from autoparallel.runtime import torch_schedule
from autoparallel.runtime.batch import IGNORED, Batch
from autoparallel.runtime.checks import Fingerprint
from autoparallel.runtime.engine import Engine
from autoparallel.runtime.parameters import Parameters
from autoparallel.tensor_parallel.layout import Dim, Sharding
from autoparallel.tensor_parallel.regions import Regions
from tests.equality import parallel
from tests.families import make_batch, make_model, program_of
from tests.ranks import run_ranks

PIPELINED = Strategy(num_stages=2, batch_per_device=2, num_micro_batches=2)
REPLICATED = Strategy(data_parallel=2, batch_per_device=2, num_micro_batches=1)
SHARDED = Strategy(data_parallel=2, batch_per_device=2, num_micro_batches=1, distribute_param=1)
GROUPED = Strategy(data_parallel=4, num_micro_batches=1, distribute_param=2, shard_group_size=2)
TENSOR_PARALLEL = Strategy(tensor_parallel=2, batch_per_device=2, num_micro_batches=2)
Values = list[float]


def _models(family: str, strategy: Strategy, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """(plain, parallel), equal in value."""
    model = make_model(family, dtype=torch.float32, **changes)
    return copy.deepcopy(model), parallel(model, program_of(family, **changes), strategy)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 1) -> float:
    loss = model(**make_batch(4, 8, seed=seed), use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def _losses_of_both(models: tuple[nn.Module, nn.Module], run: Callable[[nn.Module], Values]) -> tuple[Values, Values]:
    return run(models[0]), run(models[1])


def clipping(mended: bool) -> tuple[Values, Values]:
    """`clip_grad_norm_` sees this rank's gradients only, and clips by their norm."""
    from torch.nn.utils import clip_grad

    def run(model: nn.Module) -> Values:
        model(**make_batch(4, 8), use_cache=False).loss.backward()
        if not mended:
            clip_grad._get_total_norm = getattr(clip_grad._get_total_norm, "__wrapped__", clip_grad._get_total_norm)
        return [float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))]

    return _losses_of_both(_models("llama", PIPELINED), run)


def overflow(mended: bool) -> tuple[Values, Values]:
    """GradScaler skips the step on the rank that overflowed, and on no other."""
    import torch.distributed as dist
    from torch.amp import GradScaler

    def run(model: nn.Module) -> Values:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler("cpu", init_scale=4.0)
        for step in range(2):
            scaler.scale(model(**make_batch(4, 8, seed=step), use_cache=False).loss).backward()
            if not mended:
                GradScaler._unscale_grads_ = getattr(
                    GradScaler._unscale_grads_, "__wrapped__", GradScaler._unscale_grads_
                )
            if step == 0:
                last = [p for p in model.parameters() if p.grad is not None][-1]
                if last.grad.numel():
                    last.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales = [0.0] * dist.get_world_size()
        dist.all_gather_object(scales, scaler.get_scale())
        return [float(model(**make_batch(4, 8, seed=9), use_cache=False).loss), *scales]

    return _losses_of_both(_models("llama", PIPELINED), run)


def early_optimizer(mended: bool) -> tuple[Values, Values]:
    """An optimizer made before sharding steps parameters that nothing computes with any more."""
    adopt = parameters_module._adopt_shards

    def forget(stage: nn.Module, parameters: Parameters) -> None:
        adopt(stage, parameters)
        for p in parameters.placed:
            p.master.data = p.master.data.clone()

    if not mended:
        parameters_module._adopt_shards = forget
        Fingerprint.check = lambda self, model: None  # type: ignore[method-assign]  # it would notice, one step later

    def run(model: nn.Module) -> Values:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return [_step(model, optimizer, seed=1) for _ in range(3)]

    return _losses_of_both(_models("llama", SHARDED), run)


def gathered_parameters(mended: bool) -> tuple[Values, Values]:
    """What an evaluation, or a frozen parameter, has left gathered is computed with again after its shards changed."""
    if not mended:
        torch_schedule.Sharding.give_back = lambda self: None  # type: ignore[method-assign]

    def run(model: nn.Module) -> Values:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in list(model.parameters())[:6]:
            parameter.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(**make_batch(4, 8), use_cache=False).loss.backward()
        with torch.no_grad():
            model(**make_batch(4, 8), use_cache=False)
        optimizer.step()
        with torch.no_grad():
            losses = [float(model(**make_batch(4, 8), use_cache=False).loss)]
            model.load_state_dict({name: 2 * value for name, value in start.items()})
            losses.append(float(model(**make_batch(4, 8), use_cache=False).loss))
        return losses

    return _losses_of_both(_models("llama", SHARDED), run)


def broadcast_dtype(mended: bool) -> tuple[Values, Values]:
    """A broadcast whose ends disagree on the dtype delivers other numbers."""

    def as_it_lies(buffer: torch.Tensor, parts: list[torch.Tensor]) -> None:
        flat = torch.cat([part.reshape(-1) for part in parts])
        buffer.view(flat.dtype)[: flat.numel()] = flat

    if not mended:
        batch_module._fill = as_it_lies

    def run(model: nn.Module) -> Values:
        tokens = {name: value.to(torch.int32) for name, value in make_batch(4, 8).items()}
        inputs = tokens if hasattr(model, "_parallel") else make_batch(4, 8)
        return [float(model(**inputs, use_cache=False).loss)]

    return _losses_of_both(_models("llama", REPLICATED), run)


def token_count(mended: bool) -> tuple[Values, Values]:
    """The mean of micro-batch means is not the mean of the batch when rows ignore different numbers of labels."""
    whole = Batch.micro_batch

    def local_mean(self: Batch, start: int, rows: int, names: Collection[str]) -> dict[str, torch.Tensor]:
        inputs = whole(self, start, rows, {*names, "labels"})
        counted = (inputs["labels"][:, 1:] != IGNORED).sum() * (self.rows // rows)
        return {name: counted if name == "num_items" else value for name, value in inputs.items() if name in names}

    if not mended:
        Batch.micro_batch = local_mean  # type: ignore[method-assign]

    def run(model: nn.Module) -> Values:
        return [float(model(**make_batch(4, 8), use_cache=False).loss)]

    return _losses_of_both(_models("llama", PIPELINED), run)


def dropout_in_eval(mended: bool) -> tuple[Values, Values]:
    """The captured graph has dropout switched on for good."""
    if not mended:
        Engine.train_mode = lambda self, training: None  # type: ignore[method-assign]

    def run(model: nn.Module) -> Values:
        model(**make_batch(4, 8), use_cache=False).loss.backward()
        model.eval()
        with torch.no_grad():
            out = model(**make_batch(4, 8, seed=3), use_cache=False)
        return [float(out.loss), float(out.logits.abs().sum())]

    return _losses_of_both(_models("gpt2", PIPELINED, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), run)


def tied_weights(mended: bool) -> tuple[Values, Values]:
    """Embedding and head are one parameter on two stages, each with a part of its gradient."""
    if not mended:
        init = Parameters.__init__

        def without_groups(self: Parameters, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.tie_groups = {}

        Parameters.__init__ = without_groups  # type: ignore[method-assign]

    def run(model: nn.Module) -> Values:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return [_step(model, optimizer, seed=s) for s in range(3)]

    return _losses_of_both(_models("qwen2", PIPELINED), run)


def accumulation_hooks(mended: bool) -> tuple[Values, Values]:
    """A hook on a parameter's gradient fires once per micro-batch instead of once per backward."""
    if not mended:

        def masters(parameters: Parameters, shared: frozenset[str]) -> dict[str, nn.Parameter]:
            for p in parameters.placed:
                p.leaf = p.master
            return {p.name: p.master for p in parameters.placed}

        from autoparallel.runtime import engine as engine_module

        engine_module.make_leaves = masters

    def run(model: nn.Module) -> Values:
        parameter = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
        fired: list[int] = []
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(1))
        loss = model(**make_batch(4, 8), use_cache=False).loss
        before = len(fired)
        loss.backward()
        return [float(before), float(len(fired))]

    alone = Strategy(data_parallel=2, batch_per_device=1, num_micro_batches=2)
    return _losses_of_both(_models("llama", alone), run)


def _trained_losses(family: str, strategy: Strategy) -> tuple[Values, Values]:
    def run(model: nn.Module) -> Values:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return [_step(model, optimizer, seed=s) for s in range(3)]

    return _losses_of_both(_models(family, strategy), run)


def norms_on_sequence_shards(mended: bool) -> tuple[Values, Values]:
    """A norm's weight is the same on every rank, but each sees its own tokens: its gradients are addends."""
    if not mended:
        Parameters._sum_addends = lambda self, mine, totals: None  # type: ignore[method-assign]
    return _trained_losses("qwen2", TENSOR_PARALLEL.model_copy(update={"sequence_parallel": True}))


def row_parallel_bias(mended: bool) -> tuple[Values, Values]:
    """A bias that every rank adds to its part of a sum is counted once for each rank."""
    if not mended:
        Regions.deferred_bias = lambda self, op: None  # type: ignore[method-assign]
    return _trained_losses("gpt2", TENSOR_PARALLEL)


def fused_projection(mended: bool) -> tuple[Values, Values]:
    """Half of a fused query, key and value matrix is half of each of the three, not the first half of the rows."""
    if not mended:

        def contiguous(self: Sharding, dim: Dim, rank: int) -> Any:
            length = self.local_size(dim)
            return np.arange(rank * length, (rank + 1) * length)

        Sharding.global_indices = contiguous  # type: ignore[method-assign]
    return _trained_losses("gpt2", TENSOR_PARALLEL)


def equal_shards(mended: bool) -> tuple[Values, Values]:
    """Groups of replicas hold the same shards, and the norm of all gradients counts each of them."""
    if not mended:
        Parameters.counted = lambda self, placed, piece: piece  # type: ignore[method-assign]

    def run(model: nn.Module) -> Values:
        model(**make_batch(4, 8), use_cache=False).loss.backward()
        return [float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))]

    return _losses_of_both(_models("llama", GROUPED), run)


CASES = [
    clipping,
    overflow,
    early_optimizer,
    gathered_parameters,
    broadcast_dtype,
    token_count,
    dropout_in_eval,
    tied_weights,
    accumulation_hooks,
    norms_on_sequence_shards,
    row_parallel_bias,
    fused_projection,
    equal_shards,
]


def num_ranks(case: Callable[[bool], tuple[Values, Values]]) -> int:
    return GROUPED.num_devices if case is equal_shards else 2


QUICK = (gathered_parameters, tied_weights, norms_on_sequence_shards)


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_equals_one_device(case: Callable[[bool], tuple[Values, Values]]) -> None:
    for plain, found in run_ranks(num_ranks(case), case, True, first=partial(program_of, "llama")):
        assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_would_fail_without_its_mend(case: Callable[[bool], tuple[Values, Values]]) -> None:
    if case is broadcast_dtype:  # the garbage is not even in the vocabulary
        with pytest.raises(AssertionError, match="IndexError: index out of range"):
            run_ranks(2, case, False, first=partial(program_of, "llama"))
        return
    results = run_ranks(num_ranks(case), case, False, first=partial(program_of, "llama"))
    assert any(found != pytest.approx(plain, rel=1e-5) for plain, found in results)
