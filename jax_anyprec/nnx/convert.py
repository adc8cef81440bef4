"""Finds the dense layers of an NNX model, and puts packed ones in their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ..einsum import einsum_rows, parse
from ..plan import Layer, Plan, make_plan
from ..quantization import Quantization
from ..rules import Rules
from ..tensor import SCALE_DTYPES, QuantizedTensor
from .embed import embed_like
from .float_layers import FLOAT_LAYERS, float_base, own_behaviour
from .general import einsum_like, general_like, general_rows, spec_of
from .linear import linear_like
from .packed import Packed
from .references import Reference, held, references


def plan_nnx(model: nnx.Module, rules: Rules, *, errors: bool = True) -> Plan:
    """See `jax_anyprec.plan`."""
    return make_plan([found.layer for found in find(model)], rules, errors=errors)


def quantize_nnx(model: nnx.Module, rules: Rules | Plan) -> nnx.Module:
    """See `jax_anyprec.quantize_model`; a model that is itself a layer is replaced."""
    found = find(model)
    plan = make_plan([f.layer for f in found], rules, errors=False)
    plan.require_quantized()
    for planned in plan.layers:
        # What was found goes as its layer is done, and the float weight with it.
        layer = found.pop(0)
        if planned.quantization is not None:
            model = layer.convert(model, planned.quantization)
    return model


def quantized_by(model: nnx.Module, rules: Rules | Plan) -> list[tuple[Found, Quantization]]:
    """The layers that rules quantize, and how; ValueError if they quantize none."""
    found = find(model)
    plan = make_plan([f.layer for f in found], rules, errors=False)
    plan.require_quantized()
    pairs = zip(found, (p.quantization for p in plan.layers), strict=True)
    return [(f, quantization) for f, quantization in pairs if quantization is not None]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A float layer of Flax that has a packed counterpart.

    Args:
      spec: the product that it computes, see `jax_anyprec.einsum.parse`; rows don't matter.
      shape: of its weight, without stacked layers.
      packed: the counterpart with a packed weight.
      rows: the layer's input as ``[rows, K]``; None if it is called otherwise, as an embedding is.
    """

    spec: Callable[[Any], str]
    shape: Callable[[Any], tuple[int, ...]]
    packed: Callable[[Any, QuantizedTensor, Quantization], nnx.Module]
    rows: Callable[[Any, Any], Any] | None = None


KINDS: dict[type[nnx.Module], _Kind] = {
    nnx.Linear: _Kind(
        spec=lambda layer: "k,kn->n",
        shape=lambda layer: (layer.in_features, layer.out_features),
        packed=lambda layer, w, q: linear_like(layer, w, **q.layer_options),
        rows=lambda layer, x: x.reshape(-1, x.shape[-1]),
    ),
    nnx.LinearGeneral: _Kind(
        spec=spec_of,
        shape=lambda layer: (*layer.batch_axis.values(), *layer.in_features, *layer.out_features),
        packed=general_like,
        rows=general_rows,
    ),
    nnx.Einsum: _Kind(
        spec=lambda layer: layer.einsum_str,
        shape=lambda layer: tuple(layer.kernel_shape),
        packed=einsum_like,
        rows=lambda layer, x: einsum_rows(layer.einsum_str, x),
    ),
    nnx.Embed: _Kind(
        spec=lambda layer: "k,nk->n",
        shape=lambda layer: (layer.num_embeddings, layer.features),
        packed=lambda layer, w, q: embed_like(layer, w, **q.layer_options),
    ),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """A module with parameters, and where the model refers to it."""

    layer: Layer
    module: nnx.Module
    kind: _Kind | None
    references: tuple[Reference, ...]

    @property
    def has_rows(self) -> bool:
        """Whether the weight is a single matrix, and inputs are rows that it multiplies."""
        return self.layer.is_single and self.kind is not None and self.kind.rows is not None

    def rows(self, x: Any) -> jax.Array:
        """An input of the layer as ``float[rows, K]``, where it `has_rows`."""
        assert self.kind is not None
        assert self.kind.rows is not None
        return self.kind.rows(self.module, x)

    def convert(
        self, model: nnx.Module, quantization: Quantization, weight: QuantizedTensor | None = None
    ) -> nnx.Module:
        """The model with a packed layer in the place of this one.

        Args:
          weight: the packed weight; None to round the layer's own to nearest.
        """
        assert self.kind is not None
        layer: Any = self.module
        if weight is None:
            weight = self.layer.pack(quantization)
        packed: Any = self.kind.packed(layer, weight, quantization)
        if hasattr(packed, "bias"):
            packed.bias = layer.bias  # the variable itself, which may be shared
        for reference in self.references:
            reference.replace(packed)
        return packed if self.module is model else model


def find(model: nnx.Module) -> list[Found]:
    """All modules that hold parameters, once each."""
    to: dict[int, list[Reference]] = {id(model): []}
    modules: list[nnx.Pytree] = [model]
    for reference in references(model):
        if id(reference.node) not in to and isinstance(reference.node, nnx.Pytree):
            modules.append(reference.node)
        to.setdefault(id(reference.node), []).append(reference)
    rewritten = _rewritten(modules)
    found = [_describe(m, to, rewritten.get(id(m))) for m in modules if _parameters(m)]
    return found + _out_of_reach(model, to)


def _rewritten(modules: list[nnx.Pytree]) -> dict[int, str]:
    """The obstacle of all modules whose weights a module around them changes in each call."""
    return {
        id(inner): f"its weights are rewritten by the {type(module).__name__} around it"
        for module in modules
        if isinstance(module, nnx.SpectralNorm | nnx.WeightNorm)
        for _, inner in nnx.iter_modules(module)
        if inner is not module
    }


def _out_of_reach(model: nnx.Module, to: dict[int, list[Reference]]) -> list[Found]:
    """The modules that Flax finds in containers in which they can't be replaced."""
    obstacle = "lies in a container that conversion can't change: neither of Flax nor of Python"
    found = []
    for keys, module in nnx.iter_modules(model):
        if id(module) not in to and _parameters(module):
            here = Reference("/".join(map(str, keys)), module, "", module)
            held_here = {id(v): [here] for _, v in held(module)}
            found.append(_describe(module, {id(module): [here], **held_here}, obstacle))
    return found


def _describe(module: Any, to: dict[int, list[Reference]], around: str | None) -> Found:
    """What rules and plans need to know of a module.

    Args:
      to: the references to a module or variable, by its id.
      around: the obstacle that lies around the module, if one does.
    """
    parameters = _parameters(module)
    base = float_base(module)
    kind = None if base is None else KINDS[base]
    variable = (
        max(parameters, key=_nbytes) if base is None else getattr(module, FLOAT_LAYERS[base].weight)
    )
    weight = variable.get_value()
    path, *aliases = (r.path for r in to[id(module)]) if to[id(module)] else [""]
    fields: dict[str, Any] = {
        "path": path,
        "aliases": tuple(aliases),
        "kind": _name(type(module), base),
        "shape": tuple(getattr(weight, "shape", ())),
        "dtype": str(getattr(weight, "dtype", "packed")),
        "nbytes": sum(map(_nbytes, parameters)),
        "obstacle": around or _obstacle(module, base, weight, to[id(variable)]),
    }
    if kind is not None and fields["obstacle"] is None:
        product, shape = parse(kind.spec(module)), kind.shape(module)
        stacked = len(weight.shape) - len(shape)
        fields |= {
            "matrix": (*weight.shape[:stacked], *product.packed_shape(shape)),
            "stacked": stacked,
            "weight": weight,
            "matrices": product.matrices,
        }
    return Found(Layer(**fields), module, kind, tuple(to[id(module)]))


def _name(found: type, base: type | None) -> str:
    """The name of a class, and of the layer of Flax that it is derived from."""
    return found.__name__ if base in (None, found) else f"{found.__name__}({base.__name__})"


def _obstacle(module: Any, base: Any, weight: Any, holders: list[Reference]) -> str | None:
    """Why a module can't be quantized, or None."""
    name = type(module).__name__
    if isinstance(weight, QuantizedTensor):
        return "packed already"
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return "convolution"
    if base is None:
        return f"{name} has no packed form"
    behaviour = own_behaviour(module, base)
    if behaviour is not None:
        return behaviour
    kind, weight_name = KINDS[base], FLOAT_LAYERS[base].weight
    if len(holders) > 1:
        return f"its {weight_name} is in other modules too: {', '.join(r.path for r in holders)}"
    if str(weight.dtype) not in SCALE_DTYPES:
        return f"weights of {weight.dtype} are not quantized"
    expected = kind.shape(module)
    if weight.shape[len(weight.shape) - len(expected) :] != expected:
        return f"its {weight_name} should have shape {expected} after any stacked axes"
    try:
        parse(kind.spec(module))
    except ValueError as error:
        return str(error)
    return None


def _parameters(module: Any) -> list[nnx.Variable[Any]]:
    """The parameters and packed weights that a module holds itself.

    In a layer with a packed form that is any variable: a frozen one is no `nnx.Param`.
    """
    kinds = nnx.Param | Packed if float_base(module) is None else nnx.Variable
    return [node for _, node in held(module) if isinstance(node, kinds)]


def _nbytes(variable: nnx.Variable[Any]) -> int:
    leaves = jax.tree.leaves(variable.get_value())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
