"""Adapters on disk: PEFT reads ours, we read PEFT's, a kill leaves nothing half, damage is named."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.errors import DraftloopError, ModelUnreadable, StorageError
from draftloop.models.adapter_files import CONFIG_FILE, FACTS_FILE, TENSORS_FILE, read_adapter, write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = [72, 101, 108, 108, 111, 32, 40, 41, 42]
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def learnt(folder: Path, spec: LoraSpec, seed: int = 0) -> Lora:
    """A LoRA for the model in `folder` that changes what it computes."""
    lora = new_lora(read_architecture(folder), spec, seed)
    random = np.random.default_rng(seed)
    return Lora(
        spec,
        {
            name: LoraModule(one.a, random.normal(0, 0.05, one.b.shape).astype(np.float32))
            for name, one in lora.modules.items()
        },
    )


@pytest.fixture
def small() -> Lora:
    spec = LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj",))
    name = "model.layers.0.self_attn.q_proj"
    return Lora(spec, {name: LoraModule(np.ones((2, 6), np.float32), np.full((8, 2), 0.5, np.float32))})


def assert_same(found: Lora, expected: Lora) -> None:
    assert found.spec == expected.spec
    assert list(found.modules) == list(expected.modules)
    for name, module in expected.modules.items():
        np.testing.assert_array_equal(found.modules[name].a, module.a)
        np.testing.assert_array_equal(found.modules[name].b, module.b)
        assert found.modules[name].a.dtype == found.modules[name].b.dtype == np.float32


def write(folder: Path, lora: Lora, **facts: Any) -> None:
    write_adapter(folder, lora, base_model="toys/draft", facts=facts)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ALL_MODULES])
def test_what_was_written_is_read(tmp_path, toy_folder, modules):
    lora = learnt(toy_folder(num_layers=11), LoraSpec(rank=3, alpha=4.5, target_modules=modules))
    write(tmp_path / "adapters" / "a0001", lora, parent="a0000", steps=12)
    assert_same(read_adapter(tmp_path / "adapters" / "a0001"), lora)
    facts = json.loads((tmp_path / "adapters" / "a0001" / FACTS_FILE).read_text(encoding="utf-8"))
    assert facts == {"parent": "a0000", "steps": 12}


def test_the_layout_is_pefts(tmp_path, small):
    write(tmp_path / "a0001", small)
    config = json.loads((tmp_path / "a0001" / CONFIG_FILE).read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "toys/draft"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj"])
    shapes = {name: value.shape for name, value in load_file(tmp_path / "a0001" / TENSORS_FILE).items()}
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert shapes == {f"{prefix}.lora_A.weight": (2, 6), f"{prefix}.lora_B.weight": (8, 2)}


def test_a_folder_that_nobody_knows_is_replaced(tmp_path, small):
    write(tmp_path / "a0001", small, run=1)
    (tmp_path / "a0001" / "stray").touch()
    write(tmp_path / "a0001", small, run=2)
    names = {entry.name for entry in (tmp_path / "a0001").iterdir()}
    assert names == {CONFIG_FILE, TENSORS_FILE, FACTS_FILE}
    assert json.loads((tmp_path / "a0001" / FACTS_FILE).read_text(encoding="utf-8")) == {"run": 2}
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["a0001"]


def killed_at(event: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that dies by SIGKILL before its `event`-th file operation; whether it died."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(name: str, _: tuple[Any, ...]) -> None:
            nonlocal seen
            if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir"):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_leaves_an_adapter_whole_or_absent(tmp_path, small, replacing):
    old = Lora(small.spec, {name: LoraModule(one.a * 2, one.b) for name, one in small.modules.items()})
    outcomes = []
    for event in range(1, 200):
        folder = tmp_path / str(event) / "a0001"
        if replacing:
            write(folder, old)
        died = killed_at(event, lambda folder=folder: write(folder, small))
        if folder.exists():
            found = read_adapter(folder)
            outcomes.append("new" if found.modules.popitem()[1].a[0, 0] == 1 else "old")
        else:
            outcomes.append("absent")
        write(folder, small)
        assert_same(read_adapter(folder), small)
        assert [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] == ["a0001"]
        if not died:
            break
    assert not died
    assert len(outcomes) > 10
    assert outcomes[-1] == "new"
    assert "old" in outcomes if replacing else "absent" in outcomes


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, small, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"full.*storage\.directory"):
        write(tmp_path / "a0001", small)
    assert not any(entry.is_dir() for entry in tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path, small):
    (tmp_path / "adapters").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"storage\.directory"):
        write(tmp_path / "adapters" / "a0001", small)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("r", None),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("lora_alpha", 1e999),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, small, key, value):
    write(tmp_path / "a", small)
    path = tmp_path / "a" / CONFIG_FILE
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8"
    )
    with pytest.raises(ModelUnreadable, match=key):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_config_is_named(tmp_path, small, content):
    write(tmp_path / "a", small)
    (tmp_path / "a" / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ModelUnreadable, match=CONFIG_FILE):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_missing_file_is_named(tmp_path, small, name):
    write(tmp_path / "a", small)
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ModelUnreadable, match=f"{name} is missing"):
        read_adapter(tmp_path / "a")


def test_a_file_cut_anywhere_is_refused(tmp_path, small):
    write(tmp_path / "a", small)
    path = tmp_path / "a" / TENSORS_FILE
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelUnreadable, match=TENSORS_FILE):
            read_adapter(tmp_path / "a")


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{PREFIX}.lora_A.weight": None}, "lacks one of A and B"),
        ({f"{PREFIX}.lora_A.weight": np.ones((3, 6), np.float32)}, "r = 2"),
        ({f"{PREFIX}.lora_B.weight": np.ones((8, 3), np.float32)}, "r = 2"),
        ({f"{PREFIX}.lora_B.weight": np.ones(2, np.float32)}, "r = 2"),
        ({f"{PREFIX}.lora_B.weight": np.ones((8, 2), np.int32)}, "I32"),
        ({f"{PREFIX}.lora_B.weight": np.full((8, 2), np.nan, np.float32)}, "no number"),
        ({"base_model.model.lm_head.weight": np.ones((4, 4), np.float32)}, "no LoRA of a linear module"),
        ({f"{PREFIX}.lora_A.weight": None, f"{PREFIX}.lora_B.weight": None}, "no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, small, change, told):
    write(tmp_path / "a", small)
    path = tmp_path / "a" / TENSORS_FILE
    tensors = {**load_file(path), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(ModelUnreadable, match=told):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_become_float32(tmp_path, small, dtype):
    write(tmp_path / "a", small)
    path = tmp_path / "a" / TENSORS_FILE
    save_file({name: value.astype(dtype) for name, value in load_file(path).items()}, path)
    assert_same(read_adapter(tmp_path / "a"), small)


def test_every_error_says_what_to_do(tmp_path):
    with pytest.raises(DraftloopError) as caught:
        read_adapter(tmp_path / "nowhere")
    assert caught.value.exit_status == 2
    assert "adapters revert" in caught.value.remedy


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def hugging_face_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


def our_logits(folder: Path, lora: Lora | None) -> np.ndarray:
    model = NumpyBackend().load(folder, max_kv_cache_tokens=64)
    model.set_adapter(lora, AdapterForm.UNFUSED)
    return model.logits(model.new_cache(), TOKENS)


def base_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"model_type": "qwen2", "tied": True}])
def test_peft_computes_what_we_compute_with_our_adapter(peft, tmp_path, toy_folder, options):
    folder = toy_folder(**options)
    lora = learnt(folder, LoraSpec(rank=4, alpha=10.0, target_modules=("q_proj", "v_proj", "down_proj")))
    write(tmp_path / "a0001", lora)
    ours = our_logits(folder, lora)
    assert np.abs(ours - our_logits(folder, None)).max() > 0.1
    theirs = hugging_face_logits(peft.PeftModel.from_pretrained(base_model(folder), tmp_path / "a0001"))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize(
    ("target_modules", "dtype"),
    [(["v_proj", "gate_proj"], "float32"), (r".*\.(v|gate)_proj", "float32"), (["v_proj"], "bfloat16")],
)
def test_we_compute_what_peft_computes_with_its_adapter(peft, tmp_path, toy_folder, target_modules, dtype):
    import torch

    folder = toy_folder()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base_model(folder), config)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            # Rounded here as in the file, so that both compute with the same numbers.
            value.data = (0.5 * value.data).to(getattr(torch, dtype)).float()
    theirs = hugging_face_logits(model)
    if dtype != "float32":
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.data = value.data.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    lora = read_adapter(tmp_path / "theirs")
    kinds = ("v_proj",) if dtype == "bfloat16" else ("v_proj", "gate_proj")
    assert lora.spec == LoraSpec(rank=4, alpha=6.0, target_modules=kinds)
    assert np.abs(theirs - our_logits(folder, None)).max() > 0.1
    np.testing.assert_allclose(our_logits(folder, lora), theirs, atol=2e-4)


@pytest.mark.parametrize("option", ["use_rslora", "use_dora"])
def test_pefts_other_kinds_are_refused(peft, tmp_path, toy_folder, option):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{option: True})
    peft.get_peft_model(base_model(toy_folder()), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelUnreadable, match=option):
        read_adapter(tmp_path / "theirs")
