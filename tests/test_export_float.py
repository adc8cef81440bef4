"""Export of dequantized weights: files that other libraries read, and whole models in reverse."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf as tiny
from safetensors import safe_open
from safetensors.numpy import load_file

import jax_anyprec as ap
from jax_anyprec.export_float import save_dequantized
from jax_anyprec.gguf import GGUFFile
from jax_anyprec.models import load_gguf
from jax_anyprec.models.architectures import load_huggingface
from jax_anyprec.models.export import export_huggingface, weight_table
from jax_anyprec.safetensors import Tensor

FOLDERS = sorted((Path(__file__).parent / "data" / "huggingface").glob("*/config.json"))


def random_packed(*shape: int, seed: int = 0) -> ap.QuantizedTensor:
    rng = np.random.default_rng(seed)
    *leading, k, n = shape
    codes = rng.integers(0, 16, (*leading, n, k), dtype=np.uint8)
    scales, offsets = rng.uniform(-1, 1, (2, *leading, n, k // 32)).astype(np.float32)
    return ap.QuantizedTensor.from_codes(codes, np.abs(scales), offsets, bits=4)


def test_what_is_written_is_read_by_the_library(tmp_path):
    w = random_packed(2, 64, 5)
    norm = np.linspace(-1, 1, 7, dtype=np.float32)
    path = tmp_path / "model.safetensors"
    save_dequantized(path, {"w": w, "norm": norm, "prepared": w.prepare(), "jax": jnp.ones(3)})
    expected = np.asarray(w.dequantize()).swapaxes(1, 2)
    tensors = load_file(path)
    assert {name: t.dtype.name for name, t in tensors.items()} == dict.fromkeys(tensors, "float32")
    np.testing.assert_array_equal(tensors["w"], expected)
    np.testing.assert_array_equal(tensors["prepared"], expected)
    np.testing.assert_array_equal(tensors["norm"], norm)
    np.testing.assert_array_equal(tensors["jax"], np.ones(3))
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path, dtype):
    w = random_packed(64, 5)
    path = tmp_path / "w.safetensors"
    save_dequantized(path, [("w", w), ("b", np.ones(3, np.float64))], dtype=dtype)
    tensors = load_file(path)
    assert tensors["w"].dtype == tensors["b"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensors["w"], np.asarray(w.dequantize()).T.astype(dtype))


def test_rotated_weights_are_turned_back(tmp_path):
    rotation = ap.Rotation.for_size(64)
    w = dataclasses.replace(random_packed(64, 3), rotation=rotation)
    save_dequantized(tmp_path / "w.safetensors", {"w": w})
    plain = np.asarray(dataclasses.replace(w, rotation=None).dequantize())
    turned = load_file(tmp_path / "w.safetensors")["w"]
    assert np.abs(turned - plain.T).max() > 1
    np.testing.assert_allclose(rotation.apply(turned), plain.T, rtol=0, atol=1e-5)


def test_one_tensor_at_a_time(tmp_path):
    size = 2**20
    tensors = {
        str(i): Tensor((size,), np.dtype(np.float32), lambda i=i: np.full(size, i, np.float32))
        for i in range(8)
    }
    path = tmp_path / "w.safetensors"
    tracemalloc.start()
    save_dequantized(path, tensors, dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * size
    assert {name: t[0] for name, t in load_file(path).items()} == {str(i): i for i in range(8)}


def test_a_file_is_replaced_only_when_all_is_written(tmp_path):
    path = tmp_path / "w.safetensors"
    save_dequantized(path, {"w": np.ones(3, np.float32)})
    large = {"v": np.ones(3, np.float32), "w": np.full(3, 1e6, np.float32)}
    with pytest.raises(ValueError, match="w has values that float16 can't hold; use float32 or"):
        save_dequantized(path, large, dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert load_file(path)["w"].tolist() == [1, 1, 1]
    save_dequantized(path, {"w": np.array([np.inf, np.nan], np.float32)}, dtype="float16")
    np.testing.assert_array_equal(load_file(path)["w"], [np.inf, np.nan])


def test_what_is_refused(tmp_path):
    path, ones = tmp_path / "w.safetensors", np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"dtype must be one of float32, float16, bfl.*got int8"):
        save_dequantized(path, {"w": ones}, dtype="int8")
    with pytest.raises(TypeError, match=r"tensors\['w'\] must be of floats or packed, got int64"):
        save_dequantized(path, {"w": np.arange(3)})
    with pytest.raises(ValueError, match="tensors must have each name once, got 'w' twice"):
        save_dequantized(path, [("w", ones), ("w", ones)])
    with pytest.raises(TypeError, match="names of tensors must be strings, got 1"):
        save_dequantized(path, {1: ones})
    with pytest.raises(ValueError, match="no tensor can be stored as '__metadata__'"):
        save_dequantized(path, {"__metadata__": ones})
    assert not path.exists()


# Models.


@pytest.mark.parametrize("folder", [p.parent for p in FOLDERS], ids=lambda p: p.name)
def test_folders_come_back_as_they_were(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    export_huggingface(
        tmp_path / "m", load_huggingface(folder, dtype=jnp.float32), config=config | {"a": 1}
    )
    original = load_file(folder / "model.safetensors")
    exported = load_file(tmp_path / "m" / "model.safetensors")
    if folder.name == "bert":  # saved without its head, and then names have no prefix
        original = {f"bert.{name}": value for name, value in original.items()}
    assert set(exported) == set(original)
    for name, value in exported.items():
        np.testing.assert_array_equal(value, original[name].astype(np.float32), err_msg=name)
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written == config | {"a": 1, "dtype": "float32"}
    assert load_huggingface(tmp_path / "m", dtype=jnp.float32).config is not None


def test_a_gguf_file_becomes_a_folder(tmp_path):
    path = tiny.write_llama(tmp_path / "tiny.gguf", tied=False)
    loaded = load_gguf(path, dtype=jnp.float32)
    assert len(loaded.model.layers[0].attention.qkv.layers) == 1  # merged
    export_huggingface(tmp_path / "m", loaded)
    exported, file = load_file(tmp_path / "m/model.safetensors"), GGUFFile(path)

    def check(name: str, gguf_name: str, *, rotary: bool = False) -> None:
        expected = file.floats(f"{gguf_name}.weight")
        if rotary:  # rows 2 i and 2 i + 1 of a head are its rows i and D / 2 + i
            d = tiny.HEAD_DIM
            rows = [
                h + 2 * (i % (d // 2)) + i // (d // 2)
                for h in range(0, len(expected), d)
                for i in range(d)
            ]
            expected = expected[rows]
        np.testing.assert_array_equal(exported.pop(f"{name}.weight"), expected, err_msg=name)

    check("model.embed_tokens", "token_embd")
    check("model.norm", "output_norm")
    check("lm_head", "output")
    for i in range(tiny.LAYERS):
        layer, blk = f"model.layers.{i}", f"blk.{i}"
        check(f"{layer}.input_layernorm", f"{blk}.attn_norm")
        check(f"{layer}.self_attn.q_proj", f"{blk}.attn_q", rotary=True)
        check(f"{layer}.self_attn.k_proj", f"{blk}.attn_k", rotary=True)
        check(f"{layer}.self_attn.v_proj", f"{blk}.attn_v")
        check(f"{layer}.self_attn.o_proj", f"{blk}.attn_output")
        check(f"{layer}.post_attention_layernorm", f"{blk}.ffn_norm")
        check(f"{layer}.mlp.gate_proj", f"{blk}.ffn_gate")
        check(f"{layer}.mlp.up_proj", f"{blk}.ffn_up")
        check(f"{layer}.mlp.down_proj", f"{blk}.ffn_down")
    assert not exported
    assert load_huggingface(tmp_path / "m").config == loaded.config


def test_what_config_json_says(tmp_path):
    loaded = load_gguf(tiny.write_llama(tmp_path / "tiny.gguf"), dtype=jnp.float32)
    export_huggingface(tmp_path / "m", loaded, dtype="bfloat16")
    assert json.loads((tmp_path / "m/config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": tiny.VOCAB,
        "num_hidden_layers": tiny.LAYERS,
        "hidden_size": tiny.HIDDEN,
        "intermediate_size": tiny.INNER,
        "num_attention_heads": tiny.HEADS,
        "num_key_value_heads": tiny.KV_HEADS,
        "head_dim": tiny.HEAD_DIM,
        "max_position_embeddings": tiny.CONTEXT,
        "rope_theta": tiny.ROPE_THETA,
        "rms_norm_eps": float(np.float32(tiny.NORM_EPS)),
        "dtype": "bfloat16",
    }
    old = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": {"bits": 4}}
    export_huggingface(tmp_path / "m", loaded, config=old)
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert written == {"model_type": "llama", "dtype": "float32"}


def test_models_that_need_a_config_or_are_unknown(tmp_path):
    folder = next(p.parent for p in FOLDERS if p.parent.name == "qwen2")
    loaded = load_huggingface(folder)
    with pytest.raises(ValueError, match="config must be given for models that are not of archite"):
        export_huggingface(tmp_path / "m", loaded)
    with pytest.raises(TypeError, match="config must be one of this package's models, got dict"):
        weight_table({})
    assert not (tmp_path / "m").exists()
