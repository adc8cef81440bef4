"""Calibration of a Linen model, layer by layer on the inputs that packed layers before it give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from .._compat import Tracer
from ..calibrate.descend import Tuning
from ..calibrate.moments import Moments, moments_of
from ..calibrate.pack import Packing, check_inputs, pack
from ..calibrate.report import CalibratedLayer, CalibrationReport
from ..calibrate.solve import Method
from ..einsum import einsum_rows
from ..plan import Plan
from ..rules import Rules
from .boxes import reboxed, unboxed
from .calls import Calls, EinsumCall, by_function, described_call, plain
from .convert import Chosen, choose, converted, quantized_module, with_collections
from .find import LinenLayer, flatten
from .quantized import Quantized
from .tune import tune
from .weights import PARAMS

Path = tuple[str, ...]
"""Names of modules from the root, and the weight's."""


def calibrate(
    module: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    calibration: Method | None = None,
    tuning: Tuning | None = None,
    progress: Callable[[int, int], None] | None = None,
    calls: Calls | None = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[Quantized, Any, CalibrationReport]:
    """Quantize a Linen model so that its outputs change least on `batches`.

    `quantize_model` rounds each weight on its own; this also sees what goes into it. The model is
    run eagerly up to each layer in turn, in float and with all layers before it packed, so that
    errors don't add up; time so grows with the square of the number of layers. All is
    deterministic.

    Args:
      module, rules, variables: the model, as for `jax_anyprec.quantize_model`.
      batches: inputs, a few hundred rows of each layer's K at least: the one argument of a call, or
        a tuple of its arguments.
      calibration: how codes and scales are found, without nested precisions; None for what measured
        best.
      tuning: how scales, norms and biases of the whole model are tuned together at the end, see
        `jax_anyprec.calibrate.tune`; None leaves that out. Its batches are as `batches`; `call` has
        no meaning for Linen models.
      progress: called with the layers done so far and their number; steps of tuning count too.
      calls, method, kwargs: as for `jax_anyprec.linen.convert.quantize_linen`, in each call.

    Returns:
      A `Quantized` module and its variables, as `jax_anyprec.quantize_model` gives, and a
      `CalibrationReport`. Layers that no batch reaches, that run in `nn.scan`, `nn.jit` or another
      transformation, or whose inputs are no rows of one matrix (embeddings, experts) are rounded to
      nearest; it says so.

    Raises:
      ValueError: there are no batches, inputs of a layer or a loss of tuning are not finite, or as
        for `quantize_model`.
    """
    given = _as_arguments(batches)
    if not given:
        raise ValueError("batches must hold at least one batch, got none")
    if tuning is not None:
        tuning = _suited(tuning, given)
    calibration = Method() if calibration is None else calibration
    if calibration.nested:
        raise ValueError("calibration has nested precisions, which only NNX models are packed for")
    call = {**kwargs, "method": method}
    chosen = choose(module, rules, variables, given[0], call, calls)
    state = _Calibration(module, variables, chosen, given, call, calls or {}, calibration)
    return state.run((lambda done, total: None) if progress is None else progress, tuning)


def _as_arguments(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


def _suited(tuning: Tuning, batches: list[tuple[Any, ...]]) -> Tuning:
    if tuning.call is not None:
        raise ValueError("Tuning.call must be None for Linen models: `method` says what is called")
    own = batches if tuning.batches is None else _as_arguments(tuning.batches)
    return dataclasses.replace(tuning, batches=own)


class _Reached(Exception):
    """The inputs of the layers that were waited for, so that the rest need not be run."""


class _Calibration:
    """The state of a calibration: which layers are packed, and all variables with them."""

    def __init__(
        self,
        module: nn.Module,
        variables: Mapping[str, Any],
        chosen: Sequence[Chosen],
        batches: Sequence[tuple[Any, ...]],
        call: Mapping[str, Any],
        calls: Calls,
        method: Method,
    ):
        self.module, self.exact, self.variables = module, variables, variables
        self.chosen = {(*layer.scope, layer.name): (layer, q) for layer, q in chosen}
        self.batches, self.call, self.calls, self.method = batches, call, calls, method
        self.packed: list[Chosen] = []
        self.done: list[CalibratedLayer] = []

    def run(
        self, progress: Callable[[int, int], None], tuning: Tuning | None
    ) -> tuple[Quantized, Any, CalibrationReport]:
        left, count = dict.fromkeys(self.chosen), len(self.chosen)
        total = count + (len(tuning.batches or ()) if tuning else 0)
        for stage in self._stages():
            seen: dict[bool, Moments] = {}  # of all its layers, by whether inputs are rotated
            for path, call in stage.items():
                rotate = self.chosen[path][1].rotate
                if rotate not in seen:
                    seen[rotate] = moments_of(self._inputs(path), rotate)
                self._pack(path, call, seen[rotate])
                del left[path]
                progress(len(self.done), total)
        for path in left:
            self._round(path, "its inputs are no rows of one matrix, or it is not called eagerly")
            progress(len(self.done), total)
        # As `quantize_model` gives it: with settings in the order of the variables.
        module = quantized_module(self.module, list(self.chosen.values()), self.calls)
        if tuning:
            self.variables = tune(
                module, self.variables, self.exact, tuning, self.call,
                lambda done, _: progress(count + done, total),
            )  # fmt: skip
        return module, self.variables, CalibrationReport(module, tuple(self.done))

    def _stages(self) -> list[dict[Path, EinsumCall]]:
        """Layers that can be calibrated, by order of call; neighbours of one input together."""
        stages: list[dict[Path, EinsumCall]] = []
        seen: set[Path] = set()
        last: Any = None

        def show(path: Path, call: EinsumCall) -> None:
            nonlocal last
            if path not in self.chosen or path in seen or not _has_rows(self.chosen[path][0], call):
                return
            seen.add(path)
            if not stages or call.inputs is not last:
                stages.append({})
            stages[-1][path] = call
            last = call.inputs

        self._watch(self.module, self.exact, self.batches[0], show)
        return stages

    def _inputs(self, path: Path) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Rows that go into a layer in each batch, in the packed and in the float model."""
        packed = quantized_module(self.module, self.packed, self.calls)

        def show(found: Path, call: EinsumCall) -> None:
            if found == path:
                raise _Reached(einsum_rows(call.spec, call.inputs))

        def rows(module: nn.Module, variables: Any, batch: tuple[Any, ...]) -> jax.Array:
            try:
                self._watch(module, variables, batch, show)
            except _Reached as reached:
                return reached.args[0]
            raise ValueError(f"layer {'/'.join(path)!r} is called with some batches only")

        for batch in self.batches:
            yield rows(packed, self.variables, batch), rows(self.module, self.exact, batch)

    def _watch(
        self,
        module: nn.Module,
        variables: Any,
        batch: tuple[Any, ...],
        show: Callable[[Path, EinsumCall], None],
    ) -> None:
        """Run the model on a batch, and show each call of a layer whose weight is in float."""
        functions = by_function(self.calls)
        del functions[plain(nn.Embed.attend)]  # its table is looked up as well

        def intercept(
            next_function: Callable[..., Any],
            args: Sequence[Any],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            call = described_call(functions, args, kwargs, context)
            if call is not None:
                show((*context.module.path, call.weight), call)
            return next_function(*args, **kwargs)

        with nn.intercept_methods(intercept):
            module.apply(variables, *batch, **self.call)

    def _pack(self, path: Path, call: EinsumCall, moments: Moments) -> None:
        layer, quantization = self.chosen[path]
        reason = check_inputs(layer, moments)
        if reason is not None:
            self._round(path, reason)
            return
        packing = pack(layer, quantization, moments, self.method)
        self._replace(path, packing)
        if call.bias is not None and self.method.correct_bias:
            self._correct((*layer.scope, call.bias), layer, packing.shift)
        rows = int(moments.rows)
        self.done.append(CalibratedLayer(layer.path, quantization, rows, packing.error, None))

    def _round(self, path: Path, reason: str) -> None:
        layer, quantization = self.chosen[path]
        self._replace(path, None)
        self.done.append(CalibratedLayer(layer.path, quantization, 0, None, reason))

    def _replace(self, path: Path, packing: Packing | None) -> None:
        weights = {} if packing is None else {path: packing.weight}
        self.variables = converted(self.variables, [self.chosen[path]], weights)
        self.packed.append(self.chosen[path])

    def _correct(self, path: Path, layer: LinenLayer, shift: jax.Array) -> None:
        """Add a shift ``[N]`` to a bias."""
        assert layer.product is not None
        shift = layer.product.as_bias(shift, layer.inner_shape)
        params = dict(flatten(self.variables[PARAMS]))
        box = params[path]
        bias = (unboxed(box) + shift).astype(unboxed(box).dtype)
        params[path] = reboxed(box, bias)
        self.variables = with_collections(self.variables, {PARAMS: params})


def _has_rows(layer: LinenLayer, call: EinsumCall) -> bool:
    """Whether the weight is a single matrix, and this call shows rows that it multiplies."""
    return layer.is_single and not isinstance(call.inputs, Tracer)
