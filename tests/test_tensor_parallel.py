"""A Llama shared by devices, and by processes: the text of one, and what is communicated."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from test_sharding import collectives

import jax_anyprec as ap
from jax_anyprec.models import generate, load_gguf
from jax_anyprec.models.partition import shard_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"
SIZE, HEAD_DIM = 128, 32
SETTINGS = {
    "float": None,
    "packed as in the file": ap.Quantization(activations=None),
    "W4A8": ap.Quantization(weights=4, activations=8, group_size=32),
    "W8A8, one scale": ap.Quantization(weights=8, act_scales="token"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file whose layers two devices can share."""
    rows = {"attn_q": 4 * HEAD_DIM, "attn_k": 2 * HEAD_DIM, "attn_v": 2 * HEAD_DIM}
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        kind = name.split(".")[-2]
        shape = (rows.get(kind, shape[0]), SIZE if kind == "attn_output" else shape[1])
        return rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)

    shapes = synthetic_gguf.weight_shapes(hidden=SIZE, inner=SIZE)
    return synthetic_gguf.write_llama(
        tmp_path_factory.mktemp("parallel") / "tiny.gguf",
        weights={name: draw(name, shape) for name, shape in shapes.items()},
        metadata={
            "llama.embedding_length": SIZE,
            "llama.feed_forward_length": SIZE,
            "llama.rope.dimension_count": HEAD_DIM,
        },
    )


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tensor_parallel", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mesh_of(count: int) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=devices)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_devices_agree_with_one(path: Path, setting: str) -> None:
    """And speak twice a layer and once for the embedding; a scale for all of K is agreed on too."""
    quantization = SETTINGS[setting]
    tokens = jnp.arange(1, 13)[None]
    whole = load_gguf(path, quantization=quantization)
    shared = load_gguf(path, quantization=quantization, mesh=mesh_of(2))
    graph, state = nnx.split(shared.model)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    compiled = run.lower(state, tokens).compile()
    layers = whole.config.num_layers
    scales = 2 * layers if setting == "W8A8, one scale" else 0
    assert collectives(compiled) == {"all-reduce": 2 * layers + 1 + scales}
    expected = whole.model(tokens)
    spread = np.abs(expected).max()
    np.testing.assert_allclose(compiled(state, tokens), expected, rtol=0, atol=0.02 * spread)
    if quantization is None or quantization.activations is None:
        np.testing.assert_allclose(compiled(state, tokens), expected, rtol=0, atol=1e-5 * spread)
        prompt = list(range(1, 8))
        assert list(generate(shared.model, prompt, max_tokens=16)) == list(
            generate(whole.model, prompt, max_tokens=16)
        )


def test_each_device_holds_its_part(path: Path) -> None:
    mesh = mesh_of(2)
    model = load_gguf(path, mesh=mesh).model
    layer = model.layers[0]
    for linear in (*layer.attention.qkv.layers, layer.feed_forward.down, model.embed):
        (packed,) = (v for v in vars(linear).values() if isinstance(v, ap.nnx.Packed))
        for field in jax.tree.leaves(packed.get_value()):
            assert all(2 * shard.data.size == field.size for shard in field.addressable_shards)


def test_stacked_layers_are_cut_in_their_matrix() -> None:
    @nnx.vmap
    def make(key: jax.Array) -> nnx.Linear:
        return nnx.Linear(64, 128, rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 3))
    shard_model(layers, mesh_of(2), {"**": P(None, "model")})
    assert layers.kernel.get_value().sharding.spec == P(None, None, "model")
    assert layers.bias.get_value().sharding.spec == P(None, "model")


def test_merged_projections_are_refused(path: Path) -> None:
    merged = load_gguf(path).model
    with pytest.raises(ValueError, match=r"layers/0/attention/qkv: projections are merged"):
        shard_model(merged, mesh_of(2))


def test_a_size_that_can_not_be_cut_names_the_layer(path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed: N = 320 .* in 4 parts.*pad N to 384"):
        load_gguf(path, mesh=mesh_of(4))


def test_two_processes_write_the_text_of_one(path: Path, example: ModuleType) -> None:
    loaded = load_gguf(path, quantization=example.FLOAT_ACTIVATIONS)
    ids = loaded.tokenizer.encode("abc")
    expected = loaded.tokenizer.decode(list(generate(loaded.model, ids, max_tokens=12)))
    command = [sys.executable, str(EXAMPLE), "abc", "--model", str(path), "--tokens", "12"]
    found = subprocess.run(
        [*command, "--processes", "2"], capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    # The library that processes speak by writes lines of its own, sometimes two into one.
    assert expected.rstrip("\n") in found.stdout
