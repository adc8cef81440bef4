"""Calibrated layers in a folder, part by part as they are done: to go on later, and to load.

``index.json`` lists the parts (a block each, say) with their layers; the packed weights and biases
of part i are in ``part-i.safetensors`` (`jax_anyprec.save`). A part is listed when its file is
complete, so an interrupted calibration leaves the parts before. Other variables of the model that
have changed, of norms before smoothed layers, are in ``variables.safetensors``, by path; numbers
that were tuned when all layers were done (`calibrate.tune`) are in ``tuned.safetensors``, and while
that goes on the state of it in ``unfinished-tuned.safetensors``.

At nested precisions (`Method.nested`) first planes of the same weights are read, of 3 bits say; a
part has the scales for them beside each weight, and what was tuned is in ``tuned-3.safetensors``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
from flax import nnx

from ..checkpoint import CheckpointError, load, save
from ..nnx.convert import find
from ..nnx.references import references
from ..quantization import Quantization
from ..quantize import Grid
from ..safetensors import replace_files
from ..tensor import QuantizedTensor
from .report import CalibratedLayer
from .tune import numbers, set_numbers

INDEX = "index.json"
VARIABLES = "variables.safetensors"
FORMAT = "jax_anyprec calibration 1"

Weights = Mapping[str, jax.Array | QuantizedTensor]
"""Of one layer: "kernel", packed, "bias" where it has one, and "scales-3", say, to read 3 bits."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers that were calibrated together, and their weights."""

    layers: tuple[CalibratedLayer, ...]
    weights: tuple[Weights, ...]


class Store:
    """The folder of a calibration.

    Args:
      path: of the folder, made if there is none.
      key: says what is being calibrated, how, and on what; parts of another key are refused.
      nested: precisions that are calibrated besides that of the weights.

    Raises:
      ValueError: the folder is of another calibration.
      CheckpointError: its index can't be read.
    """

    def __init__(self, path: str | os.PathLike[str], key: str, nested: Sequence[int] = ()):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        there = (self.path / INDEX).exists()
        self._index = _read_index(self.path) if there else _new_index(key, nested)
        if self._index["key"] != key:
            raise ValueError(
                f"{self.path} holds a calibration of another model, with other rules or on other "
                "data; give another folder, or delete it"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._index["parts"]

    def read(self, name: str) -> Part:
        """A part that is there."""
        return _read_part(self.path, self._index["parts"][name])

    def write(self, name: str, part: Part) -> None:
        """Add a part that is not there."""
        file = f"part-{len(self._index['parts'])}.safetensors"
        save(self.path / file, {str(i): dict(each) for i, each in enumerate(part.weights)})
        entry = {"file": file, "layers": [dataclasses.asdict(layer) for layer in part.layers]}
        self._index["parts"][name] = entry
        text = json.dumps(self._index, indent=1).encode()

        def write_index(out: BinaryIO) -> None:
            out.write(text)

        replace_files({self.path / INDEX: write_index})

    def put(self, model: nnx.Module, bits: int | None = None) -> nnx.Module:
        """The model with all parts that are there in their places, at fewer `bits` if given."""
        return _put_all(model, self._index, self.path, bits)

    def tuned(self, bits: int | None = None) -> dict[str, Any] | None:
        """Numbers that were tuned at the end, at fewer `bits` if given; None before."""
        file = self.path / _tuned(bits)
        return load(file) if file.exists() else None

    def unfinished(self, bits: int | None = None) -> Path:
        """Where the numbers of `tuned` are on their way."""
        return self.path / f"unfinished-{_tuned(bits)}"

    def keep_tuned(self, values: Mapping[str, jax.Array], bits: int | None = None) -> None:
        """Add the numbers of `tuned`, which are finished."""
        save(self.path / _tuned(bits), dict(values))
        self.unfinished(bits).unlink(missing_ok=True)

    def keep(self, variables: Mapping[str, jax.Array]) -> None:
        """Variables that loading a calibration has to change, besides layers, by path."""
        save(self.path / VARIABLES, dict(variables))


def load_calibrated(
    model: nnx.Module, path: str | os.PathLike[str], *, bits: int | None = None
) -> nnx.Module:
    """Put calibrated layers in the places of a float model's, which is changed and returned.

    Args:
      model: as it was given to `calibrate_model`.
      path: the folder that was given there as `store`.
      bits: read so many planes of each weight only, one of the `Method.nested` that it was
        calibrated with, with the scales for that; None for all. Weights that have no more stay as
        they are.

    Raises:
      FileNotFoundError: there is no such folder, or no calibration in it.
      CheckpointError: it is damaged, or of another model.
      ValueError: it was not calibrated for `bits`.
    """
    path = Path(path)
    index = _read_index(path)
    if bits is not None and bits not in index["nested"]:
        raise ValueError(
            f"bits must be None or one that {path} was calibrated for (Method.nested), "
            f"{index['nested']}, got {bits!r}"
        )
    if (path / VARIABLES).exists():
        _set_variables(model, load(path / VARIABLES), str(path))
    model = _put_all(model, index, path, bits)
    if (path / _tuned(bits)).exists():
        put_tuned(model, load(path / _tuned(bits)), str(path / _tuned(bits)))
    return model


def put(model: nnx.Module, part: Part, source: str) -> nnx.Module:
    """The model with the layers of a part in their places."""
    found = {f.layer.path: f for f in find(model)}
    for layer, weights in zip(part.layers, part.weights, strict=True):
        place, kernel = found.get(layer.path), weights["kernel"]
        if place is None or place.layer.matrix != tuple(kernel.shape) or place.kind is None:
            raise CheckpointError(f"{source} is of another model: layer {layer.path!r} differs")
        assert isinstance(kernel, QuantizedTensor)
        if "bias" in weights:
            bias: Any = place.module
            bias.bias.set_value(weights["bias"])
        quantization = dataclasses.replace(layer.quantization, weights=kernel.bits)
        model = place.convert(model, quantization, kernel.prepare())
    return model


def at_bits(field: str, bits: int) -> str:
    """The name of a weight's "scales" or "offsets" for a nested precision."""
    return f"{field}-{bits}"


def _tuned(bits: int | None) -> str:
    return "tuned.safetensors" if bits is None else f"tuned-{bits}.safetensors"


def _put_all(model: nnx.Module, index: Any, path: Path, bits: int | None) -> nnx.Module:
    for entry in index["parts"].values():
        model = put(model, _read_part(path, entry, bits), str(path))
    return model


def put_tuned(model: nnx.Module, values: Mapping[str, Any], source: str) -> None:
    """Put tuned numbers in their places in a model whose layers are packed."""
    shapes = {name: value.shape for name, value in numbers(model).items()}
    if shapes != {name: value.shape for name, value in values.items()}:
        raise CheckpointError(f"{source} is of another model: it has numbers of others")
    set_numbers(model, values)


def _set_variables(model: nnx.Module, values: Mapping[str, Any], source: str) -> None:
    modules: dict[str, Any] = {reference.path: reference.node for reference in references(model)}
    for path, value in values.items():
        module, _, name = path.rpartition("/")
        variable = getattr(modules.get(module), name, None)
        if not isinstance(variable, nnx.Variable) or variable.shape != value.shape:
            raise CheckpointError(f"{source} is of another model: {path!r} differs")
        variable.set_value(value)


def _new_index(key: str, nested: Sequence[int]) -> dict[str, Any]:
    return {"format": FORMAT, "key": key, "nested": list(nested), "parts": {}}


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT or not isinstance(index["parts"], dict):
            raise KeyError("format")
        if not isinstance(index.setdefault("nested", []), list):  # older ones have none
            raise KeyError("nested")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / INDEX} is no index of a calibration: {error}") from None
    return index


def _read_part(path: Path, entry: Any, bits: int | None = None) -> Part:
    try:
        layers = tuple(_from_json(each) for each in entry["layers"])
        name = Path(entry["file"]).name
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / INDEX} has a part that can't be read: {error}") from None
    weights = load(path / name, bits=bits)
    if set(weights) != {str(i) for i in range(len(layers))}:
        raise CheckpointError(f"{path / name} lacks layers that {INDEX} lists, or has others")
    each = (weights[str(i)] for i in range(len(layers)))
    return Part(layers, tuple(each if bits is None else (_at(one, bits) for one in each)))


def _at(weights: Weights, bits: int) -> Weights:
    """Weights of which at most `bits` planes were read, with scales and offsets for that."""
    kernel = weights["kernel"]
    names = {field: at_bits(field, bits) for field in Grid._fields}
    fields: dict[str, Any] = {f: weights[name] for f, name in names.items() if name in weights}
    if not fields or not isinstance(kernel, QuantizedTensor):
        return weights
    for field, value in fields.items():
        there = getattr(kernel, field)
        if there is None or value.shape != there.shape:
            raise CheckpointError(
                f"{field} for {bits} bits must be {there if there is None else there.shape}, "
                f"got {value.shape}"
            )
    return {**weights, "kernel": dataclasses.replace(kernel, **fields)}


def _from_json(fields: dict[str, Any]) -> CalibratedLayer:
    return CalibratedLayer(**{**fields, "quantization": Quantization(**fields["quantization"])})
