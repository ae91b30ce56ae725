"""GGUF files to 4-bit folders: weights, order of rows, config, tokenizer, and damaged files."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from draftloop.backends.architecture import Quantization, read_architecture
from draftloop.errors import ModelUnreadable
from draftloop.models.affine import AffineRows
from draftloop.models.folder import check_folder
from draftloop.models.gguf import convert_gguf, converted_bytes
from draftloop.models.gguf_config import hf_config
from draftloop.models.gguf_file import read_gguf
from draftloop.models.gguf_tokenizer import end_token_ids, write_tokenizer
from draftloop.models.progress import SilentProgress
from models_samples import HEAD_DIM, HIDDEN, LAYERS, RecordedProgress, decode, write_gguf


def converted(tmp_path, *args, **kwargs):
    sample = write_gguf(tmp_path / "tiny.gguf", *args, **kwargs)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(read_gguf(sample.path), folder, SilentProgress())
    return sample, folder


def weights_of(folder):
    """Each tensor of a converted folder as float32, quantized ones decoded."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, values in stored.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in stored and name.endswith(".weight"):
            found[name] = decode(AffineRows(values, stored[f"{module}.scales"], stored[f"{module}.biases"]))
        elif not name.endswith((".scales", ".biases")):
            found[name] = values.astype(np.float32)
    return found


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_folder_holds_the_files_weights(tmp_path, architecture):
    sample, folder = converted(tmp_path, architecture)
    found = weights_of(folder)
    assert found.keys() == sample.weights.keys()
    for name, wanted in sample.weights.items():
        error = np.linalg.norm(found[name] - wanted) / np.linalg.norm(wanted)
        exact = any(part in name for part in ("v_proj.weight", "o_proj", "down_proj", "embed"))
        assert error < (0.004 if wanted.ndim == 1 else 0.01 if exact else 0.1), name


def test_the_architecture_is_what_the_file_says(tmp_path):
    sample, folder = converted(tmp_path, "qwen2")
    architecture = check_folder(folder)
    assert architecture.quantization == Quantization(group_size=32, bits=4)
    assert (architecture.model_type, architecture.hidden_size, architecture.num_layers) == (
        "qwen2",
        HIDDEN,
        LAYERS,
    )
    assert architecture.head_dim == HEAD_DIM
    assert architecture.vocab_size == len(sample.tokens)
    assert architecture.tied_embeddings
    assert architecture.attention_bias
    assert architecture.rms_norm_eps == 1e-6
    assert architecture.eos_token_ids == (sample.tokens.index("<|im_end|>"),)
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}


def test_a_head_that_repeats_the_embedding_is_tied_and_gives_the_finer_copy(tmp_path):
    sample, folder = converted(tmp_path, "qwen2", head="same")
    assert check_folder(folder).tied_embeddings
    found = weights_of(folder)
    assert "lm_head.weight" not in found
    wanted = sample.weights["model.embed_tokens.weight"]
    assert np.linalg.norm(found["model.embed_tokens.weight"] - wanted) < 0.1 * np.linalg.norm(wanted)


def test_a_head_of_its_own_stays(tmp_path):
    sample, folder = converted(tmp_path, "qwen2", head="own")
    assert not check_folder(folder).tied_embeddings
    wanted = sample.weights["lm_head.weight"]
    assert np.linalg.norm(weights_of(folder)["lm_head.weight"] - wanted) < 0.1 * np.linalg.norm(wanted)


def test_progress_reaches_its_total(tmp_path):
    sample = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "folder").mkdir()
    progress = RecordedProgress()
    convert_gguf(read_gguf(sample.path), tmp_path / "folder", progress)
    (task,) = progress.tasks
    assert task.done_bytes == task.total_bytes > 0


def test_the_size_is_known_before(tmp_path):
    sample, folder = converted(tmp_path, "llama")
    actual = (folder / "model.safetensors").stat().st_size
    assert 0.8 * actual < converted_bytes(read_gguf(sample.path)) <= actual


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_text_survives_the_tokenizer(tmp_path, architecture):
    sample, folder = converted(tmp_path, architecture)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("hello hello\n\n\tdef f(x):  return x", "日本語 🙂👩‍👧 ünï", "it's 1212"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("hello hello").tokens == ["hello", "Ġhello"]
    assert tokenizer.encode("12").tokens == ["1", "2"], "digits stay apart although a merge joins them"
    start = sample.tokens.index("<|im_start|>")
    assert tokenizer.encode("<|im_start|>he").ids == [start, sample.tokens.index("he")]
    assert len(tokenizer.encode("<tool_call>").ids) == 1
    assert tokenizer.token_to_id("[PAD0]") is None


def test_transformers_opens_the_tokenizer_with_its_template(tmp_path):
    from transformers import AutoTokenizer

    _, folder = converted(tmp_path, "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"
    direct = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in ("hello, it's 12\r\n  x", "Ünï 🙂", text):
        assert tokenizer.encode(sample, add_special_tokens=False) == direct.encode(sample).ids


def test_every_token_that_ends_an_answer_is_named(tmp_path):
    sample, folder = converted(tmp_path, "qwen2")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [sample.tokens.index("<|im_end|>"), sample.tokens.index("<|endoftext|>")]
    assert end_token_ids({"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 7}) == [7]


SENTENCEPIECE = {
    "general.architecture": "llama",
    "llama.context_length": 128,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        *("<unk>", "<s>", "</s>"),
        *(f"<0x{i:02X}>" for i in range(256)),
        *("▁", "h", "i", "hi", "▁hi", "▁h"),
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes(tmp_path):
    write_tokenizer(SENTENCEPIECE, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hi hi").tokens == ["<s>", "▁hi", "▁hi"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("hi é 🙂", "  hi\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd", "tokenizer.ggml.merges": []}, "'odd'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x y"]}, "'x y'"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "tokenizer"),
        ({"tokenizer.ggml.scores": None}, "tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused(tmp_path, change, message):
    with pytest.raises(ModelUnreadable, match=message):
        write_tokenizer(SENTENCEPIECE | change, tmp_path)
    assert not list(tmp_path.iterdir())


METADATA = SENTENCEPIECE | {
    "llama.attention.head_count": 4,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.block_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
}


def llama3_factors(factor):
    """What llama.cpp's converter writes into rope_freqs.weight for a head of 64 and Llama 3's bounds."""
    values = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 64)
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


def test_llama3_scaling_is_recognised_from_its_factors():
    config = hf_config(METADATA, [], tied=True, rope_factors=llama3_factors(32.0))
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 32.0
    with pytest.raises(ModelUnreadable, match="rope_freqs"):
        hf_config(METADATA, [], tied=True, rope_factors=llama3_factors(32.0)[::-1].copy())


def test_a_sliding_window_limits_the_context(tmp_path):
    config = hf_config(METADATA | {"llama.attention.sliding_window": 32}, [], tied=True, rope_factors=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path).max_position_tokens == 32


def test_a_tensor_of_three_dimensions_is_refused_by_name(tmp_path):
    gguf_file = read_gguf(write_gguf(tmp_path / "tiny.gguf").path)
    name = "blk.0.ffn_up.weight"
    experts = dataclasses.replace(gguf_file.tensors[name], shape=(2, 128, 64))
    gguf_file = dataclasses.replace(gguf_file, tensors={**gguf_file.tensors, name: experts})
    assert converted_bytes(gguf_file) > 0
    with pytest.raises(ModelUnreadable, match=r"ffn_up\.weight has 3 dimensions"):
        convert_gguf(gguf_file, tmp_path, SilentProgress())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.attention.sliding_window": "wide"}, "misstates"),
        ({"general.architecture": "mamba"}, "mamba"),
        ({"llama.expert_count": 8}, "mixture"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.attention.head_count": 0}, "misstates"),
    ],
)
def test_a_model_that_no_backend_runs_is_refused(change, message):
    with pytest.raises(ModelUnreadable, match=message):
        hf_config(METADATA | change, [], tied=True, rope_factors=None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("damage") / "tiny.gguf").path


HEAD_BYTES = 6000
"""Less than the head of the tiny file takes."""

PAST_THE_FILE = (2**64 - 1, 2**63, 2**62, 2**32)


def damaged(path, position, replacement):
    """A copy of `path` with `replacement` written over what lies at `position`."""
    data = bytearray(path.read_bytes())
    data[position : position + len(replacement)] = replacement
    copy = path.with_name("damaged.gguf")
    copy.write_bytes(data)
    return copy


def test_a_truncated_file_is_refused_wherever_it_ends(tiny):
    data = tiny.read_bytes()
    copy = tiny.with_name("short.gguf")
    for size in (*range(0, HEAD_BYTES, 64), *range(HEAD_BYTES, len(data), 9973), len(data) - 1):
        copy.write_bytes(data[:size])
        with pytest.raises(ModelUnreadable, match=r"short\.gguf is (truncated|not a GGUF file)"):
            converted_bytes(read_gguf(copy))


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(4, HEAD_BYTES),
    replacement=st.binary(min_size=1, max_size=8)
    | st.sampled_from(PAST_THE_FILE).map(lambda length: length.to_bytes(8, "little")),
)
def test_damage_anywhere_in_the_head_is_refused_or_harmless(tiny, position, replacement):
    with suppress(ModelUnreadable):
        assert converted_bytes(read_gguf(damaged(tiny, position, replacement))) > 0


@pytest.mark.parametrize("length", PAST_THE_FILE)
@pytest.mark.parametrize(
    ("key", "before_length"),
    [
        ("tokenizer.ggml.token_type", b"\x09\0\0\0" + b"\0\0\0\0"),  # an array of bytes
        ("tokenizer.ggml.tokens", b"\x09\0\0\0" + b"\x08\0\0\0"),  # an array of strings
        ("tokenizer.ggml.pre", b"\x08\0\0\0"),  # a string
    ],
)
def test_a_length_that_points_past_the_end_is_refused(tiny, key, before_length, length):
    position = tiny.read_bytes().index(key.encode()) + len(key)
    with pytest.raises(ModelUnreadable, match="corrupt"):
        converted_bytes(read_gguf(damaged(tiny, position, before_length + length.to_bytes(8, "little"))))


def test_a_tensor_whose_place_overflows_is_refused(tiny):
    name = b"output_norm.weight"
    position = tiny.read_bytes().index(name) + len(name) + 4 + 8 + 4
    with pytest.raises(ModelUnreadable, match="corrupt"):
        converted_bytes(read_gguf(damaged(tiny, position, (2**64 - 32).to_bytes(8, "little"))))


def test_a_key_that_is_there_twice_is_refused(tiny):
    position = tiny.read_bytes().index(b"qwen2.context_length")
    with pytest.raises(ModelUnreadable, match=r"general\.architecture"):
        converted_bytes(read_gguf(damaged(tiny, position, b"general.architecture")))


def test_a_head_of_endless_values_is_refused_before_it_fills_the_memory(tiny, monkeypatch):
    monkeypatch.setattr("draftloop.models.gguf_file._MAX_VALUES", 100)
    with pytest.raises(ModelUnreadable, match="more than 100 values"):
        converted_bytes(read_gguf(tiny))


@pytest.mark.parametrize(("version", "message"), [(9, "version 9"), (3 << 24, "corrupt")])
def test_another_version_is_refused(tiny, version, message):
    with pytest.raises(ModelUnreadable, match=message):
        converted_bytes(read_gguf(damaged(tiny, 4, version.to_bytes(4, "little"))))


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(str(path), "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnreadable, match="big-endian"):
        converted_bytes(read_gguf(path))


def test_an_unknown_tensor_type_is_refused(tiny):
    name = b"output_norm.weight"
    position = tiny.read_bytes().index(name) + len(name) + 4 + 8
    with pytest.raises(ModelUnreadable, match="999"):
        converted_bytes(read_gguf(damaged(tiny, position, (999).to_bytes(4, "little"))))


def test_another_alignment_gives_the_same_weights(tmp_path):
    _, wide = converted(tmp_path, alignment=256)
    (tmp_path / "usual").mkdir()
    _, usual = converted(tmp_path / "usual")
    wanted = weights_of(usual)
    for name, values in weights_of(wide).items():
        np.testing.assert_array_equal(values, wanted[name])


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    sample = write_gguf(tmp_path / "tiny.gguf")
    data = sample.path.read_bytes()
    damaged = data[:-144] + b"\xff\x7f" + data[-142:]
    sample.path.write_bytes(damaged)
    with pytest.raises(ModelUnreadable, match=r"blk\.1\.ffn_down"):
        convert_gguf(read_gguf(sample.path), tmp_path, SilentProgress())
