"""Flavors: every form resolves to the hardware it names; anything else is a ConfigError with the nearest name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoparallel.cost import flavors
from autoparallel.cost.flavors import list_flavors, nvidia_models, resolve_flavor
from autoparallel.errors import ConfigError
from autoparallel.ir.flavor import Flavor

NUM_CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", list_flavors())
def test_every_listed_flavor_resolves(name: str) -> None:
    flavor = resolve_flavor(name)
    assert resolve_flavor(flavor.name) == flavor
    assert resolve_flavor(name.swapcase()) == flavor


@pytest.mark.parametrize(
    ("name", "dies", "hosts"),
    [("Small.64GB", 1, 1), ("xLarge.512GB", 8, 1), ("1.5xLarge.768GB", 12, 2), ("48xLarge.24576GB", 384, 48)],
)
def test_named_sizes_count_mi250_dies(name: str, dies: int, hosts: int) -> None:
    flavor = resolve_flavor(name)
    assert (flavor.device, flavor.num_devices, flavor.num_hosts) == ("MI250", dies, hosts)
    assert flavor.memory_bytes == 65_520 * 2**20


@pytest.mark.parametrize(
    ("text", "devices", "per_host"),
    [
        ("H200", 1, 1),
        ("8xH200", 8, 8),
        ("4x8xH200", 32, 8),
        ("3x2xH200", 6, 2),
        (" 2xh200 ", 2, 2),
        ("72xGB200", 72, 72),
    ],
)
def test_counted_gpus(text: str, devices: int, per_host: int) -> None:
    flavor = resolve_flavor(text)
    assert (flavor.num_devices, flavor.devices_per_host, flavor.is_cpu) == (devices, per_host, False)


def test_cpu_processes_share_the_host() -> None:
    one, four = resolve_flavor("cpu"), resolve_flavor("cpu:4")
    assert (four.num_devices, four.devices_per_host, four.cores_per_host) == (4, 4, NUM_CORES)
    assert four.memory_bytes == one.memory_bytes // 4


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("8xH100", "8xH100-SXM5-80GB"),
        ("8xH100-SXM5-80G", "8xH100-SXM5-80GB"),
        ("4xLarge", "4xLarge.2048GB"),
        ("xlrge.512GB", "xLarge.512GB"),
        ("MI300", "MI300X"),
        ("16xH200", "2x8xH200"),
        ("3x16xH200", "6x8xH200"),
        ("0xH200", "no devices"),
        ("4x0xH200", "no devices"),
        ("cpu:0", "no devices"),
        ("cpu:-1", "cpu:4"),
        ("2xcpu", "cpu:4"),
        ("2x2x2xH200", "unknown flavor"),
        ("", "unknown flavor"),
        ("missing.json", "cannot read"),
        ("a\0/b", "cannot read"),
        (os.sep, "cannot read"),
    ],
)
def test_bad_flavor(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_flavor(text)
    assert hint in str(caught.value)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    flavor = Flavor(name="mine", device="H200", num_devices=6, devices_per_host=4, memory_bytes=2**37)
    path.write_text(flavor.model_dump_json())
    assert resolve_flavor(path) == resolve_flavor(str(path)) == flavor
    path.write_text(flavor.model_dump_json().replace('"num_devices":6', '"num_devices":0'))
    with pytest.raises(ConfigError, match="num_devices"):
        resolve_flavor(path)


def test_flavor_must_fit_its_device() -> None:
    fields: dict[str, Any] = {"name": "f", "num_devices": 1, "devices_per_host": 1, "memory_bytes": 2**30}
    with pytest.raises(ConfigError, match="H200"):
        resolve_flavor(Flavor(device="H20", **fields))
    with pytest.raises(ConfigError, match="cores_per_host"):
        resolve_flavor(Flavor(device="cpu", **fields))
    with pytest.raises(ConfigError, match="cores_per_host"):
        resolve_flavor(Flavor(device="H200", cores_per_host=4, **fields))


def _driver(tmp_path: Path, *models: str) -> Path:
    for index, model in enumerate(models):
        (tmp_path / f"0000:{index:02d}:00.0").mkdir()
        (tmp_path / f"0000:{index:02d}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 7\n")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GB200", "GB200"),
    ],
)
def test_local_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, device: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(flavors, "NVIDIA_GPUS", _driver(tmp_path, model, model))
    assert resolve_flavor("local") == resolve_flavor(f"2x{device}")


def test_local_gpus_that_cannot_be_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(flavors, "NVIDIA_GPUS", _driver(tmp_path, "NVIDIA H200", "Quadro 1"))
    with pytest.raises(ConfigError, match="differ"):
        resolve_flavor("local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match="Quadro 1"):
        resolve_flavor("local")


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,7,0", 1), ("GPU-1,GPU-2", 2)]
)
def test_visible_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_models(_driver(tmp_path, "NVIDIA H200", "NVIDIA H200")) == ["NVIDIA H200"] * count


def test_local_without_a_driver_is_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavors, "NVIDIA_GPUS", tmp_path)
    assert resolve_flavor("local").name == f"cpu:{NUM_CORES}"


def test_resolving_imports_no_torch() -> None:
    code = (
        "import sys; from autoparallel.cost.flavors import *; resolve_flavor('local'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
