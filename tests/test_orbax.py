"""Orbax: trees with packed tensors and states of packed models, sharded and onto other meshes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jax_anyprec as ap

Tree = dict[str, Any]


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linears = nnx.List(
            [ap.nnx.QuantLinear(64, 64, group_size=32, rngs=rngs) for _ in range(2)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.fixture(scope="module")
def tree() -> Tree:
    kernel = jax.random.normal(jax.random.key(0), (128, 40))
    w = ap.quantize(kernel, 3, group_size=64, rotation=ap.Rotation(64, 5))
    shifted = dataclasses.replace(w, offsets=w.scales.astype(jnp.float16), rotation=None)
    return {"w": w, "layers": [{"w": w.prepare(), "shifted": shifted}], "x": jnp.ones(3)}


@pytest.fixture(scope="module")
def stored(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "tree"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, custom_metadata=ap.static_fields(tree))
    return path


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_a_tree_comes_back(stored: Path, tree: Tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(stored, jax.eval_shape(lambda: tree)), tree)


def test_static_fields_come_back_whatever_the_target_had(stored: Path, tree: Tree) -> None:
    # Of the same shapes, so that Orbax can't see that the target is for other weights.
    other = jax.eval_shape(lambda: tree)
    other["w"] = dataclasses.replace(other["w"], rotation=ap.Rotation(64, 6))
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(stored, other)["w"].rotation.seed == 6  # why they are saved
        saved = checkpointer.metadata(stored).custom_metadata
        same(checkpointer.restore(stored, ap.with_static_fields(other, saved)), tree)


def test_the_state_of_an_nnx_model(tmp_path: Path) -> None:
    model = Model(nnx.Rngs(0))
    state = nnx.state(model)
    restored = nnx.eval_shape(lambda: Model(nnx.Rngs(1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "m", state, custom_metadata=ap.static_fields(state))
        checkpointer.wait_until_finished()
        saved = checkpointer.metadata(tmp_path / "m").custom_metadata
        target = ap.with_static_fields(nnx.state(restored), saved)
        assert isinstance(target, nnx.State)
        nnx.update(restored, checkpointer.restore(tmp_path / "m", target))
    same(nnx.state(restored), state)
    x = jnp.ones((2, 64))
    np.testing.assert_array_equal(restored.linears[1](x), model.linears[1](x))


def test_static_fields_are_json(tree: Tree) -> None:
    rotation = {"block": 64, "seed": 5}
    assert ap.static_fields(tree) == {
        "w": {"k": 128, "group_size": 64, "rotation": rotation, "columns": None},
        "layers.0.w": {"k": 128, "group_size": 64, "rotation": rotation, "columns": 40},
        "layers.0.shifted": {"k": 128, "group_size": 64, "rotation": None, "columns": None},
    }
    assert ap.static_fields(Model(nnx.Rngs(0))).keys() == {"linears.0.kernel", "linears.1.kernel"}


def test_static_fields_that_do_not_fit(tree: Tree) -> None:
    w = {"w": tree["w"]}
    good = ap.static_fields(w)["w"]
    for fields, message in (
        ({}, "for the packed tensors of the tree, 'w' is only in tree"),
        ({"w": good, "v": good}, "'v' is only in fields"),
        ({"w": {"k": 1}}, r"w must have k, group_size, rotation, columns, got \{'k': 1\}"),
        ({"w": good | {"k": 1.5}}, "w has k 1.5, it must be an int from 0"),
        ({"w": good | {"rotation": []}}, r"w has rotation \[\], it must be an object or null"),
        ({"w": good | {"group_size": 128}}, r"w.scales must have shape \(40, 1\), got \(40, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ap.with_static_fields(w, fields)


SHARDED = """
import sys
import dataclasses
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_anyprec as ap

path = sys.argv[1]
auto = (jax.sharding.AxisType.Auto,)
w = ap.quantize(jax.random.normal(jax.random.key(0), (256, 64)), 4, group_size=64)

def shardings(shape, names, planes, scales):
    mesh = jax.make_mesh(shape, names, axis_types=auto * len(names))
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    return dataclasses.replace(w, planes=at(*planes), scales=at(*scales))

struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
rows = shardings((4,), ("x",), (None, None, "x"), (None, "x"))
columns = shardings((2, 2), ("x", "y"), (None, ("y", "x"), None), (("y", "x"), None))
placed = jax.tree.map(jax.device_put, w, rows)
tree = {"w": placed}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree, custom_metadata=ap.static_fields(tree))
    checkpointer.wait_until_finished()
    for wanted in (rows, columns):
        target = jax.tree.map(struct, {"w": w}, {"w": wanted})
        target = ap.with_static_fields(target, checkpointer.metadata(path).custom_metadata)
        found = checkpointer.restore(path, target)["w"]
        assert jax.tree.map(lambda x: x.sharding, found) == wanted
        assert len(found.planes.addressable_shards) == 4
        assert jnp.array_equal(found.planes, w.planes) and jnp.array_equal(found.scales, w.scales)
assert found.planes.addressable_shards[0].data.shape == (4, 16, 8)
print("ok")
"""


def test_from_one_mesh_to_another(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", SHARDED, str(tmp_path / "sharded")],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stderr
