"""From the user's one line to a running engine: launch, patch, and the plan that rank 0 makes at the first step and
everyone adopts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from loguru import logger
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from autoparallel import errors
from autoparallel.capture.program import capture, model_dtype
from autoparallel.errors import AutoParallelError, ConfigError
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision, choose_precision
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import Constraints
from autoparallel.runtime.batch import Batch
from autoparallel.runtime.checks import bind
from autoparallel.runtime.engine import Engine, agree_on_program
from autoparallel.runtime.launch import ensure_launched, is_main
from autoparallel.runtime.lazy import LazyParameter
from autoparallel.runtime.loading import check_values, load_lazily
from autoparallel.runtime.module import EngineFactory, ParallelModule, _State, inner, parallelize
from autoparallel.runtime.one_process import see_one_process

Planner = Callable[..., Plan]


def compile_model(
    model: nn.Module,
    flavor: Flavor,
    *,
    dtype: str,
    plan: Plan | None,
    constraints: Constraints,
    example_inputs: dict[str, Any] | None,
    torch_compile: bool,
    planner: Planner,
) -> nn.Module:
    """Launch, and give `model` the parallel forward; with example inputs, plan now. Of a peft model, the transformer
    inside gets it, adapters included.
    """
    wrapper, model = model, inner(model)
    if isinstance(model, ParallelModule):
        raise ConfigError("this model is compiled already", remedy="compile a freshly loaded model")
    check_values(model)
    precision = _precision(model, flavor, dtype=dtype, plan=plan, constraints=constraints)
    device = _launch(flavor)
    _say_what_it_holds(model)
    start = engine_factory(
        flavor,
        precision=precision,
        plan=plan,
        constraints=constraints,
        torch_compile=torch_compile,
        planner=planner,
        device=device,
    )
    parallelize(model, start, device=device)
    if example_inputs is not None:
        state: _State = model._parallel  # type: ignore[assignment]
        batch = state.exchange.agree(
            input_ids=example_inputs["input_ids"],
            attention_mask=example_inputs.get("attention_mask"),
            labels=example_inputs.get("labels"),
            num_items=None,
        )
        state.start(model, batch)
    return wrapper


def enable(flavor: Flavor, constraints: Constraints, *, torch_compile: bool, planner: Planner) -> None:
    """Launch, and compile every HF model at the first call that trains it, wrapped by peft or not; those loaded from
    now on are lazy.
    """
    _launch(flavor)
    if getattr(PreTrainedModel.__call__, "_autoparallel", False):
        raise ConfigError(
            "enable_advanced_parallelization was called twice", remedy="call it once, before training starts"
        )

    def compiling(plain_call: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            known = isinstance(inner(self), ParallelModule) or _is_capturing() or not torch.is_grad_enabled()
            if not known and bind(self.forward, args, kwargs).get("labels") is not None:
                compile_model(
                    self,
                    flavor,
                    dtype="auto",
                    plan=None,
                    constraints=constraints,
                    example_inputs=None,
                    torch_compile=torch_compile,
                    planner=planner,
                )
            return plain_call(self, *args, **kwargs)

        call._autoparallel = True  # type: ignore[attr-defined]
        return call

    load_lazily()
    for kind in _called_models():
        kind.__call__ = compiling(kind.__call__)  # type: ignore[method-assign]


def _called_models() -> list[type[nn.Module]]:
    """What a loop calls: a transformer, or peft's wrapper, which calls the transformer's forward itself."""
    if not is_peft_available():
        return [PreTrainedModel]
    from peft import PeftModel

    return [PreTrainedModel, PeftModel]


def _launch(flavor: Flavor) -> torch.device:
    """Return in every rank, with the device that it drives."""
    ensure_launched(flavor)
    device = torch.device("cpu") if flavor.is_cpu else torch.device("cuda", torch.cuda.current_device())
    see_one_process(device)
    _share_random_state()
    return device


def _say_what_it_holds(model: nn.Module) -> None:
    held = sum(p.nbytes for p in model.parameters() if p.is_cpu and not isinstance(p, LazyParameter))
    if is_main() and dist.get_world_size() > 1 and held >= 1 << 30:
        logger.info(
            "Every rank holds the whole model until its first step, {:.2f} GiB of host memory each; with "
            "enable_advanced_parallelization() before from_pretrained, each reads only its part.",
            held / 2**30,
        )


def _share_random_state() -> None:
    """Give every rank rank 0's random state, so that a script without a seed draws the same everywhere."""
    state: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    dist.broadcast_object_list(state, src=0)
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _is_capturing() -> bool:
    """torch.export runs a twin of the model, which must stay plain."""
    return torch.compiler.is_exporting() or torch.compiler.is_compiling()


def engine_factory(
    flavor: Flavor,
    *,
    precision: Precision,
    plan: Plan | None,
    constraints: Constraints,
    torch_compile: bool,
    planner: Planner,
    device: torch.device,
) -> EngineFactory:
    """How a compiled model gets its engine when the first training batch arrives."""

    def start(model: nn.Module, batch: Batch) -> Engine:
        check_values(model)
        plain = type(model).__mro__[2]
        parallel, model.__class__ = type(model), plain  # capture sees, and copies, the user's model
        state = model.__dict__.pop("_parallel")
        try:
            copied = precision.separate_compute_copy
            program = capture(model, dtype=getattr(torch, precision.compute_dtype) if copied else None)
        finally:
            model.__class__, model.__dict__["_parallel"] = parallel, state
        agree_on_program(program)
        adopted = _agree_on_plan(
            lambda: (
                plan
                or planner(
                    program,
                    flavor,
                    batch_size=batch.rows,
                    seq_len=batch.seq_len,
                    precision=precision,
                    constraints=constraints,
                )
            )
        )
        engine = Engine(model, program, adopted, device=device, torch_compile=torch_compile)
        if is_main():
            estimate = adopted.estimate
            logger.info(
                "Predicted step time {:.3f} s, {:.0f} tokens/s, peak memory {:.2f} GiB per device.",
                estimate.step_time_s,
                estimate.tokens_per_second,
                estimate.peak_memory_bytes / 2**30,
            )
        return engine

    return start


def _agree_on_plan(make: Callable[[], Plan]) -> Plan:
    """Rank 0 plans; its plan, or its error, is everyone's."""
    message = [""]
    if is_main():
        try:
            message = [make().to_json()]
        except AutoParallelError as error:
            parts = {"what": error.what, "why": error.why, "remedy": error.remedy}
            message = [json.dumps({"error": type(error).__name__, **parts})]
    dist.broadcast_object_list(message, src=0)
    text = message[0]
    if text.startswith('{"error"'):
        failed = json.loads(text)
        raise getattr(errors, failed["error"], AutoParallelError)(
            failed["what"], why=failed["why"], remedy=failed["remedy"]
        )
    return Plan.model_validate_json(text)


def _precision(
    model: nn.Module, flavor: Flavor, *, dtype: str, plan: Plan | None, constraints: Constraints
) -> Precision:
    """Of the run; raises ConfigError for what the loaded weights or the program cannot serve."""
    found = model_dtype(model)
    precision = choose_precision(flavor, dtype=dtype, model_dtype=found, mixed_precision=constraints.mixed_precision)
    if plan is not None:
        precision = plan.precision
        if dtype not in ("auto", precision.compute_dtype):
            raise ConfigError(
                f"compile got dtype={dtype!r} and a plan that computes in {precision.compute_dtype}",
                remedy="leave dtype out, or make a plan for it",
            )
    if precision.master_dtype != found:
        raise ConfigError(
            f"the model is {found} and the program's parameters are to rest in {precision.master_dtype}",
            why="parameters stay in the dtype in which they were loaded",
            remedy=f"load the model with dtype=torch.{precision.master_dtype}",
        )
    if precision.compute_dtype == "float16":
        raise ConfigError(
            "training in float16 is not supported",
            why="small gradients vanish unless the loss is scaled before backward, and all micro-batches run backward "
            "inside forward, before a GradScaler can scale it",
            remedy='use dtype="bfloat16", which has the range of fp32',
        )
    return precision
