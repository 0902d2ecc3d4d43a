"""The public calls: questions that have an answer, and questions that get one clear message instead."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import autoparallel as ap
from autoparallel.capture.program import capture
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.segments import build_workload
from autoparallel.cost.tables import load_table
from autoparallel.errors import AutoParallelError, ConfigError, NoFeasiblePlanError, PlanMismatchError
from autoparallel.ir.precision import Precision
from autoparallel.plans.grid import AXES
from autoparallel.plans.strategy import Strategy
from autoparallel.search.price import cut_and_price
from tests.families import FAMILIES
from tests.strategies import plan_for


def question(**changes: Any) -> dict[str, Any]:
    return {"model": FAMILIES["llama"](), "flavor": "cpu:2", "batch_size": 4, "seq_len": 16, **changes}


def test_a_plan_answers_and_round_trips(tmp_path: Path) -> None:
    plan = ap.plan(**question())
    assert plan.strategy.num_devices == 2
    assert plan.strategy.batch_size == 4
    possible = [c for c in plan.candidates if c.estimate is not None]
    assert plan.estimate.step_time_s == min(c.estimate.step_time_s for c in possible if c.estimate)
    plan.save(tmp_path / "plan.json")
    assert ap.Plan.load(tmp_path / "plan.json") == plan
    text = plan.explain()
    assert "predicted" in text
    assert plan.strategy.schedule in text


@pytest.mark.slow
def test_a_large_model_is_planned_without_weights_or_gpu() -> None:
    """MoAI's own choice for Qwen1.5-7B on 32 GCDs fits too, and is not faster."""
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    batch: dict[str, Any] = {"batch_size": 256, "seq_len": 2048}
    plan = ap.plan(config, "4xLarge.2048GB", **batch)
    assert plan.strategy.num_devices == 32
    assert any("assumed" not in a for a in plan.assumptions)
    theirs = Strategy(num_stages=2, data_parallel=16, num_micro_batches=16, batch_per_device=1, distribute_param=1)
    estimate = ap.estimate(config, "4xLarge.2048GB", theirs, **batch)
    assert estimate.peak_memory_bytes <= plan.flavor.memory_bytes
    assert estimate.step_time_s >= plan.estimate.step_time_s


def test_the_strategy_asked_for_is_priced_as_the_search_prices_it() -> None:
    plan = ap.plan(**question())
    asked = {key: value for key, value in question().items() if key not in ("model", "flavor")}
    estimate = ap.estimate(FAMILIES["llama"](), "cpu:2", plan.strategy, **asked)
    assert estimate == plan.estimate


def test_the_program_of_any_rank_is_readable_offline() -> None:
    plan = ap.plan(**question(constraints=ap.Constraints(data_parallel=1, tensor_parallel=1)))
    assert plan.strategy.num_stages == 2
    texts = [ap.program(FAMILIES["llama"](), plan, rank=rank).print_readable(print_output=False) for rank in (0, 1)]
    assert "input_ids" in texts[0]
    assert texts[0] != texts[1]
    with pytest.raises(ConfigError, match="rank 2 does not exist"):
        ap.program(FAMILIES["llama"](), plan, rank=2)


def test_the_program_of_a_tensor_parallel_rank_shows_its_collectives_and_shapes() -> None:
    constraints = ap.Constraints(tensor_parallel=2, sequence_parallel=True)
    plan = ap.plan(**question(constraints=constraints))
    assert plan.strategy.splits is not None
    stage = ap.program(FAMILIES["llama"](), plan, rank=1)
    block = stage.get_submodule("segment_1")
    held = {name: tuple(value.shape) for name, value in block.named_parameters()}
    text = plan.explain()
    for split in plan.strategy.splits[1]:
        assert split in text
    assert held["model.layers.0.mlp.gate_proj.weight"] in {(32, 32), (64, 32)}
    assert "sequence_parallel : True" in text
    assert "all_gather" in block.print_readable(print_output=False)


def test_the_program_of_a_rank_is_that_of_its_place() -> None:
    config = FAMILIES["llama"]()
    captured = capture(config, dtype=torch.float32)
    fields: dict[str, Any] = {"num_stages": 2, "tensor_parallel": 2, "data_parallel": 2}
    usual, other = (Strategy(**fields, mesh_order=order) for order in (None, ("tp", "dp", "pp")))
    plans = [plan_for(captured, strategy, seq_len=8) for strategy in (usual, other)]
    ranks = (1, other.rank_of(usual.place_of(1)))
    assert ranks == (1, 4)
    one, two = (
        ap.program(config, plan, rank=rank).print_readable(print_output=False)
        for plan, rank in zip(plans, ranks, strict=True)
    )
    assert one == two


def test_tensor_parallel_ranks_cost_more_the_more_hosts_they_cross() -> None:
    """A workload of all orders prices each as a workload of its own does."""
    flavor, sizes = resolve_flavor("4x8xH100-SXM5-80GB"), {"batch_size": 32, "seq_len": 64}
    graph = capture(FAMILIES["llama"](), dtype=torch.bfloat16).graph
    table, precision = load_table(flavor.device), Precision.of("bfloat16", "float32")
    drawn = build_workload(
        graph, flavor, table, **sizes, micro_batch_sizes=[4], memory_ratio=1.0, precision=precision, tensor_degrees=[4]
    )
    assert {variant.tensor_stride for variant in drawn.variants} == {1, 4, 8}
    fields: dict[str, Any] = {"tensor_parallel": 4, "data_parallel": 4, "num_stages": 2, "batch_per_device": 4}
    comm_s = {}
    for order in permutations(AXES):
        strategy = Strategy(**fields, num_micro_batches=2, mesh_order=order)
        estimate = ap.estimate(graph, flavor, strategy, **sizes)
        assert cut_and_price(drawn, strategy) == estimate
        comm_s[strategy.stride_of("tp")] = estimate.breakdown_s.tp_comm
    assert comm_s[1] == comm_s[2] < comm_s[4] < comm_s[8]
    over_two_hosts = Strategy(tensor_parallel=16, data_parallel=2, batch_per_device=16)
    assert ap.estimate(graph, flavor, over_two_hosts, **sizes).breakdown_s.tp_comm > 0


def check_message(error: AutoParallelError, *parts: str) -> None:
    for part in parts:
        assert part in str(error)
    assert error.remedy, "an error names what to do"


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        ap.plan(**question(batch_size=7, constraints=ap.Constraints(data_parallel=2)))
    check_message(caught.value, "7", "2")


def test_an_unknown_flavor_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        ap.plan(**question(flavor="4xLarge.2084GB"))
    check_message(caught.value, "4xLarge.2048GB")


def test_a_model_too_large_for_every_candidate() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with pytest.raises(NoFeasiblePlanError) as caught:
        ap.plan(config, "L4", batch_size=1, seq_len=2048)
    check_message(caught.value, "GiB")


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    plan = ap.plan(**question())
    with pytest.raises(PlanMismatchError) as caught:
        ap.program(FAMILIES["gpt2"](), plan)
    check_message(caught.value, "another model")


def test_a_strategy_for_other_devices_or_rows() -> None:
    with pytest.raises(ConfigError, match="is for 1 devices and 1 rows"):
        ap.estimate(FAMILIES["llama"](), "cpu:2", ap.Strategy(), batch_size=4, seq_len=16)


def test_units_and_optimizers_that_have_no_price() -> None:
    asked: dict[str, Any] = {"batch_size": 4, "seq_len": 16}
    strategy = ap.Strategy(num_micro_batches=4)
    with pytest.raises(ConfigError) as caught:
        ap.estimate(FAMILIES["llama"](), "V100-SXM2-32GB", strategy, **asked, dtype="float8")
    check_message(caught.value, "V100-SXM2-32GB", "float8", "float16")
    with pytest.raises(ConfigError, match="adam'"):
        ap.estimate(FAMILIES["llama"](), "H200", strategy, **asked, optimizer="adam")  # type: ignore[arg-type]
    for wrong in ({"attention": "flesh"}, {"gradient_dtype": "bf16"}, {"dispatch_s": -1.0}):
        with pytest.raises(ConfigError) as caught:
            ap.estimate(FAMILIES["llama"](), "H200", strategy, **asked, **wrong)  # type: ignore[arg-type]
        check_message(caught.value, next(iter(wrong)))


def test_an_unknown_option_of_the_one_line() -> None:
    with pytest.raises(ConfigError, match="num_stages"):
        ap.enable_advanced_parallelization("cpu:1", num_stage=2)


@pytest.mark.slow
def test_a_plan_is_the_same_bytes_whatever_the_workers_and_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys, autoparallel as ap; from tests.families import FAMILIES;"
        "ap.plan(FAMILIES['qwen2'](), 'cpu:4', batch_size=16, seq_len=32, workers=int(sys.argv[1])).save(sys.argv[2])"
    )
    texts = set()
    for workers, seed in ((0, "0"), (1, "1"), (3, "2")):
        path = tmp_path / f"{workers}.json"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(workers), str(path)], check=True, timeout=120, env=environment)
        texts.add(path.read_text())
    assert len(texts) == 1


def test_every_step_can_be_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPARALLEL_DUMP", str(tmp_path / "dump"))
    plan = ap.plan(**question())
    names = [path.name for path in sorted((tmp_path / "dump").iterdir())]
    assert names == ["10_capture.txt", "20_annotate.txt", "30_price.json", "40_plan.json"]
    assert ap.Plan.load(tmp_path / "dump" / "40_plan.json") == plan
