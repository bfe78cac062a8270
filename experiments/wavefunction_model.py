"""A small neural wavefunction for a few electrons, in plain JAX.

After FermiNet (Pfau et al. 2020, arXiv:1909.02487): layers that treat all electrons of
one spin alike, orbitals that decay exponentially, and a sum of determinants,

    psi(x) = e^J(x) sum_k det[phi_kj(x; up)] det[phi_kj(x; down)],

which changes its sign when two electrons of equal spin change places. The Jastrow
factor J has the kink that electrons need where they meet (Kato's cusp).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from wavefunction_systems import System

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The network's sizes."""

    layers: int = 2
    width: int = 24  # of an electron's features
    pair_width: int = 8  # of a pair's
    determinants: int = 4


@partial(jax.jit, static_argnums=(0, 1, 2))
def init_params(system: System, shape: Shape, dtype: Any, key: Array) -> Params:
    """Parameters at which the orbitals are nearly those of hydrogen-like atoms."""
    keys = iter(jax.random.split(key, 2 * shape.layers + len(system.spins)))
    atoms, spins = len(system.charges), len(system.spins)

    def dense(inputs: int, outputs: int, scale: float = 1.0, shift: float = 0.0) -> Any:
        w = jax.random.normal(next(keys), (inputs, outputs), dtype)
        return {"w": scale * w / inputs**0.5, "b": jnp.full(outputs, shift, dtype)}

    several = system.electrons > 1
    single, pair = 4 * atoms, 4
    params: Params = {"single": [], "pair": [], "orbitals": [], "cusp": {}}
    for layer in range(shape.layers):
        seen = single + (single + pair) * spins if several else single
        params["single"].append(dense(seen, shape.width))
        if several and layer < shape.layers - 1:
            params["pair"].append(dense(pair, shape.pair_width))
        single, pair = shape.width, shape.pair_width
    for number in system.spins:
        count = shape.determinants * number
        # each orbital of a determinant decays as one of hydrogen: 1s, 2s, ...
        principal = jnp.tile(jnp.arange(1, number + 1, dtype=dtype), shape.determinants)
        linear = dense(single, count, scale=0.1, shift=1.0)
        decay = jnp.asarray(system.charges, dtype)[:, None] / principal
        weight = jnp.ones((atoms, count), dtype)
        params["orbitals"].append({**linear, "decay": decay, "weight": weight})
    for kind, *_ in _meetings(system):
        params["cusp"][kind] = jnp.ones((), dtype)
    return params


def log_psi(system: System, params: Params, electrons: Array) -> Array:
    """Log |psi| of one walker, electrons `[electrons, 3]`.

    Psi is a plain product, which a few electrons do not bring near underflow.
    """
    return jnp.log(jnp.abs(psi(system, params, electrons)))


def psi(system: System, params: Params, electrons: Array) -> Array:
    """The wavefunction of one walker, electrons `[electrons, 3]`; not normalized."""
    nuclei = jnp.asarray(system.positions, electrons.dtype)
    from_nuclei = electrons[:, None, :] - nuclei  # [electron, nucleus, 3]
    radii = jnp.linalg.norm(from_nuclei, axis=-1)
    vectors = electrons[:, None, :] - electrons  # [electron, electron, 3]
    # the norm has no derivative at the zeros of the diagonal
    diagonal = jnp.eye(system.electrons, dtype=electrons.dtype)
    distances = (1 - diagonal) * jnp.linalg.norm(vectors + diagonal[..., None], axis=-1)

    single = jnp.concatenate([from_nuclei, radii[..., None]], axis=-1)
    single = single.reshape(system.electrons, -1)
    pair = jnp.concatenate([vectors, distances[..., None]], axis=-1)
    for depth, weights in enumerate(params["single"]):
        single = _dense(weights, _seen(system, single, pair))
        if depth < len(params["pair"]):
            pair = _dense(params["pair"][depth], pair)

    product = jnp.exp(_cusp(system, params["cusp"], distances))
    for group, weights in zip(system.groups, params["orbitals"], strict=True):
        orbitals = _orbitals(weights, single[group], radii[group])
        product = product * _determinants(orbitals)
    return product.sum()


def _seen(system: System, single: Array, pair: Array) -> Array:
    """What each electron sees: itself, and the means over each spin and its pairs."""
    if system.electrons == 1:
        return single
    features = [single]
    for group in system.groups:
        mean = single[group].mean(0, keepdims=True)
        features += [jnp.broadcast_to(mean, single.shape), pair[:, group].mean(1)]
    return jnp.concatenate(features, axis=-1)


def _dense(weights: Params, x: Array) -> Array:
    """A layer, with its input added to its output where they are of one shape."""
    y = jnp.tanh(x @ weights["w"] + weights["b"])
    return x + y if x.shape == y.shape else y


def _orbitals(weights: Params, single: Array, radii: Array) -> Array:
    """`[electron, orbital]`, a linear function of the features times an envelope.

    The envelope is `sum_I weight_I exp(-decay_I |r - R_I|)` over the nuclei.
    """
    decayed = jnp.exp(-radii[..., None] * weights["decay"])
    envelope = (decayed * weights["weight"]).sum(1)
    return (single @ weights["w"] + weights["b"]) * envelope


def _determinants(orbitals: Array) -> Array:
    """The determinants, `[determinant]`, of orbitals `[electron, all orbitals]`."""
    number = len(orbitals)
    matrices = orbitals.reshape(number, -1, number).swapaxes(0, 1)
    return matrices[:, 0, 0] if number == 1 else jnp.linalg.det(matrices)


def _meetings(system: System) -> list[tuple[str, float, list[tuple[int, int]]]]:
    """Kinds of pairs that there are, the slope of log psi where they meet, the pairs.

    It is 1/2 for electrons of different spin. For equal spins, whose psi has a node
    there, the slope of log (psi / r) is 1/4.
    """
    spins = [spin for spin, number in enumerate(system.spins) for _ in range(number)]
    kinds: dict[str, list[tuple[int, int]]] = {"parallel": [], "antiparallel": []}
    for i, j in combinations(range(len(spins)), 2):
        kinds["parallel" if spins[i] == spins[j] else "antiparallel"].append((i, j))
    slopes = {"parallel": 0.25, "antiparallel": 0.5}
    return [(kind, slopes[kind], pairs) for kind, pairs in kinds.items() if pairs]


def _cusp(system: System, rates: Params, distances: Array) -> Array:
    """J, the sum of `slope r / (1 + rate r)` over pairs, with a learned rate."""
    total = jnp.zeros((), distances.dtype)
    for kind, slope, pairs in _meetings(system):
        i, j = np.asarray(pairs).T
        r = distances[i, j]
        total = total + (slope * r / (1 + rates[kind] * r)).sum()
    return total
