"""LoRA through peft: a frozen base, an adapter saved, reloaded and trained on. `--plan` adds the one line, with
`--base-first` before the adapter is put in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--plan", type=json.loads)
parser.add_argument("--base-first", action="store_true")
args = parser.parse_args()


def one_line(model: Any) -> Any:
    if args.plan:
        import autoparallel

        model = autoparallel.compile(model, constraints=autoparallel.Constraints(**args.plan))
    return model


base = AutoModelForCausalLM.from_pretrained(args.model)
if args.base_first:
    base = one_line(base)
torch.manual_seed(0)
config = LoraConfig(r=6, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1])
model = get_peft_model(base, config)
if not args.base_first:
    model = one_line(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
tokens = torch.randint(1, 96, (5, 8, 10))

losses, norms = [], []
for step in range(4):
    loss = model(input_ids=tokens[step], labels=tokens[step]).loss
    loss.backward()
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step == 1:
        model.save_pretrained(args.out / "early")
        early = {name: value.clone() for name, value in model.state_dict().items()}

frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
assert all(parameter.grad is None and parameter not in optimizer.state for parameter in frozen)
moments = sum(state["exp_avg"].numel() for state in optimizer.state_dict()["state"].values())
assert moments == sum(value.numel() for name, value in model.state_dict().items() if "lora_" in name)

model.load_adapter(args.out / "early", "default")
assert all(torch.equal(value, early[name]) for name, value in model.state_dict().items())
model.eval()
with torch.no_grad():
    evaluation = model(input_ids=tokens[4], labels=tokens[4])
model.save_pretrained(args.out / "adapter")
plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.out / "adapter").eval()
with torch.no_grad():
    torch.testing.assert_close(plain(input_ids=tokens[4]).logits, evaluation.logits, rtol=1e-4, atol=1e-5)
torch.save(model.state_dict(), args.out / "state.pt")
print(json.dumps([losses, norms, evaluation.loss.item(), moments]))
