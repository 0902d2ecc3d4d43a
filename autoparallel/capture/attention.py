"""Attention as one op of the captured graph, and the masks that may stand behind it.

Left alone, torch.export builds a boolean [batch, 1, seq, seq] mask, hands it to sdpa and expands grouped keys and
values to all heads: flash attention is lost and every stage clones an S² tensor. While `captured_attention` is active,
transformers' own registries (`AttentionInterface`, `AttentionMaskInterface`) give one `autoparallel::attention` node a
layer with the 2-D padding beside it. A mask or an attention that this op cannot express (ALiBi, chunks, sinks) marks
the recording, and capture falls back to eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "autoparallel"
ATTENTION_TARGET = "autoparallel.attention.default"
PADDING_TARGET = "autoparallel.padding_mask.default"

# Arguments that attention layers pass along and that change nothing in a causal training forward.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "num_items_in_batch", "is_causal", "return_dict", "labels"}


@dataclass
class Recording:
    """What one capture asked of attention; `unsupported` holds the first thing our op cannot express."""

    unsupported: str = ""

    def refuse(self, reason: str) -> None:
        self.unsupported = self.unsupported or reason


_recording: ContextVar[Recording | None] = ContextVar("autoparallel_attention_recording", default=None)


@torch.library.custom_op("autoparallel::attention", mutates_args=())
def attention(
    query: Tensor,  # [batch, heads, seq, head_dim]
    key: Tensor,  # [batch, kv_heads, seq, head_dim]
    value: Tensor,  # [batch, kv_heads, seq, value_dim]
    padding: Tensor | None,  # [batch, seq], bool, True where a token is real
    scale: float,
    window: int,  # tokens a query sees, itself included; 0 sees all before it
    softcap: float,  # 0 for none
    dropout: float,
) -> Tensor:  # [batch, seq, heads, value_dim]
    """Causal attention. Only ever captured: the emitter replaces it by `Attention` below."""
    raise AssertionError("autoparallel::attention is lowered before it runs")


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    dropout: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


# Registered so that the captured forward counts as differentiable; the lowered module brings the real backward.
attention.register_autograd(lambda ctx, grad: (None,) * 8)


@torch.library.custom_op("autoparallel::padding_mask", mutates_args=())
def padding_mask(attention_mask: Tensor, window: int) -> Tensor:
    """Stands where a model asked for its mask; may reach nothing but attention (checked after capture)."""
    return attention_mask.clone()


@padding_mask.register_fake
def _(attention_mask: Tensor, window: int) -> Tensor:
    return torch.empty_like(attention_mask)


def _attention_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its sdpa layer."""
    recording = _recording.get()
    assert recording is not None, "the captured attention is only reachable while a capture runs"
    strange = [k for k, v in other.items() if k not in _HARMLESS and isinstance(v, Tensor)]
    if strange:
        recording.refuse(f"attention of {type(module).__name__} takes {', '.join(strange)}")
    causal = other.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        recording.refuse(f"attention of {type(module).__name__} is not causal")
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    # The mask is the truth about the window (as for sdpa); `Program` copies it from the padding_mask node.
    out = attention(query, key, value, attention_mask, scale, 0, float(softcap or 0.0), float(dropout))
    return out, None


def _mask(
    *args: Any, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **other: Any
) -> Tensor | None:
    """What transformers calls in place of its sdpa mask: the 2-D padding, tagged with the window it stands for."""
    recording = _recording.get()
    assert recording is not None, "the captured mask is only reachable while a capture runs"
    window = _causal_window(mask_function, other.get("config"))
    if window is None:
        recording.refuse(
            f"the mask {getattr(mask_function, '__qualname__', mask_function)!s} is neither causal nor a sliding window"
        )
        window = 0
    return None if attention_mask is None else padding_mask(attention_mask, window)


def _causal_window(mask_function: Callable[..., Any], config: Any) -> int | None:
    """0 for a causal mask, the window for a sliding one, None for anything else; decided by values, not by names."""
    sizes = {0}
    for name in ("sliding_window", "attention_chunk_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size > 0:
            sizes.add(size)
    probes = sorted(
        {p for size in sizes for p in (0, 1, 2, 3, 7, size - 1, size, size + 1, 2 * size, 2 * size + 1) if p >= 0}
    )
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # on real tensors, unseen by the tracer
            positions = torch.tensor(probes)
            q, k = positions[:, None], positions[None, :]
            first = torch.zeros((), dtype=torch.long)
            allowed = mask_function(first, first, q, k).expand(len(probes), len(probes))
            expected = {w: (k <= q) & ((q - k < w) if w else True) for w in sorted(sizes)}
            return next((w for w, mask in expected.items() if torch.equal(mask, allowed)), None)
    except Exception:  # a mask that needs the batch itself is not one of ours
        return None


@contextmanager
def captured_attention() -> Iterator[Recording]:
    """Route transformers' attention and masks to the ops above while a model is traced with
    `_attn_implementation="autoparallel"`.
    """
    AttentionInterface.register(NAME, _attention_layer)
    AttentionMaskInterface.register(NAME, _mask)
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


class Attention(nn.Module):
    """What the op is lowered to, both priced and emitted: causal flash attention where nothing is padded
    or windowed, masked sdpa elsewhere. Dropout follows `train()` and `eval()`.
    """

    def __init__(self, *, scale: float, window: int, softcap: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.window, self.softcap, self.dropout = scale, window, softcap, dropout

    def forward(
        self,
        query: Tensor,  # [batch, heads, seq, head_dim]
        key: Tensor,  # [batch, kv_heads, seq, head_dim]
        value: Tensor,  # [batch, kv_heads, seq, value_dim]
        padding: Tensor | None,  # [batch, seq], True where a token is real; None when all are
    ) -> Tensor:  # [batch, seq, heads, value_dim]
        dropout = self.dropout if self.training else 0.0
        mask = self.mask(query.shape[2], padding, query.device)
        if self.softcap:
            out = self.capped(query, key, value, mask, dropout)
        else:
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
        return out.transpose(1, 2).contiguous()

    def mask(self, seq: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
        """[batch or 1, 1, seq, seq], True where a query may look; None for plain causal attention."""
        windowed = 0 < self.window < seq
        if padding is None and not windowed:
            return None
        position = torch.arange(seq, device=device)
        seen = position[:, None] >= position[None, :]
        if windowed:
            seen &= position[:, None] - position[None, :] < self.window
        return seen[None, None] if padding is None else seen[None, None] & padding[:, None, None, :]

    def capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Scores squashed by `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118); no fused kernel does
        that.
        """
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = self.softcap * torch.tanh(query @ key.transpose(2, 3) * (self.scale / self.softcap))
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        weights = torch.softmax(
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min),
            -1,
            dtype=torch.promote_types(scores.dtype, torch.float32),
        )
        return F.dropout(weights.to(value.dtype), dropout) @ value

    def extra_repr(self) -> str:
        return f"scale={self.scale}, window={self.window}, softcap={self.softcap}, dropout={self.dropout}"
