"""The versions of the draft's cut head: they last though the answers that taught them make room for others.

Contract: one version for each pair and each wish, the newest. Must not know how tokens are chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from draftloop.storage.records import VocabularyVersion
from draftloop.storage.rows import PAIR_ID, ensure_pair, names, reading

if TYPE_CHECKING:
    from draftloop.storage.database import Database
    from draftloop.storage.records import PairKey


class Vocabularies:
    """The vocabulary versions of a store.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def answer_tokens(self, pair: PairKey) -> int:
        """Tokens of all the answers that were ever stored for a pair, those that made room included."""
        query = "SELECT answer_tokens FROM pairs WHERE target = ? AND draft = ?"
        with self._database.read() as connection:
            row = connection.execute(query, names(pair)).fetchone()
        return 0 if row is None else int(row[0])

    def recall(self, pair: PairKey, wanted: str) -> VocabularyVersion | None:
        """The version that was remembered for this pair and wish; None where there is none.

        Raises:
            StorageError: it is damaged.
        """
        query = f"SELECT answer_tokens, ids FROM vocabulary_versions WHERE pair_id = {PAIR_ID} AND wanted = ?"  # noqa: S608
        with self._database.read() as connection:
            row = connection.execute(query, (*names(pair), wanted)).fetchone()
        if row is None:
            return None
        with reading("the draft's vocabulary", "It is chosen anew."):
            return VocabularyVersion(int(row[0]), np.frombuffer(row[1], "<i4").astype(np.int32))

    def remember(self, pair: PairKey, wanted: str, version: VocabularyVersion) -> None:
        """Put a version in the place of the one before.

        Args:
            pair: whose.
            wanted: tells one wish from another: the setting, and all else that decides.
            version: what was chosen.

        Raises:
            StorageError: it cannot be written.
        """
        with self._database.write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO vocabulary_versions VALUES (?, ?, ?, ?)",
                (
                    ensure_pair(connection, pair),
                    wanted,
                    version.answer_tokens,
                    version.ids.astype("<i4").tobytes(),
                ),
            )
