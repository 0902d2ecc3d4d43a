"""The batch of one call: rank 0's is authoritative, everyone gets it in one broadcast, each rank cuts its micro-batches
from it.

Every rank runs the user's loop and so holds a batch of its own, but an unseeded `shuffle=True` gives each another one.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autoparallel.errors import ContractError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token tensors [batch, seq], int64, on this rank's device."""

    input_ids: Tensor
    padding: Tensor | None
    """The attention mask where some token is padding."""
    labels: Tensor | None
    num_items: Tensor
    """[] int64 or float: the divisor of the summed loss, global over micro-batches and data-parallel ranks."""

    @cached_property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.input_ids) if self.padding is None else self.padding

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
        padding = None if self.padding is None else extend(self.padding)
        return replace(self, input_ids=extend(self.input_ids), padding=padding, labels=labels)

    def micro_batch(self, start: int, rows: int, names: Collection[str]) -> dict[str, Tensor]:
        """Keyword inputs called `names` of the stages, for rows `start .. start + rows`."""
        inputs = {"num_items": self.num_items} if "num_items" in names else {}
        if "input_ids" in names:
            inputs["input_ids"] = self._rows_of(self.input_ids, start, rows)
        if "labels" in names:
            inputs["labels"] = self._rows_of(self.input_ids if self.labels is None else self.labels, start, rows)
        if "attention_mask" in names:
            inputs["attention_mask"] = self._rows_of(self.attention_mask, start, rows)
        if "padding" in names and self.padding is not None:
            inputs["padding"] = self._rows_of(self.padding, start, rows).bool()
        return inputs

    def _rows_of(self, tensor: Tensor, start: int, rows: int) -> Tensor:
        return tensor if rows == self.rows else tensor[start : start + rows]


class _Header(NamedTuple):
    rows: int = 0
    seq_len: int = 0
    padded: int = 0
    has_labels: int = 0
    labels_are_ids: int = 0
    """The loop passes one tensor as both; it travels once."""
    divisor: float = 0.0

    @property
    def size(self) -> int:
        """Tokens of all tensors that travel: a mask of ones does not."""
        return self.rows * self.seq_len * (1 + self.padded + self.has_labels - self.labels_are_ids)

    def words(self) -> list[int]:
        (divisor,) = struct.unpack("q", struct.pack("d", self.divisor))
        return [*self[:-1], divisor]

    @classmethod
    def of_words(cls, words: list[int]) -> _Header:
        *whole, bits = words
        (divisor,) = struct.unpack("d", struct.pack("q", bits))
        return cls._make([*whole, divisor])


class BatchExchange:
    """Makes rank 0's batch everyone's, in one broadcast a step.

    Header and tokens travel in one buffer whose size all ranks know beforehand: what the largest batch so far took. A
    larger batch says so in its header and follows in a second broadcast.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._room = 0
        """Tokens, of all tensors together, that the buffer has."""
        self._divisor: float | None = None
        self._num_items: Tensor
        """The tensor of `_divisor`: most steps have the same."""

    def agree(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_items: Tensor | int | float | None,
    ) -> Batch:
        """Rank 0's batch, on every rank."""
        if dist.get_rank() == 0:
            _check_tokens(input_ids, attention_mask, labels)
            header, parts = _described(input_ids, attention_mask, labels, num_items)
        else:
            header, parts = _Header(), []
        if dist.get_world_size() > 1:
            header, parts = self._exchanged(header, parts)
        tokens = [part.to(self.device) for part in parts]
        ids = tokens[0]
        labels = tokens[-1] if header.has_labels > header.labels_are_ids else ids if header.has_labels else None
        if self._divisor != header.divisor:
            self._divisor = header.divisor
            value = int(header.divisor) if header.divisor.is_integer() else header.divisor
            self._num_items = torch.full((), value, device=self.device)
        return Batch(
            input_ids=ids,
            padding=tokens[1] if header.padded else None,
            labels=labels,
            num_items=self._num_items,
        )

    def _exchanged(self, header: _Header, parts: list[Tensor]) -> tuple[_Header, list[Tensor]]:
        """int64 on every rank: gloo does not compare dtypes, it copies bytes."""
        at = len(header)
        buffer = torch.empty(at + self._room, dtype=torch.int64)
        if dist.get_rank() == 0:
            buffer[:at] = torch.tensor(header.words())
            if header.size <= self._room:
                _fill(buffer[at:], parts)
        dist.broadcast(buffer, src=0)
        header = _Header.of_words(buffer[:at].tolist())
        payload = buffer[at:]
        if header.size > self._room:
            self._room = header.size
            payload = torch.empty(self._room, dtype=torch.int64)
            if dist.get_rank() == 0:
                _fill(payload, parts)
            dist.broadcast(payload, src=0)
        return header, list(payload[: header.size].view(-1, header.rows, header.seq_len))


def _described(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, num_items: Tensor | int | float | None
) -> tuple[_Header, list[Tensor]]:
    """What all ranks need to know of rank 0's batch, and its tensors."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    divisor = 0.0
    if num_items is not None:
        divisor = float(num_items)
    elif labels is not None:
        divisor = float((labels[:, 1:] != IGNORED).count_nonzero())
    header = _Header(
        rows=input_ids.shape[0],
        seq_len=input_ids.shape[1],
        padded=padded,
        has_labels=labels is not None,
        labels_are_ids=labels is input_ids,
        divisor=divisor,
    )
    given = (input_ids, attention_mask if padded else None, None if labels is input_ids else labels)
    return header, [tensor for tensor in given if tensor is not None]


def _fill(buffer: Tensor, parts: list[Tensor]) -> None:
    torch.cat([part.reshape(-1).to(buffer) for part in parts], out=buffer[: sum(part.numel() for part in parts)])


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ContractError(f"input_ids has shape {tuple(input_ids.shape)}", why="a batch is [rows, tokens]")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ContractError(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}",
                why="the program is captured for a 2-D padding mask and one label a token",
            )
