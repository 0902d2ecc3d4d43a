"""Planning's capture: of blocks that are alike one is traced, yet the graph is that of the whole model, op by op."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from autoparallel.capture.attention import ATTENTION_TARGET
from autoparallel.capture.program import Program, capture, capture_for_planning
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.segments import build_workload
from autoparallel.cost.tables import load_table
from autoparallel.ir.graph import Graph, Op, SavedTensor, TensorSpec
from autoparallel.ir.precision import Precision
from autoparallel.tensor_parallel.analysis import analyze
from autoparallel.tensor_parallel.splits import choices
from tests.families import FAMILIES, UNSEEN, make_model, program_of


def by_place(graph: Graph) -> tuple[list[Op], list[list[TensorSpec]], list[str]]:
    """Ops, boundaries and outputs with every op named by its place in the program."""
    places = {op.name: f"op {k}" for k, op in enumerate(graph.ops())}

    def name(of: str) -> str:
        maker, colon, which = of.partition(":")
        return places.get(maker, maker) + colon + which

    def specs(given: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, name=name(spec.name)) for spec in given)

    def storages(given: tuple[SavedTensor, ...]) -> tuple[SavedTensor, ...]:
        return tuple(replace(kept, storage=name(kept.storage)) for kept in given)

    ops = [
        replace(
            op,
            name=name(op.name),
            inputs=specs(op.inputs),
            outputs=specs(op.outputs),
            saved=storages(op.saved),
            kept=storages(op.kept),
        )
        for op in graph.ops()
    ]
    return ops, [list(specs(entering)) for entering in graph.boundaries], [name(output) for output in graph.outputs]


def priced(graph: Graph) -> str:
    flavor = resolve_flavor("2xA100-SXM4-80GB")
    return build_workload(
        graph,
        flavor,
        load_table(flavor.device),
        batch_size=4,
        seq_len=32,
        micro_batch_sizes=[1, 2],
        memory_ratio=0.9,
        precision=Precision.of("float32", "float32"),
        tensor_degrees=[2],
    ).model_dump_json()


def assert_same(whole: Graph, quick: Graph) -> None:
    for ours, theirs in zip(by_place(quick), by_place(whole), strict=True):
        assert ours == theirs
    assert quick.parameters == whole.parameters
    assert quick.segment_classes == whole.segment_classes
    assert quick.fingerprint == whole.fingerprint
    assert (quick.architecture, quick.model_name, quick.notes) == (whole.architecture, whole.model_name, whole.notes)
    ours, theirs = ({(a, b, d["tensor"]) for a, b, d in g.dag.edges(data=True)} for g in (quick, whole))
    assert len(ours) == len(theirs)
    assert priced(quick) == priced(whole)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in UNSEEN)])
def test_families(family: str) -> None:
    quick = capture_for_planning(make_model(family, dtype=torch.float32))
    assert quick.num_traced_blocks == (2 if family == "gemma2" else 1)
    assert_same(program_of(family).graph, quick.graph)


@pytest.mark.parametrize("layers", [3, 6])
def test_depths(layers: int) -> None:
    model = make_model("gpt2", dtype=torch.float32, num_hidden_layers=layers, attn_pdrop=0.1, resid_pdrop=0.1)
    assert_same(capture(model).graph, capture_for_planning(model).graph)


class LowRank(nn.Module):
    """A linear with a low-rank term beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class Numbered(nn.Module):
    """Something that knows its block's number."""

    def __init__(self, inner: nn.Module, number: int, use: Callable[[int], float]) -> None:
        super().__init__()
        self.inner, self.number, self.use = inner, number, use

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.use(self.number)
        return out


def llama(change: Callable[[Any], Any], layers: int = 5) -> Callable[[], Any]:
    def made() -> Any:
        model: Any = make_model("llama", dtype=torch.float32, num_hidden_layers=layers)
        change(model.model.layers if change.__code__.co_varnames[0] == "layers" else model)
        return model

    return made


def freeze_embeddings(model: Any) -> None:
    model.model.embed_tokens.requires_grad_(False)


def freeze_half(model: Any) -> None:
    freeze_embeddings(model)
    for block in model.model.layers[:3]:
        block.requires_grad_(False)


def adapt_some(model: Any) -> None:
    model.requires_grad_(False)
    for block in model.model.layers[1:4]:
        block.self_attn.q_proj = LowRank(block.self_attn.q_proj)


def swap_a_norm(layers: Any) -> None:
    layers[3].input_layernorm = nn.LayerNorm(32)


def hook_one(layers: Any) -> None:
    layers[2].mlp.register_forward_hook(lambda module, args, out: 2 * out)


def patch_one(layers: Any) -> None:
    forward = layers[3].mlp.forward
    layers[3].mlp.forward = lambda x: forward(x) + x


def share_a_weight(layers: Any) -> None:
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight


def repeat_a_block(layers: Any) -> None:
    layers[3] = layers[1]


def scale_one(layers: Any) -> None:
    for block in layers:
        block.mlp = Numbered(block.mlp, 1, float)
    layers[2].mlp.number = 7


def number_all(use: Callable[[int], float]) -> Callable[[Any], None]:
    def change(layers: Any) -> None:
        for k, block in enumerate(layers):
            block.mlp = Numbered(block.mlp, k, use)

    return change


def config_of(name: str, **changes: Any) -> Callable[[], Any]:
    """A model of a family that is not in `FAMILIES`."""
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    made = getattr(transformers, f"{name}Config")(**sizes | changes)
    return lambda: transformers.AutoModelForCausalLM.from_config(made)


CHANGED: dict[str, tuple[Callable[[], Any], int | None]] = {
    "embeddings frozen": (llama(freeze_embeddings), 2),
    "half frozen": (llama(freeze_half, 6), 3),
    "some adapted": (llama(adapt_some, 6), 4),
    "one norm swapped": (llama(swap_a_norm), 2),
    "one hooked": (llama(hook_one), 2),
    "one patched": (llama(patch_one), 2),
    "a weight shared": (llama(share_a_weight), 3),
    "a block repeated": (llama(repeat_a_block), None),
    "one scaled": (llama(scale_one), 2),
    "the number is multiplied": (llama(number_all(lambda number: 1.0 / (number + 1))), None),
    "the number is compared": (llama(number_all(lambda number: 1.0 if number < 3 else 2.0)), None),
    "the number is looked up": (llama(number_all(lambda number: [1.0, 2.0, 1.0, 2.0, 2.0][number])), None),
    "the number is a truth": (llama(number_all(lambda number: 1.0 if number else 2.0)), None),
    "the number is not used": (llama(number_all(lambda number: 3.0)), 1),
    "scaled by the inverse number": (
        lambda: make_model("gpt2", dtype=torch.float32, scale_attn_by_inverse_layer_idx=True),
        None,
    ),
    "windows from a block on": (
        config_of("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
        2,
    ),
}
FAST = ("half frozen", "the number is compared")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CHANGED])
def test_models_whose_blocks_differ(name: str) -> None:
    made, num_traced = CHANGED[name]
    model = made().train()
    quick = capture_for_planning(model)
    assert quick.num_traced_blocks == num_traced
    assert_same(capture(model).graph, quick.graph)


def test_a_deep_model_is_traced_as_a_shallow_one() -> None:
    config = FAMILIES["llama"]()
    programs: list[Program] = []
    for config.num_hidden_layers in (2, 60):
        programs.append(capture_for_planning(config))
    shallow, deep = (len(program.module.graph.nodes) for program in programs)
    assert deep - shallow == 2 * 58
    assert programs[1].graph.num_segments == 62


def test_blocks_of_one_segment_are_split_alike() -> None:
    """The first block is the last one too, so that all are one segment; of its 21 dims there are 2^21 sets."""

    def share(layers: Any) -> None:
        layers[7] = layers[0]

    program = capture_for_planning(llama(share, 8)())
    assert program.graph.num_segments == 3
    groups = choices(analyze(program.graph, 1), 2)
    assert [len(group) for group in groups] == [7, 7, 7]
    for group in groups:
        assert len({name.split(".", 1)[1] for name in group}) == 1


def test_adapted_blocks_have_the_attention_of_their_base() -> None:
    """Ten dims of a block: heads, their groups, the channels of the MLP, and the ranks of seven adapters, as one."""
    import peft

    adapters = peft.LoraConfig(r=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama", dtype=torch.float32), adapters)
    graph = capture_for_planning(model).graph
    assert not graph.notes
    assert_same(capture(model).graph, graph)
    for block in range(1, graph.num_segments - 1):
        assert sum(op.target == ATTENTION_TARGET for op in graph.segment_ops(block)) == 1
        groups = choices(analyze(graph, block), 2)
        assert sorted(map(len, groups)) == [1, 1, 1, 7]


def test_the_users_model_is_left_alone() -> None:
    model: Any = make_model("llama", dtype=torch.float32)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    capture_for_planning(model)
    after = [(type(module), dict(vars(module))) for module in model.modules()]
    assert [kind for kind, _ in before] == [kind for kind, _ in after]
    for (_, old), (_, new) in zip(before, after, strict=True):
        assert old.keys() == new.keys()


def test_graphs_that_differ_have_fingerprints_that_differ() -> None:
    changes: list[dict[str, Any]] = [{}, {"num_hidden_layers": 5}, {"rms_norm_eps": 1e-3}, {"intermediate_size": 48}]
    found = [capture_for_planning(make_model("llama", **change)).graph.fingerprint for change in changes]
    frozen = make_model("llama")
    next(frozen.parameters()).requires_grad_(False)
    found.append(capture_for_planning(frozen).graph.fingerprint)
    assert all(one != other for one, other in itertools.combinations(found, 2))
