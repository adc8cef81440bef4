"""Calibration of a model, layer by layer on the inputs that packed layers before it give."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ..nnx.convert import Found, find, quantized_by
from ..nnx.packed import Packed
from ..nnx.references import held
from ..quantization import Quantization
from ..rules import Rules
from ..tensor import QuantizedTensor
from .blocks import Blocks, Call, find_blocks
from .descend import Tuning
from .moments import Moments, moments_of
from .observe import Run, input_of, inputs_of, order
from .pack import check_inputs, pack
from .packed import PackedWeights, check_packed, held_as
from .report import CalibratedLayer
from .smooth import Link, smooth
from .solve import Method
from .store import Part, Store, put, put_tuned
from .tune import numbers, tune

Progress = Callable[[int, int], None]

AS_PACKED = "as packed"
"""The part of layers whose weights are taken as they are; the others are named by their blocks."""


class Runs(NamedTuple):
    """One batch through a module, and through the float copy of it."""

    packed: Run
    exact: Run


class Calibration:
    """The state of a calibration: the model, what is still to be done, and what has been.

    Args:
      model: changed in place, layer by layer.
      rules: which layers become what.
      batches: what `call` takes.
      call: runs the model on a batch.
      progress: called with the layers and steps of tuning done so far and their number.
      store: where parts that are done are kept and found, or None.
      links: channels that are made alike in size before anything else.
      packed: weights that are taken as they are, by path.
      tuning: how all layers are tuned together at the end, or None.
    """

    def __init__(
        self,
        model: nnx.Module,
        rules: Rules,
        batches: Sequence[Any],
        *,
        method: Method,
        call: Call,
        progress: Progress,
        store: str | os.PathLike[str] | None,
        links: tuple[Link, ...] = (),
        packed: PackedWeights,
        tuning: Tuning | None = None,
    ):
        layers = quantized_by(model, rules)
        check_packed(packed, [f for f, _ in layers])
        self.todo = {f.layer.path: each for f, each in layers}
        self.todo |= {path: held_as(t, self.todo[path]) for path, t in packed.items()}
        if set(packed) == set(self.todo):
            tuning = None  # nothing is lost that could be made up for
        self.done: list[CalibratedLayer] = []
        self.model, self.batches, self.method = model, batches, method
        self.call, self.progress, self.total = call, progress, len(self.todo)
        most = max((each.weights or 0 for each in self.todo.values()), default=0)
        nested = method.below(most)
        self._precisions = (None, *nested)  # None is that of the weights
        if tuning is not None:
            steps = batches if tuning.batches is None else tuning.batches
            tuning = dataclasses.replace(tuning, batches=steps)
            self.total += len(steps) * len(self._precisions)
        self.tuning = tuning
        self._packed = packed
        self._nested: dict[str, dict[str, jax.Array]] = {}  # what fewer bits need, by layer
        self._store = None if store is None else Store(store, self._key(links), nested)
        if links:
            self._smooth(links)
        self._reference = nnx.clone(model)

    def run(self) -> None:
        """Calibrate all layers: blocks in their order, then what lies outside of them."""
        self._part(AS_PACKED, self._take_packed)
        self._run_blocks()
        self._part("", self._run_rest)
        done = len(self.done)
        if self.tuning:
            for i, bits in enumerate(self._precisions):
                self._tune(self.tuning, bits, done + i * len(self.tuning.batches or ()))

    def _take_packed(self) -> None:
        for found in find(self.model):
            path = found.layer.path
            if path in self._packed:
                self._replace(found, path, self._packed[path].prepare())
                self._finish(CalibratedLayer(path, self.todo[path], 0, None, None))

    def _run_rest(self) -> None:
        runs = [
            Runs(
                functools.partial(self.call, self.model, batch),
                functools.partial(self.call, self._reference, batch),
            )
            for batch in self.batches
        ]
        self._calibrate(self.model, self._reference, "", runs)
        for found in find(self.model):
            if found.layer.path in self.todo:
                self._round(found, "its inputs are no rows of one matrix, or it is not called")

    def _part(self, name: str, run: Callable[[], None]) -> None:
        """Do a part of the layers, or take it from the store."""
        if self._store is not None and name in self._store:
            part = self._store.read(name)
            self.model = put(self.model, part, str(self._store.path))
            for layer in part.layers:
                self._finish(layer)
            return
        first = len(self.done)
        run()
        layers = tuple(self.done[first:])
        if self._store is not None and layers:
            modules = {f.layer.path: f.module for f in find(self.model)}
            weights = tuple(
                {**_weights(modules[layer.path]), **self._nested.get(layer.path, {})}
                for layer in layers
            )
            self._store.write(name, Part(layers, weights))

    def _smooth(self, links: tuple[Link, ...]) -> None:
        """Make channels alike, and keep what of it is not in the weights to come."""
        changed = smooth(self.model, links, self.batches, call=self.call)
        if self._store is not None:
            coming = {f"{path}/kernel" for path in self.todo}
            self._store.keep({path: v for path, v in changed.items() if path not in coming})

    def _tune(self, tuning: Tuning, bits: int | None, done: int) -> None:
        """Tune all layers together, at a nested precision if given; or take that from the store."""

        def report(steps: int, _: int) -> None:
            self.progress(done + steps, self.total)

        found = None if self._store is None else self._store.tuned(bits)
        if found is not None:
            report(len(tuning.batches or ()), 0)
            if bits is None and self._store is not None:
                put_tuned(self.model, found, str(self._store.path))
            return
        model = self.model
        if bits is not None and self._store is not None:
            model = self._store.put(nnx.clone(self._reference), bits)
        unfinished = None if self._store is None else self._store.unfinished(bits)
        tune(model, self._reference, tuning, report, unfinished, fixed=self._packed)
        if self._store is not None:
            self._store.keep_tuned(numbers(model), bits)

    def _key(self, links: tuple[Link, ...]) -> str:
        """What the result depends on, in short."""
        tuning = self.tuning
        steps = tuning and (tuning.loss.__qualname__, tuning.rate)
        about = (self.todo, self.method, steps, *links, *sorted(self._packed))
        digest = hashlib.sha256(repr(about).encode())
        data = (self.batches, tuning and tuning.batches, dict(self._packed))
        for leaf in jax.tree.leaves((nnx.state(self.model), data)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def _run_blocks(self) -> None:
        references = find_blocks(self.model, list(self.todo))
        exact_references = find_blocks(self._reference, list(self.todo))
        packed_model = Blocks(self.model, references, self.call)
        exact_model = Blocks(self._reference, exact_references, self.call)
        outputs: list[tuple[Any, Any]] = [(None, None)] * len(self.batches)
        for i, (packed, exact) in enumerate(zip(references, exact_references, strict=True)):
            runs = [
                Runs(
                    packed_model.run_of(i, batch, output),
                    # What it gives is asked for twice: as its layers' inputs are seen, and then.
                    functools.cache(exact_model.run_of(i, batch, exact_output)),
                )
                for batch, (output, exact_output) in zip(self.batches, outputs, strict=True)
            ]
            calibrate = functools.partial(
                self._calibrate, packed.node, exact.node, f"{packed.path}/", runs
            )
            self._part(packed.path, calibrate)
            outputs = [(run.packed(), run.exact()) for run in runs]

    def _calibrate(self, module: Any, exact: Any, prefix: str, runs: list[Runs]) -> None:
        """Calibrate the layers of a module that its runs call, in that order."""
        copies = {f.layer.path: f for f in find(exact)}
        here = [f for f in find(module) if prefix + f.layer.path in self.todo and f.has_rows]
        stages = order(here, runs[0].packed) if here else []
        firsts = [copies[stage[0].layer.path] for stage in stages]
        exact_inputs = [inputs_of(firsts, run.exact) for run in runs]
        for stage in stages:
            rows = [
                (input_of(stage[0], run.packed), exact[stage[0].layer.path])
                for run, exact in zip(runs, exact_inputs, strict=True)
            ]
            moments: dict[bool, Moments] = {}  # by whether inputs are rotated
            for found in stage:
                quantization = self.todo[prefix + found.layer.path]
                if quantization.rotate not in moments:
                    moments[quantization.rotate] = moments_of(rows, quantization.rotate)
                self._pack(found, prefix, quantization, moments[quantization.rotate])

    def _pack(
        self, found: Found, prefix: str, quantization: Quantization, moments: Moments
    ) -> None:
        path = prefix + found.layer.path
        layer = dataclasses.replace(found.layer, path=path)
        reason = check_inputs(layer, moments)
        if reason is not None:
            self._round(dataclasses.replace(found, layer=layer), reason)
            return
        weight, shift, error, nested = pack(layer, quantization, moments, self.method)
        self._nested[path] = nested
        bias = getattr(found.module, "bias", None)
        if bias is not None and self.method.correct_bias:
            bias.set_value((bias[...] + shift.reshape(bias[...].shape)).astype(bias[...].dtype))
        self._replace(found, path, weight.prepare())
        self._finish(CalibratedLayer(path, quantization, int(moments.rows), error, None))

    def _round(self, found: Found, reason: str) -> None:
        path = found.layer.path
        self._replace(found, path, None)
        self._finish(CalibratedLayer(path, self.todo[path], 0, None, reason))

    def _replace(self, found: Found, path: str, weight: QuantizedTensor | None) -> None:
        self.model = found.convert(self.model, self.todo[path], weight)

    def _finish(self, layer: CalibratedLayer) -> None:
        del self.todo[layer.path]
        self.done.append(layer)
        self.progress(len(self.done), self.total)


def _weights(module: Any) -> dict[str, Any]:
    """The packed weight and the bias of a packed layer."""
    packed = next(value for _, value in held(module) if isinstance(value, Packed))
    weights = {"kernel": packed.get_value().restore()}
    bias = getattr(module, "bias", None)
    return weights if bias is None else {**weights, "bias": bias[...]}
