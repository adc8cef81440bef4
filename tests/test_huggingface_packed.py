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
from jax_anyprec.models import HuggingFaceError, Quantization
from jax_anyprec.models.export import huggingface_tensors
from jax_anyprec.models.huggingface_packed import PackedFolder, load_packed

DAMAGED = 200
LLAMA = Path(__file__).parent / "data" / "huggingface" / "llama"
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


def test_examples_of_the_docs_run(tmp_path, monkeypatch):
    _, layers = write_packed(tmp_path / "folder", "awq")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "importing.md").read_text("utf-8")
    examples = re.findall(r"^```python.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/importing.md", "exec"), {})
    exported = load_file("float-folder/model.safetensors")
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
        except (CheckpointError, HuggingFaceError):
            outcomes[False] += 1
    assert min(outcomes.values()) > DAMAGED // 20
