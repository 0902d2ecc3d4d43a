"""Which rank holds which stage, and the process groups between them. rank = stage × data_parallel + data-parallel
index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The 2-D mesh `pp × dp_shard`, seen from one rank."""

    device_mesh: DeviceMesh
    num_stages: int
    data_parallel: int

    @classmethod
    def create(cls, *, num_stages: int, data_parallel: int, device_type: str) -> Mesh:
        axes = ("pp", "dp_shard")
        return cls(
            init_device_mesh(device_type, (num_stages, data_parallel), mesh_dim_names=axes), num_stages, data_parallel
        )

    @property
    def stage(self) -> int:
        return dist.get_rank() // self.data_parallel

    @property
    def data_index(self) -> int:
        return dist.get_rank() % self.data_parallel

    def rank_of(self, *, stage: int, data_index: int) -> int:
        return stage * self.data_parallel + data_index

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.device_mesh["pp"].get_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.device_mesh["dp_shard"].get_group()

    def stage_groups(self, stage_sets: list[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """For each set of stages, the group of the ranks of those stages that share this rank's data index.

        Every rank must call this with the same sets: making a group is collective over the world.
        """
        mine: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for stages in sorted(set(stage_sets)):
            for index in range(self.data_parallel):
                group = dist.new_group([self.rank_of(stage=s, data_index=index) for s in stages])
                if index == self.data_index and self.stage in stages:
                    mine[stages] = group
        return mine
