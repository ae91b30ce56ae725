"""The files under configs/ and the proof that no setting is dead."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from draftloop.config import Config, flatten, load_config
from draftloop.config.schema import leaf_fields
from draftloop.config.source import read_file

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("32gb", "speed", "quality", "offline")


def leaves(name: str) -> dict[str, Any]:
    return {key: entry.value for key, entry in read_file(ROOT / "configs" / f"{name}.yaml").items()}


def test_config_yaml_is_the_defaults_leaf_for_leaf_and_in_order() -> None:
    assert list(leaves("config").items()) == list(flatten(Config()).items())


def test_config_yaml_comments_every_key() -> None:
    lines = (ROOT / "configs/config.yaml").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if ":" in line and not line.rstrip().endswith(":") and line[0] != "#"]
    assert len(settings) == len(leaf_fields())
    assert [line for line in settings if "  #" not in line] == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_differs(name: str) -> None:
    defaults = flatten(Config())
    preset = leaves(name)
    assert preset
    assert [key for key, value in preset.items() if value == defaults[key]] == []
    assert load_config([ROOT / "configs" / f"{name}.yaml"]).config != Config()


def test_the_guides_presets() -> None:
    assert leaves("32gb") == {
        "models.target.name": "mlx-community/Qwen2.5-7B-Instruct-4bit",
        "training.lora.rank": 16,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 2,
        "memory.gradient_checkpointing": False,
    }
    assert leaves("speed") == {
        "speculative.num_draft_tokens": 6,
        "speculative.temperature": 0.0,
        "speculative.acceptance_threshold": 0.3,
        "training.min_failure_cases": 100,
    }
    assert leaves("quality") == {
        "speculative.num_draft_tokens": 3,
        "speculative.temperature": 0.8,
        "speculative.acceptance_threshold": 0.6,
        "training.min_failure_cases": 30,
        "training.lora.rank": 16,
    }


def test_every_setting_has_its_row_in_the_users_page() -> None:
    page = (ROOT / "docs/configure.md").read_text(encoding="utf-8")
    rows = {
        line.split("`")[1]: line
        for line in page.splitlines()
        if line.startswith("| `") and "| `configs/" not in line
    }
    assert set(rows) == set(leaf_fields())
    for key, value in flatten(Config()).items():
        default = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
        assert f"`{default.splitlines()[0]}`" in rows[key].replace('"', "").replace("'", ""), key


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_settings", ROOT / "dev/check_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestDeadSettings:
    def tree(self, folder: Path, *, without: str = "") -> Path:
        """A program that reads every setting but one."""
        keys = [key for key in leaf_fields() if key != without]
        lines = [f"    use(config.{key})" for key in keys]
        (folder / "main.py").write_text("\n".join(["def run(config):", *lines]), encoding="utf-8")
        return folder

    def test_a_program_that_reads_all_of_them_passes(self, checker: ModuleType, tmp_path: Path) -> None:
        assert checker.problems(self.tree(tmp_path)) == []

    @pytest.mark.parametrize("key", list(leaf_fields()))
    def test_each_unread_setting_is_found(self, checker: ModuleType, tmp_path: Path, key: str) -> None:
        (line,) = checker.problems(self.tree(tmp_path, without=key))
        assert line.startswith(f"{key}: nothing reads it")

    @pytest.mark.parametrize(
        "code",
        [
            "config.generation.max_tokens = 4",
            "text = 'config.generation.max_tokens'",
            "use(config.max_tokens)",
            "use(config.generation)",
            "use(generation.max_tokens_left)",
        ],
    )
    def test_what_is_no_read(self, checker: ModuleType, tmp_path: Path, code: str) -> None:
        self.tree(tmp_path, without="generation.max_tokens")
        (tmp_path / "other.py").write_text(code, encoding="utf-8")
        assert len(checker.problems(tmp_path)) == 1

    def test_the_configuration_itself_does_not_count(self, checker: ModuleType, tmp_path: Path) -> None:
        self.tree(tmp_path, without="generation.max_tokens")
        (tmp_path / "config").mkdir()
        (tmp_path / "config/load.py").write_text("use(config.generation.max_tokens)", encoding="utf-8")
        assert len(checker.problems(tmp_path)) == 1
