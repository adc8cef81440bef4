"""Planning and converting a user's model: the entrance to what each framework needs."""

from __future__ import annotations

from typing import Any

from .plan import Plan
from .rules import Rules


def plan(model: Any, rules: Rules, variables: Any = None, *, errors: bool = True) -> Plan:
    """What `quantize_model` would do, as a table; the model is not run and not changed.

    Args:
      model: a `flax.nnx.Module`, also one of shapes (`flax.nnx.eval_shape`); or a
        `flax.linen.Module` with its variables.
      rules: which layers to quantize and how, see `jax_anyprec.rules`.
      variables: those of a Linen module, as `init` or ``jax.eval_shape(module.init, ...)`` gives.
      errors: whether to quantize each weight to measure its error; a model of shapes has none.

    Returns:
      A `Plan`: printed, a table; ``plan.rows()`` and ``plan.to_json()`` have the same as data.

    Raises:
      ValueError: a rule is malformed, matches nothing or does not fit a layer's shape.
    """
    if _is_nnx(model, variables):
        from .nnx.convert import plan_nnx

        return plan_nnx(model, rules, errors=errors)
    from .linen.convert import plan_linen

    return plan_linen(model, rules, variables, errors=errors)


def quantize_model(model: Any, rules: Rules | Plan, variables: Any = None) -> Any:
    """Quantize the layers of a model as rules or a `Plan` say; the others are left as they are.

    At no time more is held than the model and one layer.

    Args:
      model, variables: as for `plan`. An NNX model is changed in place, layer by layer.
      rules: rules, or a plan that was made for this model.

    Returns:
      NNX: the model. Linen: what `jax_anyprec.linen.convert.quantize_linen` returns.

    Raises:
      ValueError: as for `plan`; also if nothing would be quantized, or the plan is for another
        model. The model has not been changed then.
    """
    if _is_nnx(model, variables):
        from .nnx.convert import quantize_nnx

        return quantize_nnx(model, rules)
    from .linen.convert import quantize_linen

    return quantize_linen(model, rules, variables)


def _is_nnx(model: Any, variables: Any) -> bool:
    """Whether this is an NNX model, or else a Linen one; checked here because Flax loads late."""
    from flax import linen, nnx

    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables must be None for a flax.nnx.Module, which holds its own")
        return True
    if not isinstance(model, linen.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module or a flax.linen.Module, got {type(model).__name__}"
        )
    if variables is None:
        raise TypeError("variables must be given for a flax.linen.Module")
    return False
