"""Folders that are not whole: each names its file or tensor."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from draftloop.errors import ModelUnreadable
from draftloop.models.folder import check_folder, expected_tensors, folder_bytes
from draftloop.models.gguf import convert_gguf
from draftloop.models.gguf_file import read_gguf
from draftloop.models.progress import SilentProgress
from draftloop.models.safetensors_file import SafetensorsWriter, TensorSpec, read_head
from models_samples import write_gguf

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    sample = write_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "folder"
    path.mkdir()
    convert_gguf(read_gguf(sample.path), path, SilentProgress())
    return path


def rewrite(folder, change):
    """Change the tensors of the folder's only file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def split(folder):
    """Spread the tensors over two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_a_whole_folder_passes_in_one_file_and_in_two(folder):
    alone = check_folder(folder)
    split(folder)
    assert check_folder(folder) == alone
    assert folder_bytes(folder) > 100_000


def test_a_dense_folder_passes(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnreadable, match="has the shape"):
        check_folder(folder)
    shapes = {name: spec.shape for name, spec in expected_tensors_of(folder).items()}
    for dtype in (np.float32, np.float16):
        save_file({name: np.zeros(shape, dtype) for name, shape in shapes.items()}, folder / WEIGHTS)
        assert check_folder(folder).quantization is None


def expected_tensors_of(folder):
    from draftloop.backends.architecture import read_architecture

    return expected_tensors(read_architecture(folder))


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(ModelUnreadable, match="cannot be read"):
        check_folder(tmp_path / "none")
    with pytest.raises(ModelUnreadable, match="is empty"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelUnreadable, match=r"has no (config\.json|tokenizer\.json|\*\.safetensors)"):
        check_folder(folder)


def test_a_missing_shard_is_named(folder):
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnreadable, match=r"model-00002-of-00002\.safetensors is missing"):
        check_folder(folder)


def test_a_dangling_link_counts_as_missing(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")
    with pytest.raises(ModelUnreadable, match=r"model\.safetensors is missing"):
        check_folder(folder)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.9999])
def test_a_truncated_shard_is_named(folder, share):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelUnreadable, match=r"model\.safetensors"):
        check_folder(folder)


@pytest.mark.parametrize(
    "head",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
        b"\xff\xff",
        b"[" * 99999,
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
    ],
)
def test_a_damaged_head_is_refused(tmp_path, head):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"0000")
    with pytest.raises(ModelUnreadable, match=r"a\.safetensors"):
        read_head(path)


def test_a_pointer_instead_of_the_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n")
    with pytest.raises(ModelUnreadable, match="no safetensors file"):
        read_head(path)


def test_an_index_that_cannot_be_read_or_kept(folder):
    split(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelUnreadable, match=r"lacks model\.extra\.weight"):
        check_folder(folder)
    (folder / INDEX).write_text('{"weight_map": [')
    with pytest.raises(ModelUnreadable, match=r"index\.json cannot be read"):
        check_folder(folder)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.scales"), rf"lacks the tensor {Q}\.scales"),
        (lambda t: t.pop(f"{Q}.bias"), rf"lacks the tensor {Q}\.bias"),
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
        (
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][1:]}),
            r"has the shape \[63, 8\] instead of \[64, 8\]",
        ),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].astype(np.int32)}), "has the type I32"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.zeros(4)}),
            r"holds model\.layers\.0\.mlp\.up_proj\.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ModelUnreadable, match=message):
        check_folder(folder)


def test_what_needs_not_be_loaded_is_ignored(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8), "lm_head.weight": np.zeros((2, 2))}
        ),
    )
    assert check_folder(folder).tied_embeddings


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    specs = {"a": TensorSpec("F32", (2,)), "b": TensorSpec("F32", (1,))}
    values = np.zeros(2, np.float32)
    with (
        pytest.raises(ValueError, match="b was never written"),
        SafetensorsWriter(tmp_path / "x", specs) as writer,
    ):
        writer.write("a", values)
    for name, wrong in (("b", values), ("a", values[:1]), ("a", values.astype(np.float64))):
        with pytest.raises(ValueError, match=name), SafetensorsWriter(tmp_path / "x", specs) as writer:
            writer.write(name, wrong)
