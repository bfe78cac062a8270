"""Losses with optax's signatures and values that register themselves as they compute.

Each returns what `optax.losses` returns: values that still have to be reduced. What is
registered is their sum within a case and mean over the leading axis of cases, so reduce
them so: `losses.squared_error(y, t).sum(-1).mean()`. A different reduction is caught
when the plan is made; `weight` states a different factor. With a `mask` it is the mean
over what counts: `losses.squared_error(y, t, mask=m).sum() / m.sum()`.

Under `jax.vmap` the mapped axis becomes the axis of cases, which suits a function of
one case. Under a `vmap` over something else, such as the members of an ensemble, it
leaves what was a mean over the n cases of each as a sum: there pass `weight=1 / n`, or
register the outputs of all members outside of the `vmap`, cases first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from kfac_jax import distributions, tags
from kfac_jax._utils.arguments import array, floating, integer, real, shown


def _output(name: str, value: ArrayLike) -> Array:
    return floating(f"{name}, a registered output,", value)


def _classes(logits: Array, axis: int, where: ArrayLike | None) -> Array | None:
    """Which classes take part, like the logits; None for all.

    Args:
      logits: of the classes.
      axis: that of the classes.
      where: an array that broadcasts to them, or None.

    Returns:
      It, broadcast.

    Raises:
      ValueError: if one does not fit the logits.
    """
    integer("axis", axis)
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"axis must be one of the {logits.ndim} axes of the logits; got {axis}."
        )
    if where is None:
        return None
    where = real("where", where)
    tail = logits.shape[logits.ndim - where.ndim :] if where.ndim else ()
    fits = where.ndim <= logits.ndim and all(
        a in (1, b) for a, b in zip(where.shape, tail, strict=True)
    )
    if where.dtype != bool or not fits:
        raise ValueError(
            "where must be an array of bools that broadcasts to the logits "
            f"{logits.shape}; got {shown(where)}."
        )
    return jnp.broadcast_to(where, logits.shape)


def _hide_classes(logits: Array, where: Array | None) -> Array:
    """Gives excluded classes probability zero, staying finite."""
    if where is None:
        return logits
    return jnp.where(where, logits, jnp.finfo(logits.dtype).min / 2)


def _counted(
    mask: ArrayLike | None, shape: tuple[int, ...], weight: ArrayLike
) -> tuple[Array | None, ArrayLike]:
    """Makes of a mean over what counts the mean over all cases that is registered.

    Args:
      mask: what counts, the leading axes of the values; None for all.
      shape: that of the values.
      weight: the factor of the loss.

    Returns:
      The mask as numbers, and the factor of the mean over all cases.

    Raises:
      TypeError: if the mask is no array of real numbers, or the weight no number.
      ValueError: if the mask does not have the leading axes, or the weight is out of
        its range.
    """
    if mask is None:
        return None, weight
    mask = real("mask", mask)
    if not mask.ndim or mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"mask must have the leading axes of the output's values {shape}, that of "
            f"cases at least; got shape {mask.shape}. Under vmap, register the outputs "
            "of all cases outside of it."
        )
    mask = mask.astype(jnp.result_type(float))
    total = mask.sum()
    scale = jnp.where(total > 0, shape[0] / jnp.where(total > 0, total, 1.0), 0.0)
    weight = tags.loss_weight(weight)
    return mask, weight.astype(scale.dtype) * scale


def _masked(values: Array, mask: Array | None) -> Array:
    if mask is None:
        return values
    mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
    return jnp.where(mask != 0, values * mask.astype(values.dtype), 0)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers `-log softmax(logits)[label]`.

    Args:
      logits: `[n, ..., classes]`.
      labels: class indices, `[n, ...]`.
      axis: the axis of the classes.
      where: which classes take part, or None for all.
      mask: which cases count, `[n]`, or which of their positions, `[n, ...]`, as bools
        or factors; None for all. What does not count is zero in the result; average
        with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      The value of each case, `[n, ...]`.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> softmax_cross_entropy_with_integer_labels(jnp.zeros((4, 2)), jnp.zeros(4, int))
    Array([0.6931472, 0.6931472, 0.6931472, 0.6931472], dtype=float32)
    """
    logits, labels = _output("logits", logits), real("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"Integer labels are expected; got {labels.dtype}.")
    where = _classes(logits, axis, where)
    registered = jnp.moveaxis(_hide_classes(logits, where), axis, -1)
    if labels.shape != registered.shape[:-1]:
        raise ValueError(
            f"Labels of shape {registered.shape[:-1]} are expected for logits "
            f"{logits.shape}; got {labels.shape}. Check the batch's leading axes."
        )
    mask, weight = _counted(mask, registered.shape[:-1], weight)
    tags.register_softmax_cross_entropy_loss(registered, labels, mask, weight)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, labels, axis=axis, where=where
    )
    return _masked(values, mask)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers `-Σ labels · log softmax(logits)`.

    Args:
      logits: `[n, ..., classes]`.
      labels: probabilities (one-hot or soft) of the same shape, summing to one.
      axis: the axis of the classes.
      where: which classes take part, or None for all.
      mask: which cases count, `[n]`, or which of their positions, `[n, ...]`, as bools
        or factors; None for all. What does not count is zero in the result; average
        with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      The value of each case, `[n, ...]`.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([[0.5, 0.5]]))
    Array([0.6931472], dtype=float32)
    """
    logits, labels = _output("logits", logits), real("labels", labels)
    where = _classes(logits, axis, where)
    if labels.shape != logits.shape:
        raise ValueError(
            f"Labels of the logits' shape {logits.shape} are expected; got "
            f"{labels.shape}. Check the batch's leading axes."
        )
    registered = jnp.moveaxis(_hide_classes(logits, where), axis, -1)
    mask, weight = _counted(mask, registered.shape[:-1], weight)
    tags.register_softmax_cross_entropy_loss(
        registered, jnp.moveaxis(labels, axis, -1), mask, weight
    )
    values = optax.losses.softmax_cross_entropy(logits, labels, axis=axis, where=where)
    return _masked(values, mask)


def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers the Bernoulli cross entropy, elementwise.

    Args:
      logits: `[n, ...]`.
      labels: in [0, 1], of the same shape.
      mask: which cases count, `[n]`, or which of their positions, `[n, ...]`, as bools
        or factors; None for all. What does not count is zero in the result; average
        with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      The elementwise values, `[n, ...]`: sum them within a case, average over cases.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> sigmoid_binary_cross_entropy(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    Array([[0.6931472, 0.6931472]], dtype=float32)
    """
    logits, labels = _output("logits", logits), real("labels", labels)
    mask, weight = _counted(mask, logits.shape, weight)
    tags.register_sigmoid_cross_entropy_loss(logits, labels, mask, weight)
    return _masked(optax.losses.sigmoid_binary_cross_entropy(logits, labels), mask)


def squared_error(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers `(prediction - target)²`, elementwise, without a ½.

    Args:
      predictions: `[n, ...]`.
      targets: of the same shape; None means zeros.
      mask: which cases count, `[n]`, or which of their positions, `[n, ...]`, as bools
        or factors; None for all. What does not count is zero in the result; average
        with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      The elementwise values, `[n, ...]`: sum them within a case, average over cases.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.ones((1, 2)), jnp.zeros((1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    predictions = _output("predictions", predictions)
    none = jnp.zeros_like(predictions) if targets is None else targets
    known = real("targets", none)
    mask, weight = _counted(mask, predictions.shape, weight)
    tags.register_squared_error_loss(predictions, known, weight, mask)
    return _masked(optax.losses.squared_error(predictions, known), mask)


def normal_negative_log_likelihood(
    mean: ArrayLike,
    log_variance: ArrayLike,
    targets: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers `-log N(target; μ, eˢ)` without constants, elementwise.

    For networks that predict the variance, too. With a fixed variance use
    `squared_error`, or `register_normal_predictive_distribution`.

    Args:
      mean: μ, `[n, ...]`.
      log_variance: s, of the same shape.
      targets: of the same shape.
      mask: which cases count, `[n]`, or which of their positions, `[n, ...]`, as bools
        or factors; None for all. What does not count is zero in the result; average
        with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      `s / 2 + (target - μ)² / (2 eˢ)`, `[n, ...]`: sum within a case, average over
      cases.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes differ.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros((1, 2))
    >>> normal_negative_log_likelihood(jnp.ones((1, 2)), zeros, zeros)
    Array([[0.5, 0.5]], dtype=float32)
    """
    mean = _output("mean", mean)
    log_variance = _output("log_variance", log_variance)
    targets = real("targets", targets)
    if not mean.shape == log_variance.shape == targets.shape:
        raise ValueError(
            "normal_negative_log_likelihood expects mean, log_variance and targets of "
            f"one shape; got {mean.shape}, {log_variance.shape} and {targets.shape}."
        )
    distribution = distributions.NormalWithVariance()
    z = jnp.stack([mean, log_variance], axis=-1)
    mask, weight = _counted(mask, mean.shape, weight)
    tags.bind_loss(distribution, z, [targets], mask, weight)
    return _masked(distribution.negative_log_likelihood(z, (targets,)), mask)


def convex(
    per_case_loss: Callable[..., Array],
    outputs: ArrayLike,
    *data: ArrayLike,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Computes and registers any loss that is convex in the network's output.

    The Hessian of one case's loss, which plays the Fisher's part, comes from autodiff;
    it is `[d, d]` for d outputs of a case, so d should be moderate. In the sampled
    modes the output gradients are drawn from a normal distribution with that
    covariance.

    Of a loss that is not convex the negative eigenvalues of these Hessians are taken
    for zero, in every mode: its curvature is then no Gauss-Newton matrix. A plan that
    is made with concrete arrays warns if it meets some.

    Args:
      per_case_loss: `(output, *data) -> scalar` for one case. It must not close over
        arrays that are traced with the loss function (the parameters, its arguments,
        what is computed of them): pass those as data. `make_curvature` refuses it.
      outputs: `[n, ...]`.
      *data: arrays with the same leading axis.
      mask: which cases count, `[n]`, as bools or factors; None for all. What does not
        count is zero in the result; average with `.sum() / mask.sum()`.
      weight: the factor of this loss in the returned scalar.

    Returns:
      The value of each case, `[n]`.

    Raises:
      TypeError: if the loss is no function, or another argument no array.
      ValueError: if leading axes differ.

    >>> import jax.numpy as jnp
    >>> logcosh = lambda y, t: jnp.log(jnp.cosh(y - t)).sum()
    >>> convex(logcosh, jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    Array([0., 0.], dtype=float32)
    """
    distribution = distributions.Convex(per_case_loss)
    outputs = _output("outputs", outputs)
    arrays = [array("data", x) for x in data]
    if outputs.ndim == 0 or any(x.shape[:1] != outputs.shape[:1] for x in arrays):
        raise ValueError(
            "convex expects outputs and data with one leading axis of cases; got "
            f"{outputs.shape} and {[x.shape for x in arrays]}."
        )
    mask, weight = _counted(mask, outputs.shape[:1], weight)
    tags.bind_loss(distribution, outputs, arrays, mask, weight)
    return _masked(jax.vmap(per_case_loss)(outputs, *arrays), mask)
