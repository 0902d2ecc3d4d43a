"""One training step as numbers: what the search and its workers see of a model. No graph, no torch."""

from __future__ import annotations

from pydantic import Field

from autoparallel.cost.collectives import worst_spread
from autoparallel.cost.practice import OURS, Practice
from autoparallel.cost.tables import CostTable
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision
from autoparallel.ir.schema import Schema
from autoparallel.plans.strategy import Recomputation, Strategy


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
    """The same under full recomputation, collectives included; it stops at the last tensor that backward needs."""
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
    forward_comm_s: float = 0.0
    """Collectives of tensor parallelism."""
    backward_comm_s: float = 0.0
    replicated_s: float = 0.0
    """The part of forward and backward that every tensor-parallel rank repeats."""

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


class Variant(Schema):
    """The model as one rank of a tensor-parallel group holds and runs it, under one split."""

    tensor_parallel: int
    sequence_parallel: bool
    batch_per_device: int
    tensor_stride: int = 1
    """Ranks between neighbours of the group; strides that spread it over hosts alike cost the same."""
    splits: tuple[tuple[str, ...], ...]
    """By segment class: the parameter dims that are sharded."""
    costs: tuple[SegmentCost, ...]
    """By class."""
    parameters: tuple[ParameterCount, ...]
    shared: tuple[SharedParameters, ...]
    addends: tuple[int, ...]
    """Of each segment: elements of which every rank has an addend of the gradient, summed once a step."""
    without_rule: tuple[str, ...]
    """Operators that no rule of tensor parallelism fits: computed on whole tensors."""


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
    practice: Practice = OURS
    segment_classes: tuple[int, ...]
    """Class of each segment in order; equal segments share a class. First: before the blocks; last: after them."""
    costs: dict[int, tuple[SegmentCost, ...]]
    """By batch_per_device, then by class."""
    parameters: tuple[ParameterCount, ...]
    """Of each segment, shared ones left out."""
    shared: tuple[SharedParameters, ...]
    step_flops: int
    """Model FLOPs of a step, without recomputation, causality not subtracted."""
    addends: tuple[int, ...] = ()
    """As in `Variant`; empty without tensor parallelism."""
    variants: tuple[Variant, ...] = ()
    """Under tensor parallelism; of one degree and micro-batch size the fastest first, then the leanest."""
    impossible_degrees: dict[int, str] = Field(default_factory=dict)
    """Degrees of tensor parallelism that divide the devices and no block, with the arithmetic."""

    def under(self, strategy: Strategy) -> list[tuple[Workload, Strategy]]:
        """This workload as one rank of a tensor-parallel group has it, once for every split that the strategy may use,
        the fastest first; beside it the strategy with that split.
        """
        if strategy.tensor_parallel == 1:
            return [(self, strategy)]
        return [
            (self._under(variant), strategy.model_copy(update={"splits": variant.splits}))
            for variant in self.variants
            if self._serves(variant, strategy)
        ]

    def _serves(self, variant: Variant, strategy: Strategy) -> bool:
        asked = (strategy.tensor_parallel, strategy.sequence_parallel, strategy.batch_per_device)
        offered = (variant.tensor_parallel, variant.sequence_parallel, variant.batch_per_device)
        if asked != offered or strategy.splits not in (None, variant.splits):
            return False
        strides = (strategy.stride_of("tp"), variant.tensor_stride)
        cluster = (self.flavor.num_devices, self.flavor.devices_per_host)
        asked_spread, offered_spread = (worst_spread(*cluster, strategy.tensor_parallel, stride) for stride in strides)
        return asked_spread == offered_spread

    def _under(self, variant: Variant) -> Workload:
        return self.model_copy(
            update={
                "costs": {variant.batch_per_device: variant.costs},
                "parameters": variant.parameters,
                "shared": variant.shared,
                "addends": variant.addends,
                "variants": (variant,),
            }
        )

    @property
    def tensor_degrees(self) -> list[int]:
        """One, and all that were looked at."""
        return sorted({1, *self.impossible_degrees, *(variant.tensor_parallel for variant in self.variants)})

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
