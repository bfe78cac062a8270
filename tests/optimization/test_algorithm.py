"""The paper's Algorithm 2, written naively in numpy, step by step against `kfac`.

Everything is dense: the exact Fisher from whole Jacobians, each block's inverse from a
Kronecker product of damped factors, M(δ) term by term. Vectors over the parameters are
`[W_1; W_2]`, each row-major `[inputs + 1, outputs]` with the bias as last row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from tests.helpers.models import traced_once

SIZES = (3, 4, 2)
L2 = 0.03  # η
CASES = 8
STEPS = 50
NAMES = ("first", "second")


def loss_fn(params, x, y):
    first, second = params["first"], params["second"]
    h = jnp.tanh(x @ first["w"] + first["b"][None])
    z = h @ second["w"] + second["b"][None]
    penalty = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
    return kfac_jax.losses.squared_error(z, y).sum(-1).mean() + L2 / 2 * penalty


def make_params():
    rng = np.random.default_rng(0)
    return {
        name: {"w": jnp.asarray(rng.normal(size=(n, m))), "b": jnp.zeros(m)}
        for name, n, m in zip(NAMES, SIZES, SIZES[1:], strict=False)
    }


def make_batch(k):
    """Noisy values of a fixed function, so that there is something to learn."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=(CASES, SIZES[0])) * np.array([2.0, 1.0, 0.3])
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)
    return x, y + 0.1 * rng.normal(size=y.shape)


class Algorithm2:
    """Section 9 for a tanh net of two layers with a squared error.

    `-log N(y | z, 1/2 I) = ‖z - y‖² + const` has the Fisher 2 I over z.
    """

    def __init__(self, params, *, damping, t1, t2, t3, decay, tau2, momentum):
        self.w = [np.vstack([params[n]["w"], params[n]["b"]]) for n in NAMES]
        self.damping, self.gamma = damping, np.sqrt(damping + L2)
        self.t1, self.t2, self.t3 = t1, t2, t3
        self.decay, self.tau2, self.momentum = decay, tau2, momentum
        self.k = 1
        self.factors = [(0.0, 0.0), (0.0, 0.0)]
        self.inverse = None
        self.previous = np.zeros(sum(w.size for w in self.w))
        self.rho = np.nan

    # ------------------------------------------------------------- the network

    def forward(self, w, x):
        a0 = np.hstack([x, np.ones((len(x), 1))])
        h = np.tanh(a0 @ w[0])
        a1 = np.hstack([h, np.ones((len(x), 1))])
        return a0, h, a1, a1 @ w[1]

    def loss(self, w, x, y):
        z = self.forward(w, x)[-1]
        penalty = sum((each**2).sum() for each in w)
        return ((z - y) ** 2).sum(-1).mean() + L2 / 2 * penalty

    def output_jacobians(self, x):
        """dz/ds_1 and dz/ds_2 for each case, `[n, output, unit]`."""
        _, h, _, _ = self.forward(self.w, x)
        top = np.broadcast_to(np.eye(SIZES[2]), (len(x), SIZES[2], SIZES[2]))
        return np.einsum("nh,ho->noh", 1 - h**2, self.w[1][:-1]), top

    def jacobian(self, x):
        """dz/dθ, `[n, output, P]`."""
        a0, _, a1, _ = self.forward(self.w, x)
        parts = [
            np.einsum("ni,noj->noij", a, j).reshape(len(x), SIZES[2], -1)
            for a, j in zip((a0, a1), self.output_jacobians(x), strict=True)
        ]
        return np.concatenate(parts, -1)

    def gradient(self, x, y):
        z = self.forward(self.w, x)[-1]
        return 2 * np.einsum("nop,no->p", self.jacobian(x), z - y) / len(x) + (
            L2 * self.vector(self.w)
        )

    def fisher(self, x):
        j = self.jacobian(x)
        return 2 * np.einsum("nop,noq->pq", j, j) / len(x)

    @staticmethod
    def vector(matrices):
        return np.concatenate([m.reshape(-1) for m in matrices])

    def matrices(self, vector):
        cut = self.w[0].size
        return [
            part.reshape(w.shape)
            for part, w in zip((vector[:cut], vector[cut:]), self.w, strict=True)
        ]

    # ----------------------------------------------------------- the algorithm

    def update_factors(self, x):
        a0, _, a1, _ = self.forward(self.w, x)
        epsilon = min(1 - 1 / self.k, self.decay)
        self.factors = [
            (
                epsilon * old_a + (1 - epsilon) * a.T @ a / len(x),
                epsilon * old_g
                + (1 - epsilon) * 2 * np.einsum("noh,noi->hi", j, j) / len(x),
            )
            for (old_a, old_g), a, j in zip(
                self.factors, (a0, a1), self.output_jacobians(x), strict=True
            )
        ]

    def inverted(self, gamma):
        """The inverse of the block-diagonal approximation, damped with γ."""
        blocks = []
        for a, g in self.factors:
            pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
            damped_a = a + pi * gamma * np.eye(len(a))
            damped_g = g + gamma / pi * np.eye(len(g))
            blocks.append(np.linalg.inv(np.kron(damped_a, damped_g)))
        cut = len(blocks[0])
        result = np.zeros((len(self.previous), len(self.previous)))
        result[:cut, :cut], result[cut:, cut:] = blocks
        return result

    def proposal(self, gamma, gradient, matrix):
        """The inverse, α, μ, δ and M(δ) - M(0) for one γ."""
        due = self.k % self.t3 == 0 or self.k <= 3
        inverse = self.inverted(gamma) if due else self.inverse
        direction = -inverse @ gradient
        d, d0 = direction, self.previous
        if self.momentum is None:
            basis = np.stack([d, d0])
            alpha, mu = np.linalg.pinv(basis @ matrix @ basis.T) @ -(basis @ gradient)
        else:
            mu = self.momentum
            alpha = -(gradient @ d + mu * d0 @ matrix @ d) / (d @ matrix @ d)
        delta = alpha * d + mu * d0
        change = gradient @ delta + 0.5 * delta @ matrix @ delta
        return inverse, alpha, mu, delta, change

    def step(self, x, y):
        gradient = self.gradient(x, y)
        self.update_factors(x)
        matrix = self.fisher(x[: round(self.tau2 * len(x))])
        matrix += (self.damping + L2) * np.eye(len(matrix))
        gammas = [self.gamma]
        if self.k % self.t2 == 0:
            omega2 = np.sqrt(19 / 20) ** self.t2
            gammas += [omega2 * self.gamma, self.gamma / omega2]
        proposals = [self.proposal(gamma, gradient, matrix) for gamma in gammas]
        self.changes = [change for *_, change in proposals]
        best = int(np.argmin(self.changes))
        self.gamma = gammas[best]
        self.inverse, self.alpha, self.mu, delta, self.change = proposals[best]
        after = [w + d for w, d in zip(self.w, self.matrices(delta), strict=True)]
        self.used_damping = self.damping
        if self.k % self.t1 == 0:
            risen = self.loss(after, x, y) - self.loss(self.w, x, y)
            self.rho = -np.inf if risen > 0 else risen / self.change
            omega1 = (19 / 20) ** self.t1
            if self.rho > 3 / 4:
                self.damping *= omega1
            elif self.rho < 1 / 4:
                self.damping /= omega1
        self.w, self.previous = after, delta
        self.k += 1


@functools.cache
def plan():
    return kfac_jax.make_curvature(
        loss_fn,
        make_params(),
        *map(jnp.asarray, make_batch(0)),
        estimation_mode="fisher_exact",
        l2=L2,
    )


@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize(("initial", "tau2"), [(0.05, 1.0), (3.0, 0.5)])
def test_fifty_steps_of_the_whole_algorithm(momentum, initial, tau2):
    """EMA, π, γ, α, μ, M, ρ, λ and θ, with the periods T1 = 3, T2 = 4 and T3 = 2."""
    naive = Algorithm2(
        make_params(),
        damping=initial,
        t1=3,
        t2=4,
        t3=2,
        decay=0.8,
        tau2=tau2,
        momentum=momentum,
    )
    tx = kfac_jax.kfac(
        plan(),
        kfac_jax.QuadraticModel(fraction=tau2, largest_momentum=None, longest=None),
        momentum,
        kfac_jax.LevenbergMarquardt(initial, every=3),
        factored_damping=kfac_jax.SeparateDamping(every=4),
        decay=0.8,
        inverse_every=2,
    )

    @jax.jit
    @traced_once
    def step(params, state, *args):
        value, grads, statistics = plan().value_grad_and_statistics(params, *args)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = tx.init(params)
    np.testing.assert_allclose(state.factored_damping, naive.gamma, rtol=1e-12)
    gammas, dampings = [naive.gamma], [naive.damping]
    for k in range(1, STEPS + 1):
        x, y = make_batch(k)
        params, state = step(params, state, jnp.asarray(x), jnp.asarray(y))
        naive.step(x, y)
        info = state.info
        actual = {
            "gamma": info.factored_damping,
            "lambda": info.damping,
            "next lambda": state.damping,
            "alpha": info.learning_rate,
            "mu": info.momentum,
            "change": info.quadratic_change,
            "rho": info.rho,
        }
        expected = {
            "gamma": naive.gamma,
            "lambda": naive.used_damping,
            "next lambda": naive.damping,
            "alpha": naive.alpha,
            "mu": naive.mu,
            "change": naive.change,
            "rho": naive.rho,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(
                actual[name], value, rtol=1e-7, atol=1e-10, err_msg=f"{name} at {k}"
            )
        np.testing.assert_allclose(state.factored_damping, naive.gamma, rtol=1e-10)
        for name, w, (a, g) in zip(NAMES, naive.w, naive.factors, strict=True):
            found = state.factors[name]
            np.testing.assert_allclose(found["input"], a, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(found["output"], g, rtol=1e-9, atol=1e-11)
            moved = np.vstack([params[name]["w"], params[name]["b"]])
            np.testing.assert_allclose(moved, w, rtol=1e-8, atol=1e-10)
        gammas.append(naive.gamma)
        dampings.append(naive.damping)
        if len(naive.changes) > 1:  # no choice hangs on rounding
            first, second = sorted(naive.changes)[:2]
            assert second - first > 1e-9 * abs(first)
    assert step._cache_size() <= 1  # or 0, where JAX has forgotten it
    assert int(info.skipped_updates) == 0
    assert len(set(gammas)) > 3 and len(set(dampings)) > 3
