"""`Arena`: what it moves, what it leaves, and who keeps its memory."""

from __future__ import annotations

import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec import memory


def address(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


def test_values_types_and_structure_stay() -> None:
    w = ap.quantize(np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32), 3).prepare()
    tree = {
        "packed": w,
        "half": jnp.arange(7, dtype=jnp.bfloat16),
        "scalar": jnp.float32(3),
        "committed": jax.device_put(jnp.arange(3), jax.devices()[0]),
        "empty": jnp.zeros((0, 4)),
        "not arrays": (None, 3, "text", np.arange(3)),
    }
    placed = ap.Arena().place(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        assert type(after) is type(before)
        if isinstance(before, jax.Array):
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            assert (after.sharding, after.committed) == (before.sharding, before.committed)
            np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    np.testing.assert_array_equal(
        ap.matmul(jnp.ones((2, 64)), placed["packed"], act_bits=8),
        ap.matmul(jnp.ones((2, 64)), w, act_bits=8),
    )


def test_arrays_lie_one_after_another() -> None:
    arena = ap.Arena()
    first, second, third = (arena.place(jnp.ones(100)) for _ in range(3))
    assert address(first) % memory.ALIGNMENT == 0
    step = -(-400 // memory.ALIGNMENT) * memory.ALIGNMENT
    assert [address(second), address(third)] == [address(first) + step, address(first) + 2 * step]


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4096)
    arrays = [jnp.full(n, n, jnp.int32) for n in (500, 600, 5000, 10, 1024, 1)]
    arena = ap.Arena()
    placed = [arena.place(x) for x in arrays]
    spans = sorted((address(x), address(x) + x.nbytes) for x in placed)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    for x, y in zip(arrays, placed, strict=True):
        np.testing.assert_array_equal(x, y)


def test_memory_outlives_the_arena_but_not_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, huge_pages = [], memory._huge_pages

    def watched(size: int) -> np.ndarray:
        chunk = huge_pages(size)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(memory, "_huge_pages", watched)
    arena = ap.Arena()
    x = arena.place(jnp.arange(1000))
    del arena
    gc.collect()
    np.testing.assert_array_equal(x, np.arange(1000))
    assert chunks[0]() is not None
    del x
    gc.collect()
    assert chunks[0]() is None


def test_a_donated_array_leaves_the_arena_as_it_is() -> None:
    arena = ap.Arena()
    x, y = arena.place(jnp.arange(64)), arena.place(jnp.arange(64))
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    np.testing.assert_array_equal(y, np.arange(64))


def test_a_module_and_keys() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    placed = ap.Arena().place(model)
    np.testing.assert_array_equal(placed(jnp.ones(4)), model(jnp.ones(4)))
    key = jax.random.key(1)
    assert ap.Arena().place(key) is key


def test_sharded_arrays_stay() -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    spread = jax.device_put(jnp.arange(8 * len(jax.devices())), jax.NamedSharding(mesh, jax.P("x")))
    placed = ap.Arena().place(spread)
    assert (placed is spread) == (len(jax.devices()) > 1)


def test_not_under_tracing() -> None:
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(ap.Arena().place)(jnp.ones(3))
