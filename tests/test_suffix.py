"""Suffix drafting against a reference that scans everything, its bounds, and what it learns."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.speculation.suffix import (
    DRAFT_TOKENS_PER_MATCH_TOKEN,
    MAX_MATCH_TOKENS,
    MAX_PLACES,
    RUN_LENGTHS,
    Match,
    Source,
    SuffixIndex,
    TokenTrail,
)

TOKENS = st.lists(st.integers(0, 2), max_size=60)
ANSWERS = st.lists(TOKENS, max_size=5)
BREAK = -1
Place = tuple[int, list[int]]
Guess = tuple[int, list[int], list[float]]


def scanned(pieces: list[list[int]], text: list[int], run: int, *, own: bool) -> list[Place]:
    """Every earlier place of the text's last `run` tokens, newest first."""
    ending, found = text[-run:], []
    for piece in reversed(pieces):
        for end in range(len(piece) - (1 if own else 0), run - 1, -1):
            if piece[end - run : end] != ending or end == len(piece):
                continue
            length = run
            while (
                length < min(end, len(text), MAX_MATCH_TOKENS)
                and piece[end - length - 1] == text[-length - 1]
            ):
                length += 1
            found.append((length, piece[end:]))
    return found[:MAX_PLACES]


def scanned_match(answers: list[list[int]], text: list[int], max_tokens: int) -> Guess | None:
    """The match's length, the draft and its shares, by brute force."""
    if max_tokens < 1:
        return None
    own, others = list[Place](), list[Place]()
    for run in RUN_LENGTHS:
        if len(text) >= run and not own + others:
            own, others = scanned([text], text, run, own=True), scanned(answers, text, run, own=False)
    longest = max((length for length, _ in own + others), default=0)
    if not longest:
        return None
    from_text = any(length == longest for length, _ in own)
    following = [rest for length, rest in (own if from_text else others) if length == longest]
    draft: list[int] = []
    shares: list[float] = []
    while len(draft) < min(max_tokens, DRAFT_TOKENS_PER_MATCH_TOKEN * longest):
        # Behind the end of the text itself the draft goes on.
        next_tokens = [
            ((rest + draft) if from_text else rest)[len(draft) : len(draft) + 1] for rest in following
        ]
        votes = Counter(tokens[0] for tokens in next_tokens if tokens)
        if not votes:
            break
        token, count = votes.most_common(1)[0]
        draft.append(token)
        shares.append(count / len(following))
        following = [r for r, tokens in zip(following, next_tokens, strict=True) if tokens == draft[-1:]]
    return longest, draft, shares


def plain(match: Match | None) -> Guess | None:
    return None if match is None else (match.match_tokens, list(match.tokens), list(match.shares))


def index_of(answers: list[list[int]], max_tokens: int = 10_000) -> SuffixIndex:
    index = SuffixIndex(max_tokens)
    for answer in answers:
        index.add_answer(answer)
    return index


@settings(max_examples=300)
@given(answers=ANSWERS, text=TOKENS, max_tokens=st.integers(0, 12))
def test_finds_what_a_scan_of_everything_finds(
    answers: list[list[int]], text: list[int], max_tokens: int
) -> None:
    index = index_of(answers)
    match = index.match(index.open_text(text, 100), max_tokens)
    expected = scanned_match(answers, text, max_tokens)
    assert plain(match) == expected


@given(text=TOKENS, split=st.integers(0, 60), max_tokens=st.integers(1, 12))
def test_a_text_that_grows_token_by_token_is_the_text_at_once(
    text: list[int], split: int, max_tokens: int
) -> None:
    index = index_of([])
    grown = index.open_text(text[:split], 100)
    for token in text[split:]:
        index.match(grown, max_tokens)
        grown.append(token)
    assert index.match(grown, max_tokens) == index.match(index.open_text(text, 100), max_tokens)


@settings(max_examples=300)
@given(
    answers=st.lists(st.lists(st.integers(0, 1), max_size=60), max_size=5),
    text=st.lists(st.integers(0, 1), min_size=4, max_size=12),
    kept=st.integers(4, 40),
)
def test_only_the_newest_tokens_count(answers: list[list[int]], text: list[int], kept: int) -> None:
    """What the bound pushed out is found no more, and all that it left is found still."""
    joined: list[list[int]] = []
    room = kept
    for answer in reversed(answers):
        # A break between two answers takes one token's room.
        room -= 1
        joined.insert(0, answer[max(0, len(answer) - room) :] if room > 0 else [])
        room -= len(answer)
    index = index_of(answers, kept)
    match = index.match(index.open_text(text, 100), 8)
    expected = scanned_match(joined, text, 8)
    assert plain(match) == expected


@given(tokens=st.lists(st.integers(0, 3), max_size=200), max_tokens=st.integers(4, 30))
def test_memory_is_bounded(tokens: list[int], max_tokens: int) -> None:
    trail = TokenTrail(max_tokens)
    for i, token in enumerate(tokens):
        trail.append(token)
        if i % 17 == 0:
            trail.close()
        for run in RUN_LENGTHS:
            followed = [
                tuple(trail[p + i] for i in range(run + 1)) for p in range(trail.start, trail.end - run)
            ]
            # A run that only a break follows leads nowhere.
            assert trail.num_runs(run) == len({one[:-1] for one in followed if BREAK not in one})
            assert trail.num_runs(run) <= max_tokens


def test_the_most_frequent_continuation_wins_and_the_newest_of_equals() -> None:
    index = index_of([[1, 2, 3, 7], [1, 2, 3, 8], [1, 2, 3, 8], [1, 2, 3, 9]])
    match = index.match(index.open_text([1, 2, 3], 10), 1)
    assert match is not None
    assert (match.tokens, match.shares, match.source) == ((8,), (0.5,), Source.ANSWERS)
    even = index_of([[1, 2, 3, 7], [1, 2, 3, 8]])
    newest = even.match(even.open_text([1, 2, 3], 10), 1)
    assert newest is not None
    assert newest.tokens == (8,)


def test_a_longer_match_goes_before_more_frequent_ones_and_the_text_before_answers() -> None:
    index = index_of([[5, 1, 2, 3, 7], [6, 1, 2, 3, 8], [6, 1, 2, 3, 8]])
    longer = index.match(index.open_text([5, 1, 2, 3], 10), 1)
    assert longer is not None
    assert (longer.tokens, longer.match_tokens) == ((7,), 4)
    own = index.match(index.open_text([1, 2, 3, 4, 0, 1, 2, 3], 10), 1)
    assert own is not None
    assert (own.tokens, own.source) == ((4,), Source.TEXT)


def test_the_draft_is_no_longer_than_the_match_allows() -> None:
    answer = list(range(100))
    index = index_of([answer])
    for length in (3, 5, 20):
        match = index.match(index.open_text(answer[40 : 40 + length], 100), 64)
        assert match is not None
        assert len(match.tokens) == min(64, DRAFT_TOKENS_PER_MATCH_TOKEN * length, 60 - length)


def test_one_token_is_found_where_two_are_not() -> None:
    """However often it stands elsewhere, it hides no place where two agree."""
    index = index_of([[1, 2, 7, 8]])
    assert index.match(index.open_text([9], 10), 4) is None
    one = index.match(index.open_text([9, 2], 10), 4)
    assert one is not None
    assert (one.tokens, one.match_tokens) == ((7, 8), 1)
    hidden = index_of([[1, 2, 7, 8]] + [[3, 2, 5]] * (2 * MAX_PLACES))
    two = hidden.match(hidden.open_text([1, 2], 10), 2)
    assert two is not None
    assert (two.tokens, two.match_tokens) == ((7, 8), 2)


def test_no_answers_are_kept_without_room() -> None:
    empty = index_of([[1, 2, 3, 4]], max_tokens=0)
    assert empty.match(empty.open_text([1, 2, 3], 10), 4) is None
    with pytest.raises(ValueError, match="needs more than"):
        TokenTrail(RUN_LENGTHS[0])


def _drafted(rounds: int, accepted: int) -> Match:
    index = index_of([list(range(30))])
    text = index.open_text([10, 11, 12, 13], 10)
    match = index.match(text, 4)
    for _ in range(rounds):
        assert match is not None
        index.observe(match, 4, accepted)
    after = index.match(text, 4)
    assert after is not None
    return after


def test_acceptance_follows_what_was_observed() -> None:
    fresh = _drafted(0, 0).acceptance
    assert all(0 < chance < 1 for chance in fresh)
    assert list(fresh) == sorted(fresh), "longer matches are more certain"
    kept, lost, first = _drafted(200, 4).acceptance, _drafted(200, 0).acceptance, _drafted(200, 2).acceptance
    assert min(kept) > 0.95
    assert lost[0] < 0.1
    assert lost[-1] == fresh[-1], "nothing is known behind a rejection"
    assert first[0] > 0.9
    assert first[3] == fresh[3]


def test_the_same_calls_give_the_same_guesses() -> None:
    def guesses() -> list[Match | None]:
        index = index_of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 6, 7], [2, 3, 4, 1, 2, 3]], 16)
        text, found = index.open_text([2, 3], 40), []
        for token in [4, 1, 2, 3, 5, 6, 1, 2, 3, 4, 5]:
            text.append(token)
            match = index.match(text, 6)
            found.append(match)
            if match is not None:
                index.observe(match, len(match.tokens), token % 3)
        return found

    assert guesses() == guesses()
    assert any(guesses())
