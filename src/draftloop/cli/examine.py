"""What `doctor` finds out about this machine, as plain facts.

Contract: every function gives a JSON-able dict and downloads nothing; what is missing is a fact,
not an error. Must not know how facts are shown.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftloop.cli.cost_table import cost_figures
from draftloop.cli.memory_table import memory_figures
from draftloop.errors import DraftloopError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.config import Config
    from draftloop.loading import Prepared
    from draftloop.speculation.costs import RoundCosts

COMMAND_TIMEOUT_S = 5
HUB_TIMEOUT_S = 3

Facts = dict[str, Any]


def machine_facts() -> Facts:
    """System, processor, memory and GPU."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "threads": psutil.cpu_count() or 1,
        "memory_bytes": int(memory.total),
        "memory_available_bytes": int(memory.available),
        "gpu": _gpu_name(),
    }


def version_facts(packages: Sequence[str]) -> dict[str, str]:
    """Versions of this program, of Python, and of those `packages` that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"draftloop": version("draftloop"), "Python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def backend_facts(config: Config) -> Facts:
    """The backend that the settings choose, why, and the state of each one."""
    from draftloop.backends.registry import BACKENDS, choose_backend, is_apple_silicon

    automatic = config.backend == "auto"
    chosen = choose_backend() if automatic else config.backend
    why = f"backend: {chosen} in the settings"
    if automatic:
        why = f"backend: auto, and this machine has {'an' if is_apple_silicon() else 'no'} Apple chip"
    return {
        "chosen": chosen,
        "why": why,
        "all": {name: _backend_state(name, config.device) for name in BACKENDS},
    }


def hub_facts() -> Facts:
    """Whether the Hub answers, within a few seconds; `HF_HUB_OFFLINE` is respected."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return {"reachable": False, "detail": "switched off by HF_HUB_OFFLINE"}
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S):  # noqa: S310
            return {"reachable": True, "detail": constants.ENDPOINT}
    except HTTPError as error:
        return {"reachable": error.code < 500, "detail": f"{constants.ENDPOINT} answers {error.code}"}
    except (OSError, ValueError) as error:
        return {"reachable": False, "detail": f"{constants.ENDPOINT}: {getattr(error, 'reason', error)}"}


def storage_facts() -> Facts:
    """Where models are kept, and how much room there is."""
    from huggingface_hub import constants

    from draftloop.folders import cache_root

    root = cache_root()
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    return {
        "cache": str(root),
        "hub_cache": str(Path(constants.HF_HUB_CACHE)),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def model_facts(config: Config) -> Facts:
    """Whether each model of the settings is here, or what it takes to get it."""
    from draftloop.models.resolve import exists

    facts: Facts = {}
    for role, name in (("target", config.models.target.name), ("draft", config.models.draft.name)):
        try:
            facts[role] = {"name": name, "availability": exists(name).value, "error": None}
        except DraftloopError as error:
            facts[role] = {"name": name, "availability": None, "error": str(error)}
    return facts


def pair_facts(config: Config) -> Facts:
    """For a pair that is here: whether it fits together, the memory plan, and what its rounds cost."""
    from draftloop.loading import prepare

    try:
        prepared = prepare(config)
    except DraftloopError as error:
        return {"memory": None, "costs": None, "error": str(error)}
    costs = _costs_known(config, prepared)
    figures = None if costs is None else cost_figures(costs, config.speculative.num_draft_tokens)
    facts: Facts = {"memory": memory_figures(prepared.plan), "costs": figures, "error": None}
    try:
        prepared.plan.check_generation()
    except DraftloopError as error:
        facts["error"] = str(error)
    return facts


def _costs_known(config: Config, prepared: Prepared) -> RoundCosts | None:
    """What rounds cost; what is stored decides how much of the draft's head is used."""
    from draftloop.loading import costs_known, open_storage

    try:
        with open_storage(config, read_only=True) as store:
            return costs_known(config, prepared, store)
    except StorageError:
        return costs_known(config, prepared, None)


def problems_of(facts: Facts) -> list[str]:
    """What keeps the pair from answering, each with its remedy."""
    problems = []
    chosen = facts["backends"]["all"][facts["backends"]["chosen"]]
    if chosen["error"]:
        problems.append(chosen["error"])
    problems += [model["error"] for model in facts["models"].values() if model["error"]]
    pair = facts["pair"]
    if pair is not None and pair["error"] and pair["error"] not in problems:
        problems.append(pair["error"])
    return problems


def _backend_state(name: str, device: str) -> Facts:
    from draftloop.backends.registry import open_backend

    nothing = {"usable": False, "version": None, "device": None}
    try:
        found = open_backend(name, device).capabilities()
    except DraftloopError as error:
        return {**nothing, "error": str(error)}
    except (ImportError, OSError, RuntimeError) as error:
        # A framework built for another machine fails in its own way while it is imported.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return {**nothing, "error": f"backend {name!r} fails: {reason}"}
    return {"usable": True, "version": found.version, "device": found.device, "error": None}


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu_name() -> str | None:
    from draftloop.backends.registry import is_apple_silicon

    if is_apple_silicon():
        return "Apple GPU, shares the machine's memory"
    listed = _output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return "; ".join(listed.splitlines()) if listed else None


def _output_of(program: str, *arguments: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        result = subprocess.run(
            [path, *arguments], capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
