"""Claim: a rank's host memory while a model is loaded and saved is its shard, the largest tensor and a constant.

Writes a TinyLlama-1.1B-shaped model with random weights as safetensors shards, then for each plan starts one process
per rank, which loads, places and saves it. Memory is VmHWM of /proc/self/status, the peak of resident memory,
file-mapped pages included, reset before each phase; shown above what was resident after imports and launch. Exit code 1
when a rank needs more than its shard + the largest tensor + an allowance (500 MiB).

    python benchmarks/weights_memory.py                     # fp32, 4 ranks; 8.2 GiB of disk
    python benchmarks/weights_memory.py --eager  # without the line before from_pretrained
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import autoparallel

MIB = 1 << 20
NUM_RANKS, ROWS, SEQ_LEN = 4, 4, 64
PLANS: dict[str, dict[str, Any]] = {
    "pipelined": {"num_stages": 4, "tensor_parallel": 1, "distribute_parameter": 0},
    "tensor-parallel": {"num_stages": 1, "tensor_parallel": 4, "distribute_parameter": 0},
    "sharded": {"num_stages": 1, "tensor_parallel": 1, "distribute_parameter": 3},
    "sharded stages": {"num_stages": 2, "tensor_parallel": 1, "distribute_parameter": 1},
}
FLAVOR = autoparallel.Flavor(
    name="cpu:4", device="cpu", num_devices=4, devices_per_host=4, memory_bytes=1 << 38, cores_per_host=4
)


def config_of(layers: int) -> LlamaConfig:
    """TinyLlama-1.1B at 22 layers."""
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip


def write_model(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """A checkpoint with one shard a layer; the bytes of its largest tensor."""
    config = config_of(layers)
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in shards.items():
        save_file(
            {n: torch.randn(shapes[n], dtype=dtype) * 0.02 for n in names}, folder / file, metadata={"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(shape.numel() for shape in shapes.values()) * dtype.itemsize


def resident() -> tuple[int, int]:
    """(now, peak) bytes of this process."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(model_path: Path, plan_path: Path, out: Path, *, eager: bool) -> None:
    """One rank: load, place, save; its peaks go to a file."""
    plan = autoparallel.Plan.load(plan_path)
    if not eager:
        autoparallel.enable_advanced_parallelization(plan.flavor)
    forget_peak()
    baseline = resident()[0]
    model = AutoModelForCausalLM.from_pretrained(model_path).train()
    tokens = torch.ones(ROWS, SEQ_LEN, dtype=torch.long)
    model = autoparallel.compile(model, plan=plan, example_inputs={"input_ids": tokens, "labels": tokens})
    held, loading = resident()
    forget_peak()
    model.save_pretrained(out / "saved", max_shard_size="1GB")
    saving = resident()[1]
    shard = sum(p.nbytes for p in model.parameters())
    peaks = {"shard": shard, "held": held - baseline, "loading": loading - baseline, "saving": saving - baseline}
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(peaks))


def measure(name: str, model_path: Path, folder: Path, *, eager: bool) -> list[dict[str, int]]:
    constraints = autoparallel.Constraints(**PLANS[name])
    plan = autoparallel.plan(
        str(model_path), FLAVOR, batch_size=ROWS, seq_len=SEQ_LEN, dtype="auto", constraints=constraints, workers=0
    )
    out = folder / name.replace(" ", "-")
    out.mkdir()
    plan.save(out / "plan.json")
    command = [sys.executable, __file__, "--worker", str(model_path), "--out", str(out), *(["--eager"] * eager)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    shutil.rmtree(out / "saved")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def show(name: str, peaks: list[dict[str, int]], more: int) -> bool:
    """Print one table; whether every rank stayed below its bound."""
    print(f"\n{name}: MiB above the baseline\nrank   shard    bound  loading   saving   afterwards held")
    fits = True
    for rank, found in enumerate(peaks):
        bound = found["shard"] + more
        fits &= max(found["loading"], found["saving"]) <= bound
        figures = [found["shard"], bound, found["loading"], found["saving"], found["held"]]
        print(f"{rank:4}" + "".join(f"{figure / MIB:9.0f}" for figure in figures))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--allowance-mib", type=int, default=500)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.out / "plan.json", args.out, eager=args.eager)
        return
    with tempfile.TemporaryDirectory() as folder:
        model_path = Path(folder, "model")
        largest = write_model(model_path, args.layers, getattr(torch, args.dtype))
        size = sum(path.stat().st_size for path in model_path.iterdir())
        print(f"model {size / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB, {NUM_RANKS} ranks")
        more = largest + args.allowance_mib * MIB
        fits = [show(n, measure(n, model_path, Path(folder), eager=args.eager), more) for n in args.plans]
    sys.exit(0 if all(fits) else 1)


if __name__ == "__main__":
    main()
