"""Plans that are kept: the same bytes without capture, for the same question only, and never a reason to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import autoparallel as ap
from autoparallel import api
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.tables import load_table
from autoparallel.errors import ConfigError
from autoparallel.plans import cache
from autoparallel.plans.identity import model_facts
from tests import plans
from tests.families import FAMILIES, make_model

ROOT = Path(__file__).parent.parent
KEY = "ab" * 32
SMALL = ap.Constraints(num_micro_batches=1, tensor_parallel=1)
QUESTION: dict[str, Any] = {
    "flavor": "cpu:2", "batch_size": 4, "seq_len": 16, "constraints": SMALL, "workers": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were captured."""
    captured: list[Any] = []
    capture = api._capture

    def counted(model: Any, precision: Any) -> Any:
        captured.append(model)
        return capture(model, precision)

    monkeypatch.setattr(api, "_capture", counted)
    return captured


def test_a_question_asked_again_gets_the_same_bytes_and_no_capture(folder: Path, captures: list[Any]) -> None:
    made = ap.plan(FAMILIES["llama"](), **QUESTION)
    kept = ap.plan(FAMILIES["llama"](), **QUESTION)
    assert len(captures) == 1
    assert kept.to_json() == made.to_json() == next(folder.iterdir()).read_text()
    assert kept == made
    ap.plan(FAMILIES["llama"](), **{**QUESTION, "batch_size": 8})
    ap.plan(FAMILIES["qwen2"](), **QUESTION)
    assert len(captures) == 3


def test_a_plan_made_in_a_limited_time_or_dumped_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ap.plan(FAMILIES["llama"](), **QUESTION, budget_s=60.0)
    assert not folder.exists()
    ap.plan(FAMILIES["llama"](), **QUESTION)
    monkeypatch.setenv("AUTOPARALLEL_DUMP", str(tmp_path / "dump"))
    ap.plan(FAMILIES["llama"](), **QUESTION)
    assert (tmp_path / "dump" / "10_capture.txt").exists()


def test_a_kept_plan_of_a_folder_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "model")
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('autoparallel', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)\n"
    )
    words = ["plan", str(tmp_path / "model"), "--flavor", "cpu:2", "--batch-size", "4", "--seq-len", "16", "--json"]
    runs = [
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stderr.endswith("['torch', 'transformers']\n")
    assert "Took the plan from the cache" in runs[1].stderr
    assert runs[1].stderr.endswith("[]\n")


def key(model: Any = None, **changes: Any) -> str | None:
    flavor = resolve_flavor(changes.pop("flavor", "2xA100-SXM4-80GB"))
    fields = {"flavor": flavor, "table": load_table(flavor.device), "batch_size": 4, "seq_len": 16, "dtype": "auto"}
    return cache.key_of(
        FAMILIES["llama"]() if model is None else model, **{**fields, "constraints": ap.Constraints(), **changes}
    )


def test_whatever_decides_the_answer_is_in_the_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert key() == key()
    table = load_table("A100-SXM4-80GB")
    changed: list[dict[str, Any]] = [
        {"model": FAMILIES["qwen2"]()},
        {"flavor": "4xA100-SXM4-80GB"},
        {"batch_size": 8},
        {"seq_len": 32},
        {"dtype": "float32"},
        {"constraints": ap.Constraints(num_stages=1)},
        {"table": table.model_copy(update={"description": "another"})},
    ]
    keys = {key(), *(key(**change) for change in changed)}
    assert len(keys) == 1 + len(changed)
    monkeypatch.setattr(cache, "_versions", lambda: ["another"])
    assert key() not in keys
    monkeypatch.setenv("AUTOPARALLEL_CACHE", "off")
    assert key() is None


def test_an_odd_question_still_gets_its_own_message(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype"):
        ap.plan(FAMILIES["llama"](), **QUESTION, dtype=torch.bfloat16)


def test_an_edited_source_is_another_version(tmp_path: Path) -> None:
    source = tmp_path / "inner" / "code.py"
    source.parent.mkdir()
    source.write_text("1")
    before = sorted(cache._sources(tmp_path))
    source.write_text("22")
    longer = sorted(cache._sources(tmp_path))
    os.utime(source, ns=(0, 0))
    assert len({str(before), str(longer), str(sorted(cache._sources(tmp_path)))}) == 3


def test_equal_models_have_equal_facts_and_changed_ones_others() -> None:
    def changed(change: Callable[[Any], Any]) -> object:
        model = make_model("llama")
        change(model)
        return model_facts(model)

    facts = model_facts(make_model("llama"))
    assert facts is not None
    assert facts == model_facts(make_model("llama", seed=1))
    others = [
        changed(lambda m: m.lm_head.requires_grad_(False)),
        changed(lambda m: m.float()),
        changed(lambda m: setattr(m.model.layers[1].self_attn, "attention_dropout", 0.1)),
        changed(lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight)),
        changed(lambda m: setattr(m.config, "hidden_act", "gelu")),
        changed(lambda m: m.model.layers.append(m.model.layers[0])),
    ]
    assert None not in others
    assert len({json.dumps(each) for each in [facts, *others]}) == 1 + len(others)


class Other(nn.Linear):
    pass


def test_models_that_facts_do_not_tell_are_not_kept(folder: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert key(model) is None
    handle.remove()
    assert key(model) is not None
    model.model.layers[0].forward = lambda hidden: hidden
    assert key(model) is None
    other = make_model("llama")
    other.lm_head = Other(32, 96, bias=False)
    assert key(other) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert key(tmp_path) is not None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}))
    assert key(tmp_path) is None
    assert key("some/name-of-a-hub") is None


def test_patched_and_registered_code_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    config = FAMILIES["llama"]()
    for owner, name in ((modeling_llama, "apply_rotary_pos_emb"), (modeling_llama.LlamaMLP, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: None)
            assert key(config) is None
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert key(make_model("llama")) is None
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    with monkeypatch.context() as patch:
        patch.setattr(mapping, "_extra_content", {Other: Other})
        assert key(config) is None
    assert key(config) is not None


def test_a_broken_or_foreign_entry_is_passed_over_and_replaced(folder: Path, captures: list[Any]) -> None:
    made = ap.plan(FAMILIES["llama"](), **QUESTION)
    (entry,) = folder.iterdir()
    for text in ("{", "", plans.sample_plan().to_json()):
        entry.write_text(text)
        assert ap.plan(FAMILIES["llama"](), **QUESTION) == made
        assert entry.read_text() == made.to_json()
    assert len(captures) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path / "file" / "plans"))
    assert ap.plan(FAMILIES["llama"](), **QUESTION).batch_size == 4


def test_the_oldest_of_our_entries_are_removed_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    folder.mkdir()
    (folder / "notes.json").write_text("mine")
    (folder / f".{KEY}.json.xyz.tmp").write_text("left by a killed writer")
    for age, old in enumerate("1234"):
        (folder / f"{old * 64}.json").write_text("")
        os.utime(folder / f"{old * 64}.json", (100 - age, 100 - age))
    os.utime(folder / f".{KEY}.json.xyz.tmp", (1, 1))
    os.utime(folder / "notes.json", (1, 1))
    cache.write(KEY, plans.sample_plan())
    assert sorted(path.name[:5] for path in folder.iterdir()) == ["11111", "22222", "ababa", "notes"]


def test_writers_at_the_same_time_leave_a_whole_entry(folder: Path) -> None:
    plan = plans.sample_plan()
    writers = [threading.Thread(target=cache.write, args=(KEY, plan)) for _ in range(8)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert cache.read(KEY) in (None, plan)
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.json"]


def test_the_folder_is_the_users_cache_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AUTOPARALLEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "autoparallel" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "autoparallel" / "plans"
