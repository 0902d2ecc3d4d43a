"""HF Trainer on a peft model: checkpoints hold the adapter, the best one is loaded, and a run resumes from one.
`--plan` adds the one line, the other of the two: before any model is made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--plan", type=json.loads)
args = parser.parse_args()

if args.plan:
    import autoparallel

    autoparallel.enable_advanced_parallelization(**args.plan)

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(1, 96, (18, 8), generator=generator)
rows = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(
    args.out,
    per_device_train_batch_size=4,
    num_train_epochs=2,
    learning_rate=1e-2,
    adam_epsilon=1e-3,
    logging_steps=2,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    use_cpu=True,
    report_to=[],
)


def trainer() -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), lora)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:7])


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=str(args.out / "checkpoint-5"))
torch.save(resumed.model.state_dict(), args.out / "state.pt")
history = first.state.log_history + resumed.state.log_history
print(json.dumps([{k: v for k, v in entry.items() if k in ("loss", "grad_norm", "eval_loss")} for entry in history]))
