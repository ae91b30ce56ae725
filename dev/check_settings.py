"""Proves that no setting is dead: each one is read by the program.

Contract: looks for attribute chains that end in a setting's dotted key (`config.training.lora.rank`, or
`speculative.top_p` on a section) in src/draftloop outside config/. Runs nothing. `make check` calls it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from draftloop.config.schema import leaf_fields

SOURCE = Path(__file__).resolve().parent.parent / "src" / "draftloop"


def attribute_chains(source: str) -> set[str]:
    """Every dotted attribute access that is read in `source`, from its leftmost plain name on."""
    chains = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                names.append(inner.id)
            chains.add(".".join(reversed(names)))
    return chains


def read_keys(root: Path) -> set[str]:
    """The settings that some file under `root`, outside config/, reads."""
    files = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] != "config"]
    chains = {f".{chain}" for path in files for chain in attribute_chains(path.read_text(encoding="utf-8"))}
    # A key without a section is too short to be told from any other attribute: it needs its owner's name.
    endings = {key: f".{key}" if "." in key else f".config.{key}" for key in leaf_fields()}
    return {key for key, ending in endings.items() if any(chain.endswith(ending) for chain in chains)}


def problems(root: Path) -> list[str]:
    """One line for each dead setting."""
    read = read_keys(root)
    return [f"{key}: nothing reads it. Read it or remove it." for key in leaf_fields() if key not in read]


def main() -> int:
    """Print the problems; 1 if there is one."""
    lines = problems(SOURCE)
    print("\n".join(lines) or f"{len(leaf_fields())} settings: each one acts.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
