"""Which rank holds what, and the process groups between them. Tensor-parallel ranks are neighbours:

rank = (stage × data_parallel + data-parallel index) × tensor_parallel + tensor-parallel index
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """The mesh `pp × dp_shard × tp`, seen from one rank."""

    device_mesh: DeviceMesh
    num_stages: int
    data_parallel: int
    tensor_parallel: int = 1

    @classmethod
    def create(cls, *, num_stages: int, data_parallel: int, tensor_parallel: int, device_type: str) -> Mesh:
        """Ranks are read from the mesh's own tensors, which have values even where the model's are fake."""
        shape = (num_stages, data_parallel, tensor_parallel)
        with unset_fake_temporarily():
            return cls(init_device_mesh(device_type, shape, mesh_dim_names=AXES), *shape)

    @property
    def stage(self) -> int:
        return dist.get_rank() // (self.data_parallel * self.tensor_parallel)

    @property
    def data_index(self) -> int:
        return dist.get_rank() // self.tensor_parallel % self.data_parallel

    @property
    def tensor_index(self) -> int:
        return dist.get_rank() % self.tensor_parallel

    def rank_of(self, *, stage: int, data_index: int, tensor_index: int) -> int:
        return (stage * self.data_parallel + data_index) * self.tensor_parallel + tensor_index

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.device_mesh["pp"].get_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.device_mesh["dp_shard"].get_group()

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return self.device_mesh["tp"].get_group()

    def stage_groups(self, stage_sets: list[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """For each set of stages, the group of the ranks of those stages that share this rank's other indices.

        Every rank must call this with the same sets: making a group is collective over the world.
        """
        mine: dict[tuple[int, ...], dist.ProcessGroup] = {}
        ranks_of_a_stage = self.data_parallel * self.tensor_parallel
        for stages in sorted(set(stage_sets)):
            for index in range(ranks_of_a_stage):
                group = dist.new_group([stage * ranks_of_a_stage + index for stage in stages])
                if index == dist.get_rank() % ranks_of_a_stage and self.stage in stages:
                    mine[stages] = group
        return mine
