"""Every way to be wrong: one line, with the key, the value, the place and what would be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.config import load_config
from draftloop.config.schema import leaf_fields
from draftloop.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(path: Path, content: str | bytes, *overrides: str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config([path], overrides)
    message = str(caught.value)
    assert "\n" not in message
    message.encode("utf-8")
    return message.replace(str(path), "F")


@pytest.mark.parametrize(
    ("content", "beginning"),
    [
        ("- a\n- b", "F:1 holds a list"),
        ("just words", "F:1 holds the value just words"),
        ("a: b: c", "F:1 is not YAML"),
        ("training:\n\tbatch_size: 1", "F:2 is not YAML"),
        ("a: [1,\n", "F:2 is not YAML"),
        ("a: 1\n---\nb: 2", "F:2 is not YAML"),
        ("a: &x 1\nb: *x", "F:2 is not YAML that can be used: aliases"),
        (b"a: 1\nb: \x00\x01", "F:2 is not YAML: it holds the character 0x00"),
        (b"# fine\n\xff\xfe", "F:2 is not UTF-8 (byte 0xff)"),
        (b"\x93NUMPY\x01\x00", "F:1 is not UTF-8"),
        ("a: " + "[" * 5000, "F is nested too deep"),
        ("#" * ((1 << 20) + 1), "F is longer than 1048576 bytes"),
        (
            "generation:\n  max_tokens: 1\n  max_tokens: 2",
            "generation.max_tokens stands twice (F:3, first in line 2)",
        ),
        ("chat:\ngeneration:\nchat:\n", "chat stands twice (F:3, first in line 1)"),
        ("training.lora.rank: 4", "training.lora.rank (F:1) is written with dots"),
        ("training: 5", "training (F:1) is a section, not the value 5"),
        ("training: [5]", "training (F:1) is a section, not a list"),
        ("backend: !!python/object/apply:os.getcwd []", "backend = [] (F:1) cannot be used"),
        ("backend: !mine x", "the tag !mine (F:1) has no meaning here"),
        ("speculative: {top_k: !!int abc}", "abc (F:1) is no int"),
        ("speculative: {top_k: %s}" % ("9" * 5000), "999"),
    ],
)
def test_what_is_not_a_configuration(tmp_path: Path, content: str | bytes, beginning: str) -> None:
    assert refusal(tmp_path / "c.yaml", content).startswith(beginning)


@pytest.mark.parametrize(
    ("content", "nearest"),
    [
        ("speculative:\n  temprature: 1", "speculative.temperature"),
        ("speculativ: {top_p: 1}", "speculative"),
        ("rank: 4", "training.lora.rank"),
        ("training: {rank: 4}", "training.lora.rank"),
        ("speculative: {max_token: 4}", "generation.max_tokens"),
        ("models: {draft: {naem: x}}", "models.draft.name"),
        ("drafts: {name: x}", "models.draft"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, content: str, nearest: str) -> None:
    message = refusal(tmp_path / "c.yaml", content)
    assert message.endswith(f" is not a setting. The nearest known key is {nearest}.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("generation: {zzz: 1}", "generation.zzz (F:1) is not a setting. Known in generation: max_tokens, "),
        ("1: 2", "1 (F:1) is not a setting. Known at the top: models, speculative, chat, training, "),
        ("? [a]\n: b", "a list (F:1) is not a setting. Known at the top: models, "),
    ],
)
def test_keys_that_resemble_none_list_what_there_is(tmp_path: Path, content: str, message: str) -> None:
    assert refusal(tmp_path / "c.yaml", content).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.max_tokens=0", "= 0 (--set) cannot be used. It must be a whole number of at least 1."),
        ("generation.max_tokens=4.0", "= 4.0 (--set) cannot be used. It must be a whole number"),
        ("generation.max_tokens='4'", '= "4" (--set) cannot be used.'),
        ("generation.max_tokens=true", "= true (--set) cannot be used."),
        ("generation.max_tokens=010", '= "010" (--set) cannot be used.'),
        ("generation.max_tokens=1e99", "= 1e+99 (--set) cannot be used."),
        ("generation.max_tokens=99999999999", "a whole number of at least 1 and at most 2147483647."),
        ("speculative.num_draft_tokens=0", "It must be a whole number of at least 1 and at most 64."),
        ("speculative.num_draft_tokens=65", "It must be a whole number of at least 1 and at most 64."),
        ("speculative.top_p=0", "It must be a number above 0 and at most 1."),
        ("speculative.top_p=1.01", "It must be a number above 0 and at most 1."),
        ("speculative.top_p=true", "It must be a number above 0 and at most 1."),
        ("speculative.top_p=", "= null (--set) cannot be used."),
        ("speculative.top_p=[", "is not YAML that can be used"),
        ("speculative.temperature=0.0001", "It must be 0 (greedy), or a number of at least 0.001."),
        ("speculative.acceptance_threshold=most", "It must be a number of at least 0 and at most 1, or auto"),
        ("training.replay_ratio=1", "It must be a number of at least 0 and below 1."),
        ("training.max_sequence_length=15", "It must be a whole number of at least 16."),
        ("training.lora.rank=-8", "= -8 (--set) cannot be used. It must be a whole number of at least 1."),
        ("training.lora.target_modules=[]", "It must be a list with at least one entry"),
        ("training.lora.target_modules=q_proj", "It must be a list with at least one entry"),
        ("training.lora.target_modules=[lm_head]", "each one of q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ("training.lora.target_modules=[q_proj, q_proj]", "It must be a list that names each module once."),
        ("memory.gradient_checkpointing=yes", "It must be true or false."),
        ("logging.level=info", "It must be one of DEBUG, INFO, WARNING, ERROR."),
        ("backend=cuda", "It must be one of auto, numpy, torch, mlx."),
        ("models.target.name=", "= null (--set) cannot be used. It must be text."),
        ("models.target.name='a\\tb '", "It must be a name on one line"),
        ("chat.system_message=\udcff", "It must be text without lone surrogates."),
        ("generation.min_tokens=513", "It must be at most 512, which generation.max_tokens = 512"),
        ("models.draft.max_kv_cache_tokens=5", "It must be at least 6: a round of"),
        ("server.cors_origins=[nonsense]", "as browsers send them: scheme://host"),
        ("server.cors_origins=[http://localhost:3000/]", "as browsers send them: scheme://host"),
        ("server.cors_origins=[http://Localhost]", "as browsers send them: scheme://host"),
        ("server.cors_origins=[http://localhost:port]", "as browsers send them: scheme://host"),
        ("server.cors_origins=[//localhost]", "as browsers send them: scheme://host"),
        ("generation.max_tokns=1", "The nearest known key is generation.max_tokens."),
        ("generation.max_tokens.x=1", "The nearest known key is generation.max_tokens."),
        ("generation=4", "generation (--set) is a section, not the value 4"),
        ("generation.max_tokens", "is not of the form key.path=value"),
        ("=4", "is not of the form key.path=value"),
    ],
)
def test_wrong_values_say_what_would_be_right(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path / "c.yaml", "", override)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    message = refusal(tmp_path / "c.yaml", "backend: numpy\ndevice: gpu")
    assert message.startswith('device = "gpu" (F:2) cannot be used. It must be auto or cpu')
    small_cache = "models: {target: {max_kv_cache_tokens: 100}}\ngeneration: {min_tokens: 100}"
    assert "It must be at most 99" in refusal(tmp_path / "c.yaml", small_cache)
    assert load_config([], ["models.target.max_kv_cache_tokens=6"]).config.generation.max_tokens == 512


def test_several_wrong_settings_are_counted(tmp_path: Path) -> None:
    message = refusal(tmp_path / "c.yaml", "generation: {max_tokens: 0, min_tokens: -1}\nbackend: x")
    assert message.startswith(
        "generation.max_tokens = 0 (F:1) cannot be used (2 other settings are wrong too)."
    )


def test_an_error_shows_the_place_of_the_layer_that_won(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("generation: {max_tokens: 4}")
    bad = tmp_path / "bad.yaml"
    bad.write_text("# one\n# two\ngeneration: {max_tokens: 0}")
    with pytest.raises(ConfigError, match=r"bad\.yaml:3"):
        load_config([good, bad])
    assert load_config([bad, good]).config.generation.max_tokens == 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=reason):
            load_config([path])


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_no_file_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_bytes(content)
    try:
        load_config([path])
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(deadline=None)
@given(st.sampled_from(list(leaf_fields())), st.text(max_size=30))
def test_no_override_makes_a_traceback(key: str, value: str) -> None:
    try:
        load_config([], [f"{key}={value}"])
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "origins",
    ['["*"]', "[http://localhost:3000, https://a-b.example]", '["http://[::1]:80", chrome-extension://abc]'],
)
def test_origins_that_browsers_send_are_taken(origins: str) -> None:
    assert load_config([], [f"server.cors_origins={origins}"]).config.server.cors_origins
