"""A 4-bit folder in bfloat16: the same weights, unpacked, for figures that compare the two.

Takes the folder and the name of the new one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from draftloop.backends.torch.peer import dense_tensors


def main() -> None:
    """Write the new folder."""
    folder, made = map(Path, sys.argv[1:])
    made.mkdir(parents=True)
    for path in folder.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, made / path.name)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization", "quantization_config"):
        values.pop(key, None)
    text = json.dumps(values | {"torch_dtype": "bfloat16"})
    (made / "config.json").write_text(text, encoding="utf-8")
    save_file(dense_tensors(folder), made / "model.safetensors")


if __name__ == "__main__":
    main()
