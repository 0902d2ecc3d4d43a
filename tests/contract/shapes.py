"""A loop of its own: batches of many shapes, accumulation over unequal ones, GradScaler, a schedule, evaluation in
between, and a checkpoint of model, optimizer and scheduler that a fresh model goes on from. `--plan` adds the one line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--plan", type=json.loads)
args = parser.parse_args()


def make() -> tuple[Any, ...]:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if args.plan:
        import autoparallel

        model = autoparallel.compile(model, constraints=autoparallel.Constraints(**args.plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    return model.train(), optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=128.0)


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, 96, (rows, tokens))
    mask = torch.ones_like(input_ids)
    mask[::2, tokens - 2 :] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


def step(parts: list[dict[str, torch.Tensor]]) -> None:
    """One optimizer step over several batches, weighted by their tokens."""
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    total = 0.0
    for part, count in zip(parts, counts, strict=True):
        loss = model(**part, use_cache=False).loss * count / sum(counts)
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    model.zero_grad(set_to_none=True)
    losses.append(total)


def evaluate(**inputs: torch.Tensor) -> None:
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
    losses.append(outputs.loss.item())
    shapes.append(list(outputs.logits.shape))
    model.train()


torch.manual_seed(0)
losses: list[float] = []
norms: list[float] = []
shapes: list[list[int]] = []
model, optimizer, schedule, scaler = make()
evaluate(**batch(3, 9))
step([batch(8, 12)])
step([batch(8, 10), batch(5, 12)])
evaluate(**batch(6, 11))
path = args.out / "checkpoint.pt"
args.out.mkdir(exist_ok=True)
torch.save([part.state_dict() for part in (model, optimizer, schedule, scaler)], path)

parts = model, optimizer, schedule, scaler = make()
for part, state in zip(parts, torch.load(path, weights_only=True), strict=True):
    part.load_state_dict(state)
step([batch(8, 12)])
step([batch(1, 7), batch(7, 5), batch(8, 12)])
evaluate(**batch(2, 4))
torch.save(model.state_dict(), args.out / "state.pt")
print(json.dumps([losses, norms, shapes, schedule.get_last_lr(), scaler.get_scale()]))
