"""`value_and_grad_func` of the published Optimizer as a loss function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from chex import ArrayTree, PRNGKey

from kfac_jax._jaxpr.graph import build
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax.compat._registering import all_generic


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Function:
    """A function of the user's with its own gradient, as `make_curvature` takes it.

    Attributes:
      value_and_grad: the user's function; see `Optimizer`, as for the next three.
      has_aux: whether it returns auxiliary data.
      has_state: whether it takes and returns a state.
      has_rng: whether it takes a key.
      for_estimator: another function whose registered losses count, or None.
      generic_only: whether all parameters get diagonal blocks.
    """

    value_and_grad: Callable[..., Any]
    has_aux: bool
    has_state: bool
    has_rng: bool
    for_estimator: Callable[..., Any] | None
    generic_only: bool

    def arguments(
        self, rng: PRNGKey, batch: ArrayTree, func_state: ArrayTree | None
    ) -> list[Any]:
        """What the user's function gets after the parameters."""
        state = [func_state] if self.has_state else []
        return [*state, *([rng] if self.has_rng else []), batch]

    def __call__(self, params: optax.Params, *arguments: Any) -> Any:
        """The loss and, as auxiliary data, function state, aux and gradient."""
        function = self.value_and_grad
        tagged = all_generic(params) if self.generic_only else params
        if self.for_estimator is not None:
            self.for_estimator(tagged, *arguments)
            function, tagged = _without_tags(function), params
        value, grads = self._two(function(tagged, *arguments))
        more = func_state = aux = None
        if self.has_state or self.has_aux:
            value, more = self._two(value)
        if self.has_state and self.has_aux:
            func_state, aux = self._two(more)
        elif self.has_state:
            func_state = more
        else:
            aux = more
        if isinstance(value, tuple | list):
            raise self._unlike(value)
        return value, (func_state, aux, grads)

    def _two(self, result: Any) -> Any:
        if isinstance(result, tuple | list) and len(result) == 2:
            return result
        raise self._unlike(result)

    def _unlike(self, got: Any) -> TypeError:
        names = [("loss", "(loss, aux)"), ("(loss, state)", "(loss, (state, aux))")]
        value = names[self.has_state][self.has_aux]
        return TypeError(
            f"value_and_grad_func is expected to return ({value}, grads), with "
            f"value_func_has_state={self.has_state} and "
            f"value_func_has_aux={self.has_aux}; got {type(got).__name__} for "
            "a part of that. Pass jax.value_and_grad(loss_fn, has_aux=...), and say by "
            "these options what it returns."
        )


def _without_tags(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for the eyes of discovery: without what it registers."""

    @functools.wraps(function)
    def untagged(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = Program(build(closed), {}, {})
        outputs, _ = run(program, jax.tree.leaves(args), None)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return untagged
