"""A strategy is one way to run a training step in parallel; constraints narrow which ones are looked at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from autoparallel.ir.schema import Schema
from autoparallel.plans.grid import AXES, Axis, Grid, Place

Recomputation = Literal["none", "selective", "full"]
StageRecomputation = Recomputation | Annotated[tuple[Recomputation, ...], Field(min_length=1)]
"""Of all blocks of a stage, or of each in order."""
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
RECOMPUTATION_LEVELS: dict[Recomputation, int] = {"none": 0, "selective": 1, "full": 2}


class StagePlan(Schema):
    """One pipeline stage: the segments `first_segment .. last_segment` of the graph, both included.

    Segment 0 is what comes before the first repeated block (embedding), the last is what comes after the last one
    (norm, head, loss). Both are never recomputed.
    """

    first_segment: int = Field(ge=0)
    last_segment: int = Field(ge=0)
    recomputation: StageRecomputation

    @field_validator("recomputation")
    @classmethod
    def _one_name_where_all_are_equal(cls, value: StageRecomputation) -> StageRecomputation:
        return value[0] if len(set(value)) == 1 and isinstance(value, tuple) else value

    @property
    def levels(self) -> tuple[Recomputation, ...]:
        """Of its blocks; one where all are equal."""
        return self.recomputation if isinstance(self.recomputation, tuple) else (self.recomputation,)

    def blocks(self, num_segments: int) -> range:
        """The segments of the stage that are blocks, in a model of `num_segments`."""
        return range(max(self.first_segment, 1), min(self.last_segment, num_segments - 2) + 1)

    def recomputation_of(self, segment: int, *, num_segments: int) -> Recomputation:
        """The level of one segment of the stage."""
        blocks = self.blocks(num_segments)
        if segment not in blocks:
            return "none"
        names = self.recomputation
        return names[segment - blocks.start] if isinstance(names, tuple) else names


class Strategy(Schema):
    """One named way to parallelise. `num_stages × tensor_parallel × context_parallel × data_parallel` devices;
    `data_parallel × batch_per_device × num_micro_batches` rows a step.

    `num_stages` is the number of pipeline ranks; `interleaved` cuts the model into `num_stages × virtual_stages`
    stages, which `stages` lists in the model's order: stage `s` sits on pipeline rank `s % num_stages`.

    `distribute_param`: 0 replicates over data parallelism; 1 shards masters and optimizer states; 2 gradients too,
    reduced after every micro-batch; 3 parameters too, gathered block by block (ZeRO, arXiv 1910.02054). They are
    sharded over all replicas, or over groups of `shard_group_size` that are next to each other on the mesh's axis and
    hold the same shards (hybrid sharding).

    `mesh_order` says which of the mesh's axes pp, dp and tp is the outermost, and which the innermost; none is pp, dp,
    tp. Orders that lay out the same ranks become one, as does a group of all replicas.

    `recomputation` is the level of every block. With `least_recomputation` it is the highest one: stages give blocks
    back to cheaper levels, down to the least, as far as memory allows.
    """

    num_stages: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    context_parallel: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each row: priced, not emitted."""
    data_parallel: int = Field(default=1, ge=1)
    batch_per_device: int = Field(default=1, ge=1)
    num_micro_batches: int = Field(default=1, ge=1)
    recomputation: Recomputation = "none"
    least_recomputation: Recomputation | None = None
    distribute_param: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = False
    schedule: ScheduleName = "1f1b"
    virtual_stages: int = Field(default=1, ge=1)
    shard_group_size: int | None = None
    mesh_order: tuple[Axis, ...] | None = None
    stages: tuple[StagePlan, ...] | None = None
    splits: tuple[tuple[str, ...], ...] | None = None
    """By segment class: the parameter dims that tensor parallelism shards, chosen by cost when the plan is made."""

    @field_validator("shard_group_size")
    @classmethod
    def _some_of_the_replicas(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None or not {"data_parallel", "context_parallel", "distribute_param"} <= info.data.keys():
            return value
        if info.data["distribute_param"] == 0:
            raise ValueError(f"shard_group_size={value} has nothing to shard: distribute_param is 0")
        replicas = info.data["context_parallel"] * info.data["data_parallel"]
        if value < 2 or replicas % value:
            raise ValueError(f"shard_group_size={value} does not divide {replicas} replicas into groups of two or more")
        return None if value == replicas else value

    @field_validator("mesh_order")
    @classmethod
    def _one_order_for_one_layout(cls, value: tuple[Axis, ...] | None, info: ValidationInfo) -> tuple[Axis, ...] | None:
        degrees = ("num_stages", "data_parallel", "context_parallel", "tensor_parallel")
        if value is None or any(name not in info.data for name in degrees):
            return value
        if sorted(value) != sorted(AXES):
            raise ValueError(f"mesh_order names each of {', '.join(AXES)} once, the outermost first")
        stages, replicas, context, tensor = (info.data[name] for name in degrees)
        return Grid((stages, replicas * context, tensor), value).canonical_order

    @model_validator(mode="after")
    def _least_is_less(self) -> Strategy:
        least = self.least_recomputation
        if least is not None and RECOMPUTATION_LEVELS[least] >= RECOMPUTATION_LEVELS[self.recomputation]:
            raise ValueError(f"least_recomputation={least!r} is not less than recomputation={self.recomputation!r}")
        return self

    @property
    def recomputation_range(self) -> str:
        """`full`, or `none to full` where stages choose."""
        least = self.least_recomputation
        return self.recomputation if least is None else f"{least} to {self.recomputation}"

    @model_validator(mode="after")
    def _has_virtual_stages_where_interleaved(self) -> Strategy:
        interleaved = self.schedule == "interleaved"
        if interleaved != (self.virtual_stages > 1) or (interleaved and self.num_stages == 1):
            raise ValueError(
                "interleaved, and nothing else, has two or more virtual_stages on each of two or more ranks"
            )
        return self

    @property
    def total_stages(self) -> int:
        """All pipeline ranks' stages together."""
        return self.num_stages * self.virtual_stages

    @property
    def keeps_head(self) -> bool:
        """Whether sharded parameters of the model's last segment stay gathered from its forward to its backward, which
        comes next everywhere but in gpipe.
        """
        return self.distribute_param == 3 and (self.schedule != "gpipe" or self.num_stages == 1)

    def stages_of(self, rank: int) -> tuple[StagePlan, ...]:
        """Those of one pipeline rank."""
        assert self.stages is not None, "the model is not cut yet"
        return self.stages[rank :: self.num_stages]

    @property
    def num_devices(self) -> int:
        return self.num_stages * self.tensor_parallel * self.context_parallel * self.data_parallel

    @property
    def grid(self) -> Grid:
        """Which rank stands where."""
        return Grid((self.num_stages, self.num_replicas, self.tensor_parallel), self.mesh_order or AXES)

    def stride_of(self, axis: Axis) -> int:
        """Ranks between neighbours along an axis of the mesh."""
        return self.grid.stride(axis)

    def place_of(self, rank: int) -> Place:
        return self.grid.place(rank)

    def rank_of(self, place: Place) -> int:
        return self.grid.rank(place)

    @property
    def shard_ways(self) -> int:
        """Ranks that parameters, gradients or states are sharded over; under hybrid sharding (`shard_group_size`) the
        groups hold the same shards.
        """
        return self.shard_group_size or self.num_replicas

    @property
    def shard_groups(self) -> int:
        """Groups of replicas with the same shards."""
        return self.num_replicas // self.shard_ways

    @property
    def state_ways(self) -> int:
        """Ranks that the optimizer's states are sharded over; one where each holds all of them."""
        return self.shard_ways if self.distribute_param > 0 else 1

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same parameters, and sum their gradients."""
        return self.context_parallel * self.data_parallel

    @property
    def batch_size(self) -> int:
        return self.data_parallel * self.batch_per_device * self.num_micro_batches

    def summary(self) -> str:
        """The one line a run logs."""
        parts = [f"num_stages : {self.num_stages}"] if self.num_stages > 1 else ["No PP"]
        parts += [f"num_micro_batches : {self.num_micro_batches}", f"batch_per_device : {self.batch_per_device}"]
        parts.append(f"data_parallel : {self.data_parallel}")
        parts.append(f"tensor_parallel : {self.tensor_parallel}" if self.tensor_parallel > 1 else "No TP")
        parts += ["sequence_parallel : True"] if self.sequence_parallel else []
        parts += [f"recomputation : {self.recomputation_range}", f"distribute_param : {self.distribute_param}"]
        parts += [f"shard_group_size : {self.shard_group_size}"] if self.shard_group_size else []
        if self.num_stages > 1:
            parts.append(f"schedule : {self.schedule}")
        if self.virtual_stages > 1:
            parts.append(f"virtual_stages : {self.virtual_stages}")
        parts += [f"mesh_order : {' '.join(self.mesh_order)}"] if self.mesh_order else []
        return ", ".join(parts)


Auto = Literal["auto"]


class Constraints(Schema):
    """What the user fixes; `"auto"` leaves a choice open. A value narrows the search, it never bypasses it."""

    pipeline_parallel: bool = Field(default=True, description="false allows one stage only")
    num_stages: int | Auto = Field(default="auto", description="the largest number of pipeline stages")
    num_micro_batches: int | Auto = "auto"
    batch_per_device: int | Auto = Field(default="auto", description="rows of one micro-batch of one replica")
    tensor_parallel: int | Auto = Field(default="auto", description="ranks that share each block")
    data_parallel: int | Auto = Field(default="auto", description="replicas")
    sequence_parallel: bool | Auto = "auto"
    schedule: ScheduleName | Auto = "auto"
    activation_recomputation: bool | Recomputation | Auto = Field(
        default="auto",
        description="true: every block selective or full; false: none; or the one level of every block",
    )
    distribute_parameter: bool | Literal[0, 1, 2, 3] | Auto = Field(
        default="auto", description="sharding: a level; true: any from 1 to 3; false: 0"
    )
    shard_group_size: int | Auto = Field(
        default="auto", description="replicas that share parameters or states; all of them: data_parallel"
    )
    mesh_order: tuple[Axis, ...] | Auto = Field(
        default="auto", description="axes of the mesh, the outermost first: pp dp tp"
    )
    mixed_precision: bool | Auto = "auto"
    memory_ratio: float = Field(
        default=0.8, gt=0.0, le=1.0, description="share of each device's memory that the plan may use"
    )
    memory_gib: float | Auto = Field(default="auto", description="GiB of each device's memory that it may use, at most")

    @field_validator("memory_gib")
    @classmethod
    def _some_memory(cls, value: float | Auto) -> float | Auto:
        if value != "auto" and value <= 0:
            raise ValueError("a plan needs memory: more than 0 GiB")
        return value

    def usable_ratio(self, memory_bytes: int) -> float:
        """Share of a device's memory that the plan may use."""
        if self.memory_gib == "auto":
            return self.memory_ratio
        return min(self.memory_ratio, self.memory_gib * 2**30 / memory_bytes)
