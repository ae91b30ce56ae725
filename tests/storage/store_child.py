"""Another process that uses a store: `python store_child.py DIRECTORY TASK [ARGUMENT]`.

It begins at the first line it is sent and prints what it has done, line by line.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from storage_samples import PAIR, add_promoted, make_adapter, make_request

from draftloop.errors import StorageError
from draftloop.storage.store import open_store


def add_for_good(directory: Path, max_megabytes: int) -> None:
    """Add requests and print the id of each that was acknowledged, until killed."""
    with open_store(directory, max_megabytes=max_megabytes) as store:
        say("open")
        seed = 0
        while True:
            say(store.requests.add(make_request(rows=60, seed=seed)))
            seed += 1


def add_some(directory: Path, count: int) -> None:
    """Add so many requests, each with a split key of its own."""
    with open_store(directory, max_megabytes=100) as store:
        for seed in range(count):
            say(store.requests.add(make_request(seed=seed, source=sys.argv[4])))


def promote_for_good(directory: Path, _: int) -> None:
    """Promote and revert without end; each promotion learns from all requests at once."""
    with open_store(directory, max_megabytes=100) as store:
        if store.adapters.active(PAIR) is None:
            add_promoted(store, store.adapters.next_name())
        while (active := store.adapters.active(PAIR)) is not None and active.name != "a0001":
            store.adapters.revert(PAIR, "a killed process left it")
        say("open")
        while True:
            name = store.adapters.next_name()
            store.adapters.add(make_adapter(name, "a0001"))
            ids = [one.id for one in store.requests.list(PAIR)]
            store.adapters.promote(name, trained_request_ids=ids, reason="better")
            say(name)
            store.adapters.revert(PAIR, "worse")
            say(name)


def add_to_a_limit(directory: Path, limit_bytes: int) -> None:
    """Add until a file may not become larger, and print what is said then."""
    with open_store(directory, max_megabytes=100) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            for seed in range(1000):
                say(store.requests.add(make_request(rows=100, seed=seed)))
        except StorageError as error:
            say(f"told: {error}")


def say(what: object) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    task = {
        "add": add_for_good,
        "some": add_some,
        "promote": promote_for_good,
        "limit": add_to_a_limit,
    }[sys.argv[2]]
    say("ready")
    sys.stdin.readline()
    task(Path(sys.argv[1]), int(sys.argv[3]))
