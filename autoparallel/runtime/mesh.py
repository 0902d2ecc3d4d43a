"""Which rank holds what, and the process groups between them: the ranks of `plans.grid`, seen from one of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoparallel.plans.grid import Grid, Place
from autoparallel.plans.strategy import Strategy

REPLICAS = ("dp_replicate", "dp_shard")
"""The axis of replicas under hybrid sharding: groups that hold the same shards, and the ranks of a group."""


@dataclass(frozen=True)
class Mesh:
    """The mesh `pp × dp_shard × tp` in the strategy's order of axes; `dp_shard` is a group of replicas."""

    device_mesh: DeviceMesh
    grid: Grid
    shard_ways: int

    @classmethod
    def create(cls, strategy: Strategy, *, device_type: str) -> Mesh:
        """Ranks are read from the mesh's own tensors, which have values even where the model's are fake."""
        grid, ways = strategy.grid, strategy.shard_ways
        sizes: dict[str, int] = {}
        for axis in grid.order:
            if axis == "dp" and strategy.shard_groups > 1:
                sizes |= dict(zip(REPLICAS, (strategy.shard_groups, ways), strict=True))
            else:
                sizes["dp_shard" if axis == "dp" else axis] = grid.size(axis)
        with unset_fake_temporarily():
            mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            return cls(mesh, grid, ways)

    @property
    def num_stages(self) -> int:
        return self.grid.size("pp")

    @property
    def data_parallel(self) -> int:
        return self.grid.size("dp")

    @property
    def tensor_parallel(self) -> int:
        return self.grid.size("tp")

    @property
    def place(self) -> Place:
        return self.grid.place(dist.get_rank())

    @property
    def stage(self) -> int:
        return self.place.stage

    @property
    def data_index(self) -> int:
        return self.place.data_index

    @property
    def tensor_index(self) -> int:
        return self.place.tensor_index

    def rank_of(self, *, stage: int, data_index: int, tensor_index: int) -> int:
        return self.grid.rank(Place(stage, data_index, tensor_index))

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self._group("pp")

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self._group("dp_shard")

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return self._group("tp")

    def _group(self, name: str) -> dist.ProcessGroup:
        return self.device_mesh[name].get_group()

    @property
    def sharding_mesh(self) -> DeviceMesh:
        """What parameters are sharded over, replicated over the first of two axes under hybrid sharding."""
        hybrid = self.data_parallel > self.shard_ways
        with unset_fake_temporarily():
            return self.device_mesh[REPLICAS] if hybrid else self.device_mesh["dp_shard"]

    def stage_groups(self, stage_sets: list[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """For each set of stages, the group of the ranks of those stages that share this rank's other indices.

        Every rank must call this with the same sets: making a group is collective over the world.
        """
        mine: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for stages in sorted(set(stage_sets)):
            for data_index, tensor_index in product(range(self.data_parallel), range(self.tensor_parallel)):
                places = [Place(stage, data_index, tensor_index) for stage in stages]
                group = dist.new_group([self.grid.rank(place) for place in places])
                if self.place in places:
                    mine[stages] = group
        return mine
