"""The whole flow on one screen: capture, price, search, select, plan; and the two ways into a training script.

model + batch shape → Program → Graph → Workload → candidates → Plan → Engine
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

import autoparallel
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.practice import OURS, Attention, Practice
from autoparallel.cost.tables import CostTable, load_table
from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import Graph
from autoparallel.ir.precision import Precision, choose_precision
from autoparallel.plans import cache
from autoparallel.plans.estimate import Estimate
from autoparallel.plans.plan import ModelSummary, Plan
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.settings import read_settings

if TYPE_CHECKING:
    from torch import fx, nn

    from autoparallel.capture.program import Program

FlavorLike = str | os.PathLike[str] | Flavor


def plan(
    model: Any,
    flavor: FlavorLike,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "auto",
    constraints: Constraints | None = None,
    workers: int | None = None,
    budget_s: float | None = None,
) -> Plan:
    """Find the cheapest way to train `model` on `flavor`, without a GPU and without weights.

    `model` is an HF causal LM (real or on meta), its config, or the path of either; `batch_size` rows of `seq_len`
    tokens are one step of the whole cluster. After `budget_s` seconds the search ends with the best so far, and
    `Plan.gap` says what is proved of it; without such a budget, a question that was asked before is answered from the
    cache. Raises NoFeasiblePlanError when nothing fits, ConfigError when the question cannot be asked.
    """
    return plan_asked(
        Asked(model),
        flavor,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        constraints=constraints,
        workers=workers,
        budget_s=budget_s,
    )


class Asked:
    """A model that several questions are asked of: it is captured when a plan has to be made, once in each dtype."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._programs: dict[str, Program] = {}

    @cached_property
    def dtype(self) -> str:
        return _model_dtype(self.model)

    def program(self, precision: Precision) -> Program:
        """Its graph is what counts: its module need not hold every block."""
        name = precision.compute_dtype
        if name not in self._programs:
            self._programs[name] = _capture(self.model, precision)
        return self._programs[name]


def plan_asked(
    asked: Asked,
    flavor: FlavorLike,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "auto",
    constraints: Constraints | None = None,
    workers: int | None = None,
    budget_s: float | None = None,
) -> Plan:
    """As `plan`. The answer to a question that was asked before comes from the cache, and nothing is captured."""
    resolved, constraints = resolve_flavor(flavor), constraints or Constraints()
    question: dict[str, Any] = {
        "flavor": resolved, "batch_size": batch_size, "seq_len": seq_len, "constraints": constraints,
    }  # fmt: skip
    table = load_table(resolved.device)
    kept = budget_s is None and not read_settings().dump
    key = cache.key_of(asked.model, table=table, dtype=dtype, **question) if kept else None
    found = cache.read(key, **question) if key is not None else None
    if found is not None:
        return found.asked_for(asked.model)
    precision = choose_precision(
        resolved, dtype=dtype, model_dtype=asked.dtype, mixed_precision=constraints.mixed_precision
    )
    made = plan_program(asked.program(precision), **question, precision=precision, workers=workers, budget_s=budget_s)
    if key is not None:
        cache.write(key, made)
    return made


def plan_program(
    program: Program,
    flavor: Flavor,
    *,
    batch_size: int,
    seq_len: int,
    precision: Precision,
    constraints: Constraints,
    workers: int | None = None,
    budget_s: float | None = None,
) -> Plan:
    """Plan for a captured program: price its segments, search, select."""
    made, workload = plan_graph(
        program.graph,
        flavor,
        batch_size=batch_size,
        seq_len=seq_len,
        precision=precision,
        constraints=constraints,
        workers=workers,
        budget_s=budget_s,
    )
    _dump("10_capture.txt", lambda: program.module.print_readable(print_output=False))
    _dump("20_annotate.txt", lambda: "\n".join(str(op) for op in program.graph.ops()))
    _dump("30_price.json", lambda: workload.model_dump_json(indent=1))
    _dump("40_plan.json", made.to_json)
    return made


def plan_graph(
    graph: Graph,
    flavor: Flavor,
    *,
    batch_size: int,
    seq_len: int,
    precision: Precision,
    constraints: Constraints,
    workers: int | None = None,
    budget_s: float | None = None,
) -> tuple[Plan, Workload]:
    """The same for its graph alone, with the prices that the plan was made of."""
    from loguru import logger

    from autoparallel.search.select import search, select_best_graph_from_candidates

    table = load_table(flavor.device)
    logger.info("Got cost table {} from cost_models.", table.name)
    workload = _workload(
        graph,
        flavor,
        table,
        batch_size=batch_size,
        seq_len=seq_len,
        precision=precision,
        constraints=constraints,
    )
    found = search(workload, constraints, workers=workers, budget_s=budget_s)
    chosen = select_best_graph_from_candidates(found.candidates, workload=workload, constraints=constraints)
    assert chosen.estimate is not None
    made = Plan(
        autoparallel_version=autoparallel.__version__,
        torch_version=importlib.metadata.version("torch").split("+")[0],
        model=_summary(graph),
        flavor=flavor,
        constraints=constraints,
        batch_size=batch_size,
        seq_len=seq_len,
        precision=precision,
        strategy=chosen.strategy,
        estimate=chosen.estimate,
        bound_s=found.bound_s,
        num_candidates=found.num_candidates,
        candidates=tuple(found.candidates),
        pruned=tuple(found.pruned),
        notes=_notes(graph, workload, chosen.strategy),
        assumptions=tuple(
            f"{path} = {figure.value:g} {figure.unit} ({figure.source})" for path, figure in table.assumed()
        ),
    )
    return made.asked_for(graph), workload


def estimate(
    model: Any,
    flavor: FlavorLike,
    strategy: Strategy,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "auto",
    memory_ratio: float = 1.0,
    attention: Attention = "flash",
    fused: bool = False,
    merged_norms: bool = False,
    merged_loss: bool = False,
    overlap: bool = True,
    gathers_ahead: bool = True,
    gathers_each_parameter: bool = False,
    shards_most: bool = False,
    keeps_gathered: bool = True,
    blocking_sends: bool = False,
    scatters_sends: bool = False,
    tensor_overlap: bool = False,
    accumulates_in_matmul: bool = False,
    dispatch_s: float | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    optimizer_workspace_bytes: int | None = None,
    gradient_dtype: str | None = None,
    master_dtype: str | None = None,
    table: CostTable | None = None,
) -> Estimate:
    """Price one named strategy. Without `stages`, the blocks are cut where that is cheapest; memory is reported, never
    a reason to refuse. `model` may be a captured `Graph` too, whose dtype is then the compute dtype.

    The other options price other people's programs: matmuls in `dtype="float8"` or `"float4"` beside bfloat16, other
    kernels of `attention`, `fused` element-wise ones or `merged_...` ones alone, collectives of data (`overlap`,
    `gathers_...`) and tensor parallelism (`tensor_overlap`) beside compute, stages that wait for their sends
    (`blocking_sends`) or whose tensor-parallel ranks send a part each (`scatters_sends`), tensor parallelism that
    divides all it can (`shards_most`) or gathers twice (not `keeps_gathered`), matmuls that sum the gradients they make
    (`accumulates_in_matmul`), bytes that the optimizer needs for an element while it steps, dtypes of gradients and
    masters, host time to launch a kernel (`dispatch_s`). `table` stands in for the device's cost table.
    """
    from autoparallel.search.price import cut_and_price

    resolved = resolve_flavor(flavor)
    if strategy.num_devices != resolved.num_devices or strategy.batch_size != batch_size:
        raise ConfigError(
            f"the strategy is for {strategy.num_devices} devices and {strategy.batch_size} rows",
            why=f"asked: {resolved.num_devices} devices ({resolved.name}) and {batch_size} rows",
            remedy="devices = num_stages × tensor_parallel × context_parallel × data_parallel; "
            "rows = data_parallel × batch_per_device × num_micro_batches",
        )
    table = table or load_table(resolved.device)
    matmul_dtype = dtype if dtype in ("float8", "float4") else None
    if matmul_dtype is not None and matmul_dtype not in table.peak_flops_per_s:
        raise ConfigError(
            f"{table.name} does not multiply in {matmul_dtype}",
            why="its cost table has no peak for it, only for " + ", ".join(table.peak_flops_per_s),
            remedy='price it with dtype="bfloat16" or "float16"',
        )
    if optimizer not in ("adamw", "sgd"):
        raise ConfigError(
            f"no price for the optimizer {optimizer!r}", why="states are counted by it", remedy='use "adamw" or "sgd"'
        )
    of_compute = "bfloat16" if matmul_dtype else dtype
    if isinstance(model, Graph):
        graph, precision = model, Precision.of(_graph_dtype(model), "float32")
    else:
        precision = choose_precision(resolved, dtype=of_compute, model_dtype=_model_dtype(model))
        graph = _capture(model, precision).graph
    try:
        precision = precision.varied(optimizer=optimizer, gradient_dtype=gradient_dtype, master_dtype=master_dtype)
        practice = Practice(
            attention=attention,
            fused=fused,
            merged_norms=merged_norms,
            merged_loss=merged_loss,
            matmul_dtype=matmul_dtype,
            overlap=overlap,
            gathers_ahead=gathers_ahead,
            gathers_each_parameter=gathers_each_parameter,
            shards_most=shards_most,
            keeps_gathered=keeps_gathered,
            blocking_sends=blocking_sends,
            scatters_sends=scatters_sends,
            tensor_overlap=tensor_overlap,
            accumulates_in_matmul=accumulates_in_matmul,
            optimizer_workspace_bytes=optimizer_workspace_bytes,
            dispatch_s=dispatch_s,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(
            f"{first['loc'][0]}={first['input']!r} is no option of an estimate",
            why=str(first["msg"]),
            remedy="the options of autoparallel.estimate name the values",
        ) from error
    workload = _workload(
        graph,
        resolved,
        table,
        batch_size=batch_size,
        seq_len=seq_len,
        precision=precision,
        constraints=Constraints(memory_ratio=memory_ratio),
        practice=practice,
        only=strategy,
    )
    return cut_and_price(workload, strategy)


@lru_cache(maxsize=256)
def _graph_dtype(graph: Graph) -> str:
    """Of most parameters."""
    counts = Counter[str]()
    for parameter in graph.parameters:
        counts[parameter.dtype] += parameter.numel
    return counts.most_common(1)[0][0]


def program(model: Any, plan: Plan, *, rank: int = 0, virtual_stage: int = 0) -> fx.GraphModule:
    """The fx program that `rank` would run under `plan`, on fake tensors: no weights, no processes. `print_readable()`
    shows it. Under an interleaved schedule a rank has one for each of its virtual stages.
    """
    import torch

    from autoparallel.capture.program import capture
    from autoparallel.emit.deferred import defer_weight_gradients
    from autoparallel.emit.stage import Member, emit_stage, local_tensors
    from autoparallel.schedule.actions import splits_backward
    from autoparallel.tensor_parallel.splits import SplitGraph

    captured = capture(model, dtype=getattr(torch, plan.precision.compute_dtype))
    plan.check_matches(fingerprint=captured.graph.fingerprint)
    if not 0 <= rank < plan.strategy.num_devices:
        raise ConfigError(f"rank {rank} does not exist", why=f"the plan is for {plan.strategy.num_devices} devices")
    if not 0 <= virtual_stage < plan.strategy.virtual_stages:
        raise ConfigError(
            f"virtual stage {virtual_stage} does not exist", why=f"a rank has {plan.strategy.virtual_stages}"
        )
    place = plan.strategy.place_of(rank)
    stages = plan.strategy.stages_of(place.stage)
    member = Member(SplitGraph.of_strategy(captured.graph, plan.strategy), place.tensor_index)
    tensors = local_tensors(captured, member)
    module = emit_stage(captured, stages[virtual_stage], lambda name: tensors[name], member=member)
    if splits_backward(plan.strategy.schedule, plan.strategy.num_stages):
        defer_weight_gradients(module)
    return module


def compile(
    model: nn.Module,
    flavor: FlavorLike = "local",
    *,
    dtype: str = "auto",
    plan: Plan | str | os.PathLike[str] | None = None,
    constraints: Constraints | None = None,
    example_inputs: dict[str, Any] | None = None,
    torch_compile: bool = False,
) -> nn.Module:
    """Make `model` train in parallel on `flavor`, in an unchanged single-device loop. Returns the same object.

    In a plain `python train.py` this call starts one process per device and never returns in the first one; under
    torchrun it joins. Without `example_inputs` (a batch: input_ids, labels, ...) the plan is made at the first
    training forward. `plan` replays a saved one. `torch_compile` compiles every block of the emitted stages with
    torch.compile, which the plan's prices do not take into account.
    """
    from autoparallel.runtime import start

    given = Plan.load(os.fspath(plan)) if isinstance(plan, (str, os.PathLike)) else plan
    other_flavor = given is not None and flavor != "local" and resolve_flavor(flavor) != given.flavor
    if given is not None and (constraints is not None or other_flavor):
        raise ConfigError(
            f"compile got a plan for {given.flavor.name} and a flavor or constraints beside it",
            why="a plan fixes both",
            remedy="leave flavor and constraints out, or leave the plan out",
        )
    resolved = given.flavor if given is not None else resolve_flavor(_or_setting(flavor))
    return start.compile_model(
        model,
        resolved,
        dtype=dtype,
        plan=given,
        constraints=constraints or Constraints(),
        example_inputs=example_inputs,
        torch_compile=torch_compile,
        planner=plan_program,
    )


def enable_advanced_parallelization(
    flavor: FlavorLike | None = None, *, torch_compile: bool = False, **constraints: Any
) -> None:
    """The one line: every HF causal LM that is trained after it, created before or after, runs as `compile` would make
    it run. `from_pretrained` after it leaves the weights in their files until each rank reads its part of them.

    Other keyword arguments are those of `Constraints`: pipeline_parallel, num_stages, num_micro_batches,
    batch_per_device, ...
    """
    from autoparallel.runtime import start

    unknown = [name for name in constraints if name not in Constraints.model_fields]
    if unknown:
        from autoparallel.cost.tables import nearest

        close = nearest(unknown[0], tuple(Constraints.model_fields))
        raise ConfigError(
            f"enable_advanced_parallelization has no option {unknown[0]!r}",
            why="options are " + ", ".join(Constraints.model_fields),
            remedy=f"did you mean {close[0]!r}?" if close else "remove it",
        )
    resolved = resolve_flavor(_or_setting("local" if flavor is None else flavor))
    start.enable(resolved, Constraints(**constraints), torch_compile=torch_compile, planner=plan_program)


def _dump(name: str, text: Callable[[], str]) -> None:
    """Write what a step made into the folder AUTOPARALLEL_DUMP names, if it names one."""
    folder = read_settings().dump
    if folder:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text())


def _or_setting(flavor: FlavorLike) -> FlavorLike:
    """AUTOPARALLEL_FLAVOR stands in for the default, so that one script serves every cluster."""
    return read_settings().flavor or flavor if flavor == "local" else flavor


def _capture(model: Any, precision: Precision) -> Program:
    """For planning."""
    import torch
    from loguru import logger

    from autoparallel.capture.program import capture_for_planning

    start = time.perf_counter()
    as_it_is = precision.compute_dtype == _model_dtype(model)
    captured = capture_for_planning(model, dtype=None if as_it_is else getattr(torch, precision.compute_dtype))
    graph, num_traced = captured.graph, captured.num_traced_blocks
    logger.info(
        "Captured {} ({}{} blocks, {} ops) in {:.0f} [ms]",
        graph.architecture,
        "" if num_traced is None else f"{num_traced} of ",
        graph.num_segments - 2,
        graph.dag.number_of_nodes(),
        (time.perf_counter() - start) * 1e3,
    )
    for note in captured.graph.notes:
        logger.info("{}", note)
    return captured


def _workload(
    graph: Graph,
    flavor: Flavor,
    table: CostTable,
    *,
    batch_size: int,
    seq_len: int,
    precision: Precision,
    constraints: Constraints,
    practice: Practice = OURS,
    only: Strategy | None = None,
) -> Workload:
    """Of all strategies that the constraints allow, or of one."""
    from autoparallel.cost.segments import build_workload
    from autoparallel.space.candidates import enumerate_space, tensor_degrees

    if only is not None:
        degrees, micro_batch_sizes = [only.tensor_parallel], [only.batch_per_device]
    else:
        degrees = tensor_degrees(flavor.num_devices, constraints)
        space = enumerate_space(
            num_devices=flavor.num_devices,
            batch_size=batch_size,
            num_blocks=graph.num_segments - 2,
            constraints=constraints,
            tensor_degrees=degrees,
            seq_len=seq_len,
            devices_per_host=flavor.devices_per_host,
        )
        micro_batch_sizes = [shape.batch_per_device for shape in (*space.shapes, *space.too_many_stages)]
    return build_workload(
        graph,
        flavor,
        table,
        batch_size=batch_size,
        seq_len=seq_len,
        micro_batch_sizes=micro_batch_sizes,
        memory_ratio=constraints.usable_ratio(flavor.memory_bytes),
        precision=precision,
        tensor_degrees=[degree for degree in degrees if degree > 1],
        practice=practice,
        only=only,
    )


def _notes(graph: Graph, workload: Workload, strategy: Strategy) -> tuple[str, ...]:
    """What a reader of the plan should know beside its numbers."""
    whole = [target for variant in workload.under(strategy)[0][0].variants for target in variant.without_rule]
    computed = f"without a rule of tensor parallelism, computed whole by every rank: {', '.join(whole)}"
    return (*graph.notes, *([computed] if strategy.tensor_parallel > 1 and whole else []))


def _summary(graph: Graph) -> ModelSummary:
    return ModelSummary(
        name=graph.model_name,
        architecture=graph.architecture,
        fingerprint=graph.fingerprint,
        num_parameters=sum(p.numel for p in graph.parameters),
        trainable_parameters=sum(p.numel for p in graph.parameters if p.trainable),
        parameter_bytes=sum(p.size_bytes for p in graph.parameters),
        num_blocks=graph.num_segments - 2,
        block_classes=graph.segment_classes[1:-1],
    )


def _model_dtype(model: Any) -> str:
    """The dtype the user's weights have or would load with."""
    from autoparallel.capture.program import model_dtype

    return model_dtype(model)


__all__ = ["compile", "enable_advanced_parallelization", "estimate", "plan", "plan_program", "program"]
