"""Which tokens the draft's cut head keeps: those that the target emits, learnt from what is stored.

Contract: a version is chosen once, from the answers that are stored then, and remembered beside them until
the pair has said twice as much, or as much again as a version is learnt from; what is evicted meanwhile
changes nothing. Must not know a backend.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from draftloop.backends.vocabulary import CutVocabulary
from draftloop.errors import RecordLost, StorageError
from draftloop.storage.records import VocabularyVersion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.storage.records import PairKey, RequestRecord
    from draftloop.storage.store import Store

logger = logging.getLogger(__name__)

FIRST_TOKENS = 1_024
"""Answers with fewer tokens together teach nothing."""
AUTO_TOKENS = 8_192
"""With fewer, `auto` cuts nothing: what they lack is mostly what was not asked yet."""
WINDOW_TOKENS = 65_536
"""No more of them are read, the newest. So many tokens later none of them taught the version that still
serves, and what a pair is asked may have changed: it is chosen anew, however long the pair is at work."""
LEAST_PROBABILITY = 0.001
"""What the target holds for less likely teaches nothing: there is so much of it that it would drive out what
is frequent. (It helps where the lowest ids are of little use, as in Chinese, and hurts where they are.)"""
AUTO_SIZES = (16_384, 32_768, 49_152, 65_536)
"""What `auto` tries, smallest first."""
MOST_MISSED = 0.01
"""`auto` cuts where no domain's answers have more tokens that the others would not have taught. A missed
token ends a round early; one percent of them costs about one and a half percent of tau."""
FOLDS = 5
MIN_DOMAIN_TOKENS = 1_000
"""Domains with fewer are looked at together."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What may be kept.

    Attributes:
        draft_tokens: rows of the draft's head.
        known_tokens: ids that the tokenizer knows; those above are padding.
        always: ids that are kept in any case, beside the number asked for: what ends or frames an answer.
        from_text: whether the draft also proposes what stands in the text (`Capabilities.drafts_from_text`).
    """

    draft_tokens: int
    known_tokens: int
    always: frozenset[int]
    from_text: bool = False


def choose_vocabulary(
    store: Store | None, pair: PairKey, setting: int | Literal["full", "auto"], wanted: Wanted
) -> CutVocabulary | None:
    """What `speculative.draft_vocabulary` means for this pair now; None leaves the head whole.

    Args:
        store: whose answers teach, and where the version is remembered if it can be written; None where there
            is none, or it is not to be used.
        pair: whose answers.
        setting: a number of tokens, `auto` or `full`.
        wanted: what may be kept.

    Raises:
        StorageError: the store cannot be read.
    """
    usable = min(wanted.draft_tokens, wanted.known_tokens)
    if setting == "auto" and usable < 2 * AUTO_SIZES[0]:
        return None
    if setting == "full" or (setting != "auto" and setting >= usable):
        return None
    told_tokens = 0 if store is None else store.vocabularies.answer_tokens(pair)
    if store is None or told_tokens < (AUTO_TOKENS if setting == "auto" else FIRST_TOKENS):
        ids = _chosen_ids([], setting, wanted)
    else:
        ids = _version(store, pair, setting, wanted, told_tokens).ids
    if not len(ids):
        logger.debug("the draft's head stays whole: no cut is known to be safe yet")
        return None
    cut = CutVocabulary(ids)
    logger.debug("the draft's head keeps %s of %d tokens", cut.name, wanted.draft_tokens)
    return cut


def _version(
    store: Store, pair: PairKey, setting: int | Literal["auto"], wanted: Wanted, told_tokens: int
) -> VocabularyVersion:
    """The version that is remembered; a new one, remembered from now on, once it has served its time."""
    always = sorted(wanted.always)
    wish = json.dumps([setting, wanted.draft_tokens, wanted.known_tokens, wanted.from_text, always])
    try:
        version = store.vocabularies.recall(pair, wish)
    except RecordLost as error:
        logger.debug("%s", error)
        version = None
    if version is not None and told_tokens < version.answer_tokens + min(
        version.answer_tokens, WINDOW_TOKENS
    ):
        return version
    version = VocabularyVersion(told_tokens, _chosen_ids(_teachers(store, pair), setting, wanted))
    try:
        store.vocabularies.remember(pair, wish, version)
    except StorageError as error:
        # Who only reads may be shown it; who answers comes later and remembers.
        logger.debug("this vocabulary is not remembered: %s", error)
    return version


def _chosen_ids(
    teachers: Sequence[RequestRecord], setting: int | Literal["auto"], wanted: Wanted
) -> NDArray[np.int32]:
    """The tokens to keep, ascending; none where `auto` leaves the head whole."""
    usable = min(wanted.draft_tokens, wanted.known_tokens)
    taught = _taught(teachers, usable, from_text=wanted.from_text)
    size = _safe_size(taught, usable) if setting == "auto" else setting
    if size is None:
        return np.empty(0, np.int32)
    kept = np.union1d(_most_wanted(taught.weights.sum(axis=0), size), sorted(wanted.always))
    return kept[kept < wanted.draft_tokens].astype(np.int32)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as a cut is judged by it.

    Attributes:
        fold: of those in time.
        domain: what it is about.
        num_tokens: emitted.
        needed: of those, the ones that must be kept to be drafted; the text itself gives the others.
    """

    fold: int
    domain: str
    num_tokens: int
    needed: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """What answers teach, in folds that follow each other in time.

    Attributes:
        weights: [FOLDS, usable], what each token was worth: 1 wherever the target emitted it, and its
            probability wherever it was among the target's likeliest.
        answers: each one.
    """

    weights: NDArray[np.float64]
    answers: Sequence[Answer]

    def covers(self, size: int) -> bool:
        """Whether so many tokens are enough for every domain, each fold being judged by the others."""
        total = sum(one.num_tokens for one in self.answers)
        return total >= AUTO_TOKENS and all(
            missed <= MOST_MISSED * tokens for missed, tokens in self.missed(size).values()
        )

    def missed(self, size: int) -> dict[str, tuple[int, int]]:
        """Tokens that would have been cut off, and all tokens, domain by domain; "" are the small ones."""
        found: dict[str, tuple[int, int]] = {}
        total = self.weights.sum(axis=0)
        kept = [set(_most_wanted(total - fold, size).tolist()) for fold in self.weights]
        lengths: Counter[str] = Counter()
        for one in self.answers:
            lengths[one.domain] += one.num_tokens
        for one in self.answers:
            name = one.domain if lengths[one.domain] >= MIN_DOMAIN_TOKENS else ""
            missed, tokens = found.get(name, (0, 0))
            here = sum(token not in kept[one.fold] for token in one.needed)
            found[name] = missed + here, tokens + one.num_tokens
        return found


def _safe_size(taught: Taught, usable: int) -> int | None:
    """The smallest that `auto` dares; None where there is none, or nothing worth cutting."""
    return next((size for size in AUTO_SIZES if size <= usable // 2 and taught.covers(size)), None)


def _teachers(store: Store, pair: PairKey) -> list[RequestRecord]:
    """The answers that a version is learnt from: the newest, oldest first."""
    chosen: list[int] = []
    tokens = 0
    for one in reversed(store.requests.list(pair)):
        if tokens >= WINDOW_TOKENS:
            break
        chosen.append(one.id)
        tokens += one.num_answer_tokens
    records = []
    for identity in reversed(chosen):
        try:
            records += store.requests.load([identity])
        except RecordLost as error:
            logger.debug("request %d teaches no vocabulary: %s", identity, error)
    return records


def _taught(records: Sequence[RequestRecord], usable: int, *, from_text: bool) -> Taught:
    weights = np.zeros((FOLDS, usable))
    answers = []
    for index, record in enumerate(records):
        fold = index * FOLDS // len(records)
        tokens, ids = record.answer_tokens, record.traces.top_ids
        probs = np.exp(record.traces.top_logprobs)
        known = (ids >= 0) & (ids < usable) & (probs >= LEAST_PROBABILITY)
        np.add.at(weights[fold], tokens[tokens < usable], 1.0)
        np.add.at(weights[fold], ids[known], probs[known])
        needed = _first_of_each(record) if from_text else tuple(tokens.tolist())
        answers.append(Answer(fold, record.domain, len(tokens), needed))
    return Taught(weights, answers)


def _first_of_each(record: RequestRecord) -> tuple[int, ...]:
    """The answer's tokens that stood nowhere in the text before."""
    return tuple(set(record.answer_tokens.tolist()) - set(record.prompt_tokens.tolist()))


def _most_wanted(weights: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """The ids of the `size` heaviest tokens [usable]; of equals, and where nothing is known, the lowest.

    Byte-pair vocabularies number their merges in the order of their frequency (Sennrich et al. 2016).
    """
    return np.argsort(-weights, kind="stable")[:size]
