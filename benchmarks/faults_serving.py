"""Kill `draftloop serve` while it streams and while an adapter is promoted, and let its disk become full.

After each SIGKILL the database must open, pass SQLite's integrity check and hold every answer that a client
had whole; every adapter's files must load; the active one must be the last that was acknowledged, or the one
that was being promoted. With a full disk the server goes on answering and says what it could not store; all
else is stored. Prints a summary, exits 1 on any violation.

    python benchmarks/faults_serving.py [--kills 40] [--seed 0]

Toys from tests/ answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "server")]

from faults import Lab, stored  # noqa: E402
from servers import Running, running  # noqa: E402
from traffic import Target, read_reply, read_status  # noqa: E402

import pupils  # noqa: E402
from draftloop.models.tokenizer import Tokenizer  # noqa: E402
from draftloop.storage.store import DATABASE_NAME  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Coroutine

ADAPTERS = ("first", "second")
CLIENTS = 3
LONGEST_LIFE_S = 0.8
ROOM_BYTES = 200_000
"""What the full disk still takes."""
NOT_STORED = "was not stored"


@dataclass(slots=True)
class Witness:
    """What clients know when the server is killed.

    Attributes:
        answered: the prompts whose answers they had whole.
        active: the adapter that was last acknowledged as active; None where none was yet.
        promoting: the one that is being promoted.
        streaming: how many streams are under way.
    """

    answered: list[str] = field(default_factory=list)
    active: str | None = None
    promoting: str | None = None
    streaming: int = 0


def main() -> int:
    """Kill, fill, sum up; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began_s, moments = time.perf_counter(), Counter[str]()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pupils.write_pupil(Path(folder))
        room = pupils.Classroom(Path(folder))
        with room.store() as store:
            for name in ADAPTERS:
                pupils.add_adapter(room, store, name, confused=name == ADAPTERS[1])
        lab = Lab(room.options(backend="numpy", adaptation__revert_after_requests=100000))
        chance, past = random.Random(arguments.seed), Witness()
        for number in range(arguments.kills):
            with running(lab.options, room.folder, "--no-learn") as server:
                asyncio.run(kill(server, past, chance, f"kill {number + 1}"))
            moments["while streaming"] += past.streaming > 0
            moments["while promoting"] += past.promoting is not None
            look(lab, room, past, f"kill {number + 1}")
        with running(lab.options, room.folder, "--no-learn") as server:
            unstored = asyncio.run(fill_the_disk(lab, server, past))
        look(lab, room, past, "full disk", unstored)
    print(f"{arguments.kills} kills, {dict(moments)}; {len(past.answered)} answers acknowledged")
    print(f"full disk: {unstored} answers were given and not stored, and said so")
    print(f"{len(lab.violations)} violations in {time.perf_counter() - began_s:.0f} s, seed {arguments.seed}")
    return 1 if lab.violations else 0


async def kill(server: Running, past: Witness, chance: random.Random, where: str) -> None:
    """Let clients ask and promote, until the server is killed at some moment."""
    past.promoting, past.streaming = None, 0
    target = Target(server.port, server.model, 20, ())
    work = [forever(ask(target, past, f"{where}, client {number}", chance)) for number in range(CLIENTS)]
    tasks = [asyncio.create_task(one) for one in (*work, forever(promote(target, past, chance)))]
    await asyncio.sleep(chance.uniform(0, LONGEST_LIFE_S))
    server.process.kill()
    await asyncio.gather(*tasks)
    server.process.wait()


async def forever(work: Coroutine[None, None, None]) -> None:
    """Work that the server's end breaks off."""
    with suppress(OSError, asyncio.IncompleteReadError):
        await work


async def ask(target: Target, past: Witness, who: str, chance: random.Random) -> None:
    """Ask again and again; what was answered whole is written down."""
    number = 0
    while True:
        number += 1
        await ask_once(target, past, f"{who}, question {number}", stream=chance.random() < 0.7)


async def ask_once(target: Target, past: Witness, prompt: str, *, stream: bool) -> None:
    """One question."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    body = {"model": target.model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    writer.write(target.post(body))
    status = await read_status(reader)
    past.streaming += stream
    text = await reader.read()
    whole = b"data: [DONE]" in text if stream else text.endswith(b"}")
    if status == 200 and whole:
        past.answered.append(prompt)
        past.streaming -= stream
    writer.close()


async def promote(target: Target, past: Witness, chance: random.Random) -> None:
    """Promote one adapter after the other."""
    while True:
        past.promoting = next(name for name in ADAPTERS if name != past.active)
        await promote_once(target, past)
        await asyncio.sleep(chance.uniform(0, 0.02))


async def promote_once(target: Target, past: Witness) -> int:
    """Promote the one that is written down; the answer's status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    writer.write(target.post(b"{}", path=f"/api/adapters/{past.promoting}/promote"))
    status, body = await read_reply(reader)
    writer.close()
    if status == 200 and json.loads(body):
        past.active, past.promoting = past.promoting, None
    return status


def look(lab: Lab, room: pupils.Classroom, past: Witness, where: str, unstored: int = 0) -> None:
    """Everything that must hold after a server's end."""
    ids = stored(lab, room.data, room.pair, where)
    with room.store() as store:
        records = store.requests.load(sorted(ids))
        active = store.adapters.active(room.pair)
    tokenizer = Tokenizer.load(room.folder / "target")
    prompts = " ".join(tokenizer.decode(one.prompt_tokens.tolist()) + "\n" for one in records)
    missing = [prompt for prompt in past.answered if f"{prompt}\n" not in prompts]
    if len(missing) > unstored:
        lab.blame(f"{where}: {len(missing)} acknowledged answers are not stored, as {missing[0]!r}")
    name = None if active is None else active.name
    if name != past.active and name != past.promoting:
        lab.blame(f"{where}: {name} is active, {past.active} was acknowledged, {past.promoting} under way")
    past.active = name


async def fill_the_disk(lab: Lab, server: Running, past: Witness) -> int:
    """Answer with a full disk, then with room again; how many answers the server said it could not store."""
    target = Target(server.port, server.model, 20, ())
    past.promoting, past.streaming = None, 0
    # Everything is written to SQLite's log first.
    await ask_once(target, past, "room still", stream=False)
    server.bound_files(Path("data", f"{DATABASE_NAME}-wal").stat().st_size + ROOM_BYTES)
    before = len(past.answered)
    for number in range(60):
        await ask_once(target, past, f"full disk, question {number}", stream=True)
    if len(past.answered) != before + 60:
        lab.blame(f"full disk: {len(past.answered) - before} of 60 were answered")
    past.promoting = next(name for name in ADAPTERS if name != past.active)
    status = await promote_once(target, past)
    if status == 200 and past.promoting is not None:
        lab.blame("full disk: a promotion that failed was acknowledged")
    server.bound_files(-1)
    for number in range(10):
        await ask_once(target, past, f"room again, question {number}", stream=False)
    server.process.kill()
    server.process.wait()
    unstored = sum(NOT_STORED in line for line in server.said)
    if not unstored:
        lab.blame("full disk: the disk was never full")
    return unstored


if __name__ == "__main__":
    sys.exit(main())
