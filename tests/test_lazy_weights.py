"""`from_pretrained` that reads nothing: the same model as the plain one, each rank's pieces from the files, one message
where that cannot be.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from autoparallel.capture.program import capture
from autoparallel.errors import CheckpointError, ConfigError
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime import loading
from autoparallel.runtime.deferred import Deferred, part, put, take, whole
from autoparallel.runtime.lazy import LazyParameter
from autoparallel.runtime.loading import check_values, load_lazily
from tests.equality import Reference, parallel, train, worst_difference
from tests.families import make_batch, make_model
from tests.ranks import run_ranks

PIPELINED = Strategy(num_stages=2, batch_per_device=2, num_micro_batches=2)
SHARDED = Strategy(data_parallel=2, batch_per_device=2, num_micro_batches=1, distribute_param=3)
TENSOR_PARALLEL = Strategy(tensor_parallel=2, sequence_parallel=True, batch_per_device=2, num_micro_batches=2)
GROUPED = Strategy(
    tensor_parallel=2, data_parallel=4, mesh_order=("tp", "pp", "dp"), distribute_param=3, shard_group_size=2
)
MIXTRAL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it to load lazily for the rest of the test."""
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", PreTrainedModel.__dict__["_load_pretrained_model"])
    return load_lazily  # type: ignore[return-value]


def lazy_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, LazyParameter)}


def assert_same(plain: nn.Module, found: nn.Module) -> None:
    """Names, ties, modes, buffers (the rebuilt ones too) and values."""
    assert found.training == plain.training
    for (name, a), (other, b) in zip(plain.named_buffers(), found.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in found.named_parameters()]
    theirs = dict(found.named_parameters(remove_duplicate=False))
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == theirs[name].requires_grad
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name
        assert type(theirs[name]) is nn.Parameter


# ------------------------------------------------------------------------------------------------ as transformers loads


def _sharded_llama(folder: Path) -> Callable[[], nn.Module]:
    make_model("llama", dtype=torch.float32).save_pretrained(folder, max_shard_size="40KB")
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def _cast(folder: Path) -> Callable[[], nn.Module]:
    make_model("llama-tied", dtype=torch.float32).save_pretrained(folder)
    return lambda: transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")


def _merged_experts(folder: Path) -> Callable[[], nn.Module]:
    AutoModelForCausalLM.from_config(transformers.MixtralConfig(**MIXTRAL)).save_pretrained(folder)
    assert any("experts.3.w2" in name for name in load_file(folder / "model.safetensors"))
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def _without_head(folder: Path) -> Callable[[], nn.Module]:
    make_model("llama", dtype=torch.float32).model.save_pretrained(folder)
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def _base_of_full(folder: Path) -> Callable[[], nn.Module]:
    make_model("gpt2", dtype=torch.float32).save_pretrained(folder)
    return lambda: AutoModel.from_pretrained(folder)


def _both_of_a_tie(folder: Path, *, differ: float = 0.0) -> Callable[[], nn.Module]:
    make_model("llama-tied", dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + differ
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def _both_of_a_broken_tie(folder: Path) -> Callable[[], nn.Module]:
    return _both_of_a_tie(folder, differ=1.0)


def _other_names(folder: Path) -> Callable[[], nn.Module]:
    make_model("llama", dtype=torch.float32).save_pretrained(folder)
    tensors = {k.replace("mlp", "ffn"): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return lambda: AutoModelForCausalLM.from_pretrained(folder, key_mapping={"ffn": "mlp"})


class Buffered(transformers.LlamaForCausalLM):
    """With a buffer that checkpoints hold."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.ones(3))


def _kept_buffer(folder: Path) -> Callable[[], nn.Module]:
    model = Buffered(make_model("llama").config)
    model.scale.fill_(7.0)
    model.save_pretrained(folder)
    return lambda: Buffered.from_pretrained(folder)


READ_WHOLE = {
    _without_head: {"lm_head.weight"},
    _both_of_a_tie: {"model.embed_tokens.weight"},
    _both_of_a_broken_tie: {"model.embed_tokens.weight", "lm_head.weight"},
}
"""What is not left in the files: it is not there, or transformers compares it."""


@pytest.mark.parametrize(
    "case",
    [
        _kept_buffer, _sharded_llama, _cast, _merged_experts, _without_head, _base_of_full, _both_of_a_tie,
        _both_of_a_broken_tie, _other_names,
    ],
    ids=lambda case: case.__name__.strip("_"),
)  # fmt: skip
def test_a_lazy_model_is_the_plain_one(
    case: Callable[[Path], Callable[[], nn.Module]], tmp_path: Path, lazily: Callable[[], None]
) -> None:
    load = case(tmp_path)
    torch.manual_seed(0)
    plain = load()
    lazily()
    torch.manual_seed(0)
    found = load()
    everything = {name for name, _ in found.named_parameters()}
    assert lazy_names(found) == everything - READ_WHOLE.get(case, set())
    found(torch.ones(1, 3, dtype=torch.long))
    assert not lazy_names(found) - {"lm_head.weight"}
    assert_same(plain, found)


def test_what_cannot_be_deferred_is_loaded_as_always_and_says_so(tmp_path: Path, lazily: Callable[[], None]) -> None:
    model = make_model("llama", dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    lazily()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    logger.remove(sink)
    assert not lazy_names(found)
    assert_same(model, found)
    assert "is loaded whole by every rank, 0.00 GiB of host memory each: its weights are not safetensors" in said[0]


# ------------------------------------------------------------------------------------------------ a lazy parameter


def without_values(model: Any) -> None:
    """What a script does before it trains; nothing of it needs a value."""
    torch.optim.AdamW(model.parameters(), fused=True)
    model.to("cpu").to(torch.bfloat16).float().train().requires_grad_(True).zero_grad()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.dtype == torch.float32
    model.get_memory_footprint()
    copied = copy.deepcopy(model)
    assert lazy_names(copied) == {name for name, _ in model.named_parameters()}
    capture(model)


def test_values_are_read_when_something_looks_at_them(tmp_path: Path, lazily: Callable[[], None]) -> None:
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).bfloat16().float()
    lazily()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = model.lm_head.weight
    without_values(model)
    assert lazy_names(model) == {name for name, _ in model.named_parameters()}
    assert head is model.lm_head.weight
    nn.init.ones_(head)
    assert head.sum() == head.numel()
    model.model.norm.weight.data.mul_(3.0)
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight * 3.0)
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(64, 32)
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert len(lazy_names(model)) == len(list(model.parameters())) - 3
    again = pickle.loads(pickle.dumps(model.model.embed_tokens.weight))
    assert torch.equal(again, plain.model.embed_tokens.weight)
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], plain.model.layers[1].mlp.up_proj.weight
    )


def test_a_part_of_a_file_is_the_part_of_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any dims, runs and gaps, over the bounds of what is mapped at a time."""
    monkeypatch.setattr(loading, "BLOCK_BYTES", 100)
    values = {"m": torch.randn(13, 6), "v": torch.randn(9), "s": torch.tensor(2.0), "t": torch.randn(5, 2, 3)}
    save_file(values, tmp_path / "x.safetensors")
    tensors = loading._tensors(loading.File.at(str(tmp_path / "x.safetensors")))
    generator = np.random.default_rng(0)
    for name, value in values.items():
        assert torch.equal(whole(tensors[name]), value)
        for _ in range(20):
            picked = generator.integers(-1, max(value.dim(), 1))
            held = tuple(
                np.sort(generator.permutation(n)[: generator.integers(1, n + 1)]) if dim in (0, picked) else None
                for dim, n in enumerate(value.shape)
            )
            expected = take(value, held)
            assert torch.equal(part(tensors[name], held), expected)
            cast: Any = tensors[name].to(torch.bfloat16)
            assert torch.equal(part(cast, held), expected.bfloat16())
            merged: Any = torch.cat([tensors[name].flatten(), tensors[name].flatten() + 1])
            assert torch.equal(whole(merged), torch.cat([value.flatten(), value.flatten() + 1]))
    rows, columns = np.arange(4, 9), np.array([0, 2, 5])
    copied = torch.zeros(13, 6)
    put(copied, take(values["m"], (rows, columns)), (rows, columns))
    assert torch.equal(copied[4:9][:, [0, 2, 5]], values["m"][4:9][:, [0, 2, 5]])
    assert copied.count_nonzero() == 15
    with pytest.raises(NotImplementedError, match="writes into a tensor"):
        Deferred.add_(tensors["m"], 1)


# ------------------------------------------------------------------------------------------------ under a plan


def trained(source: Path, strategies: list[Strategy], family: str, dtype: torch.dtype) -> list[tuple[int, float]]:
    """By plan: how many parameters were lazy, and the worst difference to the model that was loaded eagerly."""
    eager = AutoModelForCausalLM.from_pretrained(source).train()
    program = capture(eager)
    load_lazily()
    found = []
    for strategy in strategies:
        models: list[Any] = [copy.deepcopy(eager), AutoModelForCausalLM.from_pretrained(source).train()]
        references: list[Reference] = [
            train(parallel(model, program, strategy), strategy.batch_size, steps=1, clip=0.5) for model in models
        ]
        lazy = len(lazy_names(AutoModelForCausalLM.from_pretrained(source)))
        found.append((lazy, worst_difference(*references)))
    return found


SLOW = [
    pytest.param(family, dtype, [PIPELINED, SHARDED, TENSOR_PARALLEL], marks=pytest.mark.slow)
    for family, dtype in (
        ("llama", torch.bfloat16),
        ("qwen2", torch.float32),
        ("gpt2", torch.float32),
        ("phi3", torch.float32),
    )
]
SLOW += [pytest.param("gpt2", torch.float32, [GROUPED], marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "dtype", "strategies"), [("qwen2", torch.float32, [SHARDED]), *SLOW])
def test_training_from_files_is_training_from_memory(
    family: str, dtype: torch.dtype, strategies: list[Strategy], tmp_path: Path
) -> None:
    """Bit for bit: losses, norms, gradients, parameters, logits. GPT-2 and Phi-3 cut fused projections."""
    make_model(family, dtype=dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    count = len(list(make_model(family).parameters()))
    for results in run_ranks(strategies[0].num_devices, trained, tmp_path, strategies, family, dtype):
        assert results == [(count, 0.0)] * len(strategies)


def looked_at_first(source: Path) -> tuple[float, float, list[float]]:
    """(plain loss, loss before a plan, two ranks' training losses), with one parameter that only rank 1 has read and
    another that each rank has changed by itself.
    """
    import torch.distributed as dist

    eager = AutoModelForCausalLM.from_pretrained(source).train()
    load_lazily()
    model = parallel(AutoModelForCausalLM.from_pretrained(source).train(), capture(eager), PIPELINED)
    with torch.no_grad():
        before = float(model(**make_batch(4, 8), use_cache=False).loss)
    model = parallel(AutoModelForCausalLM.from_pretrained(source).train(), capture(eager), PIPELINED)
    if dist.get_rank() == 1:
        float(model.lm_head.weight.sum())  # type: ignore[union-attr,operator]
    nn.init.constant_(model.model.norm.weight, 1.0 + dist.get_rank())  # type: ignore[union-attr,arg-type]
    nn.init.constant_(eager.model.norm.weight, 1.0)
    losses = [float(m(**make_batch(4, 8), use_cache=False).loss.detach()) for m in (eager, model)]
    return float(AutoModelForCausalLM.from_pretrained(source)(**make_batch(4, 8)).loss.detach()), before, losses


def test_evaluation_and_changes_before_the_first_step(tmp_path: Path) -> None:
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    for plain, before, (expected, found) in run_ranks(2, looked_at_first, tmp_path):
        assert before == pytest.approx(plain, rel=1e-6)
        assert found == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------ faults


def _truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00005.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


def _remove(folder: Path) -> None:
    (folder / "model-00002-of-00005.safetensors").unlink()


@pytest.mark.parametrize("harm", [_truncate, _remove])
def test_a_damaged_checkpoint_is_named_at_once(
    harm: Callable[[Path], None], tmp_path: Path, lazily: Callable[[], None]
) -> None:
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="40KB")
    harm(tmp_path)
    lazily()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005\.safetensors cannot be read") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert caught.value.exit_code == 7


def test_wrong_shapes_are_refused_as_transformers_does(tmp_path: Path, lazily: Callable[[], None]) -> None:
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.vocab_size += 4
    lazily()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert found.lm_head.weight.shape[0] == config.vocab_size
    assert lazy_names(found) == {n for n, _ in found.named_parameters()} - {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


def test_a_file_that_changes_before_it_is_read(tmp_path: Path, lazily: Callable[[], None]) -> None:
    model = make_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    lazily()
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not the file that from_pretrained saw"):
        found.lm_head.weight.sum()


def other_files(sources: list[Path]) -> str:
    import torch.distributed as dist

    load_lazily()
    model = AutoModelForCausalLM.from_pretrained(sources[dist.get_rank()]).train()
    try:
        parallel(model, capture(model), PIPELINED)(**make_batch(4, 8), use_cache=False)
    except CheckpointError as error:
        return error.what
    return "nothing"


def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    sources = [tmp_path / "a", tmp_path / "b"]
    for seed, source in enumerate(sources):
        make_model("llama", dtype=torch.float32, seed=seed).save_pretrained(source)
    assert run_ranks(2, other_files, sources) == ["ranks [1] have another model.safetensors than rank 0"] * 2


def test_a_model_without_any_values_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**MIXTRAL))
    with pytest.raises(ConfigError, match="is on the meta device"):
        check_values(model)
