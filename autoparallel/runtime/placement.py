"""From a whole model to a rank's pieces and back, one parameter at a time: no rank holds more than its pieces and the
parameter that is on its way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoparallel.ir.graph import Parameter
from autoparallel.ir.precision import Precision
from autoparallel.runtime.deferred import Held, put, take
from autoparallel.runtime.lazy import LazyParameter
from autoparallel.runtime.loading import agree_on_lazy
from autoparallel.runtime.mesh import Mesh
from autoparallel.runtime.parameters import Parameters, Placed
from autoparallel.tensor_parallel.layout import ParameterSplit


def place(
    model: nn.Module,
    table: tuple[Parameter, ...],
    stage_of_segment: list[int],
    splits: dict[str, ParameterSplit],
    mesh: Mesh,
    precision: Precision,
    *,
    sharded: bool,
    device: torch.device,
) -> Parameters:
    """Leave this rank its pieces of the parameters: read from the model's files where every rank can, else cut from
    rank 0's values, which are everyone's, as under DDP, since an unseeded init differs.
    """
    by_name = {p.name: p for p in table}
    in_files = agree_on_lazy(model)
    placed = []
    for name, master in model.named_parameters():
        stages = tuple(sorted({stage_of_segment[s] for s in by_name[name].segments}))
        placed.append(Placed(name, master, master.shape, stages, splits.get(name)))
    ties = [p.stages for p in placed if len(p.stages) > 1]
    parameters = Parameters(mesh, sharded, precision, placed, mesh.stage_groups(ties))
    for p in placed:
        if p.name in in_files:
            _read_piece(parameters, p, device)
        else:
            _cut_piece(parameters, p)
    for _, buffer in model.named_buffers():
        dist.broadcast(buffer, src=0)
    return parameters


def _read_piece(parameters: Parameters, placed: Placed, device: torch.device) -> None:
    master = placed.master
    assert isinstance(master, LazyParameter)
    if parameters.holds(placed):
        master.settle(master.piece(parameters.held(placed)).to(device))
    else:
        master.settle(torch.empty((0, *placed.shape[1:]), dtype=master.dtype, device=device))


def _cut_piece(parameters: Parameters, placed: Placed) -> None:
    master = placed.master
    if isinstance(master, LazyParameter):
        master.materialize()
    dist.broadcast(master.data, src=0)
    if not parameters.holds(placed):
        master.data = master.data.new_empty((0, *placed.shape[1:]))
    elif any(indices is not None for indices in parameters.held(placed)):
        master.data = take(master.data, parameters.held(placed)).clone()
    else:
        return
    master.grad = None


def on_first_rank(parameters: Parameters, placed: Placed) -> Tensor | None:
    """The whole parameter in rank 0's host memory, sent there piece by piece; None on other ranks (collective)."""
    is_first = dist.get_rank() == 0
    if not placed.stages:
        return placed.master.detach().cpu() if is_first else None
    whole = torch.empty(placed.shape, dtype=placed.master.dtype) if is_first else None
    mesh, split = parameters.mesh, placed.split
    assert split is not None
    for data_index in range(parameters.ways):
        for tensor_index in range(mesh.tensor_parallel if split.is_sharded else 1):
            owner = mesh.rank_of(stage=placed.stages[0], data_index=data_index, tensor_index=tensor_index)
            held = parameters.held(placed, data_index=data_index, tensor_index=tensor_index)
            sizes = [n if indices is None else len(indices) for n, indices in zip(placed.shape, held, strict=True)]
            if 0 in sizes:
                continue
            mine = placed.master.detach().cpu().contiguous() if dist.get_rank() == owner else None
            if mine is not None and whole is not None:
                put(whole, mine, held)
            elif mine is not None:
                dist.send(mine, 0)
            elif whole is not None:
                _receive(whole, held, owner)
    return whole


def _receive(whole: Tensor, held: Held, owner: int) -> None:
    """Take a rank's piece of `whole` into its place; through a buffer where its places are apart."""
    piece = take(whole, held)
    in_place = piece.is_contiguous() and piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    received = piece if in_place else torch.empty_like(piece, memory_format=torch.contiguous_format)
    dist.recv(received, owner)
    if not in_place:
        put(whole, received, held)
