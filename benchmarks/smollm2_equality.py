"""Claim: fine-tuning SmolLM2-135M on several processes is fine-tuning it on one.

Runs the demo's loop plain, on cpu:2 and on cpu:4 (each in a process of its own), and prints the largest relative
difference of the losses of every step, of the first gradient norm, and of five named gradients of the first step.

    python examples/prepare_smollm2.py && python benchmarks/smollm2_equality.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

MODEL = Path("runs/smollm2")
NAMED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.14.mlp.down_proj.weight",
    "model.layers.29.input_layernorm.weight",
    "model.norm.weight",
]


def train(out: Path, steps: int, *, plain: bool) -> None:
    """The demo's loop, with what the comparison needs written down."""
    torch.manual_seed(0)
    data = torch.load(MODEL / "blocks.pt", weights_only=True)
    loader = DataLoader(TensorDataset(data["input_ids"]), batch_size=8, shuffle=True, drop_last=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    if not plain:
        import autoparallel

        model = autoparallel.compile(model)
    model.train()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, norms, gradients = [], [], {}
    for step, (input_ids,) in zip(range(steps), loader, strict=False):
        loss = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids, use_cache=False)[
            0
        ]
        loss.backward()
        if step == 0:
            parameters = dict(model.named_parameters())
            gradients = {n: (parameters[n].grad if plain else model.gradient(n)).clone() for n in NAMED}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optim.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    if plain or torch.distributed.get_rank() == 0:
        summary = "" if plain else model.parallel_plan.strategy.summary()
        torch.save({"losses": losses, "norms": norms, "gradients": gradients, "plan": summary}, out)


def run(flavor: str, out: Path, steps: int) -> dict:
    command = [sys.executable, __file__, "--worker", flavor, "--out", str(out), "--steps", str(steps)]
    environment = {**os.environ, "AUTOPARALLEL_FLAVOR": "" if flavor == "plain" else flavor}
    subprocess.run(command, check=True, env=environment)
    return torch.load(out, weights_only=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if args.worker:
        train(args.out, args.steps, plain=args.worker == "plain")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            flavor: run(flavor, Path(folder, flavor.replace(":", "")), args.steps)
            for flavor in ("plain", "cpu:2", "cpu:4")
        }
    plain = found.pop("plain")
    first, last = plain["losses"][0], plain["losses"][-1]
    print(f"plain: loss {first:.6f} -> {last:.6f} ({1 - last / first:.1%} lower), first norm {plain['norms'][0]:.6f}")
    for flavor, result in found.items():
        worst = max(abs(a - b) / b for a, b in zip(result["losses"], plain["losses"], strict=True))
        norm = abs(result["norms"][0] - plain["norms"][0]) / plain["norms"][0]
        print(f"{flavor}: {result['plan']}")
        print(f"  worst relative loss difference of {args.steps} steps {worst:.1e}, first gradient norm {norm:.1e}")
        for name in NAMED:
            print(f"  gradient of step 1, {name}: {relative(result['gradients'][name], plain['gradients'][name]):.1e}")


if __name__ == "__main__":
    main()
