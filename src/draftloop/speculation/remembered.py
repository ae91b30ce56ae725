"""Which calibration is this machine's and this pair's, and what was measured under settings like these.

Contract: reads what `calibration.py` stored; measures nothing. Must not know settings or requests.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.models.folder import heads_digest
from draftloop.speculation.calibration import known_costs
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from draftloop.backends.base import Backend
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.speculation.calibration import ServedRounds
    from draftloop.speculation.costs import RoundCosts

USUAL = (Sampling(), Sampling(temperature=1.0, top_p=0.9))


def calibration_facts(
    backend: Backend, target_folder: Path, draft_folder: Path, vocabulary: CutVocabulary | None
) -> dict[str, str]:
    """All that the costs of rounds depend on, beside the rounds."""
    capabilities = backend.capabilities()
    return {
        "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()}",
        "backend": f"{capabilities.backend} {capabilities.version}",
        "draftloop": f"{version('draftloop')} {_code_digest()}",
        "device": capabilities.device,
        "target": heads_digest(target_folder),
        "draft": heads_digest(draft_folder),
        # Costs depend on how many rows the head has, not on which.
        "draft_vocabulary": "full" if vocabulary is None else str(len(vocabulary.ids)),
    }


def nearest_costs(served: ServedRounds, facts: Mapping[str, str]) -> RoundCosts | None:
    """As measured for these rounds, or else for rounds like them; None where none were.

    Who answers with flags of his own has measured under those, which is better than nothing;
    `RoundCosts.sampling` tells.
    """
    tried = (
        replace(served, sampling=sampling, trace=trace)
        for sampling in (served.sampling, *USUAL)
        for trace in (served.trace, not served.trace)
    )
    return next((costs for rounds in tried if (costs := known_costs(rounds, facts)) is not None), None)


def _code_digest() -> str:
    """Of the backends' sources: other kernels have other costs."""
    folder = Path(__file__).parents[1] / "backends"
    sources = sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".c", ".h", ".cu"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
