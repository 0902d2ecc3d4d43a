"""Step 2: a plain single-device training script with one line added. It knows nothing of ranks, stages or shards.

python examples/train_smollm2.py                                  # all of this machine
AUTOPARALLEL_FLAVOR=cpu:4 python examples/train_smollm2.py        # four processes, the same script
python examples/train_smollm2.py --plain                          # without the line
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoparallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-tuned"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = torch.load(args.model / "blocks.pt", weights_only=True)
    dataset = TensorDataset(data["input_ids"], data["attention_mask"])
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, drop_last=True)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    if not args.plain:
        model = autoparallel.compile(model)
    model.train()
    optim = torch.optim.AdamW(model.parameters(), lr=args.lr)

    durations, losses = [], []
    for step, (input_ids, attention_mask) in zip(range(args.steps), loader, strict=False):
        start = time.perf_counter()
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        loss = outputs[0]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        model.zero_grad(set_to_none=True)
        durations.append(time.perf_counter() - start)
        losses.append(loss.item())
        print(
            f"[Step {step + 1}/{args.steps}] | Loss: {loss.item():.6f} | Grad norm: {norm.item():.4f} | "
            f"Duration: {durations[-1]:.2f} | Throughput: {input_ids.numel() / durations[-1]:.1f} tokens/sec",
            flush=True,
        )

    if not args.plain:
        plan = model.parallel_plan
        steady = sorted(durations[1:])[len(durations[1:]) // 2]
        print(plan.explain())
        predicted = plan.estimate.step_time_s
        print(f"step time: {predicted:.2f} s predicted, {steady:.2f} s measured (median of steps 2 to {args.steps})")
        plan.save("runs/plan.json")

    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    (args.out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
