"""Ways to minimize the energy.

One is K-FAC, with a plan and an optax transformation. Two are the natural gradient in
the sample space: SPRING and MinSR. One is `kfac_jax.Optimizer`, the front for programs
that were written for the published kfac-jax.

The gradient of the energy E = E[e] is not that of what a batch of local energies e
returns, since its walkers follow psi^2. With O = grad log |psi|,

    grad E = 2 E[(e - E) O],        F = E[grad log p grad log p^T] = 4 E[O O^T]

for p = psi^2 (F without the term that normalizes p, as is usual). A normal distribution
with mean log |psi| and variance 1/4 has just this Fisher: J^T J / variance. Other codes
leave out both factors of 2 and take the default variance, 1/2; that has the same
natural gradient, as both grad E and F are halved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from wavefunction_model import Params, log_psi
from wavefunction_sampling import clipped, local_energy
from wavefunction_systems import System

import kfac_jax

VARIANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Constants of the optimizer."""

    learning_rate: float = 0.2  # alpha at the start
    halved_after: float = 1000.0  # steps after which alpha is half of that
    damping: float = 1e-3  # lambda
    # largest alpha^2 D'FD of a direction D; of SPRING alpha^2 D'D
    norm_constraint: float = 1e-2
    decay: float = 0.95  # of the factors' averages
    inverse_every: int = 1  # steps between inverses, T3

    def rate(self, step: ArrayLike) -> Array:
        """The learning rate at a step."""
        return self.learning_rate / (1 + jnp.asarray(step, float) / self.halved_after)


class Route(NamedTuple):
    """A way to train: electrons are `[walkers, electrons, 3]`, energies `[walkers]`."""

    init: Callable[[Params, Array], Any]  # params, electrons -> state
    # params, state, electrons, key -> params, state, local energies before the step
    step: Callable[[Params, Any, Array, Array], tuple[Params, Any, Array]]
    report: Callable[[], str]  # the plan, after init


def energies(system: System, params: Params, electrons: Array) -> Array:
    """The local energy of each walker."""
    return jax.vmap(partial(local_energy, system, partial(log_psi, system, params)))(
        electrons
    )


def logs(system: System, params: Params, electrons: Array) -> Array:
    """Log |psi| of each walker, registered as what the Fisher is of."""
    values = jax.vmap(partial(log_psi, system, params))(electrons)
    kfac_jax.register_normal_predictive_distribution(values[:, None], variance=VARIANCE)
    return values


def surrogate(system: System, params: Params, electrons: Array) -> tuple[Array, Array]:
    """The energy, with the gradient that it has where the walkers follow psi^2."""
    local = jax.lax.stop_gradient(energies(system, params, electrons))
    values = logs(system, params, electrons)
    slope = 2 * (_centred(local) * values).mean()
    return local.mean() + slope - jax.lax.stop_gradient(slope), local


def _centred(local: Array) -> Array:
    limited = clipped(local)
    return limited - limited.mean()


class Method(NamedTuple):
    """A plan's options, and the optax transformation that goes with it."""

    options: dict[str, Any]
    transformation: Callable[
        [kfac_jax.Curvature, Settings], optax.GradientTransformation
    ]


def kfac(
    curvature: kfac_jax.Curvature, settings: Settings
) -> optax.GradientTransformation:
    """K-FAC with a given rate and damping."""
    return kfac_jax.kfac(
        curvature,
        learning_rate=settings.rate,
        momentum=0.0,
        damping=lambda _: settings.damping,
        norm_constraint=lambda _: settings.norm_constraint,
        decay=settings.decay,
        inverse_every=settings.inverse_every,
    )


def natural_gradient(
    curvature: kfac_jax.Curvature, settings: Settings, momentum: float
) -> optax.GradientTransformation:
    """The natural gradient of all parameters together, from the walkers' rows."""
    return kfac_jax.natural_gradient(
        curvature,
        settings.rate,
        lambda _: settings.damping,
        kfac_jax.Spring(momentum),
        norm_constraint=lambda _: settings.norm_constraint,
    )


OF_WALKERS = {"structure": kfac_jax.SampleSpace(centered=True)}
METHODS = {
    "kfac": Method({}, kfac),
    "spring": Method(OF_WALKERS, partial(natural_gradient, momentum=0.99)),
    "minsr": Method(OF_WALKERS, partial(natural_gradient, momentum=0.0)),
}


def plan(
    method: Method, system: System, params: Params, electrons: Array
) -> kfac_jax.Curvature:
    """The plan of a system's energy."""
    return kfac_jax.make_curvature(
        partial(surrogate, system),
        params,
        electrons,
        has_aux=True,
        estimation_mode="fisher_exact",
        **method.options,
    )


def native(
    method: Method,
    system: System,
    settings: Settings,
    params: Params,
    electrons: Array,
) -> Route:
    """A plan and an optax transformation, as a step."""
    curvature = plan(method, system, params, electrons)
    tx = method.transformation(curvature, settings)
    train = kfac_jax.make_step(curvature, tx)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, electrons: Array, key: Array) -> Any:
        # the key is for parameters without a layer, if a change of the model has some
        params, state, (_, local) = train(params, state, key, electrons)
        return params, state, local

    return Route(lambda params, electrons: tx.init(params), step, curvature.report)


def optimizer(
    system: System, settings: Settings, params: Params, electrons: Array
) -> Route:
    """`kfac_jax.Optimizer`, which steps by itself."""
    del params, electrons
    front = kfac_jax.Optimizer(
        jax.value_and_grad(total_energy(system), has_aux=True),
        l2_reg=0.0,
        value_func_has_aux=True,
        value_func_has_rng=False,
        learning_rate_schedule=settings.rate,
        curvature_ema=settings.decay,
        inverse_update_period=settings.inverse_every,
        norm_constraint=settings.norm_constraint,
        num_burnin_steps=0,
        estimation_mode="fisher_exact",
    )

    def step(params: Params, state: Any, electrons: Array, key: Array) -> Any:
        params, state, stats = front.step(
            params,
            state,
            key,
            batch=electrons,
            momentum=0.0,
            damping=settings.damping,
        )
        return params, state, stats["aux"]

    def init(params: Params, electrons: Array) -> Any:
        return front.init(params, jax.random.key(0), electrons)

    return Route(init, step, lambda: front.curvature.report())


def total_energy(
    system: System,
) -> Callable[[Params, Array], tuple[Array, Array]]:
    """The energy and the local ones, with a rule that says what the gradient is.

    The rule also registers log |psi|; it is where other codes do so, too.
    """

    @jax.custom_jvp
    def total_energy(params: Params, electrons: Array) -> tuple[Array, Array]:
        local = energies(system, params, electrons)
        return local.mean(), local

    @total_energy.defjvp
    def _(primals: tuple[Params, Array], tangents: tuple[Params, Array]) -> Any:
        params, electrons = primals
        loss, local = total_energy(params, electrons)
        _, tangent = jax.jvp(
            lambda p: logs(system, p, electrons), (params,), tangents[:1]
        )
        slope = 2 * (_centred(local) * tangent).mean()
        return (loss, local), (slope, jnp.zeros_like(local))

    return total_energy


OPTIMIZERS = {name: partial(native, method) for name, method in METHODS.items()}
OPTIMIZERS["compat"] = optimizer
