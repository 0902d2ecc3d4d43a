"""Models by name, and questions to ask the planner: what the parts of the search benchmark plan for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autoparallel.cost.flavors import resolve_flavor
from autoparallel.ir.flavor import Flavor
from benchmarks.published.models import GPT, LLAMA, Architecture, Structure

QWEN = replace(LLAMA, model_type="qwen2")
MISTRAL = replace(LLAMA, model_type="mistral")
GIB = 2**30


def _gated(
    architecture: Architecture, *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int
) -> Structure:
    return Structure(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_hidden=ffn,
        vocab=vocab,
        seq_len=8192,
        tied=False,
        attention_bias=architecture is QWEN,
    )


def _gpt(*, layers: int, hidden: int, heads: int, vocab: int, tied: bool) -> Structure:
    return Structure(
        architecture=GPT,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden=4 * hidden,
        vocab=vocab,
        seq_len=2048,
        tied=tied,
    )


MODELS: dict[str, Structure] = {
    "Qwen1.5-7B": _gated(QWEN, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, vocab=151936),
    "Mistral-7B": _gated(MISTRAL, layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=32000),
    "Llama-2-7B": _gated(LLAMA, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, vocab=32000),
    "Llama-2-13B": _gated(LLAMA, layers=40, hidden=5120, ffn=13824, heads=40, kv_heads=40, vocab=32000),
    "Llama-3-8B": _gated(LLAMA, layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256),
    "Llama-3-70B": _gated(LLAMA, layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, vocab=128256),
    "Llama-3-405B": _gated(LLAMA, layers=126, hidden=16384, ffn=53248, heads=128, kv_heads=8, vocab=128256),
    "Cerebras-GPT-13B": _gpt(layers=40, hidden=5120, heads=40, vocab=50257, tied=True),
    "GPT-6.7B": _gpt(layers=32, hidden=4096, heads=32, vocab=51200, tied=True),
}


@dataclass(frozen=True)
class Problem:
    """One question, in plain values."""

    model: str
    flavor: str
    batch_size: int
    seq_len: int
    layers: int | None = None
    """Instead of the model's own."""
    memory_gib: float | None = None
    """Of a device, instead of the flavor's."""
    dtype: str = "auto"
    workers: int | None = None
    constraints: dict[str, Any] = field(default_factory=dict)
    within: str = ""
    """What the constraints stand for."""

    @property
    def structure(self) -> Structure:
        found = MODELS[self.model]
        return found if self.layers is None else replace(found, layers=self.layers)

    @property
    def cluster(self) -> Flavor:
        found = resolve_flavor(self.flavor)
        if self.memory_gib is None:
            return found
        return found.model_copy(
            update={"memory_bytes": int(self.memory_gib * GIB), "name": f"{found.name}, {self.memory_gib:g} GiB"}
        )

    @property
    def name(self) -> str:
        within = f", within {self.within}" if self.within else ""
        return f"{self.model} on {self.cluster.name}, {self.batch_size} x {self.seq_len}{within}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


LLAMA_405B = Problem("Llama-3-405B", "2048x8xH100-SXM5-80GB", 2048, 8192)
PUBLISHED_405B = replace(
    LLAMA_405B,
    within="Meta's published layout",
    constraints={
        "tensor_parallel": 8,
        "data_parallel": 128,
        "batch_per_device": 1,
        "schedule": "interleaved",
        "distribute_parameter": 2,
        "shard_group_size": 128,
    },
)
"""As far as Dubey et al. 2024, "The Llama 3 Herd of Models" (arXiv 2407.21783, section 3.3 and table 4), state it:
TP 8, PP 16, 128 replicas, interleaved stages, gradients and states sharded, parameters gathered once. One row a
micro-batch is assumed; virtual stages, cuts, sequence parallelism and what is recomputed are chosen by us.
"""
PUBLISHED_405B_MEASURED = "400 TFLOP/s a GPU at 8,192 tokens (380 at 131,072), with its own kernels (arXiv 2407.21783)"
HEADLINE = (
    Problem("Qwen1.5-7B", "4xLarge.2048GB", 256, 2048),
    Problem("Mistral-7B", "4xLarge.2048GB", 256, 2048),
    Problem("Mistral-7B", "8xLarge.4096GB", 256, 2048),
    Problem("Cerebras-GPT-13B", "4xLarge.2048GB", 32, 2048),
    Problem("Cerebras-GPT-13B", "8xLarge.4096GB", 64, 2048),
    Problem("Llama-3-70B", "8xLarge.4096GB", 512, 1024),
    LLAMA_405B,
    PUBLISHED_405B,
)
