"""The batch of one call: rank 0's is authoritative, everyone gets it, each rank cuts its micro-batches from it.

Every rank runs the user's loop and so holds a batch of its own, but an unseeded `shuffle=True` gives each another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from autoparallel.errors import ContractError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token tensors [batch, seq], int64, on this rank's device."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    num_items: Tensor
    """[] int64 or float: the divisor of the summed loss, global over micro-batches and data-parallel ranks."""
    padded: bool
    """Whether any token is padding."""

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    def filled_to(self, rows: int, seq_len: int) -> Batch:
        """The batch with rows and tokens appended whose labels are ignored: they add nothing to loss or gradients, and
        no earlier token sees them.
        """
        more_rows, more_tokens = rows - self.rows, seq_len - self.seq_len
        if not more_rows and not more_tokens:
            return self

        def extend(tensor: Tensor) -> Tensor:
            longer = torch.cat([tensor, tensor[:, -1:].expand(-1, more_tokens)], 1)
            return torch.cat([longer, longer[:1].expand(more_rows, -1)])

        labels = None
        if self.labels is not None:
            labels = torch.nn.functional.pad(self.labels, (0, more_tokens, 0, more_rows), value=IGNORED)
        return replace(
            self, input_ids=extend(self.input_ids), attention_mask=extend(self.attention_mask), labels=labels
        )

    def micro_batch(self, start: int, rows: int) -> dict[str, Tensor]:
        """Keyword inputs of the stages for rows `start .. start + rows`."""
        part = slice(start, start + rows)
        mask = self.attention_mask[part]
        inputs = {"input_ids": self.input_ids[part], "attention_mask": mask, "num_items": self.num_items}
        inputs["labels"] = self.input_ids[part] if self.labels is None else self.labels[part]
        if self.padded:
            inputs["padding"] = mask.bool()
        return inputs


def agree_on_batch(
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_items: Tensor | int | float | None,
    device: torch.device,
) -> Batch:
    """Rank 0's batch on every rank, in one header and one payload broadcast."""
    header = torch.zeros(4, dtype=torch.int64)
    payload = torch.empty(0, dtype=torch.int64)
    divisor = torch.zeros((), dtype=torch.float64)
    if dist.get_rank() == 0:
        _check_tokens(input_ids, attention_mask, labels)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        padded = not bool(mask.bool().all())
        parts = [input_ids, mask] + ([] if labels is None else [labels])
        payload = _payload(parts)
        header = torch.tensor([*input_ids.shape, labels is not None, padded])
        if num_items is not None:
            divisor = torch.as_tensor(num_items).to("cpu", torch.float64)
        elif labels is not None:
            divisor = (labels[:, 1:] != IGNORED).sum().to("cpu", torch.float64)
    dist.broadcast(header, src=0)
    rows, seq, has_labels, has_padding = (int(value) for value in header)
    if dist.get_rank() != 0:
        payload = torch.empty(2 + has_labels, rows, seq, dtype=torch.int64)
    dist.broadcast(payload, src=0)
    dist.broadcast(divisor, src=0)
    tokens = payload.to(device)
    return Batch(
        input_ids=tokens[0],
        attention_mask=tokens[1],
        labels=tokens[2] if has_labels else None,
        num_items=divisor.to(torch.int64).to(device) if float(divisor).is_integer() else divisor.to(device),
        padded=bool(has_padding),
    )


def _payload(parts: list[Tensor]) -> Tensor:
    """[tensors, rows, seq], in the one dtype that every rank's receive buffer has: gloo does not compare dtypes, it
    copies bytes.
    """
    return torch.stack([part.to("cpu", torch.int64) for part in parts])


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ContractError(f"input_ids has shape {tuple(input_ids.shape)}", why="a batch is [rows, tokens]")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ContractError(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}",
                why="the program is captured for a 2-D padding mask and one label a token",
            )
