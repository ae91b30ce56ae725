"""What a chat says of learning, where looking at it fails."""

from __future__ import annotations

import threading

import pytest

from draftloop.cli import chat_learning
from draftloop.cli.chat_learning import ChatNews
from draftloop.errors import StorageError


class Learner:
    """Fails at the first look, and says when that was."""

    def __init__(self, error):
        self.looked, self._error = threading.Event(), error

    def look(self):
        self.looked.set()
        raise self._error

    def leave(self):
        return False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StorageError("the disk is full", remedy="Make room."), "the disk is full. Make room."),
        (KeyError("a secret"), "unexpected KeyError"),
    ],
)
def test_a_look_that_fails_is_told_once_and_the_chat_goes_on(monkeypatch, capfd, error, words):
    monkeypatch.setattr(chat_learning, "LOOK_S", 0)
    learner = Learner(error)
    with ChatNews(learner):
        assert learner.looked.wait(30)
    told = capfd.readouterr()
    assert (told.out + told.err).strip() == f"no more news of learning in this chat: {words}"
