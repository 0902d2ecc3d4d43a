"""HF Trainer with an ordinary TrainingArguments: accumulation, clipping, evaluation, the best checkpoint, resuming.
Rows differ in length, and batches, epochs and accumulation leave remainders. `--plan` adds the one line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--plan", type=json.loads)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()


def load() -> Any:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if args.plan:
        import autoparallel

        model = autoparallel.compile(model, constraints=autoparallel.Constraints(**args.plan))
    return model


class Journal(TrainerCallback):
    """Writes a line for each log, as a user's own callback would."""

    def on_log(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with open(args.out / "journal.txt", "a") as file:
                file.write(f"{state.global_step}\n")


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": padded.masked_fill(padded == 0, -100)}


def accuracy(found: Any) -> dict[str, float]:
    hits = (found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]) & (found.label_ids[:, 1:] != -100)
    return {"accuracy": float(hits.sum() / (found.label_ids[:, 1:] != -100).sum())}


generator = torch.Generator().manual_seed(0)
rows = [torch.randint(1, 96, (6 + 2 * (i % 4),), generator=generator) for i in range(22)]
arguments = TrainingArguments(
    args.out,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=6,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    num_train_epochs=2,
    learning_rate=1e-2,
    adam_epsilon=1e-3,
    max_grad_norm=0.5,
    logging_steps=1,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    use_cpu=True,
    bf16=args.bf16,
    report_to=[],
)
args.out.mkdir(exist_ok=True)


def trainer() -> Any:
    data = {"train_dataset": rows[:18], "eval_dataset": rows[15:]}
    callbacks = [Journal()]
    return Trainer(load(), arguments, collate, **data, compute_metrics=accuracy, callbacks=callbacks)


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=str(args.out / "checkpoint-3"))
resumed.save_model(str(args.out / "final"))

history = [first.state.log_history, resumed.state.log_history]
kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "train_loss", "total_flos", "step")
torch.save(resumed.model.state_dict(), args.out / "state.pt")
print(json.dumps([[{k: v for k, v in entry.items() if k in kept} for entry in entries] for entries in history]))
