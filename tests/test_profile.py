"""Measuring a device: the fit recovers the rates that made its samples; this machine's table can be planned with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from autoparallel.capture.program import capture
from autoparallel.cli import app
from autoparallel.cost.compute import Device
from autoparallel.cost.kernels import Kernel, Size, kernels
from autoparallel.cost.practice import OURS
from autoparallel.cost.tables import CostTable, SizeCurve, available_devices, load_table, parse_table
from autoparallel.errors import ConfigError
from autoparallel.measure import profile as measuring
from autoparallel.measure.links import Links
from autoparallel.measure.stopwatch import Stopwatch
from autoparallel.measure.timeline import Timed, timeline
from tests.families import program_of

CPU = torch.device("cpu")
TRUE = load_table("cpu").model_copy(
    update={
        "memory_bandwidth_bytes_per_s": load_table("cpu").memory_bandwidth_bytes_per_s.model_copy(
            update={"value": 40e9}
        ),
        "memory_curve": SizeCurve(
            points=((1e5, 0.5), (4e5, 0.8), (1.6e6, 0.9), (6.4e6, 0.6), (1e8, 0.2)), kind="measured", source="made up"
        ),
        "special_functions_per_s": load_table("cpu").launch_overhead_s.model_copy(update={"value": 8e8, "unit": "1/s"}),
    }
)


def samples(sizes: tuple[tuple[int, int], ...]) -> list[Timed]:
    """What a device exactly like TRUE would take for a Llama block's operators."""
    device = Device(TRUE)
    graph = program_of("llama", num_hidden_layers=1).graph
    return [
        Timed(part.ops[0], launched, sum(map(device.kernel_s, launched)))
        for batch, seq in sizes
        for part in kernels(list(graph.ops()), Size(batch, seq), OURS)
        for launched in (part.forward, (*part.backward, *part.weight))
        if launched
    ]


def test_the_fit_recovers_what_made_its_samples() -> None:
    timed, launch_s = samples(((8, 512), (32, 1024), (64, 4096))), TRUE.launch_overhead_s.value
    curve = measuring._memory_curve(timed, launch_s, 1e9)
    device = Device(TRUE)
    for size, rate in curve:
        assert rate == pytest.approx(size / device.memory_s(size), rel=0.15)
    special_s = measuring._special_s(timed, launch_s, curve)
    assert 1 / special_s == pytest.approx(8e8, rel=0.15)
    attention = measuring._attention_flops_per_s(timed, launch_s, special_s)
    expected = TRUE.peak_flops_per_s["float32"].value * TRUE.attention_efficiency.value
    assert attention == pytest.approx(expected, rel=0.15)


def test_matmul_rates_rise_to_that_of_large_calls() -> None:
    device = Device(TRUE)
    timed = []
    for n in (64, 256, 512, 1024, 2048):
        kernel = Kernel("matmul", "float32", 3 * 4 * n * n, 1, n, n, n)
        timed.append((2.0 * n**3, device.kernel_s(kernel)))
    rates = measuring._matmul_rates(timed, TRUE.launch_overhead_s.value)
    assert [flops for flops, _ in rates] == sorted(flops for flops, _ in rates)
    assert [rate for _, rate in rates] == sorted(rate for _, rate in rates)
    assert rates[-1][1] == pytest.approx(TRUE.peak_flops_per_s["float32"].value, rel=0.02)


def test_a_larger_call_never_takes_less_time() -> None:
    points = [(1e6, 1e6, 1e-3), (1.1e6, 1.1e6, 1e-3), (4e6, 4e6, 1e-3), (2e7, 2e7, 1e-3)]
    found = measuring._bins(points)
    seconds = [size / rate for size, rate in found]
    assert seconds == sorted(seconds)


def test_every_operator_that_is_priced_is_timed() -> None:
    """Forward and backward, each once; all seconds are positive where a kernel has work."""
    program = program_of("llama", num_hidden_layers=1)
    found = timeline(program, batch=2, seq=16, budget_s=0.0, watch=Stopwatch(CPU))
    parts = kernels(list(program.graph.ops()), Size(2, 16), OURS)
    expected = sum((len(part.forward) > 0) + (len((*part.backward, *part.weight)) > 0) for part in parts)
    assert len(found) == pytest.approx(expected, abs=3)  # a gradient that nothing needs is not computed
    assert sum(part.seconds > 0 for part in found) > 0.9 * len(found)


@pytest.fixture(scope="module")
def table() -> CostTable:
    """Measured here, the smallest models only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "MODEL_SIZES", {"cpu": measuring.MODEL_SIZES["cpu"][:1]})
        patch.setattr(measuring, "measure_links", lambda *_, **__: Links(1e-4, 3e9, 0.4))
        return measuring.profile("cpu", budget_s=4.0)


def test_this_machine_has_a_table(table: CostTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_table(table.model_dump_json(exclude_none=True), file_name="cpu.json") == table
    assert table.memory_curve is not None
    figures = json.loads(table.model_dump_json(exclude_none=True))
    measured = ["memory_bandwidth_bytes_per_s", "memory_efficiency", "attention_efficiency", "launch_overhead_s"]
    assert {figures[name]["kind"] for name in measured} == {"measured"}
    assert all("autoparallel profile" in figures[name]["source"] for name in measured)
    assert 1e8 < table.peak_flops_per_s["float32"].value < 1e13
    (tmp_path / "cpu.json").write_text(table.model_dump_json(exclude_none=True))
    before = load_table("cpu")
    monkeypatch.setenv("AUTOPARALLEL_COST_MODELS", str(tmp_path))
    assert load_table("cpu") == table != before
    assert "H100-SXM5-80GB" in available_devices(), "other devices keep our tables"


def test_a_folder_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPARALLEL_COST_MODELS", "/nowhere")
    with pytest.raises(ConfigError, match=r"no folder '/nowhere' of cost tables"):
        load_table("cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="there is no device"):
        measuring.profile(device)


def test_a_file_is_no_folder_for_tables(tmp_path: Path) -> None:
    (tmp_path / "tables").touch()
    done = CliRunner().invoke(app, ["profile", "-o", str(tmp_path / "tables")])
    assert done.exit_code == ConfigError("").exit_code
    assert "cannot be made" in done.output


def test_links_between_two_processes() -> None:
    links = measuring.measure_links("cpu", 2, budget_s=0.5)
    assert 1e-6 < links.latency_s < 0.1
    assert 1e7 < links.bandwidth_bytes_per_s < 1e12
    assert 0 < links.efficiency <= 1


def test_random_weights_have_the_captured_shapes() -> None:
    config: Any = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=1, vocab_size=128)
    program = capture(config, dtype=torch.float32)
    found = timeline(program, batch=1, seq=8, budget_s=0.0, watch=Stopwatch(CPU))
    assert {part.kernels[0].kind for part in found} == {"matmul", "attention", "memory"}
