"""Layers, origins and what a value may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from draftloop.config import Config, OriginKind, flatten, load_config
from draftloop.config.schema import leaf_fields, nest
from draftloop.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def value_of(override: str) -> Any:
    key = override.partition("=")[0]
    return flatten(load_config([], [override]).config)[key]


def test_without_a_file_every_setting_is_the_default() -> None:
    loaded = load_config()
    expected = flatten(Config())
    values = flatten(loaded.config)
    del expected["storage.directory"], values["storage.directory"]
    assert values == expected
    assert {origin.kind for origin in loaded.origins.values()} == {OriginKind.DEFAULT}
    assert list(loaded.origins) == list(leaf_fields())


def test_the_default_file_is_read_where_it_exists(tmp_path: Path) -> None:
    write(tmp_path / "configs/config.yaml", "generation:\n  max_tokens: 7\n")
    loaded = load_config()
    assert loaded.config.generation.max_tokens == 7
    assert str(loaded.origins["generation.max_tokens"]) == "configs/config.yaml:2"


def test_a_named_file_replaces_the_default_file(tmp_path: Path) -> None:
    write(tmp_path / "configs/config.yaml", "generation: {max_tokens: 7}")
    other = write(tmp_path / "other.yaml", "generation: {min_tokens: 2}")
    assert load_config([other]).config.generation.max_tokens == 512


def test_later_layers_win_and_each_leaf_knows_its_origin(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "speculative:\n  top_p: 0.5\n  top_k: 10\n  min_p: 0.1\n")
    second = write(tmp_path / "b.yaml", "# later\nspeculative:\n  top_k: 20\n  min_p: 0.2\n")
    loaded = load_config([first, second], ["speculative.min_p=0.3", "speculative.min_p=0.4"])
    speculative = loaded.config.speculative
    assert (speculative.top_p, speculative.top_k, speculative.min_p) == (0.5, 20, 0.4)
    assert str(loaded.origins["speculative.top_p"]) == f"{first}:2"
    assert str(loaded.origins["speculative.top_k"]) == f"{second}:3"
    assert str(loaded.origins["speculative.min_p"]) == "--set"
    assert str(loaded.origins["speculative.temperature"]) == "default"


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "---\n", "training:\n", "training: {}\n", "\ufeff"]
)
def test_an_empty_file_or_section_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load_config([write(tmp_path / "c.yaml", text)]).config.training == Config().training


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("speculative.temperature=0", 0),
        ("training.learning_rate=1e-3", 1e-3),
        ("training.learning_rate=1.0e-3", 1e-3),
        ("training.learning_rate=.5E-2", 0.5e-2),
        ("generation.max_tokens=1_000", 1000),
        ("speculative.acceptance_threshold=auto", "auto"),
        ("speculative.acceptance_threshold=1", 1),
        ("speculative.draft_vocabulary=32768", 32_768),
        ("speculative.draft_vocabulary=auto", "auto"),
        ("memory.gradient_checkpointing=false", False),
        ("training.lora.target_modules=[k_proj, down_proj]", ("k_proj", "down_proj")),
        ("chat.system_message=", None),
        ("chat.system_message=null", None),
        ("chat.system_message=''", ""),
        ("chat.system_message=Be brief: C # only", "Be brief: C # only"),
        ('chat.system_message="a\\nb"', "a\nb"),
        ("chat.system_message=[not a list]", "[not a list]"),
        ("chat.system_message=a=b", "a=b"),
        ("logging.level=DEBUG", "DEBUG"),
        ("models.draft.name=./models/x.gguf", "./models/x.gguf"),
        (" generation.max_tokens = 9 ", None),
    ],
)
def test_overrides_are_yaml_and_text_is_taken_as_it_stands(override: str, value: Any) -> None:
    if override.startswith(" "):
        assert load_config([], [override]).config.generation.max_tokens == 9
    else:
        assert value_of(override) == value


def test_an_override_may_set_a_whole_section() -> None:
    loaded = load_config([], ["training.lora={rank: 4, alpha: 8.5}"])
    assert (loaded.config.training.lora.rank, loaded.config.training.lora.alpha) == (4, 8.5)
    assert loaded.origins["training.lora.rank"].kind is OriginKind.SET


def test_the_configuration_is_frozen() -> None:
    config = load_config().config
    with pytest.raises(ValidationError):
        config.training.lora.rank = 4  # type: ignore[misc]


class TestStorageDirectory:
    def directory(self, *paths: Path, overrides: tuple[str, ...] = ()) -> str:
        return load_config(paths, overrides).config.storage.directory

    def test_lies_beside_the_file(self, tmp_path: Path) -> None:
        assert self.directory(write(tmp_path / "x/my.yaml", "")) == str(tmp_path / "x/data")

    def test_lies_beside_the_configs_folder(self, tmp_path: Path) -> None:
        assert self.directory(write(tmp_path / "x/configs/my.yaml", "")) == str(tmp_path / "x/data")

    def test_belongs_to_the_file_that_sets_it_else_to_the_first(self, tmp_path: Path) -> None:
        first, second = write(tmp_path / "a/1.yaml", ""), write(tmp_path / "b/2.yaml", "")
        assert self.directory(first, second) == str(tmp_path / "a/data")
        second.write_text("storage: {directory: mine}")
        assert self.directory(first, second) == str(tmp_path / "b/mine")

    def test_from_the_command_line_it_is_relative_to_the_current_folder(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x/my.yaml", "")
        assert self.directory(path, overrides=("storage.directory=y",)) == str(tmp_path / "y")
        assert self.directory() == str(tmp_path / "data")

    def test_an_absolute_one_stays(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x/my.yaml", f"storage: {{directory: {tmp_path}/z}}")
        assert self.directory(path) == str(tmp_path / "z")

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert self.directory(overrides=("storage.directory=~/d",)) == str(tmp_path / "home/d")


numbers = st.floats(min_value=0.001, max_value=0.999)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "speculative.num_draft_tokens": st.integers(1, 64),
        "speculative.temperature": st.just(0) | st.floats(0.001, 1e6),
        "speculative.top_p": numbers | st.just(1),
        "speculative.acceptance_threshold": numbers | st.sampled_from([0, 1, "auto"]),
        "speculative.draft_vocabulary": st.integers(1, 200_000) | st.sampled_from(["full", "auto"]),
        "training.lora.rank": st.integers(1, 4096),
        "training.lora.target_modules": st.lists(
            st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
            min_size=1,
            unique=True,
        ),
        "training.learning_rate": st.floats(1e-12, 1),
        "training.replay_ratio": numbers,
        "chat.system_message": st.none() | st.text(st.characters(codec="utf-8"), max_size=30),
        "memory.gradient_checkpointing": st.booleans(),
        "logging.level": st.sampled_from(["DEBUG", "INFO", "WARNING", "ERROR"]),
    },
)


@settings(deadline=None)
@given(VALID)
@example({"chat.system_message": "\x85"})
@example({"chat.system_message": "0\u2028 é"})
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    # What YAML takes for the end of a line survives only escaped.
    plain = set("\x85\u2028\u2029").isdisjoint(values.get("chat.system_message") or "")
    path.write_text(yaml.safe_dump(nest(values), allow_unicode=plain), encoding="utf-8")
    loaded = load_config([path])
    read = flatten(loaded.config)
    for key, value in values.items():
        assert read[key] == (tuple(value) if isinstance(value, list) else value)
        assert loaded.origins[key].kind is OriginKind.FILE
    assert {k for k, origin in loaded.origins.items() if origin.kind is OriginKind.FILE} == set(values)


@settings(deadline=None)
@given(st.sampled_from(list(leaf_fields())), st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.5]))
def test_no_setting_takes_a_negative_or_unending_number(key: str, number: float) -> None:
    field_is_text = isinstance(flatten(Config())[key], str)
    if field_is_text and key not in ("backend", "device", "logging.level"):
        return
    shown = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(number), str(number))
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"{key}={shown}"])
    assert str(caught.value).startswith(f"{key} = ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
