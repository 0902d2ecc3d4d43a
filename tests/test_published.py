"""Rows of published runs are read whatever they lack, and become the question they stand for."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoparallel.cost.tables import available_devices
from benchmarks.published.hardware import device_of, network_bytes_per_s
from benchmarks.published.layout import layers_by_stage
from benchmarks.published.measured import step_time
from benchmarks.published.practices import PRACTICES, practice_of
from benchmarks.published.question import Question, question_of
from benchmarks.published.rows import Measured, Run, Unexpressed, Unread, read_run, read_runs
from benchmarks.scores.price import price

PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "published"
LLAMA = {"family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "ffn_hidden": 11008, "vocab": 32000,
         "seq_len": 4096, "gated_mlp": True}  # fmt: skip
GPT = {"family": "gpt", "layers": 24, "hidden": 2304, "heads": 24, "vocab": 51200, "seq_len": 2048, "gated_mlp": False}
ROW: dict[str, Any] = {
    "id": "row", "source": {"name": "somebody"}, "model": LLAMA, "gpu": {"name": "A100-SXM4-80GB", "memory_gb": 80},
    "n_gpus": 16, "gpus_per_node": 8, "precision": "bf16", "global_batch": 64, "micro_batch": 2, "tp": 2, "pp": 2,
    "zero": 1, "recompute": "none", "attention_kernel": "flash", "framework": "Megatron-LM", "schedule": "1f1b",
    "measured": {"iter_s": 2.0}, "quality": "good",
}  # fmt: skip


def question(**changes: Any) -> Question:
    run = read_run({**ROW, **changes})
    assert isinstance(run, Run), run
    return question_of(run)


def reason(**changes: Any) -> str:
    with pytest.raises(Unexpressed) as raised:
        question(**changes)
    return str(raised.value)


def test_a_row_may_lack_anything_and_have_more() -> None:
    bare = read_run(
        {"id": None, "model": {"moe": {"any": ["thing"]}}, "measured": None, "new_field": {"x": 1}}, number=3
    )
    assert isinstance(bare, Run)
    assert (bare.id, bare.source.name, bare.n_gpus, bare.notes) == ("row 3", "unnamed", None, "")
    assert read_run({**ROW, "n_gpus": "16", "zero": 1.0}) == read_run(ROW)
    loose = read_run(
        {**ROW, "micro_batch": "auto", "virtual_stages": 0, "ep": "none", "zero": "ZeRO-3", "recompute": True}
    )
    assert isinstance(loose, Run)
    assert (loose.micro_batch, loose.virtual_stages, loose.ep, loose.zero) == (None, None, None, 3)
    assert question_of(loose).strategy.recomputation == "full"


def test_no_row_breaks_the_reader_or_the_question() -> None:
    """Fields dropped or replaced by anything, at every depth."""
    rows = json.loads((PUBLISHED / "runs.json").read_text())["runs"]
    chance = random.Random(0)
    values: list[Any] = [None, -1, 0, 1, 7, "x", "", [], {}, True, 1e30, 2.5, "16", "none", [1, 2], {"a": 1}, math.nan]
    for _ in range(1000):
        row = copy.deepcopy(chance.choice(rows))
        for _ in range(chance.randint(1, 4)):
            parts = [row, *[part for part in row.values() if isinstance(part, dict) and part]]
            part = chance.choice(parts)
            part[chance.choice(list(part))] = chance.choice(values)
        run = read_run(row)
        if isinstance(run, Unread):
            assert run.reason
            continue
        try:
            asked = question_of(run)
        except Unexpressed:
            continue
        step_time(run, asked)
        assert asked.strategy.batch_size == asked.batch_size


def test_a_row_that_cannot_be_read_is_counted_with_its_field(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "bad", "n_gpus": "many"}, "text", {**ROW, "zero": 7}]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    runs, unread = read_runs(tmp_path / "runs.json")
    assert [run.id for run in runs] == ["row"]
    assert [(one.id, one.source) for one in unread] == [("bad", "somebody"), ("row 2", "unnamed"), ("row", "somebody")]
    assert "n_gpus" in unread[0].reason
    assert "zero" in unread[2].reason


def test_every_row_carried_over_is_read_and_nearly_all_can_be_asked() -> None:
    runs, unread = read_runs(PUBLISHED / "runs.json")
    assert (len(runs), unread) == (639, [])
    reasons = []
    for run in runs:
        assert run.source.name != "unnamed"
        assert run.source.url.startswith("https://")
        try:
            asked = question_of(run)
        except Unexpressed as error:
            reasons.append(str(error))
            continue
        assert asked.strategy.num_devices == asked.flavor.num_devices
        if run.measured.iter_s or run.measured.tokens_per_s_per_gpu:
            assert step_time(run, asked) is not None
    assert len(reasons) <= 0.1 * len(runs), reasons


def test_the_id_decides_nothing() -> None:
    runs, _ = read_runs(PUBLISHED / "runs.json")
    for run in runs[::20]:
        other = run.model_copy(update={"id": "zb-2p-zero8-mb1-hsdp-packed into one"})
        try:
            assert question_of(other) == question_of(run)
        except Unexpressed:
            continue


def test_stated_parameters_are_met_exactly() -> None:
    runs, _ = read_runs(PUBLISHED / "runs.json")
    stated = [run for run in runs if run.model.params]
    assert len(stated) > 100
    assert {question_of(run).structure.num_parameters - int(run.model.params or 0) for run in stated} == {0}


@pytest.mark.parametrize(
    ("model", "model_type", "tied"),
    [
        (GPT, "gpt2", True),
        ({**GPT, "family": "mpt"}, "gpt2", True),
        (LLAMA, "llama", False),
        ({**LLAMA, "family": "internlm", "kv_heads": 8}, "llama", False),
        ({**LLAMA, "family": "brand-new"}, "llama", False),
        ({**GPT, "family": "nemotron", "kv_heads": 8}, "nemotron", False),
        ({**GPT, "family": "gpt-neox"}, "gpt_neox", False),
        ({**GPT, "name": "gpt5b"}, "gpt2", True),
        ({**LLAMA, "family": "gemma", "head_dim": 256}, "llama", True),
        ({**GPT, "family": "brand-new", "kv_heads": 8}, "starcoder2", True),
        ({**GPT, "family": "brand-new"}, "gpt2", True),
        ({**LLAMA, "tied_embeddings": True}, "llama", True),
        ({**LLAMA, "params": 6.74e9 - 32000 * 4096}, "llama", True),
    ],
)
def test_a_family_is_its_nearest_architecture(model: dict[str, Any], model_type: str, tied: bool) -> None:
    structure = question(model=model).structure
    assert (structure.architecture.model_type, structure.tied) == (model_type, tied)


def test_structures_are_as_large_as_hugging_face_builds_them() -> None:
    import torch
    import transformers

    families = ("gpt", "llama", "internlm", "nemotron", "gpt-neox", "starcoder")
    for family in families:
        model = {**(LLAMA if family in ("llama", "internlm") else GPT), "family": family, "layers": 2, "vocab": 1024}
        structure = question(model=model, pp=1).structure
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(structure.config())
        assert sum(p.numel() for p in built.parameters()) == structure.num_parameters, family


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pp": None}, "pp is not stated"),
        ({"n_gpus": 15}, "do not divide 15 devices"),
        ({"global_batch": 63}, "no multiple"),
        ({"model": {**LLAMA, "layers": None}}, "layers is not stated"),
        ({"model": {**LLAMA, "moe": {"num_experts": 8}}}, "mixture of experts"),
        ({"model": {**LLAMA, "name": "Mixtral-8x7B"}}, "mixture of experts"),
        ({"model": {**LLAMA, "family": "bert"}}, "decoder"),
        ({"model": {**GPT, "family": "flan-t5"}}, "decoder"),
        ({"gpu": {"name": "TPU v4"}}, "no cost table"),
        ({"precision": "int3"}, "precision"),
        ({"ep": 4}, "expert"),
        ({"notes": "LoRA of rank 16"}, "adapters"),
        ({"notes": "optimizer offloaded to the host"}, "offloaded"),
    ],
)
def test_what_cannot_be_asked_has_its_reason(changes: dict[str, Any], why: str) -> None:
    assert why in reason(**changes)


def test_what_is_missing_is_assumed_and_said() -> None:
    asked = question(
        micro_batch=None, global_batch=None, recompute=None, zero=None, attention_kernel=None, precision=None
    )
    for word in ("micro_batch", "global_batch", "recompute", "zero", "attention_kernel", "precision"):
        assert any(word in assumption for assumption in asked.assumptions), word
    assert question().assumptions == ("sequence_parallel is not stated: False",)


def test_a_layout_becomes_a_strategy() -> None:
    strategy = question(virtual_stages=2, schedule="interleaved-1f1b", sequence_parallel=True).strategy
    assert (strategy.num_stages, strategy.tensor_parallel, strategy.data_parallel) == (2, 2, 4)
    assert (strategy.num_micro_batches, strategy.schedule, strategy.virtual_stages) == (8, "interleaved", 2)
    assert strategy.sequence_parallel
    assert [stage.last_segment - stage.first_segment + 1 for stage in strategy.stages or ()] == [9, 8, 8, 9]
    assert question(schedule="zb-1p").strategy.schedule == "zero_bubble"
    assert question(pp=1, schedule=None, virtual_stages=4).strategy.virtual_stages == 1


@pytest.mark.parametrize(
    ("layers", "stages", "fewer", "fills", "counts"),
    [
        (32, 4, False, False, [8, 8, 8, 8]),
        (22, 8, True, False, [2, 3, 3, 3, 3, 3, 3, 2]),
        (22, 24, True, False, [0, *[1] * 22, 0]),
        (126, 32, False, False, [3, *[4] * 30, 3]),
        (78, 12, False, True, [*[7] * 11, 1]),
        (106, 12, False, True, [8, *[9] * 10, 8]),
        (31, 4, False, False, [8, 8, 8, 7]),
        (2, 8, False, False, None),
    ],
)  # fmt: skip
def test_layers_lie_as_frameworks_place_them(
    layers: int, stages: int, fewer: bool, fills: bool, counts: list[int] | None
) -> None:
    found = layers_by_stage(layers, stages, fewer_at_ends=fewer, fills=fills)
    assert found == counts
    assert found is None or sum(found) == layers


def test_both_utilisations_say_how_much_is_recomputed() -> None:
    whole = question(recompute="selective", measured={"mfu": 0.45, "hfu": 0.6}).strategy
    assert (whole.recomputation, whole.least_recomputation) == ("full", None)
    half = question(recompute="selective", measured={"mfu": 0.48, "hfu": 0.56}).strategy
    levels = [level for stage in half.stages or () for level in stage.recomputation]
    assert (half.recomputation, half.least_recomputation) == ("full", "none")
    assert levels.count("full") == 16
    assert question(recompute="full", measured={"mfu": 0.5, "hfu": 0.5}).strategy.recomputation == "none"
    assert question(recompute="selective").strategy.recomputation == "selective"


def test_some_blocks_of_few_in_turn_are_recomputed() -> None:
    """Utilisations are rounded: shares are those of one to four blocks, and never none."""
    for mfu, hfu, full in ((0.48, 0.51, 8), (0.48, 0.53, 11), (0.48, 0.58, 22), (0.48, 0.60, 24)):
        strategy = question(recompute="selective", measured={"mfu": mfu, "hfu": hfu}).strategy
        levels = [level for stage in strategy.stages or () for level in stage.recomputation]
        assert levels.count("full") == pytest.approx(full, abs=1)


def test_what_is_not_stated_of_recomputation_is_as_little_as_fits() -> None:
    """A 13B model with 32 sequences at once keeps too much on one GPU, and some blocks less."""
    large = {**LLAMA, "layers": 40, "hidden": 5120, "heads": 40, "ffn_hidden": 13824}
    changes = {"model": large, "n_gpus": 8, "tp": 1, "pp": 1, "zero": 3, "global_batch": 64, "micro_batch": 8}
    stated, unstated = (question(**changes, recompute=recompute) for recompute in ("none", ""))
    capacity = stated.flavor.memory_bytes
    assert stated.if_too_large is None
    assert unstated.if_too_large is not None
    keeps, fits = (price(each).stages[0].peak_memory_bytes for each in (stated, unstated))
    assert fits <= capacity < keeps
    assert price(unstated).breakdown_s.recompute > 0
    assert question(**changes, recompute="", outcome="out of memory").if_too_large is None


def test_pipelines_of_nemo_are_interleaved_unless_stated() -> None:
    nemo, megatron = (question(framework=name, virtual_stages=None) for name in ("NeMo 24.07", "Megatron-LM"))
    assert (nemo.strategy.schedule, nemo.strategy.virtual_stages) == ("interleaved", 4)
    assert (megatron.strategy.schedule, megatron.strategy.virtual_stages) == ("1f1b", 1)
    assert question(framework="NeMo 24.07", virtual_stages=1).strategy.schedule == "1f1b"


def test_gradients_of_fp16_runs_are_summed_as_their_frameworks_do() -> None:
    assert question(precision="fp16").options.gradient_dtype == "float16"
    assert question(precision="bf16").options.gradient_dtype is None
    assert question(precision="fp16", framework="NeMo 24.07").options.gradient_dtype == "bfloat16"


def test_words_of_a_row_count() -> None:
    norms = question(framework="AA-Scaling", notes="RMS normalization merged").options
    assert (norms.fused, norms.merged_norms) == (False, True)
    merged = question(framework="AA-Scaling", notes="element-wise kernels fused").options
    assert (merged.fused, merged.merged_norms) == (True, False)
    assert question(tp=1, pp=1, notes="states sharded over 8 GPUs").strategy.shard_group_size == 8
    assert question(tp=1, pp=1, notes="hybrid sharding (HSDP)").strategy.shard_group_size == 8
    assert question(tp=1, pp=1, notes="sharded over all replicas").strategy.shard_group_size is None
    packed = question(notes="samples packed into one sequence")
    assert (packed.seq_len, packed.batch_size, packed.strategy.batch_per_device) == (4096, 64, 2)
    assert any("stays inside each" in told for told in packed.assumptions)
    assert question(framework="llm-foundry FSDP", notes="mixed precision PURE").options.gradient_dtype == "bfloat16"
    assert question(framework="llm-foundry FSDP", notes="mixed precision DEFAULT").options.gradient_dtype == "float32"
    assert question(compile=True, framework="PyTorch FSDP").options.fused
    assert question(attention_kernel="unfused (no flash)").options.attention == "unfused"


@pytest.mark.parametrize(
    ("notes", "merged", "norms"),
    [
        ("fp16 level O2, fused RMS norm", False, True),
        ("flash attention, no fused RMS norm", False, False),
        ("Apex fused Adam", False, False),
        ("merged kernels: RMS norm, cross entropy (fused)", True, False),
    ],
)
def test_what_is_merged_is_read_from_words(notes: str, merged: bool, norms: bool) -> None:
    options = question(framework="PyTorch FSDP", notes=notes).options
    assert (options.fused, options.merged_norms) == (merged, norms)
    assert options.merged_loss == ("cross entropy" in notes)


@pytest.mark.parametrize(
    ("kernel", "attention"),
    [("flash-attn 3", "vendor"), ("FlashAttention-4", "vendor"), ("flash 2", "flash"), ("flash", "flash-1")],
)
def test_attention_kernels_by_any_name(kernel: str, attention: str) -> None:
    assert question(framework="llm-foundry", attention_kernel=kernel).options.attention == attention


def test_states_in_bf16_have_no_wider_masters() -> None:
    row: dict[str, Any] = {"framework": "LLaMA-Factory", "tp": 1, "pp": 1}
    assert question(**row, notes="PURE bf16 (weights and AdamW moments)").options.master_dtype == "bfloat16"
    assert question(**row, notes="PURE").options.master_dtype == "float32"


def test_a_run_whose_parameters_exceed_the_memory_has_sharded_them() -> None:
    large = {**LLAMA, "layers": 80, "hidden": 8192, "heads": 64, "ffn_hidden": 28672}
    assert question(model=large, tp=1, pp=1).strategy.distribute_param == 3
    assert question(model=large, tp=1, pp=1, outcome="out of memory").strategy.distribute_param == 1
    assert question(model=LLAMA, tp=1, pp=1).strategy.distribute_param == 1


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16/fp16", "bfloat16"), ("amp_fp8", "float8"), ("nvfp4", "float4"), ("fp16", "float16"), ("fp32", "float32")],
)
def test_a_precision_is_a_dtype(precision: str, dtype: str) -> None:
    assert question(precision=precision).options.dtype == dtype


@pytest.mark.parametrize(
    ("text", "gbytes_per_s"),
    [
        ("NVLink4/NVSwitch in node; 8x 400 Gb/s per node", 50),
        ("1600 Gb/s RoCE per node", 25),
        ("NVLink3 in node; 4x 100 Gb/s Omni-Path per node (Jean Zay)", 6.25),
        ("DGX SuperPOD (8x HDR200 per node)", 25),
        ("900 GB/s NVLink; 8x400 Gbps RoCE v2", 50),
        ("400 Gb/s RDMA per GPU", 50),
        ("3.2 Tb/s EFA", 50),
        ("Slingshot-11 (4 x 25 GB/s)", 12.5),
        ("2x NDR InfiniBand", 12.5),
        ("NVLink5 rack-scale (NVL72)", None),
        ("NVLink 900 GB/s in node", None),
        ("HDR200", None),
        ("PCIe 4 x16", None),
        ("", None),
    ],
)
def test_the_network_is_read_from_words(text: str, gbytes_per_s: float | None) -> None:
    found = network_bytes_per_s(text, devices_per_host=8)
    assert found == (None if gbytes_per_s is None else pytest.approx(gbytes_per_s * 1e9))


@pytest.mark.parametrize(
    ("name", "memory_gb", "table", "ranks"),
    [
        ("A100", 40, "A100-SXM4-40GB", 1),
        ("NVIDIA A100 80GB PCIe", 80, "A100-PCIe-80GB", 1),
        ("H100-SXM5-96GB-HBM2e-500W", 96, "H100-SXM5-96GB", 1),
        ("A800-80GB", 80, "A800-SXM4-80GB", 1),
        ("RTX 3090 Ti", 24, "RTX3090", 1),
        ("H200-SXM", 141, "H200", 1),
        ("MI250", 128, "MI250", 2),
        ("MI250X", 64, "MI250X", 1),
        ("AMD Instinct MI300X", 192, "MI300X", 1),
        ("GeForce RTX 4090", 24, "RTX4090", 1),
        ("Tesla V100", None, "V100-SXM2-32GB", 1),
    ],
)
def test_a_gpu_is_found_by_any_name(name: str, memory_gb: float | None, table: str, ranks: int) -> None:
    device = device_of(name, memory_gb=memory_gb, ranks_per_gpu=None)
    assert (device.table, device.ranks_per_gpu) == (table, ranks)


def test_every_table_is_found_by_its_own_name() -> None:
    names = [name for name in available_devices() if name != "cpu"]
    found = [device_of(name, memory_gb=None, ranks_per_gpu=1) for name in names]
    assert [(device.table, device.assumption) for device in found] == [(name, "") for name in names]


def test_a_flavor_is_the_cluster_of_the_row() -> None:
    asked = question(gpu={"name": "MI250", "memory_gb": 128}, gpus_per_node=4, n_gpus=32)
    assert (asked.flavor.num_devices, asked.flavor.devices_per_host, asked.flavor.num_hosts) == (64, 8, 8)
    rack = question(
        gpu={"name": "GB200", "memory_gb": 186}, gpus_per_node=4, n_gpus=256, interconnect="NVL72", global_batch=256
    )
    assert rack.flavor.devices_per_host == 64


def test_one_time_however_it_is_stated() -> None:
    asked = question()
    tokens = 64 * 4096
    model_flops = asked.structure.train_flops_per_token * tokens
    ways = [
        {"iter_s": 2.0},
        {"tokens_per_s": tokens / 2},
        {"tokens_per_s_per_gpu": tokens / 2 / 16},
        {"samples_per_s": 32},
        {"samples_per_s_per_gpu": 2},
        {"tflops_per_gpu": model_flops / 2 / 16 / 1e12, "tflops_kind": "model"},
        {"mfu": 0.5, "mfu_peak_tflops": model_flops / 2 / 16 / 1e12 / 0.5},
    ]
    for measured in ways:
        run = Run.model_validate({**ROW, "measured": measured})
        found = step_time(run, asked)
        assert found is not None
        assert found.seconds == pytest.approx(2.0), measured
    run = Run.model_validate({**ROW, "measured": {"tflops_per_gpu": 100, "tflops_kind": "hardware"}})
    again = replace(asked, strategy=asked.strategy.model_copy(update={"recomputation": "full"}))
    plain, recomputed = step_time(run, asked), step_time(run, again)
    assert plain is not None
    assert recomputed is not None
    assert recomputed.seconds / plain.seconds == pytest.approx(4 / 3)
    assert step_time(Run.model_validate({**ROW, "measured": {"mfu": 0.5}}), asked) is None


def test_the_stated_rates_and_times_of_rows_agree() -> None:
    """The formula of FLOPs is that of the sources: a wrong term would show in all rows of one."""
    runs, _ = read_runs(PUBLISHED / "runs.json")
    checked = 0
    for run in runs:
        rate = {"tflops_per_gpu": run.measured.tflops_per_gpu, "tflops_kind": run.measured.tflops_kind}
        if not (run.measured.tflops_per_gpu and run.derived.iter_s) or "packed" in run.notes:
            continue
        by_rate = run.model_copy(update={"measured": Measured.model_validate(rate), "derived": Measured()})
        try:
            found = step_time(by_rate, question_of(run))
        except Unexpressed:
            continue
        assert found is not None
        assert found.how == "tflops_per_gpu"
        assert found.seconds == pytest.approx(run.derived.iter_s, rel=0.06), run.id
        checked += 1
    assert checked > 200


def test_every_practice_has_a_source_and_the_last_serves_all() -> None:
    assert all(practice.source for practice in PRACTICES)
    assert practice_of("never heard of it") is PRACTICES[-1]
    assert practice_of("NeMo 24.12").distribute_param == 1
    assert practice_of("Megatron-DeepSpeed").fills_stages
    assert practice_of("Megatron-LM (zero-bubble fork)").attention == "unfused"


def test_out_of_memory_cases_are_rows_like_others() -> None:
    limits, unread = read_runs(PUBLISHED / "limits.json")
    assert unread == []
    assert len(limits) >= 20
    assert all(run.out_of_memory for run in limits)
    assert not any(isinstance(run, Unread) for run in limits)
    assert all(question_of(run).strategy.num_devices == run.n_gpus for run in limits)
