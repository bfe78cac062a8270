"""The custom primitives that mark layers and losses, and the functions that place them.

A tag is the identity on its first operand. It costs nothing once compiled, survives
every JAX transformation, and means something only to `kfac_jax.make_curvature`; a
program that holds tags and never uses K-FAC is unchanged.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kfac_jax import distributions
from kfac_jax._jaxpr import _compat
from kfac_jax._utils.arguments import array, floating, is_number, real, shown

layer_tag = _compat.identity_primitive("kfac_layer")
generic_tag = _compat.identity_primitive("kfac_generic")
loss_tag = _compat.keep_unused(_compat.identity_primitive("kfac_loss"))


def _keep_tangent(primitive: Any) -> None:
    def rule(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        return primitive.bind(*primals, **params), tangents[0]

    _compat.set_jvp(primitive, rule)


def _moved(x: Array, axis: int | None, size: int, place: int = 0) -> Array:
    if axis is None:
        return jnp.moveaxis(jnp.broadcast_to(x, (size, *x.shape)), 0, place)
    return jnp.moveaxis(x, axis, place)


def _batch_size(operands: Sequence[Array], axes: Sequence[int | None]) -> int:
    return next(
        x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None
    )


def _batch_layer(operands: Sequence[Array], axes: Sequence[int | None], **params: Any):
    """`y` and `x` get a new axis; so do the parameters if any is batched.

    Then it is one more axis of independent layers, which lead; otherwise one of rows,
    which come after those.
    """
    size = _batch_size(operands, axes)
    count = params["num_inputs"] + 1
    independent = any(axis is not None for axis in axes[count:])
    place = 0 if independent else params["independent"]
    moved = [
        _moved(x, axis, size, place) if i < count or independent else x
        for i, (x, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    if independent:
        params["independent"] += 1
    return layer_tag.bind(*moved, **params), place


def _batch_loss(operands: Sequence[Array], axes: Sequence[int | None], **params: Any):
    """Everything gets a new leading axis, which becomes the axis of cases."""
    size = _batch_size(operands, axes)
    *arrays, weight = operands
    *array_axes, weight_axis = axes
    moved = [_moved(x, a, size) for x, a in zip(arrays, array_axes, strict=True)]
    if weight_axis is not None or weight.ndim:
        weight = _moved(weight, weight_axis, size)
    return loss_tag.bind(*moved, weight, **params), 0


def _batch_generic(operands: Sequence[Array], axes: Sequence[int | None], **_: Any):
    return generic_tag.bind(operands[0]), axes[0]


for _primitive in (layer_tag, generic_tag, loss_tag):
    _keep_tangent(_primitive)
_compat.set_batching(layer_tag, _batch_layer)
_compat.set_batching(loss_tag, _batch_loss)
_compat.set_batching(generic_tag, _batch_generic)


def _static(metadata: dict[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    return tuple((name, _hashable(value)) for name, value in sorted(metadata.items()))


def _hashable(value: Any) -> Hashable:
    """The value or its text; a tuple's type does not tell whether it is hashable."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _parameter(name: str, value: ArrayLike | None) -> Array | None:
    return None if value is None else floating(name, value)


def _bind_layer(
    kind: str,
    y: Array,
    inputs: Sequence[Array],
    params: dict[str, Array | None],
    metadata: Any,
) -> Array:
    given = {name: value for name, value in params.items() if value is not None}
    return layer_tag.bind(
        y,
        *inputs,
        *given.values(),
        kind=kind,
        num_inputs=len(inputs),
        names=tuple(given),
        independent=0,
        metadata=_static(metadata),
    )


def register_dense(
    y: ArrayLike,
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    **metadata: Any,
) -> Array:
    """Marks `y = x @ w + b` as a dense layer.

    A tag wins over detection. It is not needed for layers written with `dot_general`,
    which are found by themselves.

    Args:
      y: the layer's output, `[..., out]`.
      x: the layer's input, `[..., in]`.
      w: the weight, `[in, out]`: a parameter, or a view of one.
      b: the bias, `[out]`, or None.
      **metadata: kept with the tag as static data; what is not hashable, as text.

    Returns:
      `y`; the tag counts only where this returned value is used in its place.

    Raises:
      TypeError: if one is no array of real numbers.
      ValueError: if the shapes are not those of a dense layer.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 3)), jnp.ones((3, 2))
    >>> register_dense(x @ w, x, w).shape
    (4, 2)
    """
    y, x, w = floating("y", y), real("x", x), floating("w", w)
    b = _parameter("b", b)
    fits = (
        w.ndim == 2
        and x.shape[-1:] == w.shape[:1]
        and y.shape == (*x.shape[:-1], w.shape[-1])
        and (b is None or b.shape == w.shape[1:])
    )
    if not fits:
        raise ValueError(
            "register_dense expects y [..., out], x [..., in], w [in, out] and b "
            f"[out]; got y {y.shape}, x {x.shape}, w {w.shape}, b "
            f"{None if b is None else b.shape}. Pass w so that y = x @ w + b."
        )
    return _bind_layer("dense", y, [x], {"w": w, "b": b}, metadata)


def register_conv2d(
    y: ArrayLike,
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    **metadata: Any,
) -> Array:
    """Marks `y` as a two-dimensional convolution of `x` with kernel `w` and bias `b`.

    Args:
      y: the layer's output.
      x: the layer's input, of `y`'s rank.
      w: the kernel, of `y`'s rank.
      b: the bias, or None.
      **metadata: kept with the tag as static data, e.g. strides and padding.

    Returns:
      `y`.

    Raises:
      TypeError: if one is no array of real numbers.
      ValueError: if `y`, `x` and `w` do not have rank four.

    >>> import jax.numpy as jnp
    >>> y = jnp.ones((1, 5, 5, 2))
    >>> register_conv2d(y, jnp.ones((1, 5, 5, 1)), jnp.ones((3, 3, 1, 2))).shape
    (1, 5, 5, 2)
    """
    y, x, w = floating("y", y), real("x", x), floating("w", w)
    ranks = y.ndim, x.ndim, w.ndim
    if ranks != (4, 4, 4):
        raise ValueError(
            f"register_conv2d expects y, x and w of rank 4; got ranks {ranks}."
        )
    return _bind_layer("conv2d", y, [x], {"w": w, "b": _parameter("b", b)}, metadata)


def register_scale_and_shift(
    y: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    **metadata: Any,
) -> Array:
    """Marks `y = x * scale + shift` as an elementwise layer.

    Args:
      y: the layer's output, `[..., features]`.
      x: the layer's input, of `y`'s shape.
      scale: the scale; it broadcasts from the right to `y`'s shape.
      shift: the shift; it broadcasts from the right to `y`'s shape.
      **metadata: kept with the tag as static data; what is not hashable, as text.

    Returns:
      `y`.

    Raises:
      TypeError: if one is no array of real numbers.
      ValueError: if neither scale nor shift is given, or shapes do not broadcast.

    >>> import jax.numpy as jnp
    >>> x, s = jnp.ones((4, 3)), jnp.ones(3)
    >>> register_scale_and_shift(x * s, x, s).shape
    (4, 3)
    """
    if scale is None and shift is None:
        raise ValueError(
            "register_scale_and_shift expects a scale, a shift or both; got neither."
        )
    y, x = floating("y", y), real("x", x)
    params = {"scale": _parameter("scale", scale), "shift": _parameter("shift", shift)}
    for name, value in ({"x": x} | params).items():
        shape = y.shape if value is None else value.shape
        tail = y.shape[y.ndim - len(shape) :]
        if len(shape) > y.ndim or any(
            a not in (1, b) for a, b in zip(shape, tail, strict=True)
        ):
            raise ValueError(
                f"register_scale_and_shift expects {name} to broadcast to y "
                f"{y.shape}; got {name} {shape}."
            )
    return _bind_layer("scale_and_shift", y, [x], params, metadata)


def register_generic(w: ArrayLike) -> Array:
    """Marks a parameter as one to be given a generic diagonal block.

    Use the returned value in place of `w`.

    Args:
      w: a parameter, of any shape.

    Returns:
      `w`.

    Raises:
      TypeError: if it is no array of real floating point.

    >>> import jax.numpy as jnp
    >>> register_generic(jnp.ones(3)).shape
    (3,)
    """
    return generic_tag.bind(floating("w", w))


def bind_loss(
    distribution: distributions.Distribution,
    z: ArrayLike,
    data: Sequence[ArrayLike],
    mask: ArrayLike | None,
    weight: ArrayLike,
) -> Array:
    """Places a loss tag on the output `z`; see `RegisteredLoss` for the meaning.

    Args:
      distribution: the predictive distribution.
      z: its natural parameters, `[n, ..., d]`.
      data: what the loss is computed from besides `z`.
      mask: `[n, ...]`, the leading axes of `z`, or None.
      weight: a number, the factor of this loss in the sum of losses.

    Returns:
      `z`.

    Raises:
      TypeError: if `z` is not a real floating-point array, or another argument no
        array.
      ValueError: if mask or weight do not fit.
    """
    z = floating("A registered output z", z)
    weight = loss_weight(weight).astype(z.dtype)
    operands = [z, *data]
    if mask is not None:
        if is_number(mask) and not 0 <= float(mask) < math.inf:  # pyright: ignore[reportArgumentType]
            raise ValueError(f"A loss mask must be at least 0; got {mask}.")
        mask = real("A loss mask", mask)
        if mask.shape != z.shape[: mask.ndim] or mask.ndim > z.ndim - (
            distribution.event_rank
        ):
            raise ValueError(
                "A loss mask must have the leading axes of the registered output "
                f"{z.shape}, without the classes; got {mask.shape}."
            )
        operands.append(mask)
    return loss_tag.bind(
        *operands,
        weight,
        distribution=distribution,
        num_data=len(data),
        has_mask=mask is not None,
    )


def loss_weight(weight: ArrayLike) -> Array:
    """Checks the factor of a loss.

    Args:
      weight: a number.

    Returns:
      It as an array.

    Raises:
      TypeError: if it is no real number.
      ValueError: if it is negative, not finite or not a scalar.
    """
    if is_number(weight) and not 0 <= float(weight) < math.inf:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"A loss weight must be finite and at least 0; got {weight}.")
    weight = real("A loss weight", weight)
    if weight.ndim:
        raise ValueError(f"A loss weight must be a scalar; got shape {weight.shape}.")
    return weight


def register_loss(
    distribution: distributions.Distribution,
    z: ArrayLike,
    *data: ArrayLike,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Registers `weight · mean_n Σ mask · -log r(y | z)` for any distribution r.

    As with every loss that is registered under `jax.vmap`, the mapped axis becomes the
    axis n: where it is not that of cases, `weight` has to make up for it.

    Args:
      distribution: a `kfac_jax.distributions.Distribution`, also one of your own.
      z: what the network puts out, `[n, ..., d]`.
      *data: what the distribution's methods get as `data`, such as targets: arrays
        with the same leading axis. None for sampled and exact modes.
      mask: `[n, ...]`, leading axes of z without the event; None for all.
      weight: the factor of this loss where several are added.

    Returns:
      `z`.

    Raises:
      TypeError: if the distribution is none, or z is not real floating point.
      ValueError: if shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> from kfac_jax.distributions import Bernoulli
    >>> register_loss(Bernoulli(), jnp.ones((4, 1)), jnp.zeros((4, 1))).shape
    (4, 1)
    """
    if not isinstance(distribution, distributions.Distribution):
        raise TypeError(
            "register_loss expects a kfac_jax.distributions.Distribution as "
            f"distribution; got {shown(distribution)}."
        )
    z, arrays = floating("z", z), [array("data", x) for x in data]
    if not z.ndim or any(x.shape[:1] != z.shape[:1] for x in arrays):
        raise ValueError(
            "register_loss expects z and data with one leading axis of cases; got "
            f"{z.shape} and {[x.shape for x in arrays]}."
        )
    return bind_loss(distribution, z, arrays, mask, weight)


def _targets_like(name: str, z: Array, targets: ArrayLike | None) -> list[Array]:
    if targets is None:
        return []
    targets = real("targets", targets)
    if targets.shape != z.shape:
        raise ValueError(
            f"{name} expects targets of the output's shape {z.shape}; got "
            f"{targets.shape}. Check that the batch's leading axes agree."
        )
    return [targets]


def register_softmax_cross_entropy_loss(
    logits: ArrayLike,
    targets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Registers the loss `weight · mean_n Σ mask · -log softmax(logits)[target]`.

    Args:
      logits: `[n, ..., classes]`; the mean is over the leading axis n, a sum over
        others.
      targets: class indices `[n, ...]` or probabilities `[n, ..., classes]`. Needed by
        `estimation_mode="fisher_empirical"` and by the check of the loss's scale.
      mask: `[n, ...]`, 0 for cases that do not count. The mean stays over all n cases;
        for a mean over the unmasked ones pass `weight=n / mask.sum()`.
      weight: the factor of this loss where several are added.

    Returns:
      `logits`. The registration counts whether or not the result is used.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> register_softmax_cross_entropy_loss(jnp.ones((4, 3)), jnp.zeros(4, int)).shape
    (4, 3)
    """
    logits = floating("logits, a registered output,", logits)
    data = [] if targets is None else [real("targets", targets)]
    shape = logits.shape
    if data and data[0].shape not in (shape, shape[:-1]):
        raise ValueError(
            f"Softmax cross entropy expects targets of shape {shape[:-1]} (classes) "
            f"or {shape} (probabilities); got {data[0].shape}. Check that the "
            "batch's leading axes agree."
        )
    return bind_loss(distributions.Categorical(), logits, data, mask, weight)


def register_sigmoid_cross_entropy_loss(
    logits: ArrayLike,
    targets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
) -> Array:
    """Registers the loss `weight · mean_n Σ mask · -log Bernoulli(target | logits)`.

    Args:
      logits: `[n, ...]`; the mean is over the leading axis, a sum over the others.
      targets: labels in [0, 1] of the same shape, or None.
      mask: the leading axes of `logits`, 0 for what does not count, or None.
      weight: the factor of this loss where several are added.

    Returns:
      `logits`.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> register_sigmoid_cross_entropy_loss(jnp.ones((4, 3)), jnp.zeros((4, 3))).shape
    (4, 3)
    """
    logits = floating("logits, a registered output,", logits)
    data = _targets_like("Sigmoid cross entropy", logits, targets)
    return bind_loss(distributions.Bernoulli(), logits, data, mask, weight)


def register_normal_predictive_distribution(
    mean: ArrayLike,
    targets: ArrayLike | None = None,
    variance: float = 0.5,
    weight: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
) -> Array:
    """Registers the loss `weight · mean_n Σ mask · (mean - target)² / (2 · variance)`.

    Args:
      mean: `[n, ...]`; the mean is over the leading axis, a sum over the others.
      targets: of the same shape, or None.
      variance: σ², a Python number; 0.5 makes the loss a plain squared error.
      weight: the factor of this loss where several are added.
      mask: the leading axes of `mean`, 0 for what does not count, or None.

    Returns:
      `mean`.

    Raises:
      TypeError: if the variance is not a Python number, or another argument no array
        of real numbers.
      ValueError: if the variance is not positive or the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> register_normal_predictive_distribution(jnp.ones((4, 1))).shape
    (4, 1)
    """
    try:
        variance = float(variance)
    except Exception as error:
        raise TypeError(
            "register_normal_predictive_distribution expects a fixed variance (a "
            f"Python number); got {shown(variance)}. For a variance that the network "
            "predicts use kfac_jax.losses.normal_negative_log_likelihood."
        ) from error
    return _register_normal("mean", mean, targets, variance, weight, mask)


def register_squared_error_loss(
    prediction: ArrayLike,
    targets: ArrayLike | None = None,
    weight: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
) -> Array:
    """Registers the loss `weight · mean_n Σ mask · (prediction - target)²`.

    There is no factor ½: for `mean_n ½ Σ (·)²` pass `weight=0.5`.

    Args:
      prediction: `[n, ...]`; the mean is over the leading axis, a sum over the others.
      targets: of the same shape, or None.
      weight: the factor of this loss where several are added.
      mask: the leading axes of `prediction`, 0 for what does not count, or None.

    Returns:
      `prediction`.

    >>> import jax.numpy as jnp
    >>> register_squared_error_loss(jnp.ones((4, 2)), jnp.zeros((4, 2))).shape
    (4, 2)
    """
    return _register_normal("prediction", prediction, targets, 0.5, weight, mask)


def _register_normal(
    name: str,
    mean: ArrayLike,
    targets: ArrayLike | None,
    variance: float,
    weight: ArrayLike,
    mask: ArrayLike | None,
) -> Array:
    mean = floating(f"{name}, a registered output,", mean)
    data = _targets_like("A normal distribution", mean, targets)
    return bind_loss(distributions.Normal(variance), mean, data, mask, weight)


register_categorical_predictive_distribution = register_softmax_cross_entropy_loss
register_multi_bernoulli_predictive_distribution = register_sigmoid_cross_entropy_loss
