"""One training step as numbers: what the search and its workers see of a model. No graph, no torch."""

from __future__ import annotations

from pydantic import Field

from autoparallel.cost.tables import CostTable
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.schema import Schema
from autoparallel.plans.strategy import Recomputation


class SegmentCost(Schema):
    """A segment of the graph (embedding, one block, head and loss), for one micro-batch on one device."""

    forward_s: float
    backward_s: float
    """Without recomputation."""
    weight_gradient_s: float
    """The part of backward that a schedule with a split backward can make later."""
    recompute_selective_s: float
    """Forward work repeated in backward under selective recomputation."""
    recompute_full_s: float
    """The same under full recomputation, which stops at the last tensor that backward needs."""
    saved_bytes: int
    """Activations kept from forward to backward without recomputation, beyond its input."""
    saved_selective_bytes: int
    """The same under selective recomputation."""
    deferred_bytes: int
    """Kept from the first half of a split backward to the second: operands of the gradients that are made later."""
    input_bytes: int
    """The activations that enter: kept under every recomputation level, and sent when a stage starts here."""
    workspace_bytes: int
    """Largest transient while it runs (gradients of activations in backward included)."""
    forward_flops: int
    backward_flops: int
    """Model FLOPs, without recomputation, causality not subtracted."""

    def kept_bytes(self, recomputation: Recomputation) -> int:
        """Activations, the input left out, that stay from forward to backward."""
        return {"none": self.saved_bytes, "selective": self.saved_selective_bytes, "full": 0}[recomputation]

    def recompute_s(self, recomputation: Recomputation) -> float:
        """Forward work that backward repeats."""
        return {"none": 0.0, "selective": self.recompute_selective_s, "full": self.recompute_full_s}[recomputation]

    def transient_bytes(self, recomputation: Recomputation) -> int:
        """Workspace, and the activations that backward rebuilds."""
        return self.workspace_bytes + max(0, self.saved_bytes - self.kept_bytes(recomputation))


class ParameterCount(Schema):
    """Numbers of elements."""

    trainable: int = 0
    frozen: int = 0


class SharedParameters(Schema):
    """Parameters that several segments use (tied embeddings): every stage that holds one of them has a copy."""

    segments: tuple[int, ...]
    count: ParameterCount


class Precision(Schema):
    """Bytes per parameter element of each copy (mixed precision: bf16 compute, fp32 masters and gradients)."""

    compute_dtype: str
    compute_bytes: int
    master_bytes: int
    separate_compute_copy: bool
    """True when compute and master dtypes differ, so that both copies exist."""
    gradient_bytes: int
    optimizer_state_bytes: int
    """Of one trainable element; AdamW: two fp32 moments, 8."""


class Workload(Schema):
    """Everything that pricing a strategy needs."""

    model_name: str
    fingerprint: str
    flavor: Flavor
    table: CostTable
    batch_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    memory_ratio: float
    precision: Precision
    segment_classes: tuple[int, ...]
    """Class of each segment in order; equal segments share a class. First: before the blocks; last: after them."""
    costs: dict[int, tuple[SegmentCost, ...]]
    """By batch_per_device, then by class."""
    parameters: tuple[ParameterCount, ...]
    """Of each segment, shared ones left out."""
    shared: tuple[SharedParameters, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.segment_classes) - 2

    def cost(self, segment: int, batch_per_device: int) -> SegmentCost:
        return self.costs[batch_per_device][self.segment_classes[segment]]

    def stage_parameters(self, first_segment: int, last_segment: int) -> ParameterCount:
        """Of one stage, each shared parameter once."""
        inside = range(first_segment, last_segment + 1)
        own = [self.parameters[i] for i in inside]
        own += [s.count for s in self.shared if any(i in inside for i in s.segments)]
        return ParameterCount(trainable=sum(c.trainable for c in own), frozen=sum(c.frozen for c in own))
