"""The model of a row in, the nearest Hugging Face architecture out: by family where known, by fields otherwise."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.published.rows import ModelFacts, Unexpressed, stated

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """A family of decoders as Hugging Face builds them."""

    model_type: str
    gated: bool
    tied: bool
    """Whether input and output embeddings are one, unless the row says otherwise."""
    biases: bool
    learned_positions: bool = False
    grouped: bool = True
    """Whether it can have fewer key heads than query heads."""
    normalizations: int = 1
    """Parameters of a normalization, per hidden element."""


GPT = Architecture("gpt2", gated=False, tied=True, biases=True, learned_positions=True, grouped=False, normalizations=2)
LLAMA = Architecture("llama", gated=True, tied=False, biases=False)
NEMOTRON = Architecture("nemotron", gated=False, tied=False, biases=False, normalizations=2)
NEOX = Architecture("gpt_neox", gated=False, tied=False, biases=True, grouped=False, normalizations=2)
STARCODER = Architecture("starcoder2", gated=False, tied=True, biases=True, normalizations=2)

FAMILIES: tuple[tuple[str, Architecture, str], ...] = (
    (r"neox|pythia|gpt-?j\b|\bphi-?[12]", NEOX, ""),
    (r"nemotron", NEMOTRON, ""),
    (r"bloom", GPT, "ALiBi is priced as learned positions"),
    (r"\bmpt", GPT, "MPT is priced as GPT-2, which has the same matmuls, biases and learned positions"),
    (r"gpt|\bopt\b|turing|megatron", GPT, ""),
    (r"gemma", replace(LLAMA, tied=True), ""),
    (r"llama|mistral|qwen|internlm|\byi\b|deepseek|baichuan|vicuna|olmo|granite|\bphi", LLAMA, ""),
)
"""A pattern in the family or name of a row, the architecture it stands for, and what is not quite the same."""
NOT_DECODERS = r"bert|(?<![a-z])(m?t5|vit|bart|dit|clip)\b|whisper|mamba|rwkv|diffusion|u-?net|resnet"
EXPERTS = r"mixtral|\bmoe|dbrx|switch|\d+x\d+b"


@dataclass(frozen=True)
class Structure:
    """A model without its weights: equal structures are captured once."""

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    seq_len: int
    tied: bool
    dropout: float = 0.0
    attention_bias: bool = False

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = (3 if self.architecture.gated else 2) * self.hidden * self.ffn_hidden
        norms = 2 * self.architecture.normalizations * self.hidden
        biases = 0
        if self.architecture.biases or self.attention_bias:
            biases += self.head_dim * (self.heads + 2 * self.kv_heads) + self.hidden
        if self.architecture.biases:
            biases += self.ffn_hidden + self.hidden
        return attention + mlp + norms + biases

    @property
    def num_parameters(self) -> int:
        """Tied embeddings once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        positions = self.seq_len * self.hidden if self.architecture.learned_positions else 0
        return (
            self.layers * self.block_parameters
            + embeddings
            + positions
            + self.architecture.normalizations * self.hidden
        )

    @property
    def train_flops_per_token(self) -> float:
        """Forward and backward, causality not subtracted: six for each weight that multiplies, twelve times hidden for
        each layer and each token attended to (Narayanan et al., arXiv 2104.04473; Chowdhery et al., arXiv 2204.02311).
        """
        mlp = (3 if self.architecture.gated else 2) * self.hidden * self.ffn_hidden
        block = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + mlp
        attention = 12 * self.layers * self.heads * self.head_dim * self.seq_len
        return float(6 * (self.layers * block + self.vocab * self.hidden) + attention)

    def config(self) -> PretrainedConfig:
        """Torch is imported here, and only here."""
        import transformers

        return transformers.AutoConfig.for_model(self.architecture.model_type, **self._settings())

    def _settings(self) -> dict[str, Any]:
        common: dict[str, Any] = {
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if self.architecture.model_type == "gpt2":
            return common | {
                "n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads, "n_inner": self.ffn_hidden,
                "n_positions": self.seq_len, "resid_pdrop": self.dropout, "embd_pdrop": self.dropout,
                "attn_pdrop": self.dropout, "activation_function": "gelu",
            }  # fmt: skip
        settings = common | {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": self.ffn_hidden, "max_position_embeddings": self.seq_len, "pad_token_id": None,
        }  # fmt: skip
        if self.architecture.grouped:
            settings |= {"num_key_value_heads": self.kv_heads, "attention_bias": self.attention_bias}
        if self.architecture.model_type in ("llama", "nemotron"):
            settings |= {"head_dim": self.head_dim}
        if self.architecture.model_type == "gpt_neox":
            settings |= {"hidden_dropout": self.dropout, "attention_dropout": self.dropout}
        return settings


def structure_of(facts: ModelFacts, *, dropout: float, said: str = "") -> tuple[Structure, list[str]]:
    """The row's model, and what had to be assumed of it. Raises Unexpressed."""
    layers, hidden = stated(facts.layers, "model.layers"), stated(facts.hidden, "model.hidden")
    heads, seq_len = stated(facts.heads, "model.heads"), stated(facts.seq_len, "model.seq_len")
    if _has_experts(facts.moe) or re.search(EXPERTS, _called(facts)):
        raise Unexpressed("mixture of experts")
    architecture, note = _architecture(facts, said=said)
    assumptions = [note] if note else []
    if facts.head_dim is None and hidden % heads:
        raise Unexpressed(f"{heads} heads do not divide hidden {hidden}, and head_dim is not stated")
    ffn_hidden = facts.ffn_hidden or _usual_ffn(hidden, gated=architecture.gated)
    vocab = facts.vocab or (32000 if architecture.gated else 51200)
    assumptions += [] if facts.ffn_hidden else [f"ffn_hidden is not stated: {ffn_hidden}"]
    assumptions += [] if facts.vocab else [f"vocab is not stated: {vocab}"]
    structure = Structure(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=facts.kv_heads or heads,
        head_dim=facts.head_dim or hidden // heads,
        ffn_hidden=ffn_hidden,
        vocab=vocab,
        seq_len=seq_len,
        tied=architecture.tied if facts.tied_embeddings is None else facts.tied_embeddings,
        dropout=dropout if architecture in (GPT, NEOX) else 0.0,
        attention_bias=re.search(r"internlm|qwen", _called(facts)) is not None,
    )
    return _as_large_as_stated(structure, facts), assumptions


def _architecture(facts: ModelFacts, *, said: str) -> tuple[Architecture, str]:
    """By the family's or model's name, corrected by the fields, which count for more. `said` is what the row says."""
    family = _called(facts)
    if re.search(NOT_DECODERS, family):
        raise Unexpressed(f"{facts.family or facts.name} is not a decoder-only transformer")
    grouped = facts.kv_heads is not None and facts.kv_heads != facts.heads
    if re.search(r"parallel (transformer )?(block|attention|residual)", said) and not facts.gated_mlp and not grouped:
        return NEOX, "attention and MLP side by side are priced as in GPT-NeoX"
    for pattern, architecture, note in FAMILIES:
        fits = facts.gated_mlp in (None, architecture.gated) and (architecture.grouped or not grouped)
        if fits and re.search(pattern, family):
            return architecture, note
    if facts.gated_mlp:
        return LLAMA, f"{facts.family or 'an unnamed family'} is priced as Llama: its MLP is gated"
    architecture = STARCODER if grouped else GPT
    return architecture, f"{facts.family or 'an unnamed family'} is priced as {architecture.model_type}"


def _called(facts: ModelFacts) -> str:
    return f"{facts.family} {facts.name}".casefold()


def _has_experts(moe: Any) -> bool:
    """Whatever the field holds: a number of experts, an object with such a number, a flag."""
    if isinstance(moe, dict):
        counts = [value for key, value in moe.items() if "expert" in str(key) and isinstance(value, int)]
        return max(counts, default=2) > 1
    return bool(moe) and moe != 1


def _usual_ffn(hidden: int, *, gated: bool) -> int:
    """Four times the hidden size; two thirds of that where the MLP is gated, in multiples of 256 (arXiv 2302.13971)."""
    return -(-8 * hidden // 3 // 256) * 256 if gated else 4 * hidden


def _as_large_as_stated(structure: Structure, facts: ModelFacts) -> Structure:
    """Embeddings tied or not, whichever is nearer to the number of parameters that the row states."""
    if facts.params is None or facts.tied_embeddings is not None:
        return structure
    other = replace(structure, tied=not structure.tied)
    params = facts.params
    return min(structure, other, key=lambda one: abs(one.num_parameters - params))
