"""Tokenizer: text to ids and back, chat frames, ends of turn, and whether two of them are one."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.errors import InputError, ModelUnreadable, TokenizerMismatch
from draftloop.models.messages import Message
from draftloop.models.tokenizer import Tokenizer, check_tokenizers_agree
from toy_tokenizers import CHAT_TEMPLATE, MERGES, SPECIALS, byte_fallback, byte_level, metaspace

if TYPE_CHECKING:
    from pathlib import Path

NUM_PLAIN = 256 + len(MERGES)
ENDOFTEXT, IM_START, IM_END = range(NUM_PLAIN, NUM_PLAIN + 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("t")))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encode_adds_nothing_and_reads_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<|im_end|>") == [IM_END]
    assert len(tokenizer.encode("the the")) == 2
    assert tokenizer.vocab_size == NUM_PLAIN + 3


def test_encode_adds_no_beginning_of_text_unless_asked_and_never_a_second_one(tmp_path: Path) -> None:
    folder = byte_fallback(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    write_json(folder / "tokenizer.json", definition)
    tokenizer = Tokenizer.load(folder)
    plain = tokenizer.encode("abc")
    assert plain[0] != 1
    assert tokenizer.encode("abc", add_special_tokens=True) == [1, *plain]
    begun = tokenizer.encode("<s>abc")
    assert begun[0] == 1
    assert tokenizer.encode("<s>abc", add_special_tokens=True) == begun


def test_a_tokenizer_without_beginning_of_text_adds_none(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the", add_special_tokens=True) == tokenizer.encode("the")
    assert tokenizer.encode("", add_special_tokens=True) == []


def test_decode_leaves_out_special_and_unknown_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([IM_START, *tokenizer.encode("the"), 100_000, IM_END]) == "the"
    assert [tokenizer.has_text(i) for i in (0, IM_START, NUM_PLAIN + 3, 100_000)] == [
        True,
        False,
        False,
        False,
    ]


def test_chat_tokens_follow_the_template(tokenizer: Tokenizer) -> None:
    messages = [Message("system", "s"), Message("user", "hi")]
    text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.chat_tokens(messages, add_generation_prompt=False) == tokenizer.encode(text)
    assert tokenizer.chat_tokens(messages) == tokenizer.encode(text + "<|im_start|>assistant\n")


class TestEndTokens:
    def eos(self, folder: Path) -> frozenset[int]:
        return Tokenizer.load(folder).eos_token_ids

    def test_the_tokenizers_own_and_the_templates_end_of_turn(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_token_ids == {ENDOFTEXT, IM_END}

    def test_without_any(self, tmp_path: Path) -> None:
        assert self.eos(byte_level(tmp_path, eos=None, chat_template=None)) == frozenset()

    def test_those_of_both_config_files(self, tmp_path: Path) -> None:
        byte_level(tmp_path, chat_template=None)
        write_json(tmp_path / "config.json", {"eos_token_id": 7})
        write_json(tmp_path / "generation_config.json", {"eos_token_id": [8, 9]})
        assert self.eos(tmp_path) == {7, 8, 9, ENDOFTEXT}

    def test_null_is_none(self, tmp_path: Path) -> None:
        byte_level(tmp_path, chat_template=None, eos=None)
        write_json(tmp_path / "config.json", {"eos_token_id": None})
        assert self.eos(tmp_path) == frozenset()

    @pytest.mark.parametrize("content", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
    def test_damaged_files_are_named(self, tmp_path: Path, content: str) -> None:
        (byte_level(tmp_path) / "generation_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelUnreadable, match=r"generation_config\.json"):
            self.eos(tmp_path)

    def test_a_template_that_ends_turns_with_plain_text_adds_none(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        assert self.eos(byte_level(tmp_path, chat_template=template, eos=None)) == frozenset()


class TestBadFolders:
    @pytest.mark.parametrize("content", [None, "", "{", '{"model_type": 1}', '{"version":"1.0"}'])
    def test_a_missing_or_damaged_tokenizer(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelUnreadable, match="tokenizer") as caught:
            Tokenizer.load(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_chat_template(self, tmp_path: Path) -> None:
        with pytest.raises(ModelUnreadable, match=r"has no chat template\. Choose an instruct"):
            Tokenizer.load(byte_level(tmp_path, chat_template=None)).chat_tokens([Message("user", "hi")])

    def test_a_template_that_refuses_the_system_message(self, tmp_path: Path) -> None:
        refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=refuse + CHAT_TEMPLATE))
        assert tokenizer.chat_tokens([Message("user", "hi")])
        with pytest.raises(InputError, match="no system role") as caught:
            tokenizer.chat_tokens([Message("system", "s"), Message("user", "hi")])
        assert '--set chat.system_message=""' in caught.value.remedy

    @pytest.mark.parametrize("template", ["{% for %}", "{{ messages[9].role.x }}", "{{ 1 + 'a' }}"])
    def test_a_broken_template_is_no_traceback(self, tmp_path: Path, template: str) -> None:
        tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=template))
        assert tokenizer.eos_token_ids == {ENDOFTEXT}
        with pytest.raises(ModelUnreadable, match="is broken"):
            tokenizer.chat_tokens([Message("user", "hi")])


def test_loading_prints_nothing_and_leaves_logging_alone(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    read = transformers.PreTrainedTokenizerFast.from_pretrained

    def noisy(*args: Any, **options: Any) -> Any:
        logging.getLogger("transformers").warning("advice")
        warnings.warn("more advice", stacklevel=1)
        return read(*args, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", noisy)
    caplog.set_level(logging.WARNING)
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    tokenizer.chat_tokens([Message("user", "hi")])
    tokenizer.encode("a " * 5000)
    assert (caplog.messages, list(recwarn), capfd.readouterr()) == ([], [], ("", ""))
    logging.getLogger("transformers").warning("heard")
    assert caplog.messages == ["heard"]


def test_importing_the_module_imports_no_heavy_library() -> None:
    import subprocess

    code = "import sys, draftloop.models.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestAgreement:
    def check(self, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
        pair = [
            Tokenizer.load(byte_level(folder / name, **options))
            for name, options in (("t", first), ("d", second))
        ]
        check_tokenizers_agree(*pair)

    def refusal(self, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> str:
        with pytest.raises(TokenizerMismatch) as caught:
            self.check(folder, first, second)
        return caught.value.what.removeprefix("target and draft have different tokenizers: ")

    def test_equal_ones_agree(self, tmp_path: Path) -> None:
        self.check(tmp_path, {}, {})

    def test_template_and_end_of_text_may_differ(self, tmp_path: Path) -> None:
        self.check(tmp_path, {}, {"chat_template": None, "eos": "<|im_end|>"})

    def test_padding_in_config_json_does_not_matter(self, tmp_path: Path) -> None:
        byte_level(tmp_path / "t")
        write_json(tmp_path / "t/config.json", {"vocab_size": 151_936})
        self.check(tmp_path, {}, {})

    def test_the_lowest_differing_id_is_named(self, tmp_path: Path) -> None:
        other = (*MERGES[:3], ("o", "n"), ("e", "r"), *MERGES[5:])
        message = self.refusal(tmp_path, {}, {"merges": other})
        assert message == "id 259 is the token 'll' in the target and the token 'on' in the draft"

    def test_one_token_more(self, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, {}, {"normal": ["<tool>"]})
        assert message == f"id {NUM_PLAIN + 3} is no token in the target and the token '<tool>' in the draft"
        message = self.refusal(tmp_path, {"specials": (*SPECIALS, "<x>")}, {})
        assert message == f"id {NUM_PLAIN + 3} is the token '<x>' in the target and no token in the draft"

    def test_special_tokens_in_another_order(self, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, {}, {"specials": SPECIALS[::-1]})
        assert message.startswith(f"id {NUM_PLAIN} is the token '<|endoftext|>' in the target and the token")

    def test_special_in_one_and_plain_in_the_other(self, tmp_path: Path) -> None:
        first, second = {"specials": (*SPECIALS, "<x>")}, {"normal": ["<x>"]}
        message = self.refusal(tmp_path, first, second)
        expected = (
            f"id {NUM_PLAIN + 3} is the special token '<x>' in the target and no special token in the draft"
        )
        assert message == expected

    def test_one_vocabulary_with_other_merges(self, tmp_path: Path) -> None:
        # The same tokens in the same order, of which "the" is put together another way.
        first = (("t", "h"), ("h", "e"), ("th", "e"))
        second = (("t", "h"), ("h", "e"), ("t", "he"))
        message = self.refusal(tmp_path, {"merges": first}, {"merges": second})
        assert message == "merge 2 is ['th', 'e'] in the target and ['t', 'he'] in the draft"

    def test_other_splitting(self, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, {}, {"add_prefix_space": True})
        assert message.startswith(
            "a test text is split differently, first at token 0: 'H' in the target and 'Ġ'"
        )

    def test_other_normalizing(self, tmp_path: Path) -> None:
        assert "'H' in the target and 'h' in the draft" in self.refusal(tmp_path, {}, {"lowercase": True})

    def test_other_kinds(self, tmp_path: Path) -> None:
        kinds = [
            Tokenizer.load(make(tmp_path / make.__name__)) for make in (byte_level, byte_fallback, metaspace)
        ]
        for target in kinds:
            for draft in kinds:
                if target is draft:
                    check_tokenizers_agree(target, draft)
                else:
                    with pytest.raises(TokenizerMismatch, match=r"id [01] is"):
                        check_tokenizers_agree(target, draft)
