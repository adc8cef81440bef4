"""Whether packed models compute what they should: logits of a tiny one against XLA's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..report import Row
from .decode_rows import contestant, failure
from .llamas import CONFIGS, describe, draw_weights
from .shapes import Precision
from .steps import Case, compile_all, draw_state

FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 1e-4, 2e-2
"""How far logits of a tiny float32 model may be from XLA's, relative to their norm: sums differ by
rounding, which moves a few quantized activations to the next level."""


def check(chosen: Sequence[Precision], platform: str, command_buffers: str) -> Iterator[Row]:
    """How far the logits of a tiny float32 model are from XLA's, for every precision."""
    config, case = CONFIGS["tiny"], Case(batch=3, tokens=1, context=64)
    state = draw_state(config, case, jnp.float32)
    entries = []
    for precision in chosen:
        for implementation in (platform, "xla"):
            model = describe(config, precision, implementation, jnp.float32)
            entries.append((model, draw_weights(model)))
    logits: dict[Precision | None, list[np.ndarray]] = {precision: [] for precision in chosen}
    for model, step in compile_all(entries, case, command_buffers):
        try:
            if isinstance(step, Exception):
                raise step
            own = jax.tree.map(jnp.copy, state).at(case.context // 2)
            logits[model.precision].append(np.asarray(step(own).logits))
        except Exception as error:  # whatever it is, the others go on
            yield {"kind": "check"} | contestant(model) | failure(error)
    for precision, found in logits.items():
        if len(found) == 2:
            name = {"kind": "check", "contestant": str(precision)}
            yield name | compare(*found, precision)


def compare(found: np.ndarray, wanted: np.ndarray, precision: Precision) -> Row:
    tolerance = FLOAT_TOLERANCE if precision.pair.activations is None else QUANTIZED_TOLERANCE
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    row: Row = {"relative_error": error, "tolerance": tolerance}
    if not error <= tolerance:
        row["error"] = f"logits of the tiny model differ from XLA's by {error:.2g}"
    return row
