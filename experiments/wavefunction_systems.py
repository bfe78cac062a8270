"""Atoms and molecules with few electrons.

Lengths are in bohr, energies in hartree. The exact energies are not relativistic, with
nuclei at rest: of He from Nakashima & Nakatsuji 2007 (J. Chem. Phys. 127, 224104), of
Li from Puchalski & Pachucki 2006 (Phys. Rev. A 73, 022503), of Be from Puchalski et al.
2013 (Phys. Rev. A 87, 030502), of H2 from Pachucki 2010 (Phys. Rev. A 82, 032509), of
LiH from Cencek & Rychlewski 2000 (Chem. Phys. Lett. 320, 549).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True, kw_only=True)
class System:
    """Nuclei at fixed places, and electrons."""

    name: str
    charges: tuple[float, ...]
    positions: tuple[tuple[float, float, float], ...]
    spins: tuple[int, ...]  # numbers of electrons up and down; no zeros
    exact: float  # the ground state's energy, not relativistic, nuclei at rest
    tolerance: float | None = None  # the target of the experiment, if it has one

    @property
    def electrons(self) -> int:
        """How many electrons there are."""
        return sum(self.spins)

    @property
    def groups(self) -> tuple[slice, ...]:
        """Where the electrons of each spin are."""
        ends = [sum(self.spins[: i + 1]) for i in range(len(self.spins))]
        return tuple(slice(e - n, e) for e, n in zip(ends, self.spins, strict=True))


def atom(
    name: str, spins: tuple[int, ...], exact: float, tolerance: float | None = None
) -> System:
    """A neutral atom."""
    return System(
        name=name,
        charges=(float(sum(spins)),),
        positions=((0.0, 0.0, 0.0),),
        spins=spins,
        exact=exact,
        tolerance=tolerance,
    )


SYSTEMS = {
    "H": atom("H", (1,), -0.5, 1e-3),
    "He": atom("He", (1, 1), -2.903724, 5e-3),
    "Li": atom("Li", (2, 1), -7.478060),
    "Be": atom("Be", (2, 2), -14.667356),
    "H2": System(
        name="H2",
        charges=(1.0, 1.0),
        positions=((0.0, 0.0, -0.7), (0.0, 0.0, 0.7)),
        spins=(1, 1),
        exact=-1.174476,
        tolerance=5e-3,
    ),
    "LiH": System(
        name="LiH",
        charges=(3.0, 1.0),
        positions=((0.0, 0.0, 0.0), (0.0, 0.0, 3.015)),
        spins=(2, 2),
        exact=-8.070548,
    ),
}


def potential(system: System, electrons: Array) -> Array:
    """The Coulomb energy of one walker, that among the nuclei included."""
    charges = np.asarray(system.charges, electrons.dtype)
    nuclei = np.asarray(system.positions, electrons.dtype)
    attraction = charges / jnp.linalg.norm(electrons[:, None] - nuclei, axis=-1)
    i, j = np.triu_indices(system.electrons, 1)
    repulsion = 1 / jnp.linalg.norm(electrons[i] - electrons[j], axis=-1)
    a, b = np.triu_indices(len(charges), 1)
    fixed = charges[a] * charges[b] / np.linalg.norm(nuclei[a] - nuclei[b], axis=-1)
    return repulsion.sum() - attraction.sum() + fixed.sum(dtype=electrons.dtype)
