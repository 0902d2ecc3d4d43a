"""Claim: after `autoparallel profile`, the predicted step time of a single process is that of this machine within 10 %.

Six models, from a config (and SmolLM2-135M) to steps of an ordinary loop: forward, backward, AdamW in one kernel, one
thread. Predicted from the table alone: no step of these models was looked at.

    python examples/prepare_smollm2.py && python -m benchmarks.self_consistency
    python -m benchmarks.self_consistency --tables FOLDER      (with a table that `autoparallel profile` wrote)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

import autoparallel
from autoparallel.cost.tables import CostTable, parse_table
from autoparallel.measure.profile import profile

LIMIT = 0.10
STEPS = 9
SMOLLM2 = Path("runs/smollm2")


def llama(hidden: int, layers: int, vocabulary: int) -> PretrainedConfig:
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=vocabulary,
    )


def gpt2(hidden: int, layers: int, vocabulary: int) -> PretrainedConfig:
    return transformers.GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=hidden // 64, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None
    )


def qwen2(hidden: int, layers: int, vocabulary: int) -> PretrainedConfig:
    return transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Case:
    name: str
    config: Callable[[], PretrainedConfig]
    rows: int
    tokens: int


CASES = (
    Case("Llama 256 x 4, vocabulary 1k", lambda: llama(256, 4, 1024), 8, 128),
    Case("Llama 512 x 8, vocabulary 8k", lambda: llama(512, 8, 8192), 4, 128),
    Case("Llama 1024 x 4, vocabulary 32k", lambda: llama(1024, 4, 32000), 4, 128),
    Case("GPT-2 512 x 6, vocabulary 49k", lambda: gpt2(512, 6, 49152), 4, 128),
    Case("Qwen2 768 x 12, vocabulary 16k", lambda: qwen2(768, 12, 16384), 2, 256),
    Case("SmolLM2-135M", lambda: transformers.AutoConfig.from_pretrained(SMOLLM2), 4, 64),
)


@dataclass(frozen=True)
class Row:
    model: str
    predicted_s: float
    measured_s: float
    spread: float
    """Of the measured steps: the middle half over the median."""

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def compared(case: Case, table: CostTable) -> Row:
    config = case.config()
    strategy = autoparallel.Strategy(batch_per_device=case.rows)
    predicted = autoparallel.estimate(
        config, "cpu:1", strategy, batch_size=case.rows, seq_len=case.tokens, dtype="float32", table=table
    )
    seconds = measured_s(config, case.rows, case.tokens)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Row(case.name, predicted.step_time_s, middle, (high - low) / middle)


def measured_s(config: PretrainedConfig, rows: int, tokens: int) -> list[float]:
    """Of each step but the first two."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids = torch.randint(0, config.vocab_size, (rows, tokens))
    found = []
    for _ in range(STEPS + 2):
        begin_s = time.perf_counter()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - begin_s)
    return found[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder of a cpu.json; default: measure one now")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds to measure")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tables is None:
        table = profile("cpu", budget_s=args.budget)
    else:
        table = parse_table((args.tables / "cpu.json").read_bytes(), file_name="cpu.json")
    rows = [compared(case, table) for case in CASES]
    mean = statistics.mean(abs(row.error) for row in rows)
    if args.json:
        facts: list[dict[str, Any]] = [asdict(row) | {"error": row.error} for row in rows]
        print(json.dumps({"rows": facts, "mean_absolute_error": mean, "limit": LIMIT}, indent=1))
    else:
        print(f"{'model':<34} {'predicted':>10} {'measured':>10} {'error':>7} {'spread':>7}")
        for row in rows:
            times = f"{row.predicted_s:>8.3f} s {row.measured_s:>8.3f} s"
            print(f"{row.model:<34} {times} {row.error:>+7.1%} {row.spread:>7.1%}")
        print(f"mean absolute error {mean:.1%} (asked: at most {LIMIT:.0%})")
    sys.exit(mean > LIMIT)


if __name__ == "__main__":
    main()
