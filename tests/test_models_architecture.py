"""config.json: what is not what it should be is refused by name, whatever it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.backends.architecture import read_architecture, tensor_shapes
from draftloop.errors import ModelUnreadable

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "sliding_window": None,
    "hidden_act": "silu",
    "quantization": {"group_size": 32, "bits": 4},
    "quantization_config": None,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def read(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return read_architecture(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": 4}, "quantization: 4 is no JSON object"),
        ({"quantization": None, "quantization_config": "x"}, "quantization_config: 'x' is no JSON object"),
        ({"rope_scaling": "x"}, "rope_scaling: 'x' is no JSON object"),
        ({"rope_parameters": [1]}, r"rope_parameters: \[1\] is no JSON object"),
        ({"hidden_size": float("inf")}, "infinity"),
        ({"hidden_size": None}, "lacks or misstates"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000"),
        ({"num_attention_heads": -4}, "num_attention_heads: -4"),
        ({"num_attention_heads": 0}, "lacks or misstates"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 for 4 heads"),
        ({"eos_token_id": ["x"]}, "lacks or misstates"),
        ({"eos_token_id": {}}, "lacks or misstates"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_act": ["silu"]}, "is not supported"),
        ({"model_type": "mamba"}, "'mamba' is not supported"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_file(tmp_path, changes, message):
    with pytest.raises(ModelUnreadable, match=rf"config\.json.*{message}"):
        read(tmp_path, **changes)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "{", "\x00"])
def test_a_config_that_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnreadable, match=r"config\.json"):
        read_architecture(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*CONFIG, "type"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(list(CONFIG)), value=JSON)
def test_any_value_under_any_key_is_read_or_refused(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    try:
        architecture = read(folder, **{key: value})
    except ModelUnreadable:
        return
    assert min(min(shape) for shape in tensor_shapes(architecture).values()) > 0


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_both_names_of_the_activation_are_known(tmp_path, name):
    assert read(tmp_path, hidden_act=name).num_layers == 2


def test_every_tensor_has_its_shape(tmp_path):
    shapes = tensor_shapes(read(tmp_path, attention_bias=True, num_hidden_layers=1))
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (96, 64)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (32,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 128)
    assert len(shapes) == 3 + 2 + 7 + 3
    tied = tensor_shapes(read(tmp_path, model_type="qwen3", tie_word_embeddings=True))
    assert "lm_head.weight" not in tied
    assert tied["model.layers.1.self_attn.q_norm.weight"] == (16,)
