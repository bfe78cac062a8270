"""Powers of second moments of inputs, for preconditioning by these alone."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax.blocks import Damped
from kfac_jax.devices import Devices, Task
from kfac_jax.linalg import Inverted
from kfac_jax.linalg._psd import diagonal, eigh
from kfac_jax.operator.single import Single
from kfac_jax.plan.group import Factors, Name, ToInvert


@dataclasses.dataclass(frozen=True)
class InputPower(Single):
    """A layer under `InputOnly` whose "inverse" is another power.

    It is `(A + λ ā I)^p`, with ā the mean of A's eigenvalues.
    """

    exponent: float = -1.0

    def to_invert(self, factors: Factors, damping: Numeric) -> ToInvert:
        """The damped A if p = -1; other powers need its eigenvectors."""
        if self.exponent != -1:
            return ToInvert({}, {})
        found = ToInvert({}, {})
        for name, a in factors[self.name].items():
            is_full = name not in self.block.elementwise
            shift = _shift(a, is_full, damping)
            part = found.matrices if is_full else found.elementwise
            part[self.name, name] = Damped(a, shift if is_full else shift[..., None])
        return found

    def inverses(
        self,
        found: Mapping[Name, Inverted],
        factors: Factors,
        damping: Numeric,
        devices: Devices,
    ) -> tuple[Factors, Array]:
        """The powers."""
        if self.exponent == -1:
            return super().inverses(found, factors, damping, devices)
        ((name, a),) = factors[self.name].items()
        is_full = name not in self.block.elementwise
        shift = _shift(a, is_full, damping)

        def power(operand: tuple[Array, Array]) -> list[Array]:
            a, shift = operand
            w, u = eigh(a) if is_full else (a, None)
            w = (w + shift[..., None]) ** self.exponent
            return [w if u is None else (u * w[..., None, :]) @ jnp.swapaxes(u, -1, -2)]

        task = Task(float(a.size * a.shape[-1]), power, (a, shift))
        (result,) = devices.each({self.name: task})[self.name]
        return {self.name: {name: result}}, jnp.isfinite(result).all()


def _shift(a: Array, is_full: bool, damping: Numeric) -> Array:
    """λ ā, for each of the layer's matrices."""
    own = diagonal(a) if is_full else a
    return jnp.asarray(damping, a.dtype) * own.mean(-1)
