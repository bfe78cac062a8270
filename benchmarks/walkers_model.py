"""A wavefunction, and its energy, as published variational Monte Carlo codes have them.

After FermiNet (Pfau et al. 2020, arXiv:1909.02487) and, with `Shape(attention=True)`,
Psiformer (von Glehn et al. 2022, arXiv:2211.13672). Unlike the wavefunction of the
experiments it is written as such programs are, which is what matters for a comparison:
for one walker, with `jax.vmap` over walkers; determinants by `slogdet`; the Laplacian
by a loop; the gradient and what is registered in a `custom_jvp` rule; every argument of
`kfac_jax.Optimizer` with an axis for devices in front.

It runs with this library and with the published release of kfac-jax, which have the
same import name. All numbers that start it are from NumPy's `RandomState`, which does
not change between releases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before JAX, whose threads they are

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from wavefunction_systems import SYSTEMS, System

import kfac_jax

AXIS = "devices"
DAMPING, MOMENTUM = 1e-3, 0.0
WINDOW = 5.0  # half width for local energies, in mean absolute deviations
ATOMS = {name: SYSTEMS[name] for name in ("Li", "Be")}

Params = dict[str, Any]
Dense = Callable[..., Params]  # from numbers of inputs and outputs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The network's kind and sizes."""

    layers: int = 3
    width: int = 64  # of an electron's features
    pair_width: int = 16  # of a pair's; none with attention
    determinants: int = 8
    full: bool = False  # one matrix for all electrons, instead of one for each spin
    attention: bool = False
    heads: int = 4
    jastrow: bool = True  # the factor for electrons that meet


# ------------------------------------------------------------------------- parameters


def init_params(
    system: System, shape: Shape, seed: int = 0, dtype: Any = jnp.float32
) -> Params:
    """Parameters, the same with every release of JAX."""
    rng = np.random.RandomState(seed)

    def dense(inputs: int, outputs: int, bias: bool = True) -> Params:
        w = rng.normal(size=(inputs, outputs)) / inputs**0.5
        layer = {"w": jnp.asarray(w, dtype)}
        return layer | ({"b": jnp.zeros(outputs, dtype)} if bias else {})

    if shape.attention:
        params = _attention_params(system, shape, dense, dtype)
    else:
        params = _stream_params(system, shape, dense)
    atoms = len(system.charges)
    params |= {"orbitals": [], "envelopes": []}
    for spin in system.spins:
        count = shape.determinants * (system.electrons if shape.full else spin)
        params["orbitals"].append(dense(shape.width, count, bias=False))
        ones = jnp.ones((atoms, count), dtype)
        params["envelopes"].append({"pi": ones, "sigma": ones.copy()})
    if shape.jastrow:
        names = ("parallel", "antiparallel")
        params["jastrow"] = {name: jnp.ones(1, dtype) for name in names}
    return params


def _stream_params(system: System, shape: Shape, dense: Dense) -> Params:
    """Layers of both streams; the last needs no features of pairs."""
    spins, single, pair = len(system.spins), 4 * len(system.charges), 4
    params: Params = {"single": [], "pair": []}
    for layer in range(shape.layers):
        seen = single + (single + pair) * spins
        params["single"].append(dense(seen, shape.width))
        if layer < shape.layers - 1:
            params["pair"].append(dense(pair, shape.pair_width))
        single, pair = shape.width, shape.pair_width
    return params


def _attention_params(system: System, shape: Shape, dense: Dense, dtype: Any) -> Params:
    """Layers of self-attention, each followed by a layer for each electron alone."""
    width = shape.width

    def norm() -> Params:
        return {"scale": jnp.ones(width, dtype), "shift": jnp.zeros(width, dtype)}

    def layer() -> Params:
        heads = {name: dense(width, width, bias=False) for name in ("q", "k", "v", "o")}
        return heads | {"mlp": dense(width, width), "norms": [norm(), norm()]}

    first = dense(4 * len(system.charges) + 1, width, bias=False)  # 1 for the spin
    return {"first": first, "attention": [layer() for _ in range(shape.layers)]}


# ------------------------------------------------------------------- the wavefunction


class Places(NamedTuple):
    """Where the electrons of a walker are."""

    from_nuclei: Array  # [electrons, nuclei, 3]
    radii: Array  # [electrons, nuclei]
    vectors: Array  # [electrons, electrons, 3], between them
    distances: Array  # [electrons, electrons], with zeros on the diagonal


def places(system: System, positions: Array) -> Places:
    """Vectors and distances of one walker, positions `[electrons * 3]`."""
    electrons = positions.reshape(-1, 3)
    nuclei = jnp.asarray(system.positions, electrons.dtype)
    from_nuclei = electrons[:, None] - nuclei[None]
    vectors = electrons[:, None] - electrons[None]
    # a norm has no derivative at zero, so those of the diagonal are moved away from it
    diagonal = jnp.eye(len(electrons), dtype=electrons.dtype)
    distances = jnp.linalg.norm(vectors + diagonal[..., None], axis=-1) * (1 - diagonal)
    radii = jnp.linalg.norm(from_nuclei, axis=-1)
    return Places(from_nuclei, radii, vectors, distances)


def log_psi(system: System, shape: Shape, params: Params, positions: Array) -> Array:
    """Log |psi| of one walker, positions `[electrons * 3]`."""
    return sign_and_log(system, shape, params, positions)[1]


def sign_and_log(
    system: System, shape: Shape, params: Params, positions: Array
) -> tuple[Array, Array]:
    """The sign of psi and log |psi|, of one walker.

    Psi is `e^J sum_k prod_m det[phi_km]`, where the matrices m are of one spin each, or
    a single one is of all electrons.
    """
    where = places(system, positions)
    network = _attended if shape.attention else _streamed
    features = network(system, shape, params, where)
    spins = zip(system.groups, params["orbitals"], params["envelopes"], strict=True)
    orbitals = [
        _orbitals(shape, layer, envelope, features[group], where.radii[group])
        for group, layer, envelope in spins
    ]
    if shape.full:
        orbitals = [jnp.concatenate(orbitals, axis=1)]
    parts = [_sign_and_log_determinants(matrices) for matrices in orbitals]
    signs = jnp.stack([sign for sign, _ in parts]).prod(0)
    logs = jnp.stack([log for _, log in parts]).sum(0)
    # the shift is for the range of numbers only; it has no part in the derivative
    most = jax.lax.stop_gradient(logs.max())
    total = (signs * jnp.exp(logs - most)).sum()
    log = jnp.log(jnp.abs(total)) + most
    if shape.jastrow:
        log = log + _jastrow(system, params["jastrow"], where.distances)
    return jnp.sign(total), log


def _dense(layer: Params, x: Array) -> Array:
    y = x @ layer["w"]
    return y + jnp.expand_dims(layer["b"], range(y.ndim - 1)) if "b" in layer else y


def _added(layer: Params, seen: Array, x: Array) -> Array:
    """A layer's output, and its input x where they are of one shape."""
    y = jnp.tanh(_dense(layer, seen))
    return x + y if x.shape == y.shape else y


def _streamed(system: System, shape: Shape, params: Params, where: Places) -> Array:
    """Features of the electrons, from streams of single ones and of pairs."""
    single = jnp.concatenate([where.from_nuclei, where.radii[..., None]], axis=-1)
    single = single.reshape(system.electrons, -1)
    pair = jnp.concatenate([where.vectors, where.distances[..., None]], axis=-1)
    for depth, layer in enumerate(params["single"]):
        seen = [single]
        for group in system.groups:
            mean = single[group].mean(0, keepdims=True)
            seen += [jnp.broadcast_to(mean, single.shape), pair[:, group].mean(1)]
        single = _added(layer, jnp.concatenate(seen, axis=-1), single)
        if depth < shape.layers - 1:
            pair = _added(params["pair"][depth], pair, pair)
    return single


def _attended(system: System, shape: Shape, params: Params, where: Places) -> Array:
    """Features of the electrons, by self-attention between them."""
    # logarithms, as far electrons would have large inputs otherwise
    radii = where.radii[..., None]
    scaled = jnp.log1p(radii)
    x = jnp.concatenate([where.from_nuclei * scaled / radii, scaled], axis=-1)
    spins = np.repeat((1.0, -1.0)[: len(system.spins)], system.spins)[:, None]
    x = [x.reshape(system.electrons, -1), jnp.asarray(spins, x.dtype)]
    x = _dense(params["first"], jnp.concatenate(x, axis=-1))
    for layer in params["attention"]:
        x = _normalized(layer["norms"][0], x + _attention(layer, x, shape.heads))
        x = _normalized(layer["norms"][1], _added(layer["mlp"], x, x))
    return x


def _attention(layer: Params, x: Array, heads: int) -> Array:
    q, k, v = (_dense(layer[n], x).reshape(len(x), heads, -1) for n in ("q", "k", "v"))
    scores = jnp.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    seen = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores), v)
    return _dense(layer["o"], seen.reshape(x.shape))


def _normalized(norm: Params, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normalized = centred * jax.lax.rsqrt(variance + 1e-5)
    return normalized * norm["scale"][None] + norm["shift"][None]


def _orbitals(
    shape: Shape, layer: Params, envelope: Params, features: Array, radii: Array
) -> Array:
    """`[determinant, electron, orbital]` of the electrons of one spin.

    An envelope is `sum_I pi_I exp(-sigma_I |r - R_I|)`, over the nuclei I.
    """
    decays = jnp.exp(-radii[..., None] * envelope["sigma"][None])
    envelopes = (decays * envelope["pi"][None]).sum(1)
    orbitals = _dense(layer, features) * envelopes
    return orbitals.reshape(len(features), shape.determinants, -1).swapaxes(0, 1)


def _sign_and_log_determinants(matrices: Array) -> tuple[Array, Array]:
    if matrices.shape[-1] == 1:  # needs no factorization
        numbers = matrices[:, 0, 0]
        return jnp.sign(numbers), jnp.log(jnp.abs(numbers))
    return tuple(jnp.linalg.slogdet(matrices))


def _jastrow(system: System, alphas: Params, distances: Array) -> Array:
    """`-sum c alpha^2 / (alpha + r)` over pairs, whose slope at r = 0 is c.

    Electrons of different spin have c = 1/2, those of equal spin 1/4 (Kato's cusps).
    """
    i, j = np.triu_indices(system.electrons, 1)
    spin = np.repeat(range(len(system.spins)), system.spins)
    equal, total = spin[i] == spin[j], jnp.zeros((), distances.dtype)
    kinds = ("parallel", 0.25, equal), ("antiparallel", 0.5, ~equal)
    for name, slope, chosen in kinds:
        r, alpha = distances[i[chosen], j[chosen]], alphas[name]
        total = total - (slope * alpha**2 / (alpha + r)).sum()
    return total


# ------------------------------------------------------------------------- the energy


def potential(system: System, positions: Array) -> Array:
    """The Coulomb energy of one walker, in hartree, without that among the nuclei."""
    where = places(system, positions)
    charges = jnp.asarray(system.charges, positions.dtype)
    pairs = where.distances[np.triu_indices(system.electrons, 1)]
    return (1 / pairs).sum() - (charges[None] / where.radii).sum()


def local_energy(
    system: System, shape: Shape, params: Params, positions: Array
) -> Array:
    """`(H psi) / psi` of one walker.

    The Laplacian is by a loop over coordinates: forward mode of the reverse mode, as
    memory for all coordinates at once is what larger systems do not have.
    """
    slope = jax.grad(partial(log_psi, system, shape, params))
    gradient, along = jax.linearize(slope, positions)
    directions = jnp.eye(len(positions), dtype=positions.dtype)

    def add(i: Array, total: Array) -> Array:
        return total + along(directions[i])[i]

    zero = jnp.zeros((), positions.dtype)
    laplacian = jax.lax.fori_loop(0, len(positions), add, zero)
    kinetic = -(laplacian + jnp.square(gradient).sum()) / 2
    return kinetic + potential(system, positions)


class Aux(NamedTuple):
    """What the loss returns besides the energy."""

    variance: Array  # [] of the local energies
    local_energy: Array  # [walkers]


def of_walkers(function: Callable[..., Any], system: System, shape: Shape) -> Any:
    """A function of one walker, `(system, shape, params, positions)`, for all."""
    return jax.vmap(partial(function, system, shape), in_axes=(None, 0))


def _mean(x: Array) -> Array:
    """Over the walkers of all devices."""
    return kfac_jax.utils.pmean_if_pmap(x.mean(), AXIS)


def total_energy(system: System, shape: Shape) -> Callable[..., tuple[Array, Aux]]:
    """The energy of walkers `[walkers, electrons * 3]`, with the gradient it has.

    That is not the derivative of what is returned, as the walkers follow psi^2:
    `E[(e - E[e]) grad log |psi|]`, without the factor 2, which the registered normal
    distribution leaves out, too (its variance is 1/2). Outliers of e are brought into
    a window there.
    """
    logs_of = of_walkers(log_psi, system, shape)
    energies_of = of_walkers(local_energy, system, shape)

    @jax.custom_jvp
    def energy(params: Params, key: Array, walkers: Array) -> tuple[Array, Aux]:
        del key  # is for pseudopotentials, which these atoms do not need
        local = energies_of(params, walkers)
        mean = _mean(local)
        return mean, Aux(_mean(jnp.square(local - mean)), local)

    @energy.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        params, key, walkers = primals
        mean, aux = energy(params, key, walkers)
        slopes = tangents[0], tangents[2]
        logs, log_tangents = jax.jvp(logs_of, (params, walkers), slopes)
        kfac_jax.register_normal_predictive_distribution(logs[:, None])
        tangent = (centred(aux.local_energy) * log_tangents).mean()
        return (mean, aux), (tangent, jax.tree.map(jnp.zeros_like, aux))

    return energy


def centred(local: Array) -> Array:
    """Local energies without outliers, minus their mean."""
    middle = _mean(local)
    half = WINDOW * _mean(jnp.abs(local - middle))
    limited = jnp.clip(local, middle - half, middle + half)
    return limited - _mean(limited)


def native_loss(system: System, shape: Shape) -> Callable[..., tuple[Array, Any]]:
    """The energy with its gradient beside it, for `curvature.value_and_statistics`.

    It is the loss function of a plan made with `has_aux=True`.
    """
    function = jax.value_and_grad(total_energy(system, shape), has_aux=True)

    def loss(params: Params, walkers: Array) -> tuple[Array, tuple[Aux, Params]]:
        (energy, aux), grads = function(params, jax.random.PRNGKey(0), walkers)
        return energy, (aux, grads)

    return loss


# ------------------------------------------------------------------- walkers, training


def init_walkers(
    system: System, count: int, seed: int = 0, dtype: Any = jnp.float32
) -> Array:
    """Electrons around the nucleus, `[count, electrons * 3]`."""
    rng = np.random.RandomState(seed)
    return jnp.asarray(rng.normal(size=(count, 3 * system.electrons)), dtype)


def moved(
    system: System,
    shape: Shape,
    params: Params,
    walkers: Array,
    key: Array,
    *,
    steps: int = 10,
    width: float = 0.2,
) -> Array:
    """The walkers after Metropolis steps, which leave psi^2 as it is."""
    logs_of = of_walkers(log_psi, system, shape)

    def step(carry: tuple[Array, Array], key: Array) -> Any:
        walkers, logs = carry
        propose, decide = jax.random.split(key)
        noise = jax.random.normal(propose, walkers.shape, walkers.dtype)
        proposed = walkers + width * noise
        new = logs_of(params, proposed)
        odds = jnp.log(jax.random.uniform(decide, logs.shape, logs.dtype))
        yes = odds < 2 * (new - logs)
        walkers = jnp.where(yes[:, None], proposed, walkers)
        return (walkers, jnp.where(yes, new, logs)), None

    first = walkers, logs_of(params, walkers)
    return jax.lax.scan(step, first, jax.random.split(key, steps))[0][0]


def make_optimizer(
    system: System,
    shape: Shape,
    inverse_update_period: int = 1,
    *,
    multi_device: bool = True,
) -> kfac_jax.Optimizer:
    """`Optimizer` with the settings that published programs share."""
    return kfac_jax.Optimizer(
        jax.value_and_grad(total_energy(system, shape), has_aux=True),
        l2_reg=0.0,
        norm_constraint=1e-3,
        value_func_has_aux=True,
        value_func_has_rng=True,
        learning_rate_schedule=lambda t: 0.05 / (1 + t / 10_000),
        curvature_ema=0.95,
        inverse_update_period=inverse_update_period,
        min_damping=1e-4,
        num_burnin_steps=0,
        register_only_generic=False,
        estimation_mode="fisher_exact",
        multi_device=multi_device,
        pmap_axis_name=AXIS,
    )


class Training:
    """Steps of `Optimizer` with an axis for the local devices in front of all arrays.

    So are `params`, `state` (after `init`) and `walkers`, `[devices, walkers, 3 n]`.
    """

    def __init__(
        self,
        system: System,
        shape: Shape,
        walkers: int,
        inverse_update_period: int = 1,
        *,
        seed: int = 0,
        dtype: Any = jnp.float32,
    ) -> None:
        """Makes the arrays and the optimizer; compiles nothing of the latter.

        `walkers` are those on all devices together; one seed is for everything.
        """
        utils, devices = kfac_jax.utils, jax.local_device_count()
        replicate = utils.replicate_all_local_devices
        start = init_walkers(system, walkers, seed, dtype)
        self.walkers = utils.broadcast_all_local_devices(
            start.reshape(devices, walkers // devices, -1)
        )
        self.params = replicate(init_params(system, shape, seed, dtype))
        self.state: Any = None
        self.optimizer = make_optimizer(system, shape, inverse_update_period)
        self._key = utils.make_different_rng_key_on_all_devices(
            jax.random.PRNGKey(seed)
        )
        self._rates = {
            "momentum": replicate(jnp.asarray(MOMENTUM, dtype)),
            "damping": replicate(jnp.asarray(DAMPING, dtype)),
        }
        energy = total_energy(system, shape)
        self._gradient = jax.pmap(jax.value_and_grad(energy, has_aux=True), AXIS)
        self._move = jax.pmap(partial(moved, system, shape), AXIS)

    def next_key(self) -> Array:
        """A new key on each device."""
        self._key, now = kfac_jax.utils.p_split(self._key)
        return now

    def init(self, key: Array) -> None:
        """Makes the optimizer's state."""
        self.state = self.optimizer.init(self.params, key, self.walkers)

    def step(self, key: Array) -> dict[str, Any]:
        """One step of the optimizer, and its statistics."""
        self.params, self.state, stats = self.optimizer.step(
            params=self.params,
            state=self.state,
            rng=key,
            batch=self.walkers,
            **self._rates,
        )
        return stats

    def gradient(self, key: Array) -> Any:
        """The energy and its gradient alone."""
        return self._gradient(self.params, key, self.walkers)

    def move(self, key: Array) -> None:
        """Lets the walkers follow the parameters."""
        self.walkers = self._move(self.params, self.walkers, key)
