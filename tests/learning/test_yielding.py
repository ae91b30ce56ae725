"""Training yields to answers, whoever gives them, and comes to its turn all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import pupils
from draftloop.learning.yielding import LEAST_SHARE, LOCK_NAME, LOOK_S, MEASURING_TRIES, Answering, Yielding

ANSWER = """
import sys
from pathlib import Path
from draftloop.learning.yielding import Answering
with Answering(Path(sys.argv[1]))():
    print("answering", flush=True)
    sys.stdin.read()
"""


class Day:
    """A clock that moves while the run sleeps or works, and what happens meanwhile."""

    def __init__(self, directory, at_sleep=lambda: None) -> None:
        self.now_s = 0.0
        self.worked_s = 0.0
        self.slept_s = 0.0
        self.stop = False
        self._at_sleep = at_sleep
        self.run = Yielding(
            directory,
            lambda: self.stop,
            work_clock=lambda: self.worked_s,
            clock=lambda: self.now_s,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds
        self._at_sleep()

    def work(self, seconds: float, share: float = 1.0) -> None:
        """Some time, of which the system gave it a share."""
        self.now_s += seconds
        self.worked_s += share * seconds


@pytest.fixture
def answering(tmp_path):
    return Answering(tmp_path)


def test_where_nobody_ever_answered_nobody_waits(tmp_path):
    day = Day(tmp_path / "nowhere")
    day.work(100)
    day.run.wait()
    assert day.slept_s == 0


def test_a_run_waits_until_the_answer_is_given(tmp_path, answering):
    answer = answering()
    day = Day(tmp_path, lambda: answer.__exit__(None, None, None) if day.slept_s > 3 else None)
    day.work(100)
    answer.__enter__()
    day.run.wait()
    assert 3 < day.slept_s < 3 + 2 * LOOK_S
    day.run.wait()
    assert day.slept_s < 3 + 2 * LOOK_S


def test_it_waits_for_the_last_of_several_answers(tmp_path, answering):
    first, second, other = answering(), answering(), Answering(tmp_path)()
    ends = [first, other, second]
    day = Day(tmp_path, lambda: ends.pop(0).__exit__(None, None, None))
    day.work(100)
    for answer in (first, second, other):
        answer.__enter__()
    day.run.wait()
    assert ends == []


def test_who_always_waits_works_a_tenth_of_the_time(tmp_path, answering):
    day = Day(tmp_path)
    with answering():
        while day.now_s < 60:
            day.work(0.05)
            day.run.wait()
    assert day.worked_s / day.now_s == pytest.approx(LEAST_SHARE, rel=0.15)


def test_who_gets_little_of_the_processors_does_not_wait_on_top_of_that(tmp_path, answering):
    day = Day(tmp_path)
    with answering():
        for _ in range(100):
            day.work(1, share=LEAST_SHARE / 2)
            day.run.wait()
    assert day.slept_s == 0


def test_a_wish_to_stop_ends_the_wait(tmp_path, answering):
    day = Day(tmp_path, lambda: setattr(day, "stop", True))
    day.work(100)
    with answering():
        day.run.wait()
    assert day.slept_s == pytest.approx(LOOK_S)


def test_another_process_is_waited_for_until_it_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", ANSWER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout.readline() == b"answering\n"

        def kill():
            server.send_signal(signal.SIGKILL)
            server.wait()

        day = Day(tmp_path, kill)
        day.work(100)
        day.run.wait()
        assert day.slept_s == pytest.approx(LOOK_S)
    assert (tmp_path / LOCK_NAME).exists()


def test_an_engine_tells_while_it_answers_also_where_its_reader_goes_away(classroom):
    with classroom.store() as store:
        events = classroom.engine(store).stream(pupils.question(1))
        next(events)
        day = Day(classroom.data, events.close)
        day.work(100)
        day.run.wait()
        assert day.slept_s == pytest.approx(LOOK_S)


def test_who_answers_does_not_wait_for_others_who_do(answering):
    inside = threading.Barrier(2, timeout=60)

    def answer():
        with answering():
            inside.wait()

    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside.broken


def test_a_folder_that_cannot_be_written_stops_no_answer(tmp_path):
    with Answering(tmp_path / "nowhere")():
        pass
    assert not (tmp_path / "nowhere").exists()


def test_times_are_measured_again_where_somebody_answered_meanwhile(tmp_path, answering):
    day, tries = Day(tmp_path), []

    def measure(clock):
        tries.append(clock())
        if len(tries) < 3:
            with answering():
                pass
        return clock() - tries[-1]

    assert day.run.undisturbed(measure) >= 0
    assert len(tries) == 3


def test_where_somebody_always_answers_times_are_measured_in_the_end(tmp_path, answering):
    day, tries = Day(tmp_path), []

    def measure(clock):
        tries.append(clock())
        with answering():
            pass
        clock()
        return "measured"

    assert day.run.undisturbed(measure) == "measured"
    assert len(tries) == MEASURING_TRIES + 1


def test_a_step_pauses_between_its_products(classroom):
    """Forth and back: far more often than once a microbatch."""
    pytest.importorskip("torch")
    from draftloop.backends.lora import LoraSpec
    from draftloop.backends.training import Objective, TrainerSettings
    from draftloop.learning.continuation import starting_point
    from draftloop.learning.selection import load_examples, select

    with classroom.store() as store:
        school = classroom.school(store)
        chosen = select(store, classroom.pair, school.config).failures[:2]
        examples = load_examples(store, chosen, max_sequence_tokens=512, eos_token_ids=())
    pauses = []
    trainer = school.backend.new_trainer(
        school.draft_folder,
        starting_point(school.architecture, LoraSpec(2, 4.0, ("down_proj",)), None, 0),
        TrainerSettings(Objective.LK_HYBRID, gradient_checkpointing=False, pause=lambda: pauses.append(1)),
    )
    trainer.step([list(examples.values())], 1e-3)
    products = 4 * school.architecture.num_layers + 1
    assert len(pauses) > products
    stepped = len(pauses)
    assert np.isfinite(trainer.replay(list(examples.values()))[0]).all()
    assert len(pauses) >= stepped + products
