"""What a loop may do after the first step, on pieces of a model: either as on one device, or one clear message."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from autoparallel.capture.program import capture
from autoparallel.errors import ContractError
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.one_process import _mend_peft
from tests.equality import parallel
from tests.families import make_batch, make_model, program_of
from tests.ranks import run_ranks

PIPELINED = Strategy(num_stages=2, batch_per_device=2, num_micro_batches=2)
SHARDED = Strategy(data_parallel=2, batch_per_device=2, num_micro_batches=1, distribute_param=1)
TENSOR_PARALLEL = Strategy(tensor_parallel=2, sequence_parallel=True, batch_per_device=2, num_micro_batches=2)
GROUPED = Strategy(
    tensor_parallel=2, data_parallel=4, mesh_order=("dp", "tp", "pp"), distribute_param=2, shard_group_size=2
)
PLANS = [
    pytest.param(PIPELINED, id="pipelined"),
    pytest.param(SHARDED, id="sharded"),
    pytest.param(TENSOR_PARALLEL, id="tensor-parallel", marks=pytest.mark.slow),
    pytest.param(GROUPED, id="grouped", marks=pytest.mark.slow),
]


def _forward(model: nn.Module) -> Any:
    return model(**make_batch(4, 8), use_cache=False)


def unfreeze(model: nn.Module) -> None:
    next(iter(model.parameters())).requires_grad_(False)
    _forward(model)


def replace_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 96, bias=False)
    _forward(model)


def rebind(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    _forward(model)


def hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *a: None)
    _forward(model)


def part_in_eval(model: Any) -> None:
    model.model.layers[0].eval()
    _forward(model)


def state_of_a_part(model: Any) -> None:
    model.model.state_dict()


def deep_copy(model: nn.Module) -> None:
    copy.deepcopy(model)


def other_device(model: nn.Module) -> None:
    model.to(torch.float64)


def other_inputs(model: nn.Module) -> None:
    model(inputs_embeds=torch.zeros(4, 8, 32), **make_batch(4, 8))


def autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _forward(model)


def second_backward(model: nn.Module) -> None:
    loss = _forward(model).loss
    loss.backward(retain_graph=True)
    loss.backward()


def training_logits(model: nn.Module) -> None:
    _forward(model).logits.sum()


def no_labels(model: nn.Module) -> None:
    model(input_ids=make_batch(4, 8)["input_ids"])


def wrapped_again(model: nn.Module) -> None:
    torch.nn.parallel.DistributedDataParallel(model)


def lbfgs(model: nn.Module) -> None:
    torch.optim.LBFGS(model.parameters()).step(lambda: _forward(model).loss)


REFUSED = [
    unfreeze, replace_head, rebind, hook, part_in_eval, state_of_a_part, deep_copy, other_device, other_inputs,
    autocast, second_backward, training_logits, no_labels, wrapped_again, lbfgs,
]  # fmt: skip


def refusals(strategy: Strategy) -> list[str]:
    """What each habit got, in a fresh model that has made a step."""
    found = []
    model = make_model("llama", dtype=torch.float32, attention_dropout=0.1)
    program = program_of("llama", attention_dropout=0.1)
    for habit in REFUSED:
        compiled = parallel(copy.deepcopy(model), program, strategy)
        _forward(compiled).loss.backward()
        try:
            habit(compiled)
            found.append(f"{habit.__name__}: nothing")
        except ContractError as error:
            found.append(f"{habit.__name__}: {'refused' if error.what else 'empty'}")
    return found


@pytest.mark.parametrize("strategy", [pytest.param(PIPELINED, marks=pytest.mark.exhaustive), *PLANS[1:]])
def test_what_the_program_cannot_follow_is_refused(strategy: Strategy) -> None:
    for found in run_ranks(
        strategy.num_devices, refusals, strategy, first=partial(program_of, "llama", attention_dropout=0.1)
    ):
        assert found == [f"{habit.__name__}: refused" for habit in REFUSED]


def resumed(strategy: Strategy) -> tuple[list[float], list[float]]:
    """Losses of two more steps after saving and loading model and optimizer, on one device and in parallel."""

    def loop(model: nn.Module, again: Callable[[], nn.Module]) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(2):
            model(**make_batch(4, 8, seed=step), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        fresh = again()
        fresh.load_state_dict(weights)
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
        optimizer.load_state_dict(moments)
        losses = []
        for step in range(3):
            loss = fresh(**make_batch(4, 8, seed=step), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    def make() -> nn.Module:
        return make_model("qwen2", dtype=torch.float32)

    program = program_of("qwen2")
    plain = loop(make(), make)
    return plain, loop(parallel(make(), program, strategy), lambda: parallel(make(), program, strategy))


@pytest.mark.parametrize("strategy", PLANS)
def test_a_run_resumes_with_its_optimizer(strategy: Strategy) -> None:
    for plain, found in run_ranks(strategy.num_devices, resumed, strategy, first=partial(program_of, "qwen2")):
        assert found == pytest.approx(plain, rel=1e-5)


def habits(strategy: Strategy) -> tuple[list[float], list[float]]:
    """Numbers that a user takes from a model between steps, on one device and in parallel."""

    def numbers(model: Any) -> list[float]:
        batch = make_batch(4, 8)
        (model(**batch, use_cache=False).loss / 2).backward()
        (model(**make_batch(3, 6, seed=5), use_cache=False)[0] / 2).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found = [float(torch.nn.utils.get_total_norm(grads)), float(model.num_parameters())]
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"))))
        found.append(float(torch.nn.utils.clip_grad_norm_(list(model.parameters())[:3], 0.05)))
        with torch.no_grad():
            found.append(float(model(batch["input_ids"], batch["attention_mask"], None).logits.abs().sum()))
            found.append(float(model(batch["input_ids"], logits_to_keep=1, use_cache=False).logits.numel()))
            found.append(
                float(
                    model.eval()
                    .generate(batch["input_ids"][:2], max_new_tokens=4, do_sample=False, use_cache=False)
                    .sum()
                )
            )
        found.append(float(model.num_parameters(exclude_embeddings=True)))
        found.append(float(len(inspect.signature(model.forward).parameters)))
        wrapper = nn.ModuleDict({"inner": model})
        state = {name: 2 * value for name, value in wrapper.state_dict().items()}
        wrapper.load_state_dict(state)
        found += [float(sum(v.numel() for v in state.values())), float(model(**batch).loss)]
        return found

    model = make_model("llama", dtype=torch.float32)
    return numbers(copy.deepcopy(model)), numbers(parallel(model, program_of("llama"), strategy))


@pytest.mark.parametrize("strategy", PLANS)
def test_numbers_between_steps_are_those_of_the_whole_model(strategy: Strategy) -> None:
    for plain, found in run_ranks(strategy.num_devices, habits, strategy, first=partial(program_of, "llama")):
        assert found == pytest.approx(plain, rel=1e-5)


def shapes(strategy: Strategy) -> tuple[list[float], list[float], list[list[tuple[int, ...]]]]:
    """Losses and norms over batches of many shapes, and the micro-batches that this rank's stage saw in each step."""

    def loop(model: Any) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for rows, seq in SHAPES:
            seen.append([])
            if rows < 0:
                with torch.no_grad():
                    found.append(float(model(**make_batch(-rows, seq), use_cache=False).loss))
                continue
            loss = model(**make_batch(rows, seq), use_cache=False).loss
            loss.backward()
            found += [float(loss), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))]
            optimizer.step()
            optimizer.zero_grad()
        return found

    seen: list[list[tuple[int, ...]]] = []
    model = make_model("llama", dtype=torch.float32)
    plain = loop(copy.deepcopy(model))
    compiled: Any = parallel(model, program_of("llama"), strategy)
    compiled(**make_batch(4, 8), use_cache=False).loss.backward()
    compiled.zero_grad()
    seen.clear()

    def note(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        tokens = kwargs.get("input_ids", kwargs.get("labels"))  # a stage gets what it reads
        seen[-1].append(tuple(tokens.shape))

    for stage in compiled._parallel.engine.stages:
        stage.module.register_forward_pre_hook(note, with_kwargs=True)
    return plain, loop(compiled), seen


SHAPES = [(8, 8), (8, 12), (5, 8), (1, 6), (-6, 10), (4, 8), (-1, 4), (7, 9)]
"""Rows and tokens; negative rows are an evaluation."""


def test_every_shape_of_batch_is_pipelined() -> None:
    """A row that fills up the last micro-batch is ignored; none goes as one batch."""
    for plain, found, seen in run_ranks(2, shapes, PIPELINED, first=partial(program_of, "llama")):
        assert found == pytest.approx(plain, rel=1e-5)
        assert seen == [[(2, seq)] * -(-abs(rows) // 2) for rows, seq in SHAPES]


def adapters() -> list[str]:
    """What is refused once an adapter's program is placed."""
    _mend_peft()
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    base = make_model("llama", dtype=torch.float32)
    model: Any = get_peft_model(base, lora)
    program = capture(base)
    parallel(base, program, PIPELINED)
    _forward(model).loss.backward()
    found = []

    def disabled() -> None:
        with model.disable_adapter():
            _forward(model)

    def scaled() -> None:
        for layer in (m for m in model.modules() if hasattr(m, "merged_adapters")):
            layer.scaling["default"] *= 2
        _forward(model)

    for change in (disabled, model.merge_and_unload, model.merge_adapter, model.unload, scaled):
        try:
            change()
            found.append("nothing")
        except ContractError as error:
            found.append(error.what)
    return found


def test_adapters_that_change_are_refused() -> None:
    late = "an adapter was switched, scaled or merged after the program was placed"
    merging = [f"{name}() after the first training step" for name in ("merge_and_unload", "merge_adapter", "unload")]
    for found in run_ranks(2, adapters):
        assert found == [late, *merging, late]
