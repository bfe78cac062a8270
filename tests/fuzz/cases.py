"""Compiles a program with its plans and its oracle."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax
from kfac_jax.blocks import Full
from tests.fuzz import problem
from tests.fuzz import programs as p
from tests.fuzz.flat import Flat, Use, numbered

TOLERANCE = {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.1}
"""Of the largest entry, by the narrowest type in a program."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A description with all that is made of it.

    Attributes:
      program: the description.
      params: its parameters.
      data: its data.
      loss_fn: the loss function of both.
      plans: by name, with `Kronecker` (the defaults) and with `Full` blocks.
      warned: by name, what making the plan warned of.
    """

    program: p.Program
    params: Any
    data: problem.Data
    loss_fn: Callable[..., Any]
    plans: dict[str, kfac_jax.Curvature]
    warned: dict[str, list[str]]

    @property
    def tolerance(self) -> float:
        """Of the largest entry."""
        types = {param.dtype for param in self.program.params}
        types |= {
            op.dtype for op, _ in p.walk(self.program.body) if isinstance(op, p.Cast)
        }
        return max(TOLERANCE[name] for name in types | {"float64"})


BLOCKS = {"kronecker": None, "full": Full()}


def make(program: p.Program) -> Case:
    """Makes parameters, data and plans."""
    params = problem.parameters(program)
    lead = (program.batch, program.positions) if program.positions else (program.batch,)
    x = jax.ShapeDtypeStruct((*lead, program.width), float)
    ids = jax.ShapeDtypeStruct(lead, int)
    flags = jax.ShapeDtypeStruct((program.batch,), bool)
    z = jax.eval_shape(problem.traced_output(program), params, x, ids, flags)
    data = problem.data(program, z.shape[-1], z.ndim == 3)
    loss_fn = problem.loss_function(program)
    shapes = jax.eval_shape(lambda: (params, *data))
    plans, warned = {}, {}
    for name, blocks in BLOCKS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plans[name] = kfac_jax.make_curvature(
                loss_fn, *shapes, estimation_mode="ggn_exact", blocks=blocks
            )
        warned[name] = [str(each.message) for each in caught]
    return Case(program, params, data, loss_fn, plans, warned)


# ------------------------------------------------------------------------ the numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """What the library and the oracle computed.

    Attributes:
      plain: value and gradient, by JAX.
      flat: value of the output without control flow, and its gradient by the oracle.
      outputs: the output with control flow.
      found: for each plan value, gradient, factors, dense matrix.
      exact: the generalised Gauss-Newton matrix, `[P, P]`.
      roots: for each use `[k, e, rows, o]` whose squares add up to output factors.
      inputs: for each use `[e, rows, i]`.
      uses: the uses.
    """

    plain: Any
    found: dict[str, Any]
    exact: np.ndarray
    roots: list[np.ndarray]
    inputs: list[np.ndarray]
    uses: list[Use]
    outputs: Any
    flat: Any


def _jacobians(case: Case, params: Any, data: problem.Data) -> Any:
    """The output's rows, their Jacobians over parameters and taps, inputs of uses."""
    program = case.program
    theta = jnp.concatenate([w.astype(float).reshape(-1) for w in params.values()])
    ends = np.cumsum([w.size for w in params.values()])[:-1]

    def unravel(theta: Any) -> Any:
        parts = zip(params.items(), jnp.split(theta, ends), strict=True)
        return {k: x.reshape(w.shape).astype(w.dtype) for (k, w), x in parts}

    def flat(theta: Any, zeros: Any) -> Any:
        interpreter = Flat(program, zeros)
        named = {**unravel(theta), **numbered(program)}
        z = problem.output_of(interpreter, program)(named, *data[:3])
        return z.reshape(-1, z.shape[-1]), interpreter

    shapes = jax.eval_shape(lambda: _shapes(flat, theta))
    zeros = [jnp.zeros(s.shape) for s in shapes]
    uses: list[Use] = []

    def outputs(theta: Any, zeros: Any) -> Any:
        z, interpreter = flat(theta, zeros)
        uses.extend(interpreter.uses)
        return z, [use.x for use in interpreter.uses]

    z, pull, inputs = jax.vjp(outputs, theta, zeros, has_aux=True)
    units = jnp.eye(z.size).reshape(z.size, *z.shape)
    over_theta, over_taps = jax.vmap(pull)(units)
    return z, over_theta, over_taps, inputs, uses


def _shapes(flat: Any, theta: Any) -> list[Any]:
    _, interpreter = flat(theta, None)
    return interpreter.shapes


def compute(case: Case) -> Numbers:
    """Runs both in one compiled function."""
    program, uses = case.program, []

    def oracle(params: Any, data: problem.Data) -> Any:
        z, over_theta, over_taps, inputs, found = _jacobians(case, params, data)
        uses.extend(found)
        n, d = z.shape
        rows = data._replace(
            x=jnp.zeros(n),
            ids=jnp.zeros(n),
            flags=jnp.zeros(n),
            y=data.y.reshape(n, -1),
            labels=data.labels.reshape(n),
            mask=data.mask.reshape(n),
        )
        fisher = jax.vmap(
            lambda z, row: problem.case_fisher(program.loss.kind, z, row)
        )(z, rows)
        w, u = jnp.linalg.eigh(fisher)
        roots = u * jnp.sqrt(jnp.maximum(w, 0))[:, None, :]  # [n, d, k]
        cases = n if program.loss.cases == "rows" else program.batch
        if program.loss.place == "vmap":
            cases = program.batch
        roots = roots / jnp.sqrt(cases)

        def rooted(j: Any) -> Any:
            j = jnp.asarray(j, float).reshape(n, d, *j.shape[1:])
            return jnp.einsum("ndk,nd...->nk...", roots, j).reshape(n * d, *j.shape[2:])

        theta = rooted(over_theta)
        taps = [rooted(j) for j in over_taps]
        return z, theta.T @ theta, [use.rows(taps[use.tap]) for use in found], inputs

    def everything(params: Any, data: problem.Data) -> Any:
        plain = jax.value_and_grad(case.loss_fn)(params, *data)
        z = problem.traced_output(program)(params, *data[:3])
        found = {}
        for name, plan in case.plans.items():
            value, grads, statistics = plan.value_grad_and_statistics(params, *data)
            start = plan.init_factors(params)
            factors = plan.update_factors(start, statistics, 1)
            matrix = plan.approximation(factors).to_dense()
            found[name] = value, grads, factors, matrix
        return plain, found, z, oracle(params, data)

    results = jax.jit(everything)(case.params, case.data)
    plain, found, z, (flat, exact, roots, inputs) = jax.tree.map(np.asarray, results)
    return Numbers(plain, found, exact, roots, inputs, uses, z, flat)
