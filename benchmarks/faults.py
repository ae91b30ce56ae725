"""Kill `draftloop collect` and `draftloop train` at random moments and look at what they leave behind.

After each SIGKILL the database must open, pass SQLite's integrity check and hold every request that was
acknowledged (the engine gave its completion out) or stored before; the active adapter's files must load; an
interrupted run must resume, be killed again or not, and end. Prints a summary, exits 1 on any violation.

    python benchmarks/faults.py [--kills 50] [--seed 0] [--config FILE]

Toys from tests/ answer and learn, unless `--config` names a settings file whose pair does (slow: prompts are
short and trainings small, but each kill loads the models). Every command runs in a forked process that has
imported everything, so that the moments fall into work and not into imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftloop.engine import Completion
    from draftloop.storage.records import PairKey

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROMPTS = 4000
NEW_REQUESTS = 16
"""Answered with the first adapter, for the trainings to come."""
SHORT_MOMENT_S = 0.005
AT_WORK = 0.8
"""This share of the kills comes when the work has begun: loading takes longer than toys' work."""
ACKNOWLEDGED = "acknowledged an answer"
SMALL = (
    "training.num_epochs=2",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.min_failure_cases=4",
    "training.max_sequence_length=128",
    "speculative.acceptance_threshold=1",
    "generation.max_tokens=16",
    "adaptation.auto_train=false",
    "adaptation.revert_after_requests=100000",
)
"""What the pair of a settings file answers and learns in."""


@dataclass(slots=True)
class Lab:
    """Where everything happens: the current folder.

    Attributes:
        options: global options of every command.
        violations: what was found, in words.
        moments: how often a kill hit what.
    """

    options: list[str]
    violations: list[str] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)

    def started(self, directory: Path, *arguments: str) -> int:
        """Fork a process that runs one command with its output in `directory`'s `.log`; its id."""
        child = os.fork()
        if child:
            return child
        status = 70
        with contextlib.suppress(BaseException):
            log = os.open(log_of(directory), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from draftloop.cli.main import run

            status = run([*self.options, "--set", f"storage.directory={directory}", *arguments])
        os._exit(status)

    def finished(self, directory: Path, *arguments: str) -> tuple[int, float]:
        """Run one command to its end: exit status and seconds."""
        began_s = time.perf_counter()
        _, status = os.waitpid(self.started(directory, *arguments), 0)
        return os.waitstatus_to_exitcode(status), time.perf_counter() - began_s

    def killed(self, directory: Path, delay_s: float, *arguments: str, behind: str = "") -> bool:
        """Run one command and kill it `delay_s` after it has said `behind`, or let it end before that.

        Returns:
            Whether it was killed.
        """
        log_of(directory).unlink(missing_ok=True)
        child, until_s = self.started(directory, *arguments), None
        while until_s is None or time.perf_counter() < until_s:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            if until_s is None and log_of(directory).exists() and behind in log_of(directory).read_text():
                until_s = time.perf_counter() + delay_s
            time.sleep(SHORT_MOMENT_S if until_s is None else min(SHORT_MOMENT_S, delay_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)

    def blame(self, what: str) -> None:
        """A violation was found."""
        self.violations.append(what)
        print(f"VIOLATION: {what}", file=sys.stderr)


def log_of(directory: Path) -> Path:
    """Where a command's output goes that works on this store."""
    return directory.with_suffix(".log")


def main() -> int:
    """Kill, look, sum up; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="settings of a pair in place of toys")
    arguments = parser.parse_args()
    began_s = time.perf_counter()
    config = None if arguments.config is None else arguments.config.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lab = Lab(options_of(config))
        import_everything()
        pair = pair_key(lab)
        chance = random.Random(arguments.seed)
        collected = kill_collecting(lab, pair, chance, arguments.kills)
        trained, resumed = kill_training(lab, pair, chance, arguments.kills)
    print(f"collect: {arguments.kills} kills, {collected} requests acknowledged, each of them stored")
    print(f"train: {trained} kills, {resumed} runs resumed to their end")
    print("killed: " + ", ".join(f"{what} {count}" for what, count in sorted(lab.moments.items())))
    print(f"{len(lab.violations)} violations in {time.perf_counter() - began_s:.0f} s, seed {arguments.seed}")
    for violation in lab.violations:
        print(f"- {violation}")
    return 1 if lab.violations else 0


def options_of(config: Path | None) -> list[str]:
    """Global options; the toys are written."""
    if config is not None:
        overrides = [*SMALL]
        return ["--config", str(config), *(word for one in overrides for word in ("--set", one))]
    # Toys are too small for more than one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(TESTS))
    import pupils

    pupils.write_pupil(Path.cwd())
    return pupils.Classroom(Path.cwd()).options(adaptation__revert_after_requests=100000)


def import_everything() -> None:
    """What a command imports late: a fork inherits it. Nothing may compute here, threads do not survive.

    Every answer is acknowledged on stdout from now on.
    """
    import draftloop.backends.torch.backend
    import draftloop.backends.torch.learner
    import draftloop.cli.main
    import draftloop.learning.run
    import draftloop.loading  # noqa: F401
    from draftloop.engine import Engine

    complete = Engine.complete

    def acknowledging(*arguments: Any, **named: Any) -> Completion:
        """What `collect` learns of an answer, written down before it does anything with it."""
        completion = complete(*arguments, **named)
        os.write(1, f"{ACKNOWLEDGED}\n".encode())
        return completion

    Engine.complete = acknowledging  # type: ignore[method-assign]


def pair_key(lab: Lab) -> PairKey:
    """The pair that answers, as the store knows it."""
    from draftloop.config import load_config
    from draftloop.loading import pair_of

    sets = [value for word, value in zip(lab.options, lab.options[1:], strict=False) if word == "--set"]
    at = lab.options.index("--config") + 1 if "--config" in lab.options else None
    return pair_of(load_config([] if at is None else [Path(lab.options[at])], overrides=sets).config)


def kill_collecting(lab: Lab, pair: PairKey, chance: random.Random, kills: int) -> int:
    """Requests that were acknowledged in all."""
    directory, prompts = Path.cwd() / "collect", write_prompts("many.jsonl", PROMPTS)
    warm = write_prompts("one.jsonl", 1)
    status, one_s = lab.finished(Path.cwd() / "warm", "collect", "--prompts", warm)
    if status:
        raise SystemExit(f"collect fails by itself:\n{log_of(Path.cwd() / 'warm').read_text()}")
    known: set[int] = set()
    total = 0
    for number in range(kills):
        behind = at_work(chance, ACKNOWLEDGED)
        delay_s = chance.uniform(0, one_s / 4 if behind else one_s)
        lab.killed(directory, delay_s, "collect", "--prompts", prompts, behind=behind)
        acknowledged = log_of(directory).read_text().count(ACKNOWLEDGED)
        lab.moments["while answering" if acknowledged else "before an answer"] += 1
        total += acknowledged
        ids = stored(lab, directory, pair, f"collect, kill {number + 1}")
        if not known <= ids:
            lab.blame(f"collect, kill {number + 1}: requests {sorted(known - ids)} are gone")
        new = len(ids - known)
        # One may have been written and not yet told of.
        if not acknowledged <= new <= acknowledged + 1:
            lab.blame(f"collect, kill {number + 1}: {acknowledged} acknowledged, {new} stored")
        known = ids
    return total


def kill_training(lab: Lab, pair: PairKey, chance: random.Random, kills: int) -> tuple[int, int]:
    """Kills, and runs that were resumed and ended."""
    ready = Path.cwd() / "ready"
    requests = write_prompts("first.jsonl", 40), write_prompts("second.jsonl", NEW_REQUESTS, begin=40)
    for command in (("collect", "--prompts", requests[0]), ("train",), ("collect", "--prompts", requests[1])):
        status, _ = lab.finished(ready, *command)
        if status:
            raise SystemExit(f"{command[0]} fails by itself:\n{log_of(ready).read_text()}")
    rehearsal = shutil.copytree(ready, Path.cwd() / "rehearsal")
    status, whole_s = lab.finished(rehearsal, "train")
    known = stored(lab, ready, pair, "before any training")
    if status or not runs_of(rehearsal)[1:]:
        raise SystemExit(f"a second train fails by itself:\n{log_of(rehearsal).read_text()}")
    done = resumed = number = 0
    while done < kills:
        number += 1
        directory = shutil.copytree(ready, Path.cwd() / f"train{number}")
        # Each store is killed until its run has ended by itself, and at the most five times.
        for _ in range(5):
            where = f"train, kill {done + 1}"
            going_on = runs_of(directory)[-1] in ("interrupted", "running")
            command = ("train", "--resume") if going_on else ("train", "--force")
            behind = at_work(chance, "training: ")
            delay_s = chance.uniform(0, 0.6 * whole_s)
            if done == kills or not lab.killed(directory, delay_s, *command, behind=behind):
                break
            done += 1
            checked(lab, directory, pair, known, where)
            lab.moments[moment_of(directory)] += 1
        ended, went_on = end_of(lab, directory, pair, known, f"train {number}")
        resumed += ended and went_on
        shutil.rmtree(directory)
    return done, resumed


def at_work(chance: random.Random, sign: str) -> str:
    """What to wait for: mostly the sign that the work has begun, sometimes nothing."""
    return sign if chance.random() < AT_WORK else ""


def end_of(lab: Lab, directory: Path, pair: PairKey, known: set[int], where: str) -> tuple[bool, bool]:
    """Let what was killed end: whether it did, and whether that took a resumption."""
    went_on = runs_of(directory)[-1] in ("interrupted", "running")
    if went_on:
        status, _ = lab.finished(directory, "train", "--resume")
        if status:
            lab.blame(f"{where}: --resume ends with {status}: {log_of(directory).read_text()[-300:]}")
            return False, True
    elif len(runs_of(directory)) == 1:
        status, _ = lab.finished(directory, "train")
        if status:
            lab.blame(f"{where}: a new train ends with {status}: {log_of(directory).read_text()[-300:]}")
            return False, False
    checked(lab, directory, pair, known, f"{where}, at its end")
    last = runs_of(directory)[-1]
    if last not in ("promoted", "rejected"):
        lab.blame(f"{where}: the last run is {last}")
    if any((directory / "runs").rglob("checkpoint.safetensors*")):
        lab.blame(f"{where}: a checkpoint is left behind")
    return True, went_on


def moment_of(directory: Path) -> str:
    """What the kill hit, as the log and the store tell."""
    said = log_of(directory).read_text()
    if "choosing a form" in said:
        return "judging or concluding"
    return "training" if "training: " in said else "before training"


def checked(lab: Lab, directory: Path, pair: PairKey, known: set[int], where: str) -> None:
    """Everything that must hold at every moment."""
    ids = stored(lab, directory, pair, where)
    if ids != known:
        lab.blame(f"{where}: requests {sorted(known ^ ids)} came or went")


def stored(lab: Lab, directory: Path, pair: PairKey, where: str) -> set[int]:
    """The requests of the pair, each of them read; the database and the active adapter are checked too."""
    from draftloop.errors import DraftloopError
    from draftloop.learning.deployment import load_deployed
    from draftloop.storage.store import DATABASE_NAME, open_store

    path = directory / DATABASE_NAME
    if not path.exists():
        return set()
    try:
        with open_store(directory, max_megabytes=1000) as store:
            ids = {one.id for one in store.requests.list(pair)}
            store.requests.load(sorted(ids))
            active = store.adapters.active(pair)
            if active is not None and not load_deployed(store, directory, active.name).lora.modules:
                lab.blame(f"{where}: {active.name} has no weights")
            for one in store.adapters.list(pair):
                load_deployed(store, directory, one.name)
    except DraftloopError as error:
        lab.blame(f"{where}: {error}")
        return set()
    with closing(sqlite3.connect(path)) as connection:
        for pragma, right in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
            found = connection.execute(f"PRAGMA {pragma}").fetchall()
            if found != right:
                lab.blame(f"{where}: {pragma} says {found}")
    return ids


def runs_of(directory: Path) -> list[str]:
    """The status of every run, oldest first."""
    from draftloop.storage.store import DATABASE_NAME

    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        return [str(status) for (status,) in connection.execute("SELECT status FROM runs ORDER BY id")]


def write_prompts(name: str, count: int, begin: int = 0) -> str:
    """A file of short prompts, in the current folder."""
    path = Path.cwd() / name
    lines = [json.dumps({"prompt": f"Say {number} in words."}) for number in range(begin, begin + count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
