"""`speculative.draft_vocabulary` from the settings to the answers, the store, the gate and the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pupils
from draftloop.errors import StorageError
from draftloop.learning.circle import learn
from draftloop.learning.recipe import Recipe
from draftloop.learning.selection import select
from draftloop.models.memory import plan_memory
from pupils import Watched, ask
from toys import EOS_ID, SPECIAL_TOKENS, TOKENIZER_SIZE

KEPT = 120
SPECIAL = range(TOKENIZER_SIZE - len(SPECIAL_TOKENS), TOKENIZER_SIZE)


@pytest.fixture
def store(classroom):
    with classroom.store() as store:
        yield store


def newest_records(store, pair, since):
    return store.requests.load([one.id for one in store.requests.list(pair, since_id=since)])


def proposed_from_elsewhere(record, kept):
    """Tokens that were proposed and stood neither among the kept ones nor in the text before."""
    text, found = set(kept) | set(record.prompt_tokens.tolist()), set()
    for token, guess in zip(record.answer_tokens.tolist(), record.traces.draft_ids.tolist(), strict=True):
        found |= {guess} - text - {-1}
        text.add(token)
    return found


def newest(store, pair):
    return store.requests.list(pair)[-1].id


def test_answers_are_the_same_and_drafts_are_of_the_kept_tokens(classroom, store):
    told, elsewhere = [], []
    for size in ("full", KEPT):
        engine, last = (
            classroom.engine(store, speculative__draft_vocabulary=size),
            newest(store, classroom.pair),
        )
        kept = {*engine.pair.draft.vocabulary.ids.tolist()} if engine.pair.draft.vocabulary else set()
        told.append([one.token_ids for one in ask(engine, range(70, 90), temperature=0.0)])
        records = newest_records(store, classroom.pair, last)
        elsewhere.append(set().union(*(proposed_from_elsewhere(one, kept) for one in records)))
    assert told[0] == told[1]
    free, cut = elsewhere
    assert free
    # A round's later guesses stand behind its own earlier ones, which were kept.
    assert not cut


def test_what_ends_an_answer_can_always_be_drafted(classroom, store):
    """The lowest ids alone would lack it."""
    engine = classroom.engine(None, speculative__draft_vocabulary=1)
    (logits,) = engine.pair.draft.logits(engine.pair.draft.new_cache(), [5])
    kept = set(np.flatnonzero(np.isfinite(logits)).tolist())
    assert kept == {0, *SPECIAL}
    assert EOS_ID in kept


def test_a_request_tells_what_the_head_was_cut_to(classroom, store):
    assert {one.vocabulary for one in store.requests.list(classroom.pair)} == {None}
    last = newest(store, classroom.pair)
    ask(classroom.engine(store, speculative__draft_vocabulary=KEPT), range(3))
    ask(classroom.engine(store, speculative__draft_vocabulary=KEPT // 2), range(3))
    names = [one.vocabulary for one in store.requests.list(classroom.pair, since_id=last)]
    assert [name.split("-")[0] for name in names] == ["123"] * 3 + ["63"] * 3
    records = store.requests.load([one.id for one in store.requests.list(classroom.pair, since_id=last)])
    assert [record.vocabulary for record in records] == names


def test_q_of_a_drafted_token_is_that_of_the_cut_head(classroom, store):
    """Of fewer tokens each has more probability."""
    last = newest(store, classroom.pair)
    ask(classroom.engine(store, speculative__draft_vocabulary=1), range(1))
    (record,) = newest_records(store, classroom.pair, last)
    assert record.traces.draft_ids[0] >= 0
    prompt = record.prompt_tokens.tolist()
    draft = classroom.engine(None).pair.draft
    logits = draft.logits(draft.new_cache(), prompt)[-1]
    q = np.zeros_like(logits)
    kept = sorted({0, *SPECIAL, *prompt} - {EOS_ID})  # min_tokens holds EOS back
    q[kept] = np.exp(logits[kept])
    assert record.traces.draft_probs[0] == pytest.approx(q[record.traces.draft_ids[0]] / q.sum(), abs=1e-3)


def test_rounds_of_another_head_tell_nothing_of_this_ones_cost(classroom, store):
    """A round is timed for the gate by the newest request's kind alone."""
    before = select(store, classroom.pair, classroom.config()).timed_round
    (record,) = store.requests.load([newest(store, classroom.pair)])
    store.requests.add(replace(record, vocabulary="9-abc", decode_s=1000.0 * record.rounds))
    after = select(store, classroom.pair, classroom.config()).timed_round
    assert before.seconds < 100
    assert after.seconds == pytest.approx(1000)


class TestTraining:
    @pytest.fixture(autouse=True)
    def _steady_costs(self, monkeypatch):
        pytest.importorskip("torch")
        pupils.steady_costs(monkeypatch)

    def test_the_gate_judges_the_draft_as_it_is_served(self, classroom, store):
        school = classroom.school(store, speculative__draft_vocabulary=KEPT)
        assert school.vocabulary is not None
        whole = classroom.school(store)
        assert whole.vocabulary is None
        outcomes = [learn(school, Watched(), lambda: False)]
        store.adapters.activate(classroom.pair, None)
        store.requests.mark_untrained(outcomes[0].adapter)
        outcomes.append(learn(whole, Watched(), lambda: False))
        cut, uncut = outcomes
        assert cut.alpha_before < uncut.alpha_before - 0.02
        recipe = store.runs.get(cut.run).recipe
        assert recipe["facts"]["draft_vocabulary"] == school.vocabulary.name

    def test_a_resumed_run_is_judged_with_the_cut_of_its_day(self, classroom, store):
        """The setting has changed, or a new version has come, since it was stopped."""
        judging = Watched()
        stopped = learn(
            classroom.school(store, speculative__draft_vocabulary=KEPT),
            judging,
            lambda: judging.judged_share > 0,
        )
        assert stopped.status == "interrupted"
        run = store.runs.latest(classroom.pair)
        resumed = learn(classroom.school(store), Watched(), lambda: False, resume=True)
        store.adapters.activate(classroom.pair, None)
        store.requests.mark_untrained(resumed.adapter)
        whole = learn(classroom.school(store), Watched(), lambda: False)
        assert resumed.run == run.id
        assert resumed.alpha_before < whole.alpha_before - 0.02

    def test_a_run_of_an_older_version_is_judged_with_todays_cut(self, classroom, store):
        school = classroom.school(store, speculative__draft_vocabulary=KEPT)
        outcome = learn(school, Watched(), lambda: False)
        told = dict(store.runs.get(outcome.run).recipe)
        assert Recipe.from_json(told).cut(None).name == school.vocabulary.name
        del told["vocabulary"]
        assert Recipe.from_json(told).cut(school.vocabulary) is school.vocabulary
        with pytest.raises(StorageError, match="recipe cannot be read"):
            Recipe.from_json({**told, "vocabulary": "no ids"})


def test_costs_are_remembered_for_each_size(classroom, tmp_path, monkeypatch):
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))
    remembered = []
    for size in (KEPT, KEPT, "full"):
        classroom.engine(None, speculative__schedule="adaptive", speculative__draft_vocabulary=size)
        remembered.append(len(list((tmp_path / "cache" / "calibration").glob("*.json"))))
    assert remembered == [1, 1, 2]


def test_the_memory_plan_counts_the_copied_rows(classroom):
    engine = classroom.engine(None)
    target, draft = engine.pair.target.architecture, engine.pair.draft.architecture

    def planned(**changes):
        return plan_memory(target, draft, classroom.config(**changes), 2**40, num_suffix_tokens=0)

    whole = planned()
    for asked, rows in (("full", 0), (64, 64), ("auto", draft.vocab_size // 2), (draft.vocab_size, 0)):
        plan = planned(speculative__draft_vocabulary=asked)
        assert plan.generation_bytes - whole.generation_bytes == rows * draft.hidden_size * 4
        assert plan.training_bytes == whole.training_bytes
