"""TextStream: all of the text, none of it too early, nothing of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from draftloop.errors import InputError
from draftloop.models.text import TextStream
from draftloop.models.tokenizer import Tokenizer
from toy_tokenizers import MERGES, byte_fallback, byte_level, metaspace, word_piece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

KINDS = (byte_level, byte_fallback, metaspace, word_piece)
IM_END = 256 + len(MERGES) + 2


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    make: Callable[[Path], Path] = request.param
    return Tokenizer.load(make(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("t")))


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None, int]:
    """The answer, its stop string and where that ends: the first to be completed, of those the longest."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None, len(text)
    end, _, stop = min(found)
    return text[: end - len(stop)], stop, end


def stream_all(stream: TextStream, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    return [*pieces, stream.finish()]


def check(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], sizes: Sequence[int]) -> None:
    stream = TextStream(tokenizer, stops)
    text = tokenizer.decode(ids)
    answer, stop, end = cut(text, stops)
    assert "".join(stream_all(stream, ids, sizes)) == answer
    assert stream.stopped == stop
    if stop is None:
        assert stream.tokens_used == len(ids)
    else:
        needed = (n for n in range(1, len(ids) + 1) if tokenizer.decode(ids[:n]).startswith(text[:end]))
        assert stream.tokens_used == next(needed)
    assert stream.push(ids[:1] if stop else []) == ""


CHUNKS = st.lists(st.integers(0, 7), max_size=12)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(
    st.sampled_from("aab .é�日本語e\u0301\u200d👩💻🏽🇩🇪"), max_size=40
)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_pieces_are_the_text_cut_at_the_stop(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = any_tokenizer.encode(data.draw(TEXTS))
    check(any_tokenizer, ids, draw_stops(data, any_tokenizer.decode(ids)), data.draw(CHUNKS))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_same_for_tokens_that_no_text_has(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    few = st.sampled_from([*range(any_tokenizer.vocab_size - 25, any_tokenizer.vocab_size + 2)])
    some = st.integers(0, any_tokenizer.vocab_size + 1)
    ids = [i for i in data.draw(st.lists(few | some, max_size=30)) if i >= 0]
    check(any_tokenizer, ids, draw_stops(data, any_tokenizer.decode(ids)), data.draw(CHUNKS))


def draw_stops(data: st.DataObject, text: str) -> list[str]:
    """Stop strings of which many do occur, and some overlap."""
    stops = data.draw(st.lists(st.text(st.sampled_from("ab. é�"), min_size=1, max_size=4), max_size=2))
    for _ in range(data.draw(st.integers(0, 3)) if text else 0):
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 6))])
    return stops


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 255 + len(MERGES)), max_size=30), stop=st.text("ab", min_size=1, max_size=3)
)
@example(ids=[], stop="ab")
def test_what_is_shown_stays_shown(tokenizer: Tokenizer, ids: list[int], stop: str) -> None:
    answer, _, _ = cut(tokenizer.decode(ids), [stop])
    stream, shown = TextStream(tokenizer, [stop]), ""
    for token_id in ids:
        shown += stream.push([token_id])
        assert answer.startswith(shown)


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日")
    stream = TextStream(tokenizer)
    assert len(ids) == 3
    assert [stream.push([i]) for i in ids] == ["", "", "日"]


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a日")[:-1]
    assert [stream.push(ids), stream.finish()] == ["a", "�"]


def test_a_token_with_half_a_character_at_each_end(tokenizer: Tokenizer) -> None:
    # "!" and the first byte of an emoji are one token, its next two bytes another.
    ids = tokenizer.encode("!😀")
    assert len(ids) == 3
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in ids] == ["", "", "!😀"]


def test_a_replacement_character_of_the_text_itself_is_shown_at_once(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("a��")) == "a��"


def test_text_is_shown_at_once_unless_it_may_become_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["</end>"])
    pieces = [stream.push(tokenizer.encode(c)) for c in "a</en</x"]
    assert pieces == ["a", "", "", "", "", "</en", "", "</x"]


def test_what_was_held_back_is_shown_when_the_answer_ends(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["</end>"])
    assert stream.push(tokenizer.encode("a</en")) == "a"
    assert (stream.finish(), stream.stopped) == ("</en", None)
    assert stream.finish() == ""


def test_nothing_follows_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    ids = tokenizer.encode("one STOP two")
    assert stream.push(ids) == "one "
    assert (stream.stopped, stream.tokens_used) == ("STOP", 8)
    assert (stream.push(ids), stream.finish(), stream.tokens_used) == ("", "", 8)


def test_a_stop_string_in_the_middle_of_a_token(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["th"])
    assert stream.push([*tokenizer.encode("a the"), *tokenizer.encode("z")]) == "a "
    assert stream.tokens_used == 2


def test_a_stop_string_that_only_the_end_completes(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["�"])
    ids = tokenizer.encode("a日")[:-1]
    assert stream.push(ids) == "a"
    assert (stream.finish(), stream.stopped, stream.tokens_used) == ("", "�", 2)


@pytest.mark.parametrize(
    ("stops", "text", "answer", "stopped"),
    [
        (["abcd", "c"], "xabcd", "xab", "c"),
        (["b", "ab"], "xab", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),
        (["abab!"], "ababab!", "ab", "abab!"),
        (["a", "a"], "ba", "b", "a"),
    ],
)
def test_which_stop_string_counts(
    tokenizer: Tokenizer, stops: list[str], text: str, answer: str, stopped: str
) -> None:
    stream = TextStream(tokenizer, stops)
    assert "".join(stream_all(stream, tokenizer.encode(text), [1] * 9)) == answer
    assert stream.stopped == stopped


def test_special_tokens_count_but_show_nothing(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push([*tokenizer.encode("a"), IM_END, 100_000]) == "a"
    assert stream.tokens_used == 3


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop string is empty"):
        TextStream(tokenizer, ["x", ""])


def test_a_token_costs_the_same_late_as_early(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = tokenizer.decode

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counting)
    ids = tokenizer.encode("the é日 � \U0001f469 " * 100)
    stream = TextStream(tokenizer, ["never"])
    for token_id in ids:
        stream.push([token_id])
    assert decoded <= 8 * len(ids)
