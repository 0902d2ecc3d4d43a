"""An ordinary single-device training script. `--line` says where the one line goes; "none" runs it plain."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--line", choices=["none", "compile", "before", "after"], default="none")
parser.add_argument("--optimizer-first", action="store_true")
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()

if args.line == "before":
    import autoparallel

    autoparallel.enable_advanced_parallelization()

model = AutoModelForCausalLM.from_pretrained(args.model)
if args.optimizer_first:
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
if args.line == "compile":
    import autoparallel

    model = autoparallel.compile(model)
if args.line == "after":
    import autoparallel

    autoparallel.enable_advanced_parallelization()
if not args.optimizer_first:
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

# Unseeded on purpose where ranks are concerned: each has its own order, and rank 0's must be everyone's.
torch.manual_seed(0)
tokens = torch.randint(1, 96, (16, 12))
mask = torch.ones_like(tokens)
mask[::3, 8:] = 0
loader = DataLoader(TensorDataset(tokens, mask), batch_size=4, shuffle=True, drop_last=True)

model.train()
losses, norms, evaluations = [], [], []
for _epoch in range(2):
    for input_ids, attention_mask in loader:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        loss = outputs[0]
        assert torch.equal(loss, outputs.loss)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optim.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        outputs = model(input_ids=tokens[:6], attention_mask=mask[:6], labels=tokens[:6], use_cache=False)
    evaluations += [outputs.loss.item(), outputs.logits.abs().mean().item(), list(outputs.logits.shape)]
    model.train()

model.save_pretrained(args.out)
print("autoparallel" in sys.modules, "the user's own output")
print(json.dumps({"losses": losses, "norms": norms, "evaluations": evaluations}))
