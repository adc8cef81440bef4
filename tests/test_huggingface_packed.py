"""Models from GPTQ, AWQ and compressed-tensors folders: exactly what the integers stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from synthetic_gptq import Weights, pack_awq, pack_compressed, pack_gptq, random_weights

import jax_anyprec as ap
from jax_anyprec.gptq import CheckpointError
from jax_anyprec.models import HuggingFaceError, Quantization, load_huggingface
from jax_anyprec.models.export import huggingface_tensors
from jax_anyprec.models.huggingface_packed import PackedFolder, load_packed
from jax_anyprec.models.loading import Weight, fill

DAMAGED = 200
FOLDERS = Path(__file__).parent / "data" / "huggingface"
LLAMA = FOLDERS / "llama"
QUANTIZED = {
    "gptq": (pack_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "compressed": (
        pack_compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "symmetric": False,
                        "strategy": "group",
                        "group_size": 32,
                    },
                }
            },
        },
    ),
}


def pack_one(path: Path, architecture: str, name: str) -> None:
    """A tiny model of another architecture with one tensor packed, shaped as it was."""
    tensors = load_file(FOLDERS / architecture / "model.safetensors")
    n, k = tensors.pop(f"{name}.weight").shape
    tensors |= pack_compressed(random_weights(4, k=k, n=n), name)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((FOLDERS / architecture / "config.json").read_text())
    scheme = {"quantization_config": QUANTIZED["compressed"][1]}
    (path / "config.json").write_text(json.dumps(config | scheme))


def write_packed(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Weights]]:
    """The tiny Llama with packed layers; its tensors before, and the layers that replace them."""
    pack, scheme = QUANTIZED[kind]
    floats = load_file(LLAMA / "model.safetensors")
    tensors, layers = {}, {}
    for seed, (name, value) in enumerate(floats.items()):
        if "_proj.weight" in name:
            layer = name.removesuffix(".weight")
            n, k = value.shape
            layers[layer] = random_weights(4, k=k, n=n, seed=seed)
            tensors |= pack(layers[layer], layer)
        else:
            tensors[name] = value
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((LLAMA / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return floats, layers


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("packed", [True, False])
def test_loaded_weights_are_exact(tmp_path, kind, packed):
    floats, layers = write_packed(tmp_path / "m", kind)
    quantization = Quantization() if packed else None
    loaded = load_packed(tmp_path / "m", quantization=quantization, dtype=jnp.float32)
    # Exported tensors are in Hugging Face's order again, whatever the model's is.
    for name, tensor in huggingface_tensors(loaded).items():
        layer = name.removesuffix(".weight")
        expected = layers[layer].values().T if layer in layers else floats[name]
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=name)
    attention = loaded.model.layers[1].attention
    assert len(attention.qkv.layers) == 1  # merged
    assert isinstance(attention.output, ap.nnx.QuantLinear if packed else nnx.Linear)
    assert isinstance(loaded.model.embed, nnx.Embed)


def test_packed_and_float_models_agree(tmp_path):
    write_packed(tmp_path / "m", "gptq")
    tokens = np.random.default_rng(0).integers(0, 128, (1, 9))

    def logits(quantization: Quantization | None) -> np.ndarray:
        model = load_packed(tmp_path / "m", quantization=quantization, dtype=jnp.float32).model
        graph, state = nnx.split(model)
        return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, tokens))

    expected = logits(None)
    np.testing.assert_allclose(logits(Quantization(activations=None)), expected, atol=1e-5)


def test_progress_counts_the_bytes_of_the_file(tmp_path):
    write_packed(tmp_path / "m", "gptq")
    calls: list[tuple[int, int]] = []
    load_packed(
        tmp_path / "m", dtype=jnp.float32, progress=lambda done, total: calls.append((done, total))
    )
    tensors = load_file(tmp_path / "m/model.safetensors")
    total = sum(value.nbytes for value in tensors.values())
    assert calls[-1] == (total, total)


def test_folders_that_are_refused(tmp_path):
    path = tmp_path / "m"
    write_packed(path, "gptq")
    tensors = load_file(path / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"

    def save(**changes: np.ndarray) -> None:
        renamed = {f"{layer}.{part}": value for part, value in changes.items()}
        save_file(tensors | renamed, path / "model.safetensors")

    g_idx = tensors[f"{layer}.g_idx"]
    save(weight=np.ones((64, 32), np.float32))
    with pytest.raises(HuggingFaceError, match=rf"m has '{layer}' packed and in floats"):
        load_packed(path)
    save(weight_packed=np.zeros((64, 4), np.int32))
    with pytest.raises(CheckpointError, match=rf"{layer} is packed twice, as qweight and as we"):
        load_packed(path)
    save(qweight=np.zeros((4, 32), np.int32))
    with pytest.raises(HuggingFaceError, match=rf"{layer}.weight must have shape \(64, 32\)"):
        load_packed(path)
    save(qweight=np.zeros((4, 64), np.int64))
    with pytest.raises(CheckpointError, match=rf"{layer} has qweight in int64"):
        load_packed(path)
    save(g_idx=g_idx + 1)
    with pytest.raises(CheckpointError, match=rf"{layer} has a g_idx outside of its 1 groups"):
        load_packed(path)
    (path / "config.json").write_bytes((LLAMA / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"m has no quantization_config in config.json"):
        load_packed(path)


@pytest.mark.parametrize("quantization", [Quantization(), Quantization(weights=4), None])
@pytest.mark.parametrize(
    ("architecture", "name", "parameter"),
    [
        ("llama", "model.embed_tokens", "embed.embedding"),
        ("gpt2", "transformer.h.0.attn.c_proj", "layers.0.attention.output.kernel"),
        ("bert", "pooler.dense", "pooler.weight"),
    ],
)
def test_only_linear_layers_by_rows_may_be_packed(
    tmp_path, architecture, name, parameter, quantization
):
    pack_one(tmp_path / "m", architecture, name)
    message = rf"m has '{name}.weight' packed; only linear .* \[out, in\] .* fills {parameter}$"
    with pytest.raises(HuggingFaceError, match=message):
        load_packed(tmp_path / "m", quantization=quantization)


def test_a_packed_layer_of_bert_is_exact(tmp_path):
    pack_one(tmp_path / "m", "bert", "encoder.layer.1.intermediate.dense")
    layer = load_packed(tmp_path / "m", dtype=jnp.float32).model.layers[1].feed_forward.up
    assert isinstance(layer, ap.nnx.QuantLinear)
    found = layer.kernel.get_value().dequantize()
    np.testing.assert_array_equal(found, random_weights(4, k=32, n=64).values())
    bias = load_file(FOLDERS / "bert/model.safetensors")["encoder.layer.1.intermediate.dense.bias"]
    np.testing.assert_array_equal(layer.bias.get_value(), bias)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("linear.kernel", r"linear.kernel: packed .* shape \(64, 32\), got \(32, 64\)"),
        ("embed.embedding", r"embed.embedding: packed .* shape \(64, 32\), got \(32, 64\)"),
        ("norm.scale", r"norm.scale: packed .* nnx.Linear or an nnx.Embed, got RMSNorm"),
        ("other.kernel", r"other.kernel: packed .* nnx.Linear or an nnx.Embed, got Scaled"),
    ],
)
def test_packed_weights_replace_only_what_computes_the_same(path, message):
    class Scaled(nnx.Linear):
        """A linear layer that may do more than multiply."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(64, 32, rngs=rngs)
            self.other = Scaled(32, 64, rngs=rngs)
            self.embed = nnx.Embed(32, 64, rngs=rngs)
            self.norm = nnx.RMSNorm(64, rngs=rngs)

    class Packs:
        def nbytes(self, name: str) -> int:
            return 1

        def packed(self, name: str) -> ap.QuantizedTensor:
            return ap.quantize(np.ones((32, 64), np.float32), bits=4, group_size=32)

    with pytest.raises(ValueError, match=message):
        fill(
            nnx.eval_shape(lambda: Model(nnx.Rngs(0))),
            {"x": Weight(path, (64, 32), np.transpose, transposed=True)},
            Packs(),
            quantization=Quantization(),
            dtype=jnp.float32,
            progress=None,
        )


def test_a_mesh_needs_partition_rules(tmp_path):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    message = r"mesh must be None for this model: .* only, llama, .*, gemma3_text$"
    for architecture in ("gpt2", "bert"):
        with pytest.raises(ValueError, match=message):
            load_huggingface(FOLDERS / architecture, mesh=mesh)
    pack_one(tmp_path / "m", "bert", "encoder.layer.0.output.dense")
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path / "m", mesh=mesh)
    embed = load_huggingface(LLAMA, mesh=mesh).model.embed.embedding.get_value()
    assert embed.sharding.spec == jax.sharding.PartitionSpec("model", None)


def test_examples_of_the_docs_run(tmp_path, monkeypatch):
    _, layers = write_packed(tmp_path / "folder", "awq")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "importing.md").read_text("utf-8")
    examples = re.findall(r"^```python.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/importing.md", "exec"), {})
    exported = load_file("float-folder/model.safetensors")
    again = load_huggingface("float-folder", dtype=jnp.bfloat16)
    for name, tensor in huggingface_tensors(again).items():
        np.testing.assert_array_equal(tensor.read(), exported[name].astype(np.float32))
    single = load_file("float.safetensors")
    assert single.keys() == {f"{layer}.weight" for layer in layers}
    for name, value in single.items():
        np.testing.assert_array_equal(exported[name], value.astype("bfloat16"))


def test_damaged_folders_never_crash(tmp_path):
    path = tmp_path / "m"
    write_packed(path, "gptq")
    files = {name: (path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    header = 8 + int.from_bytes(files["model.safetensors"][:8], "little")
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(DAMAGED):
        for name, whole in files.items():
            damaged = bytearray(whole)
            for _ in range(rng.integers(1, 3)):
                place = rng.integers(header if rng.integers(2) else len(whole)) % len(whole)
                damaged[place] = rng.choice([0, 0x22, 0x30, 0x39, 0x7F, 0xFF, rng.integers(256)])
            (path / name).write_bytes(damaged)
        try:
            folder = PackedFolder(path)
            for name in folder.tensors:
                folder.packed(name)
            outcomes[True] += 1
        except CheckpointError:
            outcomes[False] += 1
    assert min(outcomes.values()) > DAMAGED // 20
