"""`draftloop adapters`: lineage, promotion by hand, the way back, and adapters from outside."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.learning.recipe import Recipe
from draftloop.models.adapter_files import read_adapter, write_adapter
from draftloop.speculation.costs import RoundCosts
from draftloop.storage.records import AdapterRecord, AdapterStatus, PairKey, RunStatus
from draftloop.types import Sampling

GAIN = {
    "gain": 0.0883,
    "gain_ci95": [0.051, 0.12],
    "domains": {
        "toys": {
            "requests": 9,
            "rows": 180,
            "alpha_before": 0.7,
            "alpha_after": 0.75,
            "tau_before": 2.95,
            "tau_after": 3.21,
        }
    },
}


@pytest.fixture
def adapters(draftloop, classroom, monkeypatch):
    """`adapters(*words)` in the classroom."""
    monkeypatch.chdir(classroom.folder)

    def call(*words, **changes):
        return draftloop(*classroom.options(**changes), "adapters", *words)

    return call


def some_lora(folder: Path, seed: int = 0, spec: LoraSpec = LoraSpec(2, 4.0, ("down_proj",))) -> Lora:  # noqa: B008
    random = np.random.default_rng(seed)
    fresh = new_lora(read_architecture(folder), spec, seed)
    return Lora(
        spec,
        {
            name: LoraModule(module.a, random.standard_normal(module.b.shape).astype(np.float32) / 10)
            for name, module in fresh.modules.items()
        },
    )


def add(classroom, name, parent=None, *, status=AdapterStatus.REJECTED, promote=False, pair=None, run=None):
    """An adapter with its files, as a training run would leave it."""
    lora = some_lora(classroom.folder / "draft", int(name[1:]))
    write_adapter(classroom.data / "adapters" / name, lora, base_model="./draft", facts={"name": name})
    with classroom.store() as store:
        store.adapters.add(
            AdapterRecord(
                name, pair or classroom.pair, parent, 1.7e9, status, "unfused", run, f"{name}'s reason", GAIN
            )
        )
        if promote:
            store.adapters.promote(name, reason=f"{name} is better")


def active(classroom):
    with classroom.store() as store:
        found = store.adapters.active(classroom.pair)
    return found and found.name


def test_without_any_there_is_a_hint_and_nothing_is_created(draftloop, toys_on_numpy):
    assert "There is no adapter yet" in draftloop(*toys_on_numpy, "adapters", "list").out
    assert draftloop(*toys_on_numpy, "adapters", "list", "--json").json == {"active": None, "adapters": []}
    for words in (("show", "a0001"), ("promote", "a0001"), ("revert",)):
        result = draftloop(*toys_on_numpy, "adapters", *words)
        result.assert_wrong_input("adapter")
    assert not Path("data").exists()


def test_the_list_shows_lineage_status_and_the_active_one(adapters, classroom):
    add(classroom, "a0001", promote=True)
    add(classroom, "a0002", "a0001", promote=True)
    add(classroom, "a0003", "a0002")
    result = adapters("list")
    lines = {
        line.split()[-0 if line[0] != "*" else 1]: line for line in result.out.splitlines() if "a000" in line
    }
    assert lines["a0002"].startswith("*")
    assert "promoted" in lines["a0002"]
    assert "+8.8 % (5.1 to 12.0)" in lines["a0003"]
    assert "rejected" in lines["a0003"]
    assert "bare draft" in lines["a0001"]
    assert "active: a0002" in result.out
    figures = adapters("list", "--json").json
    assert figures["active"] == "a0002"
    assert [(one["name"], one["parent"], one["active"]) for one in figures["adapters"]] == [
        ("a0001", None, False),
        ("a0002", "a0001", True),
        ("a0003", "a0002", False),
    ]
    assert figures["adapters"][0]["size_bytes"] > 1000
    assert figures["adapters"][0]["gain_ci95"] == [0.051, 0.12]


def recipe_of(classroom):
    with classroom.store() as store:
        ids = [one.id for one in store.requests.list(classroom.pair)]
    return Recipe(
        settings=classroom.config().training,
        gradient_checkpointing=False,
        num_draft_tokens=3,
        threshold=1.0,
        failures=tuple(ids[:5]),
        replay=tuple(ids[5:7]),
        validation=(),
        gate=(),
        gate_domains=(),
        parent=None,
        timed_round=None,
        facts={"backend": "torch", "device": "cpu"},
        by_width=RoundCosts(((1, 0.05), (4, 0.07)), 0.01, 0.002, 0.001, sampling=Sampling(0.7, 0.9)),
    )


def add_with_run(classroom):
    recipe = recipe_of(classroom)
    with classroom.store() as store:
        run = store.runs.start(classroom.pair, None, recipe.to_json())
        store.runs.finish(run, RunStatus.REJECTED, {"reason": "no gain"})
    add(classroom, "a0001", run=run)
    return recipe


def test_show_tells_what_reproduces_it(adapters, classroom):
    recipe = add_with_run(classroom)
    text = adapters("show", "a0001").out
    assert "a0001 (rejected)" in text
    assert "a0001's reason" in text
    assert str(classroom.data / "adapters" / "a0001") in text
    assert "lk_hybrid, rank 2, alpha 16, down_proj" in text
    assert "5 failures and 2 others" in text
    assert "tau 2.950 → 3.210" in text
    assert "backend torch" in text
    figures = adapters("show", "a0001", "--json").json
    assert Recipe.from_json(figures["recipe"]) == recipe
    # An older version's calibration did not tell the sampling.
    del figures["recipe"]["by_width"]["sampling"]
    assert Recipe.from_json(figures["recipe"]).by_width == replace(recipe.by_width, sampling=Sampling())
    assert figures["metrics"]["gain"] == GAIN["gain"]
    assert figures["folder"] == str(classroom.data / "adapters" / "a0001")


def test_unknown_names(adapters, classroom):
    add(classroom, "a0001")
    adapters("show", "a0009").assert_wrong_input("a0009", "adapters list")
    adapters("promote", "a0009").assert_wrong_input("a0009", "adapters list")


def test_promote_says_what_the_gate_had_said(adapters, classroom):
    recipe = add_with_run(classroom)
    result = adapters("promote", "a0001")
    assert "a0001 is active from the next request on" in result.out
    assert "rejected before: a0001's reason" in result.out
    assert active(classroom) == "a0001"
    with classroom.store() as store:
        record = store.adapters.get("a0001")
        learnt = {one.id for one in store.requests.list(classroom.pair) if one.trained_by == "a0001"}
    assert record.status is AdapterStatus.PROMOTED
    assert "a0001's reason" in record.reason
    assert learnt == set(recipe.learnt)
    adapters("promote", "a0001").assert_wrong_input("active already")


def test_promote_as_json(adapters, classroom):
    add(classroom, "a0001")
    assert adapters("promote", "a0001", "--json").json == {
        "active": "a0001",
        "status_before": "rejected",
        "reason_before": "a0001's reason",
    }


def test_revert_goes_back_parent_by_parent_to_the_bare_draft(adapters, classroom):
    add(classroom, "a0001", promote=True)
    add(classroom, "a0002", "a0001", promote=True)
    assert "a0002 is taken back; a0001 is active" in adapters("revert").out
    assert active(classroom) == "a0001"
    assert adapters("revert", "--json").json == {"reverted": "a0001", "active": None}
    assert active(classroom) is None
    adapters("revert").assert_wrong_input("none to revert")


def test_damaged_files_are_not_promoted(adapters, classroom):
    add(classroom, "a0001")
    path = classroom.data / "adapters" / "a0001" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    adapters("promote", "a0001").assert_wrong_input("adapter_model.safetensors")
    shutil.rmtree(path.parent)
    adapters("promote", "a0001").assert_wrong_input("missing")
    assert active(classroom) is None


def test_another_pairs_adapter_is_not_promoted(adapters, classroom):
    add(classroom, "a0001", pair=PairKey("./target", "./other"))
    adapters("promote", "a0001").assert_wrong_input("./other", "./draft")


def test_import_copies_checks_and_does_not_promote(adapters, classroom, tmp_path):
    outside = tmp_path / "outside"
    lora = some_lora(classroom.folder / "draft")
    write_adapter(outside, lora, base_model="somewhere/else", facts={})
    assert "a0001 is here; draftloop adapters promote a0001" in adapters("import", outside).out
    assert active(classroom) is None
    shutil.rmtree(outside)
    listed = adapters("list", "--json").json["adapters"][0]
    assert (listed["status"], listed["parent"], listed["gain"]) == ("imported", None, None)
    assert "not measured" in adapters("list").out
    copied = read_adapter(classroom.data / "adapters" / "a0001")
    for name, module in lora.modules.items():
        np.testing.assert_array_equal(copied.modules[name].b, module.b)
    assert "a0001 (imported)" in adapters("show", "a0001").out
    assert "imported before" in adapters("promote", "a0001").out
    assert active(classroom) == "a0001"
    assert adapters("revert").exit_status == 0


def test_an_imported_adapter_is_worn_by_the_next_answer(adapters, draftloop, classroom, tmp_path):
    write_adapter(tmp_path / "outside", some_lora(classroom.folder / "draft"), base_model="x", facts={})
    adapters("import", tmp_path / "outside", "--json").json  # noqa: B018
    adapters("promote", "a0001")
    options = classroom.options(backend="numpy")
    worn = draftloop(*options, "generate", "hello", "--json", "--temperature", 0).json
    assert worn["adapter"] == "a0001"
    bare = draftloop(*options, "generate", "hello", "--json", "--temperature", 0, "--adapter", "none").json
    assert bare["adapter"] is None
    assert worn["token_ids"] == bare["token_ids"]


def test_import_refuses_what_is_not_this_drafts(adapters, classroom, tmp_path, toy_folder):
    other = some_lora(toy_folder(num_layers=2, hidden_size=32))
    write_adapter(tmp_path / "other", other, base_model="x", facts={})
    adapters("import", tmp_path / "other").assert_wrong_input("down_proj", "this draft")
    adapters("import", tmp_path / "nothing").assert_wrong_input("nothing", "folder")
    (tmp_path / "empty").mkdir()
    adapters("import", tmp_path / "empty").assert_wrong_input("adapter_config.json")
    write_adapter(tmp_path / "dora", some_lora(classroom.folder / "draft"), base_model="x", facts={})
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    adapters("import", tmp_path / "dora").assert_wrong_input("use_dora")
    with classroom.store() as store:
        assert store.adapters.list(classroom.pair) == []


def test_imports_and_runs_are_given_different_names(adapters, classroom, tmp_path):
    write_adapter(tmp_path / "outside", some_lora(classroom.folder / "draft"), base_model="x", facts={})
    names = [adapters("import", tmp_path / "outside", "--json").json["name"] for _ in range(3)]
    assert names == ["a0001", "a0002", "a0003"]
    assert AdapterForm(adapters("show", "a0003", "--json").json["form"]) is AdapterForm.UNFUSED
