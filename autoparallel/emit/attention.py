"""What `autoparallel::attention` is lowered to: causal flash attention where nothing is padded or windowed, masked
sdpa elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention with grouped heads; dropout follows `train()` and `eval()`."""

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
