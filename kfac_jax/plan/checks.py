"""Checks and warnings when a plan is made."""

import dataclasses
import warnings
from collections.abc import Sequence

from jax.typing import DTypeLike

from kfac_jax._jaxpr.states import Lost
from kfac_jax._utils import arguments
from kfac_jax.blocks import Diagonal, Identity
from kfac_jax.plan import report
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.modes import MODES, is_exact
from kfac_jax.plan.tracing import Traced

SHOWN_LINES = 3


def check_options(
    has_aux: bool,
    estimation_mode: str,
    on_unmatched: str,
    on_rest: str,
    num_samples: int,
    statistics_fraction: float,
    l2: float,
    independent_cases: bool,
) -> None:
    """Checks the options of `make_curvature` that stand alone.

    Args:
      has_aux: a bool.
      estimation_mode: one of `modes.MODES`.
      on_unmatched: "warn", "error" or "ignore".
      on_rest: "warn", "error" or "ignore".
      num_samples: at least one.
      statistics_fraction: in (0, 1].
      l2: at least zero.
      independent_cases: a bool.

    Raises:
      TypeError: if one is of the wrong type.
      ValueError: if one is out of its range.
    """
    arguments.flag("has_aux", has_aux)
    arguments.flag("independent_cases", independent_cases)
    arguments.choice("estimation_mode", estimation_mode, tuple(MODES))
    arguments.choice("on_unmatched", on_unmatched, ("warn", "error", "ignore"))
    arguments.choice("on_rest", on_rest, ("warn", "error", "ignore"))
    arguments.count("num_samples", num_samples, 1)
    arguments.number("statistics_fraction (τ1)", statistics_fraction)
    if not 0.0 < statistics_fraction <= 1.0:
        raise ValueError(
            f"statistics_fraction (τ1) must be in (0, 1]; got {statistics_fraction!r}."
        )
    arguments.number("l2 (η)", l2)
    if not 0.0 <= l2 < float("inf"):
        raise ValueError(f"l2 (η) must be finite and at least 0; got {l2!r}.")


def check_factor_dtype(dtype: DTypeLike | None) -> str | None:
    """The name of a type to keep factors in, or None.

    Raises:
      TypeError: if it is no type of real floating point.
      ValueError: if it is another than bfloat16 and float32.
    """
    if dtype is None:
        return None
    name = str(arguments.floating_type("factor_dtype", dtype))
    if name not in ("bfloat16", "float32"):
        raise ValueError(
            "factor_dtype must be bfloat16 or float32, which have the range of what "
            f"factors are computed in, or None for that type; got {name}."
        )
    return name


def check_sharing(
    layers: Sequence[Layer], blocks_given: bool, weight_sharing: str
) -> None:
    """Raises ValueError if `blocks` leaves no layer a block with that setting."""
    settings = {getattr(layer.block, "weight_sharing", None) for layer in layers}
    if blocks_given and weight_sharing != "expand" and weight_sharing not in settings:
        own = ", ".join(sorted({repr(layer.block) for layer in layers}))
        raise ValueError(
            "weight_sharing is for default blocks, and none is left that uses it: "
            "expected a layer without a block of its own, got "
            f"weight_sharing={weight_sharing!r} and from blocks {own}. Give it to "
            f"a block, Kronecker(weight_sharing={weight_sharing!r}), or leave it out."
        )


def apply_policy(
    layers: Sequence[Layer], on_unmatched: str, *, inputs: bool, quiet: bool
) -> tuple[Layer, ...]:
    """Applies `on_unmatched` to parameters that no layer covers.

    Args:
      layers: the layers.
      on_unmatched: "warn", "error" or "ignore".
      inputs: whether blocks are of inputs alone, so that none is diagonal.
      quiet: whether to leave out warnings, which the plan gave before.

    Returns:
      The layers; ignored ones have the identity as their block.

    Raises:
      ValueError: with "error", naming each parameter, the reason and the line.
    """
    unmatched = [layer for layer in layers if layer.kind == "unmatched"]
    if unmatched and not quiet:
        listing = "\n".join(report.explain(layer) for layer in unmatched)
        if on_unmatched == "error":
            raise ValueError(
                f"No layer covers {len(unmatched)} parameter(s):\n{listing}\nRewrite "
                "the use as a product, scale or shift, tag it with register_generic, "
                "or pass "
                'on_unmatched="warn".'
            )
        if on_unmatched == "warn":
            block = "no block of inputs" if inputs else "a diagonal block"
            warnings.warn(
                f"kfac_jax gives {len(unmatched)} parameter(s) that no layer covers "
                f"{block}:\n{listing}",
                stacklevel=4,  # the caller of make_curvature, by way of derive
            )
    if on_unmatched != "ignore":
        return tuple(layers)
    return tuple(
        dataclasses.replace(layer, block=Identity())
        if layer.kind == "unmatched" and layer.block is not None
        else layer
        for layer in layers
    )


def of_inputs(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers of a plan whose statistics are of inputs alone.

    Args:
      layers: the layers with their blocks.

    Returns:
      The same; those that no layer covers follow their gradient.

    Raises:
      ValueError: if a block needs output gradients.
    """
    result = tuple(
        dataclasses.replace(layer, block=Identity())
        if layer.kind in ("unmatched", "generic") and isinstance(layer.block, Diagonal)
        else layer
        for layer in layers
    )
    wrong = [x for x in result if x.block is not None and x.block.needs_outputs]
    if wrong:
        raise ValueError(
            'estimation_mode="inputs" gathers no output gradients: expected blocks '
            f"InputOnly(), Identity() or None, got {wrong[0].block!r} for layer "
            f"'{wrong[0].name}'. Use another mode for that block."
        )
    return result


def check_means(traced: Traced, on_unmatched: str) -> tuple[str, ...]:
    """Warns if the curvature takes means over the batch for constants.

    Args:
      traced: the traced loss function.
      on_unmatched: whether to "warn".

    Returns:
      The lines for the report.
    """
    lines = [*dict.fromkeys(traced.found.constant_means.values())]
    if not lines:
        return ()
    shown = "; ".join(lines[:SHOWN_LINES])
    more = f"; and {len(lines) - SHOWN_LINES} more" * (len(lines) > SHOWN_LINES)
    text = (
        "Means over the batch that the network normalises with (batch norm) are "
        "constants for the curvature, though not for the gradient nor for exact "
        f"products: {shown}{more}."
    )
    if on_unmatched == "warn":
        warnings.warn(text, stacklevel=3)
    return (text,)


def check_cases(traced: Traced, estimation_mode: str, independent_cases: bool) -> str:
    """Warns of the cost of an exact mode if the axis of examples was lost.

    Args:
      traced: the traced loss function.
      estimation_mode: the mode.
      independent_cases: whether each case then counts as an example.

    Returns:
      The equation where the axis was lost; empty if it was not.
    """
    where = lost_examples(traced, estimation_mode)
    if where and not independent_cases:
        warnings.warn(cost_of_lost_examples(where), stacklevel=3)
    return where


def lost_examples(traced: Traced, estimation_mode: str) -> str:
    """The equation where the axis of examples was lost, if the mode needs that axis."""
    if not is_exact(estimation_mode):
        return ""
    states = traced.found.loss_examples
    return next((state.where for state in states if isinstance(state, Lost)), "")


def cost_of_lost_examples(where: str) -> str:
    """The warning about a lost axis of examples: the cost, and what to do."""
    return (
        "Which examples the registered outputs belong to could not be followed since "
        f"{where}: this exact mode pulls back every case by itself, so that the time "
        "of its statistics grows with the square of the batch. "
        'estimation_mode="fisher_gradients" samples, and pulls back all cases at once; '
        "so does independent_cases=True, which is right if no case's output depends on "
        "another's input."
    )
