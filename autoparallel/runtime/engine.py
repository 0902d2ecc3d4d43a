"""Program + plan on this rank: placed parameters, the emitted stage, and the two things a loop asks for: a training
step, an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn

from autoparallel.capture.program import Program
from autoparallel.emit.deferred import defer_weight_gradients
from autoparallel.emit.randomness import draws_randomly
from autoparallel.emit.stage import Member, emit_stage, inputs_read, state_tensors
from autoparallel.errors import ContractError, PlanMismatchError
from autoparallel.ir.graph import TensorSpec
from autoparallel.plans.plan import Plan
from autoparallel.runtime.batch import Batch
from autoparallel.runtime.checks import Fingerprint
from autoparallel.runtime.contract import watch
from autoparallel.runtime.mesh import Mesh
from autoparallel.runtime.parameters import make_leaves, shard
from autoparallel.runtime.pipeline import LocalStage, Pipeline, summed
from autoparallel.runtime.placement import place
from autoparallel.schedule.actions import splits_backward
from autoparallel.tensor_parallel.splits import SplitGraph


class Engine:
    """The emitted program of one rank."""

    def __init__(
        self, model: nn.Module, program: Program, plan: Plan, *, device: torch.device, torch_compile: bool = False
    ) -> None:
        plan.check_matches(fingerprint=program.graph.fingerprint, num_devices=dist.get_world_size())
        strategy = plan.strategy
        assert strategy.stages is not None
        self.plan, self.strategy, self.device = plan, strategy, device
        self.mesh = Mesh.create(strategy, device_type=device.type)
        self.split = SplitGraph.of_strategy(program.graph, strategy)
        stage_of_segment = [
            index % strategy.num_stages
            for index, s in enumerate(strategy.stages)
            for _ in range(s.first_segment, s.last_segment + 1)
        ]
        self.parameters = place(
            model,
            program.graph.parameters,
            stage_of_segment,
            self.split.parameters(),
            self.mesh,
            plan.precision,
            sharded=strategy.distribute_param > 0,
            device=device,
        )
        self.logits_spec, loss_spec = _output_specs(program)
        self.vocabulary = self.split.logits()
        self.stages = self._emit(program, state_tensors(model, program), loss_spec, torch_compile=torch_compile)
        self.pipeline = Pipeline(self.stages, strategy, self.mesh, device=device, reduction=self.parameters.reduction)
        self._inputs = {name for stage in self.stages for name in inputs_read(stage.module)}
        self.loss_dtype = getattr(torch, loss_spec.dtype)
        self.draws = draws_randomly(program.graph)
        self.training = True
        watch(self.parameters)
        self.fingerprint = Fingerprint(model, self.parameters, draws=self.draws)
        self._gathers = False
        self.lent: dict[str, Tensor] = {}
        """This rank's pieces by parameter, while a state dict is being loaded into whole tensors."""
        for part in model.modules():
            if part is not model:
                part.register_state_dict_post_hook(lambda module, *state: self._refuse_part(module))

    def _emit(
        self, program: Program, constants: Mapping[str, Tensor], loss_spec: TensorSpec, *, torch_compile: bool
    ) -> list[LocalStage]:
        """The stages of this pipeline rank, first to last, their parameters placed and sharded."""
        graph, strategy = program.graph, self.strategy
        plans = strategy.stages_of(self.mesh.stage)
        segments = [segment for plan in plans for segment in range(plan.first_segment, plan.last_segment + 1)]
        leaves = make_leaves(self.parameters, self.split.shared_parameters(segments))
        member = Member(self.split, self.mesh.tensor_index, self.mesh.tensor_group.group_name)
        stages = []
        for index, plan in zip(range(self.mesh.stage, strategy.total_stages, strategy.num_stages), plans, strict=True):
            module = emit_stage(
                program, plan, lambda name: leaves.get(name, constants[name]), member=member, device=self.device
            )
            if splits_backward(strategy.schedule, strategy.num_stages):
                defer_weight_gradients(module)
                if torch_compile:
                    logger.warning(
                        "Not compiled: a backward in two halves; constrain schedule to another one than zero_bubble."
                    )
            elif torch_compile:
                for block in module.children():
                    block.compile()
            is_last = plan.last_segment == graph.num_segments - 1
            if strategy.distribute_param > 0:
                backward = {f"segment_{s}" for s in segments if graph.runs_backward(s)}
                level, keeps_last = strategy.distribute_param, is_last and strategy.keeps_head
                shard(module, self.parameters, distribute_param=level, backward=backward, keeps_last=keeps_last)
            entering = self.split.entering(plan.first_segment)
            leaving = (loss_spec,) if is_last else self.split.entering(plan.last_segment + 1)
            stages.append(LocalStage(index, module, entering, leaving))
        return stages

    def train(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """One step: the loss of the whole batch on every rank, and this rank's piece of every trained parameter's
        gradient.
        """
        batch = self._filled(batch)
        self.parameters.begin_step()
        with torch.enable_grad(), self._own_random_stream():
            loss = self.pipeline.train(self._micro_batches(batch), seq_len=batch.seq_len)
        with torch.no_grad():
            self.parameters.reduce_gradients()
            return self._sum_over_ranks(loss), [p.gradient() for p in self.parameters.trained()]

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, logits [rows, seq, vocabulary]) of the whole batch on every rank."""
        rows, seq_len = batch.rows, batch.seq_len
        batch = self._filled(batch)
        self.parameters.refresh_copies()
        with self._own_random_stream():
            mine = self.pipeline.forward(self._micro_batches(batch), seq_len=batch.seq_len)
        loss = self._sum_over_ranks(summed([r[0] for r in mine]))
        return loss, self._gather_logits([r[1] for r in mine], batch)[:rows, :seq_len]

    def _filled(self, batch: Batch) -> Batch:
        """With as many rows as fill whole micro-batches on every data-parallel rank, and tokens that divide over the
        ranks of sequence parallelism.
        """
        unit = self.strategy.data_parallel * self.strategy.batch_per_device
        tokens = self.strategy.tensor_parallel if self.strategy.sequence_parallel else 1
        return batch.filled_to(-(-batch.rows // unit) * unit, -(-batch.seq_len // tokens) * tokens)

    def _micro_batches(self, batch: Batch) -> list[dict[str, Tensor]]:
        """This rank's share of the rows: its data index picks a contiguous part."""
        size = self.strategy.batch_per_device
        share = batch.rows // self.strategy.data_parallel
        start = self.mesh.data_index * share
        return [batch.micro_batch(start + offset, size, self._inputs) for offset in range(0, share, size)]

    def _sum_over_ranks(self, loss: Tensor | None) -> Tensor:
        """Over replicas; all ranks of a tensor-parallel group have the same loss, and one of them counts."""
        if loss is not None and self.mesh.num_stages * self.mesh.data_parallel == 1:
            return loss
        loss = loss if self.mesh.tensor_index == 0 else None
        total = torch.zeros((), dtype=self.loss_dtype, device=self.device) if loss is None else loss.to(self.loss_dtype)
        dist.all_reduce(total)
        return total

    def _gather_logits(self, mine: list[Tensor], batch: Batch) -> Tensor:
        share = batch.rows // self.mesh.data_parallel
        return torch.cat(
            [self._logits_of(index, mine, share, batch.seq_len) for index in range(self.mesh.data_parallel)]
        )

    def _logits_of(self, data_index: int, mine: list[Tensor], rows: int, seq_len: int) -> Tensor:
        """[rows, seq, vocabulary] of one replica on every rank; each tensor-parallel rank has part of the last dim."""
        vocabulary = self.logits_spec.shape[-1]
        assert isinstance(vocabulary, int)
        dtype = getattr(torch, self.logits_spec.dtype)
        whole = torch.empty(rows, seq_len, vocabulary, dtype=dtype, device=self.device)
        for rank, held in enumerate(self.vocabulary):
            owner = self.mesh.rank_of(stage=self.mesh.num_stages - 1, data_index=data_index, tensor_index=rank)
            part = torch.empty(rows, seq_len, len(held), dtype=dtype, device=self.device)
            if dist.get_rank() == owner:
                part = torch.cat(mine).contiguous()
            dist.broadcast(part, src=owner)
            whole[..., torch.from_numpy(held).to(self.device)] = part
        return whole

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        """Dropout draws from a stream of this rank's stage and replica (which sees other rows); tensor-parallel ranks
        share it. It starts anew at each step from a number that rank 0 takes out of the user's stream: who seeds,
        saves or restores that one has the dropout of the run too. A model without dropout leaves it where it was.
        """
        if not (self.draws and self.training):
            yield
            return
        seed = torch.randint(1 << 62, (), device="cpu")
        dist.broadcast(seed, src=0)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            apart = 0x9E3779B9 * (1 + self.mesh.stage * self.mesh.data_parallel + self.mesh.data_index)
            torch.manual_seed((int(seed) + apart) % (1 << 62))
            yield

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """While the whole model's state is taken, its parts may be read: what is missing is filled in afterwards."""
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False

    def _refuse_part(self, module: nn.Module) -> None:
        if not self._gathers:
            raise ContractError(
                f"state_dict() of a part of the model ({type(module).__name__})",
                why="this rank holds only pieces of its parameters",
                remedy="take state_dict() of the whole model and pick the names you want",
            )

    def train_mode(self, training: bool) -> None:
        self.training = training
        for stage in self.stages:
            stage.module.train(training)


def _output_specs(program: Program) -> tuple[TensorSpec, TensorSpec]:
    """Of (logits, loss)."""
    output = next(node for node in program.module.graph.nodes if node.op == "output")
    loss, logits = (program.graph.spec_of(node.name) for node in output.args[0])
    return logits, loss


def agree_on_program(program: Program) -> None:
    """Every rank traced the same model, or none goes on."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, program.graph.fingerprint)
    others = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if others:
        raise PlanMismatchError(
            f"ranks {others} hold another model than rank 0",
            why="their captured programs differ in structure, shapes or dtypes",
            remedy="run the same script with the same configuration and library versions on every host",
        )
