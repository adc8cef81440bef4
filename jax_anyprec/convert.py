"""Planning and converting a user's model: the entrance to what each framework needs."""

from __future__ import annotations

from typing import Any

from .plan import Plan
from .rules import Rules


def plan(model: Any, rules: Rules, *example: Any, errors: bool = True, **options: Any) -> Plan:
    """What `quantize_model` would do, as a table; the model is not changed.

    Args:
      model: a `flax.nnx.Module`, also one of shapes (`flax.nnx.eval_shape`), which is not run; or
        a `flax.linen.Module`, which is run by shapes alone.
      rules: which layers to quantize and how, see `jax_anyprec.rules`.
      example, options: for Linen, its variables (or their shapes) and the inputs of a call; see
        `jax_anyprec.linen.convert.plan_linen`. For NNX nothing.
      errors: whether to quantize each weight to measure its error; a model of shapes has none.

    Returns:
      A `Plan`: printed, a table; ``plan.rows()`` and ``plan.to_json()`` have the same as data.

    Raises:
      ValueError: a rule is malformed, matches nothing or does not fit a layer's shape.
    """
    if _is_nnx(model, example, options):
        from .nnx.convert import plan_nnx

        return plan_nnx(model, rules, errors=errors)
    from .linen.convert import plan_linen

    return plan_linen(model, rules, *example, errors=errors, **options)


def quantize_model(model: Any, rules: Rules | Plan, *example: Any, **options: Any) -> Any:
    """Quantize the layers of a model as rules or a `Plan` say; the others are left as they are.

    At no time is more held than the model and one layer; for Linen this takes ``donate=True``, or
    else the float kernels stay the caller's.

    Args:
      model: as for `plan`. An NNX model is changed in place, layer by layer; one of shapes becomes
        a packed one of shapes, for a checkpoint to be restored into.
      rules: rules, or a plan that was made for this model.
      example, options: for Linen, see `jax_anyprec.linen.convert.quantize_linen`; for NNX none.

    Returns:
      NNX: the model. Linen: a module and its variables.

    Raises:
      ValueError: as for `plan`; also if nothing would be quantized, or the plan is for another
        model: nothing has been changed then. Or a weight is not finite: layers before it have been.
    """
    if _is_nnx(model, example, options):
        from .nnx.convert import quantize_nnx

        return quantize_nnx(model, rules)
    from .linen.convert import quantize_linen

    return quantize_linen(model, rules, *example, **options)


def _is_nnx(model: Any, example: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether this is an NNX model, or else a Linen one, called as it must be."""
    from flax import linen, nnx  # not before it is needed

    if isinstance(model, nnx.Module):
        if example or options:
            raise TypeError("a flax.nnx.Module needs no variables, inputs or further options")
        return True
    if not isinstance(model, linen.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module or a flax.linen.Module, got {type(model).__name__}"
        )
    if not example:
        raise TypeError("a flax.linen.Module needs its variables and the inputs of a call")
    return False
