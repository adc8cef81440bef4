"""Calibration: packed weights that keep a model's outputs on examples of its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..rules import Rules
from ..tensor import QuantizedTensor
from .allocate import Allocation, Costs, allocate_bits, measure_costs
from .blocks import call_plainly
from .compensate import compensate, put_factors
from .descend import Tuning, kl_divergence, relative_error
from .report import CalibratedLayer, CalibrationReport
from .sensitivity import projected_loss, sampled_loss
from .smooth import Link, smooth
from .solve import Method
from .store import load_calibrated
from .tune import tune

__all__ = [
    "Allocation",
    "CalibratedLayer",
    "CalibrationReport",
    "Costs",
    "Link",
    "Method",
    "Tuning",
    "allocate_bits",
    "calibrate_model",
    "compensate",
    "kl_divergence",
    "load_calibrated",
    "measure_costs",
    "projected_loss",
    "put_factors",
    "relative_error",
    "sampled_loss",
    "smooth",
    "tune",
]


def calibrate_model(
    model: Any,
    rules: Rules,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    method: Method | None = None,
    progress: Callable[[int, int], None] | None = None,
    store: str | os.PathLike[str] | None = None,
    links: Iterable[Link] = (),
    packed: Mapping[str, QuantizedTensor] | None = None,
    tuning: Tuning | None = None,
) -> CalibrationReport:
    """Quantize a model so that its outputs change least on `batches`.

    `quantize_model` rounds each weight on its own; this also sees what goes into it. The model is
    run eagerly, block after block (a block is a layer of a transformer, say), each on what the
    packed blocks before it give, so that errors don't add up. All is deterministic.

    Args:
      model: a `flax.nnx.Module`, changed in place.
      rules: which layers become what, as for `quantize_model`.
      batches: inputs, a few hundred rows of each layer's K at least; kept in memory, with what one
        block makes of them in the float and in the packed model.
      call: ``call(model, batch)`` runs the model; None for ``model(batch)``.
      method: how codes and scales are found; None for what measured best.
      progress: called with the layers done so far and their number; steps of tuning count too.
      store: a folder in which each block is kept when it is done; what is there already, of the
        same model, rules and batches, is taken from it. `load_calibrated` loads it. None keeps
        nothing, and can't be where `method` has nested precisions: their scales are there only.
      links: channels that are made alike in size first, see `calibrate.smooth`: worth it where
        activations have fewer than 8 bits.
      packed: by layer, a weight that is packed already and is taken as it is (`Allocation.packed`,
        say); of the layer's rule only what it says of activations counts then.
      tuning: how scales, norms and biases of the whole model are tuned together at the end, see
        `calibrate.tune`; None leaves that out.

    Returns:
      A `CalibrationReport`; printed, a table. Layers that no input reaches, or whose inputs are no
      rows of one matrix (embeddings, stacked layers, experts), are rounded to nearest; it says so.

    Raises:
      TypeError: the model is no `flax.nnx.Module`; for Linen see `jax_anyprec.linen.calibrate`.
      ValueError: there are no batches, `store` is of another calibration or missing, a rule or a
        packed weight does not fit, packed weights come with links or nested precisions, or inputs
        of a layer are not finite: layers before that one have been quantized. Or the loss of tuning
        is not finite, when all have been.
    """
    from flax import nnx

    from .run import Calibration

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {type(model).__name__}; "
            "jax_anyprec.linen.calibrate is for Linen modules"
        )
    kept, links = list(batches), tuple(links)
    if not kept:
        raise ValueError("batches must hold at least one batch, got none")
    method = Method() if method is None else method
    if packed and (links or method.nested):
        raise ValueError(
            "packed weights can't be given with links, which change weights, or Method.nested, "
            "which needs codes that are chosen for it"
        )
    if method.nested and store is None:
        raise ValueError("store must be given where Method.nested is: it keeps the scales for that")
    calibration = Calibration(
        model,
        rules,
        kept,
        method=method,
        call=call or call_plainly,
        progress=(lambda done, total: None) if progress is None else progress,
        store=store,
        links=links,
        packed=packed or {},
        tuning=tuning,
    )
    calibration.run()
    return CalibrationReport(calibration.model, tuple(calibration.done))
