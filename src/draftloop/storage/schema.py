"""The tables, as numbered migrations.

Contract: migration n brings a database of version n - 1 to version n (`PRAGMA user_version`). One that was
ever released is never edited; a change is a new one at the end. Pure data.
"""

from __future__ import annotations

from collections.abc import Sequence

Migration = Sequence[str]
"""Statements, run in one transaction."""

APPLICATION_ID = 0x44724C70
"""`PRAGMA application_id`, so that no other program's database is taken for ours."""

_FIRST: Migration = (
    "CREATE TABLE pairs (id INTEGER PRIMARY KEY, target TEXT NOT NULL, draft TEXT NOT NULL, "
    "UNIQUE (target, draft))",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        pair_id INTEGER NOT NULL REFERENCES pairs (id),
        parent TEXT REFERENCES adapters (name),
        started_s REAL NOT NULL,
        ended_s REAL,
        status TEXT NOT NULL,
        recipe TEXT NOT NULL,
        result TEXT NOT NULL
    )""",
    """CREATE TABLE run_points (
        run_id INTEGER NOT NULL REFERENCES runs (id),
        step INTEGER NOT NULL,
        validates INTEGER NOT NULL,
        epoch REAL NOT NULL,
        loss REAL,
        learning_rate REAL,
        gradient_norm REAL,
        validation_alpha REAL,
        PRIMARY KEY (run_id, step, validates)
    ) WITHOUT ROWID""",
    """CREATE TABLE adapters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        pair_id INTEGER NOT NULL REFERENCES pairs (id),
        parent TEXT REFERENCES adapters (name),
        created_s REAL NOT NULL,
        status TEXT NOT NULL,
        form TEXT NOT NULL,
        run_id INTEGER REFERENCES runs (id),
        reason TEXT NOT NULL,
        metrics TEXT NOT NULL
    )""",
    # The newest row of a pair is what is active: history and pointer cannot disagree.
    """CREATE TABLE activations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        pair_id INTEGER NOT NULL REFERENCES pairs (id),
        adapter TEXT REFERENCES adapters (name),
        created_s REAL NOT NULL,
        reason TEXT NOT NULL,
        request_id INTEGER NOT NULL
    )""",
    "CREATE INDEX activations_of_pair ON activations (pair_id)",
    """CREATE TABLE requests (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        pair_id INTEGER NOT NULL REFERENCES pairs (id),
        created_s REAL NOT NULL,
        adapter TEXT,
        domain TEXT NOT NULL,
        source TEXT NOT NULL,
        key TEXT,
        split_key TEXT NOT NULL,
        held_out INTEGER NOT NULL,
        trained_by TEXT REFERENCES adapters (name),
        num_prompt_tokens INTEGER NOT NULL,
        num_answer_tokens INTEGER NOT NULL,
        temperature REAL NOT NULL,
        top_p REAL NOT NULL,
        top_k INTEGER NOT NULL,
        min_p REAL NOT NULL,
        min_tokens INTEGER NOT NULL,
        num_draft_tokens INTEGER NOT NULL,
        seed TEXT NOT NULL, -- a seed may have more than 63 bits
        finish_reason TEXT NOT NULL,
        rounds INTEGER NOT NULL,
        drafted_tokens INTEGER NOT NULL,
        accepted_tokens INTEGER NOT NULL,
        tested_tokens INTEGER NOT NULL,
        alpha_sum REAL NOT NULL,
        prompt_s REAL NOT NULL,
        decode_s REAL NOT NULL,
        stored_bytes INTEGER NOT NULL
    )""",
    "CREATE INDEX requests_of_pair ON requests (pair_id)",
    # Beside the rows and not in them, so that listing requests does not read their traces.
    "CREATE TABLE contents (request_id INTEGER PRIMARY KEY REFERENCES requests (id) ON DELETE CASCADE, "
    "body BLOB NOT NULL)",
    "CREATE TABLE totals (stored_bytes INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0)",
    "CREATE TRIGGER request_added AFTER INSERT ON requests BEGIN "
    "UPDATE totals SET stored_bytes = stored_bytes + new.stored_bytes; END",
    "CREATE TRIGGER request_removed AFTER DELETE ON requests BEGIN "
    "UPDATE totals SET stored_bytes = stored_bytes - old.stored_bytes; END",
    # These two outlive the requests: whoever was trained on stays on the side of training.
    "CREATE TABLE split_keys (pair_id INTEGER NOT NULL REFERENCES pairs (id), digest INTEGER NOT NULL, "
    "held_out INTEGER NOT NULL, PRIMARY KEY (pair_id, digest)) WITHOUT ROWID",
    "CREATE TABLE split_counts (pair_id INTEGER NOT NULL REFERENCES pairs (id), domain TEXT NOT NULL, "
    "split_keys INTEGER NOT NULL, PRIMARY KEY (pair_id, domain)) WITHOUT ROWID",
)

# Before, nothing but the draft model proposed.
_SUFFIX_ROUNDS: Migration = tuple(
    f"ALTER TABLE requests ADD COLUMN {column} NOT NULL DEFAULT 0"
    for column in (
        "suffix_rounds INTEGER",
        "suffix_tokens INTEGER",
        "suffix_drafted_tokens INTEGER",
        "suffix_accepted_tokens INTEGER",
        "suffix_s REAL",
    )
)

_VOCABULARIES: Migration = (
    # What the draft's head was cut to; NULL where it was whole.
    "ALTER TABLE requests ADD COLUMN vocabulary TEXT",
)

# Both outlive the requests, which make room for others.
_VOCABULARY_VERSIONS: Migration = (
    "ALTER TABLE pairs ADD COLUMN answer_tokens INTEGER NOT NULL DEFAULT 0",
    "UPDATE pairs SET answer_tokens = "
    "(SELECT coalesce(sum(num_answer_tokens), 0) FROM requests WHERE pair_id = pairs.id)",
    "CREATE TRIGGER answer_counted AFTER INSERT ON requests BEGIN "
    "UPDATE pairs SET answer_tokens = answer_tokens + new.num_answer_tokens WHERE id = new.pair_id; END",
    "CREATE TABLE vocabulary_versions (pair_id INTEGER NOT NULL REFERENCES pairs (id), wanted TEXT NOT NULL, "
    "answer_tokens INTEGER NOT NULL, ids BLOB NOT NULL, PRIMARY KEY (pair_id, wanted))",
)

MIGRATIONS: Sequence[Migration] = (_FIRST, _SUFFIX_ROUNDS, _VOCABULARIES, _VOCABULARY_VERSIONS)
