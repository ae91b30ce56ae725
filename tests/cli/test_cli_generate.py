"""`draftloop generate`: what stands on stdout, what is stored, and every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import settings
from cli_store import add_adapter, opened, stored_requests

import toys
from draftloop.engine import Engine
from draftloop.errors import StorageError
from draftloop.storage.records import PairKey, RunStatus
from draftloop.storage.store import DATABASE_NAME

GREEDY = ["--temperature", "0"]
CONTRACT = {
    "text": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "tokens_per_s": float,
    "rounds": int,
    "drafted_tokens": int,
    "accepted_tokens": int,
    "acceptance_rate": float,
    "alpha": float,
    "tau": float,
    "token_ids": list,
}


@pytest.fixture
def generate(draftloop, toys_on_numpy):
    """`generate(*arguments, stdin=…)` with the toy pair."""

    def call(*arguments, stdin=b"", options=()):
        return draftloop(*toys_on_numpy, *options, "generate", *arguments, stdin=stdin)

    return call


def test_the_json_contract(generate):
    figures = generate("hello", "--json").json
    for key, kind in CONTRACT.items():
        assert type(figures[key]) is kind, key
    assert figures["adapter"] is None
    assert figures["finish_reason"] in ("stop", "length")
    assert len(figures["token_ids"]) == figures["completion_tokens"] <= 12
    assert figures["acceptance_rate"] == pytest.approx(
        figures["accepted_tokens"] / figures["drafted_tokens"], abs=1e-4
    )
    assert figures["tau"] == pytest.approx(figures["completion_tokens"] / figures["rounds"], abs=1e-4)


def test_without_speculation_nothing_is_drafted_and_the_greedy_text_is_the_same(generate):
    pair = generate("hello", "--json", *GREEDY).json
    alone = generate("hello", "--json", *GREEDY, "--no-speculation").json
    assert alone["token_ids"] == pair["token_ids"]
    assert (alone["drafted_tokens"], alone["acceptance_rate"], alone["alpha"]) == (0, None, None)
    assert alone["tau"] == 1
    assert alone["models"]["draft"] is None


def test_stdout_holds_the_answer_alone(generate):
    text = generate("hello", "--json", *GREEDY).json["text"]
    result = generate("hello", *GREEDY)
    assert result.out == text + ("" if text.endswith("\n") else "\n")
    assert "tok/s" in result.err
    assert generate("hello", *GREEDY, "--no-stats").err == ""
    assert generate("hello", *GREEDY, "--json").err == ""
    assert "tok/s" in generate("hello", *GREEDY, "--json", "--stats").err


def test_colour_is_for_terminals(generate):
    result = generate("hello", *GREEDY, "--color")
    assert "\x1b" not in result.out
    assert "--color acts on a terminal" in result.err


def test_the_stats_line_points_at_a_low_acceptance_rate(generate):
    low, high = (settings(**{"speculative.acceptance_threshold": value}) for value in ("0.0", "1.0"))
    automatic = settings(**{"speculative.acceptance_threshold": "auto"})
    assert "below speculative.acceptance_threshold = 1.0" in generate("hello", options=high).err
    assert "below" not in generate("hello", options=low).err
    assert "below" not in generate("hello", options=automatic).err


def test_a_seed_fixes_the_answer_and_is_reported(generate):
    first = generate("hello", "--json").json
    again = generate("hello", "--json", "--seed", first["seed"]).json
    assert again["token_ids"] == first["token_ids"]
    others = {tuple(generate("hello", "--json", "--seed", seed).json["token_ids"]) for seed in range(4)}
    assert len(others) > 1


def test_flags_are_the_settings(generate):
    options = settings(
        **{"speculative.temperature": 1.5, "speculative.top_k": 5, "speculative.num_draft_tokens": 2}
    )
    by_settings = generate("hi", "--json", "--seed", 1, options=options).json
    flags = ["--temperature", 1.5, "--top-k", 5, "--num-draft-tokens", 2]
    by_flags = generate("hi", "--json", "--seed", 1, *flags).json
    assert by_flags["token_ids"] == by_settings["token_ids"]
    assert generate("hi", "--json", "--max-tokens", 3, "--min-tokens", 3).json["completion_tokens"] == 3


def test_a_stop_string_ends_the_answer(generate):
    text = generate("hello", "--json", *GREEDY).json["text"]
    stop = text[4:6]
    stopped = generate("hello", "--json", *GREEDY, "--stop", stop, "--stop", "not in there").json
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_raw_goes_on_with_the_text_itself(generate):
    assert generate("hello", "--raw", "--json").json["prompt_tokens"] == 5
    assert generate("--raw", "--json", stdin=b"hello").json["prompt_tokens"] == 5
    assert generate("hello", "--json").json["prompt_tokens"] > 5


def test_the_system_message_is_the_flag_or_the_setting(generate):
    by_flag = generate("hi", "--json", *GREEDY, "--system", "be brief").json
    by_setting = generate(
        "hi", "--json", *GREEDY, options=settings(**{"chat.system_message": "be brief"})
    ).json
    assert by_flag["prompt_tokens"] == by_setting["prompt_tokens"]
    assert by_flag["prompt_tokens"] != generate("hi", "--json", *GREEDY).json["prompt_tokens"]


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_a_piped_prompt_without_its_last_line_break(generate, argument):
    piped = generate(*argument, "--json", *GREEDY, stdin="naïve\nhi\n".encode()).json
    given = generate("naïve\nhi", "--json", *GREEDY).json
    assert piped["prompt_tokens"] == given["prompt_tokens"]
    assert piped["token_ids"] == given["token_ids"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "one\n\n  \ntwo\u2028still two\r\n"),
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": "two\u2028still two", "extra": [1]}\n'),
        ("p.data", '\ufeff{"prompt": "one"}\n{"prompt": "two\\u2028still two"}'),
    ],
)
def test_each_prompt_of_a_file_is_answered(generate, tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    answers = [generate(text, "--json", *GREEDY).json for text in ("one", "two\u2028still two")]
    result = generate("--prompts", file, "--json", *GREEDY).json
    assert result["prompts"] == 2
    assert [r["token_ids"] for r in result["results"]] == [a["token_ids"] for a in answers]
    rounds = sum(answer["rounds"] for answer in answers)
    assert result["tau"] == pytest.approx(sum(len(a["token_ids"]) for a in answers) / rounds, abs=1e-4)
    assert {"tokens_per_s", "alpha", "tau", "acceptance_rate"} <= result.keys()
    plain = generate("--prompts", file, *GREEDY)
    assert plain.out.startswith(answers[0]["text"])
    assert plain.out.rstrip("\n").endswith(answers[1]["text"].rstrip("\n"))
    assert "2 prompts" in plain.err


def test_a_prompt_of_a_file_may_carry_its_own_system_message_task_and_id(generate, tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "hi", "system": "be brief", "task": "greet", "id": 7}, {"prompt": "hi", "id": "b"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second = generate("--prompts", file, "--json").json["results"]
    assert (first["id"], first["task"], second["id"]) == (7, "greet", "b")
    assert "task" not in second
    assert first["prompt_tokens"] == generate("hi", "--system", "be brief", "--json").json["prompt_tokens"]
    assert second["prompt_tokens"] == generate("hi", "--json").json["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["", " \t\n"])
def test_an_empty_prompt(generate, prompt):
    generate(prompt).assert_wrong_input("the prompt is empty")
    generate(stdin=prompt.encode()).assert_wrong_input("the prompt is empty")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-tokens", "0"], ["generation.max_tokens = 0", "--max-tokens"]),
        (["--max-tokens", "-3"], ["-3", "--max-tokens"]),
        (["--min-tokens", "13"], ["min_tokens"]),
        (["--temperature", "-0.5"], ["-0.5", "--temperature"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--top-k", "-1"], ["--top-k"]),
        (["--min-p", "1.5"], ["--min-p"]),
        (["--num-draft-tokens", "0"], ["--num-draft-tokens"]),
        (["--stop", ""], ["--stop"]),
        (["--stop", "\udcff"], ["--stop", "UTF-8"]),
        (["--system", "\udcff"], ["--system", "UTF-8"]),
        (["--raw", "--system", "x"], ["--raw", "--system"]),
        (["--json", "--color"], ["--json", "--color"]),
        (["--no-speculation", "--num-draft-tokens", "3"], ["--no-speculation", "--num-draft-tokens"]),
        (["--prompts", "p.txt"], ["PROMPT", "--prompts"]),
    ],
)
def test_wrong_flags(generate, flags, words):
    generate("hello", *flags).assert_wrong_input(*words)


def test_a_prompt_that_is_not_utf8(generate):
    generate("caf\udce9").assert_wrong_input("UTF-8")
    generate(stdin=b"caf\xe9").assert_wrong_input("stdin", "0xe9", "offset 3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\ncaf\xe9\n", ["0xe9", "offset 7"]),
        (b"", ["holds no prompt"]),
        (b"\n  \n", ["holds no prompt"]),
        (b'{"prompt": "a"}\n{"prompt": \n', [":2", "JSON"]),
        (b'{"prompt": "a"}\n["b"]\n', [":2", "object"]),
        (b'{"prompt": "a"}\n{"text": "b"}\n', [":2", "'prompt'"]),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', [":2", "'prompt' is 3"]),
        (b'{"prompt": "a"}\n{"prompt": " "}\n', [":2", "empty"]),
        (b'{"prompt": "a", "system": 1}', [":1", "'system' is 1"]),
        (b'{"prompt": "a", "id": [1]}', [":1", "'id' is [1]"]),
        (b'{"prompt": "\\ud800"}', [":1", "UTF-8"]),
        (b"[" * 200_000, [":1", "nested too deep"]),
        (b'{"prompt": "a"}\n{"prompt": ' + b"[" * 200_000, [":2", "nested too deep"]),
    ],
)
def test_a_wrong_prompts_file(generate, tmp_path, content, words):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    generate("--prompts", file).assert_wrong_input(str(file), *words)


def test_a_prompts_file_that_is_missing_or_a_folder(generate, tmp_path):
    generate("--prompts", tmp_path / "none.txt").assert_wrong_input("none.txt")
    generate("--prompts", tmp_path).assert_wrong_input(str(tmp_path))


def test_a_prompt_longer_than_the_cache(generate, tmp_path):
    small = settings(**{"models.target.max_kv_cache_tokens": 100})
    generate("x" * 200, options=small).assert_wrong_input("max_kv_cache_tokens is 100")
    file = tmp_path / "p.txt"
    file.write_text("fits\n" + "x" * 200)
    generate("--prompts", file, options=small).assert_wrong_input(f"{file}:2", "max_kv_cache_tokens")


def test_a_plain_prompt_may_look_like_deep_json(generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("fits\n" + "[" * 200_000)
    generate("--prompts", file).assert_wrong_input(f"{file}:2", "max_kv_cache_tokens")
    file.write_text("[" * 200_000)
    generate("--prompts", file).assert_wrong_input(f"{file}:1", "max_kv_cache_tokens")


def test_the_target_alone_needs_no_draft(generate):
    absent = settings(**{"models.draft.name": "/nowhere"})
    generate("hello", options=absent).assert_wrong_input("/nowhere")
    alone = generate("hello", "--json", *GREEDY, "--no-speculation", options=absent).json
    assert alone["token_ids"] == generate("hello", "--json", *GREEDY).json["token_ids"]
    assert alone["models"]["draft"] is None


def test_raw_text_begins_with_bos_where_the_tokenizer_says_so(generate, tmp_path):
    def prompt_tokens(text, *options):
        return generate(text, "--raw", "--no-speculation", "--json", options=options).json["prompt_tokens"]

    folder = toys.write_toy_folder(tmp_path / "bos")
    with_bos = settings(**{"models.target.name": folder})
    assert prompt_tokens("hi", *with_bos) == prompt_tokens("hi") == 2
    _add_bos(folder, "<|endoftext|>")
    assert prompt_tokens("hi", *with_bos) == 3
    assert prompt_tokens("<|endoftext|>hi", *with_bos) == 3
    assert prompt_tokens("<|endoftext|><|endoftext|>hi", *with_bos) == 4


def _add_bos(folder, token):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": token}))


def test_a_model_that_is_not_there(draftloop, toys_on_numpy, tmp_path):
    def generate_with(name):
        return draftloop(*toys_on_numpy, *settings(**{"models.target.name": name}), "generate", "hi")

    (tmp_path / "empty").mkdir()
    generate_with(tmp_path / "none").assert_wrong_input(str(tmp_path / "none"))
    generate_with(tmp_path / "empty").assert_wrong_input(str(tmp_path / "empty"))
    generate_with("package:nonsense").assert_wrong_input("package:nonsense")
    generate_with("nobody/nothing").assert_fails(1, "nobody/nothing", "configs/offline.yaml")


def test_wrong_input_is_told_before_a_model_is_looked_for(draftloop):
    absent = settings(**{"models.target.name": "/nowhere"})
    draftloop(*absent, "generate", " ").assert_wrong_input("the prompt is empty")
    draftloop(*absent, "generate", "--prompts", "none.txt").assert_wrong_input("none.txt")


DATA = Path("data")
"""`storage.directory`, in the test's folder."""


def test_every_answer_is_stored(generate, toy_pair):
    figures = generate("hello", "--json", "--system", "be brief").json
    alone = generate("hello", "--json", "--no-speculation").json
    first, second = stored_requests(DATA)
    assert tuple(first.answer_tokens) == tuple(figures["token_ids"])
    assert (first.source, first.key, first.adapter) == ("generate", None, None)
    assert first.domain.startswith("system ")
    assert first.drafted_tokens == figures["drafted_tokens"] > 0
    assert tuple(second.answer_tokens) == tuple(alone["token_ids"])
    assert (second.num_draft_tokens, second.drafted_tokens) == (0, 0)
    assert first.pair == second.pair == PairKey(*map(str, toy_pair()))
    assert len(first.traces.top_ids) == len(first.answer_tokens)


def test_the_domain_is_the_task_or_the_system_message(generate, tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "hi", "task": "greet"}, {"prompt": "hi"}, {"prompt": "hi", "system": "be brief"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    generate("--prompts", file).assert_done()
    generate("hi", "--raw").assert_done()
    generate("hi", "--system", "be brief").assert_done()
    tagged, default, brief, raw, flag = (record.domain for record in stored_requests(DATA))
    assert tagged == "greet"
    assert default.startswith("system ")
    assert brief == flag != default
    assert raw == "no system message"


@pytest.mark.parametrize(
    ("flags", "options"), [(["--no-collect"], []), ([], settings(**{"storage.collect": "false"}))]
)
def test_without_collecting_nothing_is_touched(generate, flags, options):
    answer = generate("hello", *flags, options=options)
    assert answer.exit_status == 0
    assert "note" not in answer.err
    assert not DATA.exists()


def test_wrong_input_leaves_no_store_behind(generate):
    generate("hello", "--no-collect", "--adapter", "a0001").assert_wrong_input("'a0001'", "adapters list")
    generate(" ").assert_wrong_input("the prompt is empty")
    assert not DATA.exists()


def test_a_store_that_cannot_be_used_is_told_and_can_be_done_without(generate):
    DATA.mkdir()
    (DATA / DATABASE_NAME).write_bytes(b"no database " * 100)
    generate("hello").assert_fails(1, DATABASE_NAME, "--no-collect")
    done = generate("hello", "--no-collect", "--json", *GREEDY)
    assert done.json["adapter"] is None
    assert done.err.startswith("note: the draft goes without an adapter")
    assert done.err.count("\n") == 1
    for flags in (["--adapter", "none"], ["--no-speculation"]):
        assert generate("hello", "--no-collect", "--no-stats", *flags).err == ""
    named = generate("hello", "--no-collect", "--adapter", "a0001")
    named.assert_fails(1, DATABASE_NAME, "--adapter none")
    assert (DATA / DATABASE_NAME).read_bytes() == b"no database " * 100


def test_a_store_of_a_newer_version_is_left_alone(generate):
    import sqlite3

    generate("hello").assert_done()
    with sqlite3.connect(DATA / DATABASE_NAME) as connection:
        connection.execute("PRAGMA user_version = 1000")
    generate("hello").assert_fails(1, "newer version", "--no-collect")
    generate("hello", "--no-collect").assert_done()


def test_the_active_adapter_is_worn_unless_another_is_asked_for(generate, toy_pair):
    bare = generate("hello", "--json", *GREEDY).json
    active = add_adapter(DATA, toy_pair(), promote=True)
    other = add_adapter(DATA, toy_pair(), promote=False, strength=0.1)
    worn = generate("hello", "--json", *GREEDY).json
    assert (bare["adapter"], worn["adapter"]) == (None, active)
    assert worn["token_ids"] == bare["token_ids"]
    assert worn["alpha"] != bare["alpha"]
    assert generate("hello", "--json", *GREEDY, "--adapter", "active").json["alpha"] == worn["alpha"]
    named = generate("hello", "--json", *GREEDY, "--adapter", other).json
    assert named["adapter"] == other
    assert named["alpha"] not in (bare["alpha"], worn["alpha"])
    none = generate("hello", "--json", *GREEDY, "--adapter", "none").json
    assert (none["adapter"], none["alpha"]) == (None, bare["alpha"])
    assert generate("hello", "--json", *GREEDY, "--no-speculation").json["adapter"] is None
    count = len(stored_requests(DATA))
    assert generate("hello", "--json", *GREEDY, "--no-collect").json["adapter"] == active
    records = stored_requests(DATA)
    assert len(records) == count
    assert [record.adapter for record in records] == [None, active, active, other, None, None]


def test_without_collecting_the_store_is_only_read(generate, toy_pair):
    import sqlite3

    DATA.mkdir()
    name = add_adapter(DATA, toy_pair(), promote=True)
    with sqlite3.connect(DATA / DATABASE_NAME, isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        done = generate("hello", "--no-collect", "--json")
        writer.execute("ROLLBACK")
    assert (done.json["adapter"], done.err) == (name, "")


def test_an_adapter_that_cannot_be_worn(generate, toy_pair):
    generate("hello").assert_done()
    generate("hello", "--adapter", "a0001").assert_wrong_input("'a0001'", "adapters list")
    foreign = add_adapter(DATA, toy_pair(), promote=False, draft="somebody/else")
    generate("hello", "--adapter", foreign).assert_wrong_input(foreign, "somebody/else")
    generate("hello", "--adapter", "none", "--no-speculation").assert_wrong_input("--adapter")
    damaged = add_adapter(DATA, toy_pair(), promote=True)
    (DATA / "adapters" / damaged / "adapter_model.safetensors").write_bytes(b"\0\1")
    generate("hello").assert_wrong_input(damaged)
    generate("hello", "--adapter", "none").assert_done()


def test_an_interrupted_answer_is_stored_as_far_as_it_came(generate, monkeypatch):
    stream = Engine.stream

    def interrupted(engine, request, conversation=None):
        events = stream(engine, request, conversation)
        for number, event in enumerate(events):
            if number == 6:
                events.throw(KeyboardInterrupt)
            yield event

    monkeypatch.setattr(Engine, "stream", interrupted)
    assert generate("hello", "--min-tokens", 12).exit_status == 130
    (record,) = stored_requests(DATA)
    assert record.finish_reason == "cancelled"
    assert 0 < len(record.answer_tokens) < 12


def test_training_follows_where_the_settings_want_it(generate, toy_pair, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        "draftloop.learning.background.start_training",
        lambda arguments, directory, *, resume: started.append((list(arguments), directory, resume)),
    )
    wanted = {"speculative.acceptance_threshold": 1.0, "training.min_failure_cases": 1, "backend": "torch"}
    always = settings(**wanted, **{"adaptation.auto_train": "true"})
    generate("--prompts", two_prompts(tmp_path), options=settings(**wanted)).assert_done()
    assert started == []
    result = generate("hello", "--num-draft-tokens", 2, options=always)
    assert "failures in the background" in result.err
    ((arguments, directory, resume),) = started
    assert arguments[-len(always) - 2 :] == [*always, "--set", "speculative.num_draft_tokens=2"]
    assert (directory, resume) == (Path.cwd() / DATA, False)
    generate("hello", "--no-collect", options=always).assert_done()
    generate("hello", options=[*always, *settings(backend="numpy")]).assert_done()
    assert len(started) == 1
    with opened(DATA) as store:
        run = store.runs.start(PairKey(*map(str, toy_pair())), None, {})
        store.runs.finish(run, RunStatus.INTERRUPTED, {})
    again = generate("hello", options=always)
    assert "the interrupted training goes on in the background" in again.err
    assert started[1][2] is True


def two_prompts(tmp_path):
    """Of two new prompts in one domain at most one is held out: one failure is left to learn from."""
    file = tmp_path / "two.txt"
    file.write_text("one\ntwo")
    return file


def test_training_that_cannot_start_does_not_fail_the_answer(generate, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise StorageError("no process could be started", remedy="Try again.")

    monkeypatch.setattr("draftloop.learning.background.start_training", fail)
    wanted = {"speculative.acceptance_threshold": 1.0, "training.min_failure_cases": 1}
    options = settings(backend="torch", **wanted, **{"adaptation.auto_train": "true"})
    result = generate("--prompts", two_prompts(tmp_path), options=options)
    assert result.exit_status == 0
    assert "note: no training was started: no process could be started" in result.err


def test_the_adaptive_schedule_answers_as_the_target_and_remembers_its_costs(generate, tmp_path, monkeypatch):
    """Greedy text is the target's at any schedule; the costs are measured once and kept beside the models."""
    # However busy this machine is.
    monkeypatch.setattr("draftloop.speculation.remembered.MOST_TRIES", 1)
    adaptive = settings(**{"speculative.schedule": "adaptive"})
    alone = generate("hello", "--json", *GREEDY, "--no-speculation").json
    found = generate("hello", "--json", *GREEDY, options=adaptive).json
    assert found["token_ids"] == alone["token_ids"]
    folder = tmp_path / "cache" / "calibration"
    (greedy,) = folder.glob("*.json")
    written = greedy.read_bytes()
    # What was answered before takes part in an answer without a seed, and not in one with it.
    first = generate("hello", "--json", "--seed", 5, options=adaptive).json
    assert generate("hello", "--json", options=adaptive).json["seed"] != 5
    again = generate("hello", "--json", "--seed", 5, options=adaptive).json
    assert again["token_ids"] == first["token_ids"]
    assert greedy.read_bytes() == written
    assert len(list(folder.glob("*.json"))) == 2
