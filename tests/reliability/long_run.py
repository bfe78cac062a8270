"""Trains `fault_problem`'s model for many steps, and tells what came out.

As a program, `python -m tests.reliability.long_run CONFIGURATION STEPS` prints a digest
of all bits of the parameters and the state, and the loss.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax
from tests.reliability import fault_problem


class Run:
    """A run of a configuration, in the widest type that there is, from new programs."""

    def __init__(self, name: str) -> None:
        self.configuration = fault_problem.CONFIGURATIONS[name]
        dtype = jnp.result_type(float)
        self.params = fault_problem.make_params(dtype)
        self.inputs = fault_problem.make_inputs(dtype)
        curvature = kfac_jax.make_curvature(
            fault_problem.loss_fn,
            self.params,
            *self.inputs[:4],
            **self.configuration.plan,
        )
        tx = self.configuration.make(curvature)
        self.step = fault_problem.make_step(curvature, tx, self.configuration.carried)
        self.state = tx.init(self.params)
        self.number = 0
        self.loss = jnp.inf

    def go(self, steps: int) -> None:
        for _ in range(steps):
            after = self.step(self.params, self.state, self.inputs, self.number)
            self.params, self.state, self.loss = after[:3]
            self.number += 1

    def digest(self) -> str:
        """Of every bit of parameters and state."""
        found = hashlib.sha256()
        for leaf in jax.tree.leaves((self.params, self.state)):
            found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()


if __name__ == "__main__":
    run = Run(sys.argv[1])
    run.go(int(sys.argv[2]))
    wide = bool(jax.config.jax_enable_x64)
    print(json.dumps({"digest": run.digest(), "loss": float(run.loss), "x64": wide}))
