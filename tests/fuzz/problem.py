"""Parameters, data and the loss function of a description."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax
from kfac_jax import losses
from tests.fuzz import programs as p
from tests.fuzz.interpreter import Context, Interpreter

VOCABULARY = 4
LOSS_KINDS = (
    "squared",
    "half squared",
    "normal",
    "softmax",
    "soft labels",
    "masked softmax",
    "sigmoid",
    "log cosh",
    "two",
    "normal with variance",
)
GAUSSIAN = ("squared", "half squared", "normal")


class Data(NamedTuple):
    """The loss function's arguments after the parameters."""

    x: Any  # [batch, (positions,) width]
    ids: Any  # [batch, (positions)]
    flags: Any  # [batch]
    y: Any  # like the output
    labels: Any  # like the output without its last axis
    mask: Any  # like the labels


def parameters(program: p.Program) -> dict[str, jax.Array]:
    """Seeded parameters by name."""
    rng = np.random.default_rng(program.seed)

    def one(param: p.Param) -> jax.Array:
        own = param.shape[len(param.nests) :]
        scale = 0.7 / np.sqrt(max(own[0], 1) if len(own) > 1 else 1)
        return jnp.asarray(rng.normal(0.1, scale, param.shape), param.dtype)

    return {p.name(i): one(param) for i, param in enumerate(program.params)}


def data(program: p.Program, out: int, has_positions: bool) -> Data:
    """Seeded data for outputs of that many features."""
    rng = np.random.default_rng(program.seed + 1)
    lead = (program.batch, program.positions) if program.positions else (program.batch,)
    rows = lead if has_positions else lead[:1]
    mask = rng.integers(0, 2, rows)
    mask.reshape(-1)[0] = 1
    return Data(
        jnp.asarray(rng.normal(0.3, 1.0, (*lead, program.width))),
        jnp.asarray(rng.integers(0, VOCABULARY, lead)),
        jnp.asarray(program.flags),
        jnp.asarray(rng.uniform(0.1, 0.9, (*rows, out))),
        jnp.asarray(rng.integers(0, out, rows)),
        jnp.asarray(mask, float),
    )


def output_of(interpreter: Interpreter, program: p.Program) -> Callable[..., Any]:
    """From parameters, data to the network's output."""

    def output(params: Any, x: Any, ids: Any, flags: Any) -> Any:
        return interpreter.run(program.body, params, x, Context(ids, flags))

    return output


def traced_output(program: p.Program) -> Callable[..., Any]:
    """The network as the loss function runs it, of a whole batch."""
    output = output_of(Interpreter(program), program)
    mapped = program.loss.place == "vmap"
    return jax.vmap(output, (None, 0, 0, 0)) if mapped else output


def _log_cosh(z: Any, y: Any) -> Any:
    return jnp.log(jnp.cosh(z - y)).sum()


def _split(z: Any) -> tuple[Any, Any]:
    mean, log_variance = jnp.split(z, 2, -1)
    return mean, jnp.tanh(log_variance)


def registered(kind: str, z: Any, data: Data) -> Any:
    """Registers the loss and returns it elementwise (or by case), to be summed."""
    y, labels = data.y, data.labels
    if kind == "squared":
        return losses.squared_error(z, y)
    if kind == "half squared":
        return 0.5 * losses.squared_error(z, y, weight=0.5)
    if kind == "normal":
        kfac_jax.register_normal_predictive_distribution(z, y, variance=2.0)
        return jnp.square(z - y) / 4
    if kind == "softmax":
        return losses.softmax_cross_entropy_with_integer_labels(z, labels)
    if kind == "soft labels":
        return losses.softmax_cross_entropy(z, y / y.sum(-1, keepdims=True))
    if kind == "masked softmax":
        z = kfac_jax.register_softmax_cross_entropy_loss(z, labels, data.mask)
        return data.mask * plain_softmax(z, labels)
    if kind == "sigmoid":
        return losses.sigmoid_binary_cross_entropy(z, y)
    if kind == "log cosh":
        return losses.convex(_log_cosh, z, y)
    if kind == "normal with variance":
        mean, s = _split(z)
        return losses.normal_negative_log_likelihood(mean, s, _split(y)[0])
    first = losses.squared_error(z, y).sum(-1)
    second = losses.softmax_cross_entropy_with_integer_labels(z, labels, weight=0.5)
    return first + 0.5 * second


def plain_softmax(z: Any, labels: Any) -> Any:
    """The cross entropy of each case."""
    picked = jnp.take_along_axis(z, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(z, -1) - picked


def loss_function(program: p.Program) -> Callable[..., Any]:
    """The loss function, of parameters and `Data`."""
    output = output_of(Interpreter(program), program)
    kind = program.loss.kind

    def batch_loss(params: Any, data: Data) -> Any:
        z = output(params, *data[:3])
        if program.loss.cases == "rows" and z.ndim == 3:
            rows = z.shape[0] * z.shape[1]
            z = z.reshape(rows, -1)
            data = data._replace(
                y=data.y.reshape(rows, -1),
                labels=data.labels.reshape(rows),
                mask=data.mask.reshape(rows),
            )
        return registered(kind, z, data).sum() / len(z)

    def one_loss(params: Any, data: Data) -> Any:
        return registered(kind, output(params, *data[:3]), data).sum()

    def mapped_loss(params: Any, data: Data) -> Any:
        return jax.vmap(one_loss, (None, 0))(params, data).mean()

    places = {"vmap": mapped_loss, "outside": batch_loss, "jit": jax.jit(batch_loss)}
    places["remat"] = jax.checkpoint(batch_loss)
    return lambda params, *data: places[program.loss.place](params, Data(*data))


def case_fisher(kind: str, z: Any, data: Data) -> Any:
    """`[d, d]`: the Fisher (or Hessian) over one row `[d]` of the output."""

    def hessian(loss: Callable[[Any], Any]) -> Any:
        return jax.hessian(loss)(z)

    softmax = functools.partial(plain_softmax, labels=data.labels)
    if kind == "squared":
        return 2.0 * jnp.eye(len(z))
    if kind == "half squared":
        return jnp.eye(len(z))
    if kind == "normal":
        return jnp.eye(len(z)) / 2
    if kind in ("softmax", "soft labels"):
        return hessian(softmax)
    if kind == "masked softmax":
        return data.mask * hessian(softmax)
    if kind == "sigmoid":
        return hessian(lambda z: jnp.logaddexp(jnp.zeros(()), z).sum())
    if kind == "log cosh":
        return hessian(lambda z: _log_cosh(z, data.y))
    if kind == "two":
        return 2.0 * jnp.eye(len(z)) + 0.5 * hessian(softmax)
    inner = jax.jacobian(lambda z: jnp.concatenate(_split(z)))(z)
    _, s = _split(z)
    middle = jnp.concatenate([jnp.exp(-s), jnp.full(s.shape, 0.5)])
    return inner.T @ (middle[:, None] * inner)
