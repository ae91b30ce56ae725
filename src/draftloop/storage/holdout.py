"""Which requests are held out of training: a fifth of each domain, by split key.

Contract: a split key stays on its side for good, also after its requests are gone. Of every five
consecutive new split keys of one domain exactly one is held out; which one is a hash of pair, domain and
block, so that it is neither a choice nor a pattern in time.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from draftloop.storage.records import PairKey

BLOCK = 5


def is_held_out(pair: PairKey, domain: str, number: int) -> bool:
    """Whether the domain's new split key `number` (from 0) is held out."""
    block, place = divmod(number, BLOCK)
    named = "\0".join((pair.target, pair.draft, domain, str(block)))
    return _digest(named) % BLOCK == place


def choose_side(
    connection: sqlite3.Connection, pair_id: int, pair: PairKey, domain: str, split_key: str
) -> bool:
    """The side of a split key: the one it was given once, else the next of its domain, written down."""
    digest = _digest(split_key)
    known = connection.execute(
        "SELECT held_out FROM split_keys WHERE pair_id = ? AND digest = ?", (pair_id, digest)
    ).fetchone()
    if known is not None:
        return bool(known[0])
    row = connection.execute(
        "SELECT split_keys FROM split_counts WHERE pair_id = ? AND domain = ?", (pair_id, domain)
    ).fetchone()
    number = 0 if row is None else int(row[0])
    held_out = is_held_out(pair, domain, number)
    connection.execute("INSERT INTO split_keys VALUES (?, ?, ?)", (pair_id, digest, held_out))
    connection.execute("INSERT OR REPLACE INTO split_counts VALUES (?, ?, ?)", (pair_id, domain, number + 1))
    return held_out


def _digest(text: str) -> int:
    """63 bits, which SQLite holds. Two keys that meet share a side, which harms nothing."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
