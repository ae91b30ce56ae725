"""A checkpoint comes back as it was, to the bit; a damaged one is told; a killed write leaves the old one."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from draftloop.backends.lora import Lora, LoraModule, LoraSpec
from draftloop.backends.training import TrainerState
from draftloop.errors import StorageError
from draftloop.learning.checkpoints import Checkpoint, load_checkpoint, remove_checkpoint, save_checkpoint

NAMES = ("model.layers.10.self_attn.v_proj", "model.layers.2.self_attn.q_proj")


def checkpoint(seed: int = 0, steps_done: int = 7) -> Checkpoint:
    random = np.random.default_rng(seed)

    def lora() -> Lora:
        modules = {
            name: LoraModule(
                random.standard_normal((2, 8)).astype(np.float32),
                random.standard_normal((4, 2)).astype(np.float32),
            )
            for name in NAMES
        }
        return Lora(LoraSpec(2, 3.5, ("v_proj", "q_proj")), modules)

    moments = {
        f"{name}.{side}.{kind}": random.standard_normal((2, 2)).astype(np.float32)
        for name in NAMES
        for side in "ab"
        for kind in "mv"
    }
    return Checkpoint(
        steps_done=steps_done,
        skipped_steps=1,
        trained_s=0.1,
        state=TrainerState(lora(), moments, 6),
        best=lora(),
        best_alpha=0.1 + 0.2,
        first_alpha=None,
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for name in ("steps_done", "skipped_steps", "trained_s", "best_alpha", "first_alpha"):
        assert getattr(one, name) == getattr(other, name)
    assert one.state.steps == other.state.steps
    assert one.state.moments.keys() == other.state.moments.keys()
    for name, values in one.state.moments.items():
        np.testing.assert_array_equal(values, other.state.moments[name])
    for first, second in ((one.state.lora, other.state.lora), (one.best, other.best)):
        assert first.spec == second.spec
        assert list(first.modules) == list(second.modules)
        for name, module in first.modules.items():
            np.testing.assert_array_equal(module.a, second.modules[name].a)
            np.testing.assert_array_equal(module.b, second.modules[name].b)


def test_what_was_saved_comes_back(tmp_path):
    path = tmp_path / "runs" / "0001" / "checkpoint.safetensors"
    assert load_checkpoint(path) is None
    save_checkpoint(path, checkpoint())
    assert_same(load_checkpoint(path), checkpoint())
    save_checkpoint(path, checkpoint(1, 9))
    assert_same(load_checkpoint(path), checkpoint(1, 9))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    remove_checkpoint(path)
    assert load_checkpoint(path) is None
    remove_checkpoint(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:50], lambda data: data[:-9], lambda data: b"no tensors"]
)
def test_a_damaged_file_is_told(tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError, match=r"cannot be read.*Train without --resume"):
        load_checkpoint(path)


def test_another_file_is_told(tmp_path):
    from safetensors.numpy import save

    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(save({"a": np.zeros(2, np.float32)}))
    with pytest.raises(StorageError):
        load_checkpoint(path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path / "runs" / "0001" / "checkpoint", checkpoint())


def test_a_killed_write_leaves_a_whole_checkpoint(tmp_path):
    """Whatever moment it comes at: saves go on in a loop, and the process is killed after each few."""
    path = tmp_path / "checkpoint.safetensors"
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_checkpoints import checkpoint, save_checkpoint
        for number in range(10**6):
            save_checkpoint(Path({str(path)!r}), checkpoint(number, number))
            print(number, flush=True)
    """)
    for killed_after in (1, 3, 10):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(killed_after):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        newest = int(rest[-1]) if rest else acknowledged
        found = load_checkpoint(path)
        assert found.steps_done >= newest
        assert_same(found, checkpoint(found.steps_done, found.steps_done))
