"""Tiny models of several families, batches with ragged padding, and a float64 world to compare in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from autoparallel.capture.program import Program, capture

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=5, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, tie_word_embeddings=True),
}
UNSEEN: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2-untied": lambda: transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "gpt2-untied": lambda: transformers.GPT2Config(**_GPT2, tie_word_embeddings=False),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=5, attn_implementation="eager"),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
}


def make_model(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """A training-mode model; `changes` override its config."""
    config = {**FAMILIES, **UNSEEN}[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def make_batch(rows: int, seq: int, *, seed: int = 1, padded: bool = True) -> dict[str, Tensor]:
    """Random tokens; with `padded`, rows differ in their number of ignored labels, and one row ignores some of its own
    tokens too.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (rows, seq), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        for row in range(rows):
            attention_mask[row, seq - (3 * row) % (seq - 2) :] = 0 if (3 * row) % (seq - 2) else 1
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    if padded:
        labels[0, : seq // 2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class _Lift(TorchFunctionMode):
    """Every cast to float32 becomes one to float64, so that two programs can be compared beyond single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].to(torch.float64)
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def lifted() -> Iterator[None]:
    """Inside, models that upcast to float32 upcast to float64."""
    with _Lift():
        yield


@functools.cache
def program_of(
    family: str, *, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, **changes: Any
) -> Program:
    """Captured once a process, graph and all: what `run_ranks` is to do first."""
    program = capture(make_model(family, dtype=dtype, **changes), dtype=compute)
    assert program.graph.parameters
    return program
