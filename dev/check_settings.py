"""Proves that no setting is dead: each one is read by the program, or marked with the command it waits for.

Contract: looks for attribute chains that end in a setting's dotted key (`config.training.lora.rank`, or
`speculative.top_p` on a section) in src/draftloop outside config/. Runs nothing. `make check` calls it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from draftloop.config.schema import acts_in, leaf_fields

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
    """One line for each dead setting and each stale mark."""
    read = read_keys(root)
    lines = []
    for key, field in leaf_fields().items():
        waits_for = acts_in(field)
        if key not in read and waits_for is None:
            lines.append(
                f"{key}: nothing reads it. Read it, or mark it with the command in which it will act."
            )
        elif key in read and waits_for is not None:
            lines.append(f"{key}: it is read, so the mark acts_in={waits_for} is stale. Remove the mark.")
    return lines


def main() -> int:
    """Print the problems; 1 if there is one."""
    lines = problems(SOURCE)
    print("\n".join(lines) or f"{len(leaf_fields())} settings: each acts, or says where it will.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
