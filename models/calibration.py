"""Calibration of the decoders here: which text, which layers, and how they are held by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.calibrate.pack import has_coarse_activations
from jax_anyprec.nnx.convert import Found, find, quantized_by
from jax_anyprec.nnx.packed import packed_in
from jax_anyprec.quantization import Quantization
from jax_anyprec.rotation import MIN_BLOCK

from .llama import Llama
from .projections import Projections

Item = TypeVar("Item")

GROUP = 64
"""Weights that share a scale: 0.25 bits a weight in float16."""

FEW = 8
"""Windows that are enough to tell which layers matter."""

BATCH = 4
"""Windows that are run together."""


def calibration_part(items: Sequence[Item]) -> Sequence[Item]:
    """Every other item of a collection: what `jax-anyprec quantize` sees."""
    return items[::2]


def held_out_part(items: Sequence[Item]) -> Sequence[Item]:
    """The items between those of `calibration_part`, to measure on."""
    return items[1::2]


def default_quantization(
    k: int,
    bits: int,
    activations: int | None = 8,
    group_size: int | None = GROUP,
    act_scales: Literal["group", "token"] = "token",
    offsets: bool = False,
) -> Quantization:
    """How a weight of K rows is held best: rotated, in groups, where K lets it be.

    docs/accuracy.md has the measurements.
    """
    fits = group_size is not None and k % group_size == 0
    return Quantization(
        weights=bits,
        activations=activations,
        group_size=group_size if fits else None,
        rotate=k % MIN_BLOCK == 0,
        scale_dtype="float16",
        act_scales=act_scales,
        offsets=offsets,
    )


def default_rules(model: nnx.Module, bits: int, **options: Any) -> list[tuple[str, Quantization]]:
    """`default_quantization` of each layer that is quantized unless told otherwise."""
    return [
        (found.layer.path, default_quantization(_rows(found), bits, **options))
        for found, _ in quantized_by(model, Quantization(weights=bits))
    ]


def _rows(found: Found) -> int:
    assert found.layer.matrix is not None
    return found.layer.matrix[-2]


def batches_of(windows: np.ndarray, size: int = BATCH) -> list[jax.Array]:
    """Windows ``int32[windows, context]`` in batches of `size`."""
    starts = range(0, len(windows), size)
    return [jnp.asarray(windows[start : start + size]) for start in starts]


def split(windows: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and to tune on: the latter of so many tokens, evenly spaced.

    Raises:
      ValueError: none is left to calibrate on.
    """
    count, context = tokens // windows.shape[1], windows.shape[1]
    if count >= len(windows):
        raise ValueError(
            f"{tokens} of {windows.size} tokens to tune on leave no window of {context} to "
            "calibrate on"
        )
    last = np.linspace(0, len(windows), count + 1)[1:].astype(int) - 1
    tuned = np.isin(np.arange(len(windows)), last)
    return windows[~tuned], windows[tuned]


def _few(windows: np.ndarray, size: int) -> list[jax.Array]:
    return batches_of(windows[:: -(-len(windows) // FEW)], size)


def calibrate_decoder(
    model: Any,
    windows: np.ndarray,
    rules: Any,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ap.CalibrationReport:
    """`jax_anyprec.calibrate_model` of a decoder on tokens ``int32[windows, context]``.

    Where rules give activations fewer than 8 bits, channels are smoothed first, unless
    `links` says otherwise. Weights alone lose by it: docs/accuracy.md.
    """
    coarse = any(has_coarse_activations(each) for _, each in quantized_by(model, rules))
    options.setdefault("links", smoothing_links(model) if coarse else ())
    return ap.calibrate_model(
        model,
        rules,
        batches_of(windows),
        call=hidden,
        progress=progress,
        **options,
    )


def decoder_tuning(windows: np.ndarray, **options: Any) -> ap.calibrate.Tuning:
    """How a decoder is tuned to predict as in float: a step for each window ``[windows, context]``.

    Text that was calibrated on shows a third of what others lose: take other windows.
    """
    order = np.random.default_rng(0).permutation(len(windows))
    batches = batches_of(windows[order], 1)
    return ap.calibrate.Tuning(batches, loss=ap.calibrate.kl_divergence, **options)


def hidden(decoder: Any, tokens: jax.Array) -> Any:
    """What calibration runs of a decoder: all but its head."""
    return decoder.hidden(tokens)


def smooth_decoder(model: Any, windows: np.ndarray) -> None:
    """`jax_anyprec.calibrate.smooth` of a decoder on `FEW` of the windows, in place."""
    ap.calibrate.smooth(model, smoothing_links(model), _few(windows, BATCH), call=hidden)


def smoothing_links(model: Any) -> list[ap.calibrate.Link]:
    """The channels of a Llama that `jax_anyprec.calibrate.smooth` may scale; none of others.

    Norms give them to the projections after them, values to the attention's output, and the linear
    half of a gated unit to its down projection.
    """
    if not isinstance(model, Llama):
        return []
    links: list[ap.calibrate.Link] = []
    for i, layer in enumerate(model.layers):
        attention, feed_forward = f"layers/{i}/attention", f"layers/{i}/feed_forward"
        qkv = _paths(layer.attention.qkv, f"{attention}/qkv")
        gate_up = _paths(layer.feed_forward.gate_up, f"{feed_forward}/gate_up")
        values, first_value = _last(layer.attention.qkv)
        up, first_up = _last(layer.feed_forward.gate_up)
        output, down = (f"{attention}/output",), (f"{feed_forward}/down",)
        links += [
            ap.calibrate.Link(f"{attention}_norm", qkv),
            ap.calibrate.Link(qkv[values], output, first_value, model.config.head_dim),
            ap.calibrate.Link(f"{feed_forward}_norm", gate_up),
            ap.calibrate.Link(gate_up[up], down, first_up),
        ]
    return links


def _paths(projections: Projections, path: str) -> tuple[str, ...]:
    return tuple(f"{path}/layers/{i}" for i in range(len(projections.layers)))


def _last(projections: Projections) -> tuple[int, int]:
    """Of the last output: the layer that gives it, the last one, and the first of its columns."""
    return len(projections.layers) - 1, sum(projections.widths[-1][:-1])


def decoder_costs(
    model: Any,
    windows: np.ndarray,
    rules: Any,
    *,
    packed: Mapping[str, ap.QuantizedTensor] | None = None,
    budget: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ap.calibrate.Costs:
    """`jax_anyprec.calibrate.measure_costs` of a decoder, by what its predictions lose.

    At most FEW of the windows, evenly spaced, are used. A scale for each output channel is
    among the choices, and what is `packed` already, `packed_weights` of a file say. A `budget` that
    is too small is refused at once.
    """
    return ap.calibrate.measure_costs(
        model,
        rules,
        _few(windows, 1),  # derivatives take much memory
        group_sizes=(None,),
        packed=packed,
        budget=budget,
        loss=ap.calibrate.sampled_loss,
        call=lambda decoder, tokens: decoder(tokens),
        progress=progress,
    )


def packed_weights(packed: nnx.Module, model: nnx.Module) -> dict[str, ap.QuantizedTensor]:
    """The weights of a decoder as its file packs them, by the layers of the float model.

    Args:
      packed: loaded from the file with weights as it has them.
      model: loaded from it in float.

    Returns:
      Those of layers that both have: one may have joined projections that the other has not.
    """
    matrices = {found.layer.path: found.layer.matrix for found in find(model)}
    variables: dict[str, Any] = {path: each.node for path, each in packed_in(packed).items()}
    tensors = {path.removesuffix("/kernel"): v.get_value() for path, v in variables.items()}
    return {
        path: tensor.restore()
        for path, tensor in tensors.items()
        if matrices.get(path) == tensor.shape
    }
