"""Any rank of a cluster of any size on one process, without weights: the real engine on torch's fake process group and
fake tensors, and what it communicates and contracts, noted operator by operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import AutoModelForCausalLM, PretrainedConfig

from autoparallel.capture.export import fake_twin
from autoparallel.capture.program import Program
from autoparallel.cost.traffic import Phase, PhaseFlops
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.batch import Batch
from autoparallel.runtime.engine import Engine
from autoparallel.runtime.module import inner, training_loss
from autoparallel.tensor_parallel.analysis import analyze
from autoparallel.tensor_parallel.splits import Split, legal_splits
from tests.strategies import plan_for

CPU = torch.device("cpu")


def qwen_7b() -> PretrainedConfig:
    """Qwen1.5-7B."""
    return transformers.Qwen2Config(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32,
        intermediate_size=11008, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=False,
    )  # fmt: skip


def llama_70b() -> PretrainedConfig:
    """Llama-3-70B."""
    return transformers.LlamaConfig(
        num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


_lowered_splits: dict[tuple[str, int, bool], tuple[Split, ...]] = {}


def adapted(config: PretrainedConfig, *, dtype: torch.dtype, layers: list[int] | None = None) -> nn.Module:
    """A frozen model on meta with trained LoRA adapters, in some layers or in all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = LoraConfig(r=6, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
    return inner(get_peft_model(model, lora, autocast_adapter_dtype=False))


def widest_splits(program: Program, *, degree: int, sequence_parallel: bool) -> tuple[Split, ...]:
    """By segment class, the legal split that shards most dims."""
    graph = program.graph
    key = (graph.fingerprint, degree, sequence_parallel)
    if key not in _lowered_splits:
        found = []
        for _, segment in sorted(graph.representatives().items()):
            legal = legal_splits(
                graph, segment, analyze(graph, segment), degree=degree, sequence_parallel=sequence_parallel
            )
            found.append(max((split for split, _ in legal), key=len))
        _lowered_splits[key] = tuple(found)
    return _lowered_splits[key]


def with_widest_splits(program: Program, strategy: Strategy) -> Strategy:
    if strategy.tensor_parallel == 1:
        return strategy
    splits = widest_splits(program, degree=strategy.tensor_parallel, sequence_parallel=strategy.sequence_parallel)
    return strategy.model_copy(update={"splits": splits})


@dataclass
class FakeRank:
    """One rank of a cluster, its model placed; lives inside `fake_rank`."""

    model: nn.Module
    engine: Engine
    optimizer: torch.optim.Optimizer
    batch: Batch

    def step(self) -> None:
        """The user's loop, from the batch that ranks have agreed on."""
        training_loss(self.engine, self.batch).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


@contextmanager
def fake_rank(
    program: Program,
    config: PretrainedConfig | nn.Module,
    strategy: Strategy,
    *,
    rank: int,
    seq_len: int,
    master_dtype: str,
    watched_by: AbstractContextManager[Any] | None = None,
) -> Iterator[FakeRank]:
    """`rank` of the strategy's devices. Sends go nowhere, collectives return their buffers; no tensor has values."""
    dist.init_process_group("fake", rank=rank, world_size=strategy.num_devices, store=FakeStore())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake, watched_by or nullcontext():
            model = fake_twin(config, fake_mode=fake, dtype=getattr(torch, master_dtype))
            plan = plan_for(program, strategy, seq_len=seq_len, master_dtype=master_dtype)
            engine = Engine(model, program, plan, device=CPU)
            tokens = torch.zeros(strategy.batch_size, seq_len, dtype=torch.long)
            batch = Batch(
                input_ids=tokens,
                padding=None,
                labels=tokens,
                num_items=torch.ones((), dtype=torch.long),
            )
            yield FakeRank(model, engine, torch.optim.AdamW(model.parameters()), batch)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- what a rank does


@dataclass(frozen=True, order=True)
class Seen:
    """One communication, as an operator of torch asked for it."""

    phase: Phase
    kind: str
    ranks: tuple[int, ...]
    dtype: str
    size_bytes: int


class Recorder(TorchDispatchMode):
    """Notes every communication and the FLOPs of every contraction that run inside, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[Seen] = Counter()
        self.flops: PhaseFlops = Counter()
        self.depth = 0
        """Of the stage's modules that are running."""
        self.in_schedule = True

    def __enter__(self) -> Recorder:
        self.hooks = [
            register_module_forward_pre_hook(self.enters),
            register_module_forward_hook(self.leaves, always_call=True),  # recomputation stops early, by raising
        ]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self.hooks:
            hook.remove()

    def enters(self, module: nn.Module, args: Any) -> None:
        self.depth += isinstance(module, fx.GraphModule)

    def leaves(self, module: nn.Module, args: Any, result: Any) -> None:
        self.depth -= isinstance(module, fx.GraphModule)

    @property
    def phase(self) -> Phase:
        in_backward = torch._C._current_autograd_node() is not None
        if self.depth:
            return "recompute" if in_backward else "forward"
        return "backward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operators come here next
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in FORMULAS:
            self.flops[self.phase] += FORMULAS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func in COLLECTIVES:
            self.note(func, args, result)
        else:
            assert not str(func).startswith(("c10d.", "_c10d_functional.")) or func in _LOCAL, func
        return result

    def note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        kind, tensor, group_at = COLLECTIVES[func]
        given = args[group_at]
        group = (
            dist.distributed_c10d._resolve_process_group(given) if isinstance(given, str) else ProcessGroup.unbox(given)
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        if kind in ("send", "recv"):
            ranks = (ranks[args[2]],)
        moved = _only(result if tensor == "result" else args[tensor])
        dtype = str(moved.dtype).removeprefix("torch.")
        self.transfers[Seen(self.phase, kind, ranks, dtype, moved.nbytes)] += 1


def _only(value: Any) -> Tensor:
    while isinstance(value, (list, tuple)):
        (value,) = value
    assert isinstance(value, Tensor)
    return value


_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional
# Kind, which argument is the whole tensor, and which one names the group.
COLLECTIVES: dict[Any, tuple[str, int | str, int]] = {
    _c10d.allreduce_.default: ("all_reduce", 0, 1),
    _c10d._allgather_base_.default: ("all_gather", 0, 2),
    _c10d._reduce_scatter_base_.default: ("reduce_scatter", 1, 2),
    _c10d.send.default: ("send", 0, 1),
    _c10d.recv_.default: ("recv", 0, 1),
    _functional.all_reduce.default: ("all_reduce", 0, 2),
    _functional.all_gather_into_tensor.default: ("all_gather", "result", 2),
    _functional.reduce_scatter_tensor.default: ("reduce_scatter", 0, 3),
}
_LOCAL = {_functional.wait_tensor.default}


def _attention_flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Scores and values."""
    rows, heads, length, head_dim = query
    return 2 * rows * heads * length * key[2] * (head_dim + value[3])


def _attention_backward_flops(
    gradient: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any
) -> int:
    """Two contractions for each of forward; the scores that the kernel makes again are no work of the model."""
    return 2 * _attention_flops(query, key, value)


def _addmm_flops(total: list[int], left: list[int], right: list[int], *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# torch's table lacks the attention kernel of CPUs and contractions in place.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
    torch.ops.aten.addmm_: shape_wrapper(_addmm_flops),
}


# ---------------------------------------------------------------------------------------- what a rank holds


class _NoModules:
    """In place of torch's module tracker, which serves one forward at a time; a pipeline has several in flight."""

    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None: ...

    def clear_user_hooks(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...


class Memory(MemTracker):
    """Every storage that lives, from before the model is placed."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()

    def forget_peak(self) -> None:
        self._peak_mem.clear()
        self._peak_mem_snap.clear()

    @property
    def peak_bytes(self) -> int:
        return sum(self._peak_mem.values())

    @property
    def now_bytes(self) -> int:
        return sum(sizes["Total"] for sizes in self.get_tracker_snapshot().values())
