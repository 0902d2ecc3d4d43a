"""Dropout: off in evaluation, and the same again from the same seed or from a saved random state. `--plan` adds the one
line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--plan", type=json.loads)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
if args.plan:
    import autoparallel

    model = autoparallel.compile(model, constraints=autoparallel.Constraints(**args.plan))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tokens = torch.randint(1, 96, (8, 12), generator=torch.Generator().manual_seed(1))


def train(steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


model.eval()
with torch.no_grad():
    evaluations = [model(input_ids=tokens, labels=tokens).loss.item() for _ in range(2)]
model.train()
assert evaluations[0] == evaluations[1]
start = {name: value.clone() for name, value in model.state_dict().items()}

torch.manual_seed(5)
losses = train(2)
middle, random_state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
losses += train(2)

model.load_state_dict(start)
torch.manual_seed(5)
assert train(4) == losses
model.load_state_dict(middle)
torch.set_rng_state(random_state)
assert train(2) == losses[2:]
model.load_state_dict(start)
torch.manual_seed(6)
assert train(1) != losses[:1]
model.load_state_dict(start)
torch.save(model.state_dict(), args.out / "state.pt")
print(json.dumps([evaluations]))
