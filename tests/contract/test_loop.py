"""The unchanged loop: one script, plain and with one line added, has the same losses, norms, evaluations and
checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import make_model

SCRIPT = Path(__file__).with_name("loop.py")
LIMIT_S = 150


def run(model: Path, out: Path, *options: str, flavor: str = "", launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    environment = (
        {**os.environ, "OMP_NUM_THREADS": "1", "AUTOPARALLEL_FLAVOR": flavor}
        if flavor
        else {**os.environ, "OMP_NUM_THREADS": "1"}
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(model), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.strip()]
    assert sum("the user's own output" in line for line in said) == 1, done.stdout
    found: dict[str, Any] = json.loads(said[-1])
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saved models by family, with the plain script's results."""
    made: dict[str, tuple[Path, dict[str, Any], Path]] = {}

    def reference(family: str) -> tuple[Path, dict[str, Any], Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make_model(family, dtype=torch.float32).save_pretrained(folder / "model")
            made[family] = (folder / "model", run(folder / "model", folder / "plain"), folder / "plain")
        return made[family]

    return reference


def check(reference: tuple[Path, dict[str, Any], Path], found: dict[str, Any], out: Path) -> None:
    _, expected, plain = reference
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-3)
    assert found["evaluations"][2::3] == expected["evaluations"][2::3]
    for index in (0, 1, 3, 4):
        assert found["evaluations"][index] == pytest.approx(expected["evaluations"][index], rel=2e-3)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, plain))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=5e-2, atol=2e-3)
    assert (out / "config.json").read_text() == (plain / "config.json").read_text()


def slow(family: str, *, in_ci: bool = True) -> Any:
    return pytest.param(family, marks=pytest.mark.slow if in_ci else pytest.mark.exhaustive)


@pytest.mark.parametrize(
    "family", [slow("gemma2", in_ci=False), slow("llama", in_ci=False), slow("phi3", in_ci=False), slow("gpt_neox")]
)
def test_a_family_nobody_wrote_code_for(family: str, references: Any, tmp_path: Path) -> None:
    reference = references(family)
    check(reference, run(reference[0], tmp_path / "out", "--line", "compile", flavor="cpu:2"), tmp_path / "out")


LINES = [pytest.param(("--line", "before"), marks=pytest.mark.slow), ("--line", "after", "--optimizer-first")]


@pytest.mark.parametrize("options", LINES, ids=["before", "after"])
def test_the_one_line(options: tuple[str, ...], references: Any, tmp_path: Path) -> None:
    reference = references("qwen2")
    check(reference, run(reference[0], tmp_path / "out", *options, flavor="cpu:2"), tmp_path / "out")


@pytest.mark.slow
def test_an_optimizer_made_before_compile_on_four_processes(references: Any, tmp_path: Path) -> None:
    reference = references("qwen2")
    found = run(reference[0], tmp_path / "out", "--line", "compile", "--optimizer-first", flavor="cpu:4")
    check(reference, found, tmp_path / "out")


@pytest.mark.slow
def test_torchrun_is_the_same(references: Any, tmp_path: Path) -> None:
    reference = references("qwen2")
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--rdzv-backend",
        "c10d",
    )
    found = run(reference[0], tmp_path / "out", "--line", "compile", flavor="cpu:2", launcher=torchrun)
    check(reference, found, tmp_path / "out")
