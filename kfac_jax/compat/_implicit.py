"""Products with exact curvature matrices and their factors, of which none is formed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.differentiation import check_forward_mode, reverse_mode
from kfac_jax._jaxpr.graph import Graph
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._utils import arguments
from kfac_jax._utils.trees import TreeSpec, tree_spec
from kfac_jax.compat._plans import with_params_first, without
from kfac_jax.compat.utils import default_batch_size_extractor
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.programs import outputs_program
from kfac_jax.plan.tracing import trace

Params = Any
Outputs = tuple[list[Array], list[RegisteredLoss]]


class ImplicitExactCurvature:
    """Products with exact curvature matrices of the registered losses.

    The native way is `make_curvature(...).matvec`, and `quadratic_form`.

    With J the Jacobian of the registered outputs, and `F_R = R Rᵀ` the Fisher over
    them, the Fisher is `F = B Bᵀ` with `B = Jᵀ R`. R is the root that the losses'
    distributions have, divided by `√N`. The generalised Gauss-Newton matrix is the
    Fisher.

    Args:
      func: registers its loss; what it returns does not matter.
      params_index: the place of the parameters among the arguments.
      batch_size_extractor: N, as a function of the last argument; by default it is the
        leading axis of what is registered.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        params_index: int = 0,
        batch_size_extractor: Callable[[Any], Any] = default_batch_size_extractor,
    ) -> None:
        """Keeps the options."""
        arguments.function("func", func)
        arguments.whole("params_index", params_index)
        arguments.function("batch_size_extractor", batch_size_extractor)
        self._func = func
        self._params_index = params_index
        self._size = batch_size_extractor

    def _at(self, func_args: Sequence[Any]) -> "_Place":
        params, rest = without(func_args, self._params_index)
        tree = tree_spec(params)
        loss_fn = with_params_first(self._func, self._params_index)
        traced = trace(loss_fn, False, tree, params, rest, None)
        program = outputs_program(traced)
        data, size = jax.tree.leaves(rest), None
        if self._size is not default_batch_size_extractor:
            size = self._size(func_args[-1])
            arguments.number("what batch_size_extractor returns", size, arrays=True)

        def outputs(leaves: list[Array]) -> Outputs:
            _, losses = run(program, [*leaves, *data], None)
            scaled = [_of_size(loss, size) for loss in losses]
            return [loss.z for loss in scaled], scaled

        leaves = tree.leaves(params, "params")
        return _Place(outputs, program.graph, tree, leaves, size)

    def multiply_fisher(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the Fisher.

        Args:
          func_args: arguments of the function.
          parameter_structured_vector: like the parameters.

        Returns:
          The product.
        """
        place = self._at(func_args)
        push, losses = place.linearized()
        moved = push(place.vector(parameter_structured_vector))

        def product(losses: Sequence[RegisteredLoss], moved: list[Array]) -> Any:
            pairs = zip(losses, moved, strict=True)
            return [x.multiply_root(x.multiply_root_transpose(dz)) for x, dz in pairs]

        return place.pull(push, axis_types.auto(product, moved)(losses, moved))

    def multiply_fisher_factor(
        self, func_args: Sequence[Any], loss_inner_vectors: Sequence[Array]
    ) -> Params:
        """Multiplies by the factor B of the Fisher.

        Args:
          func_args: arguments of the function.
          loss_inner_vectors: an array for each registered loss, shaped like what was
            registered.

        Returns:
          The product, like the parameters.

        Raises:
          ValueError: if there are not as many, or their shapes differ.
        """
        place = self._at(func_args)
        push, losses = place.linearized()
        vectors = _inner(loss_inner_vectors, losses)

        def roots(losses: Sequence[RegisteredLoss], vectors: list[Array]) -> Any:
            pairs = zip(losses, vectors, strict=True)
            return [x.multiply_root(r.astype(x.z.dtype)) for x, r in pairs]

        like = [loss.z for loss in losses]
        return place.pull(push, axis_types.auto(roots, like)(losses, vectors))

    def multiply_fisher_factor_transpose(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> tuple[Array, ...]:
        """Multiplies by the transposed factor Bᵀ of the Fisher.

        Args:
          func_args: arguments of the function.
          parameter_structured_vector: like the parameters.

        Returns:
          An array for each registered loss, shaped like what was registered.
        """
        place = self._at(func_args)
        push, losses = place.linearized()
        moved = push(place.vector(parameter_structured_vector))

        def roots(losses: Sequence[RegisteredLoss], moved: list[Array]) -> Any:
            pairs = zip(losses, moved, strict=True)
            return [x.multiply_root_transpose(dz) for x, dz in pairs]

        return tuple(axis_types.auto(roots, moved)(losses, moved))

    def get_loss_inner_vector_shapes_and_batch_size(
        self, func_args: Sequence[Any], mode: str
    ) -> tuple[tuple[tuple[int, ...], ...], Any]:
        """What `multiply_fisher_factor` takes.

        Args:
          func_args: arguments of the function, or their shapes.
          mode: "fisher" or "ggn", which are equal.

        Returns:
          The shape of the array for each registered loss, and N.
        """
        arguments.choice("mode", mode, ("fisher", "ggn"))
        place = self._at(func_args)
        shapes = [x.shape for x in jax.eval_shape(place.outputs, place.leaves)[0]]
        return tuple(shapes), place.size or shapes[0][0]

    def multiply_ggn(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the generalised Gauss-Newton matrix, which is the Fisher."""
        return self.multiply_fisher(func_args, parameter_structured_vector)

    def multiply_ggn_factor(
        self, func_args: Sequence[Any], loss_inner_vectors: Sequence[Array]
    ) -> Params:
        """Multiplies by the factor B of the Fisher, see `multiply_fisher_factor`."""
        return self.multiply_fisher_factor(func_args, loss_inner_vectors)

    def multiply_ggn_factor_transpose(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> tuple[Array, ...]:
        """Multiplies by Bᵀ, see `multiply_fisher_factor_transpose`."""
        return self.multiply_fisher_factor_transpose(
            func_args, parameter_structured_vector
        )

    def multiply_hessian(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the Hessian of the sum of the registered losses.

        Args:
          func_args: arguments of the function.
          parameter_structured_vector: like the parameters.

        Returns:
          The product.

        Raises:
          ValueError: if a loss was registered without targets.
        """
        place = self._at(func_args)

        def value(leaves: list[Array]) -> Array:
            losses = place.outputs(leaves)[1]
            if not all(loss.data for loss in losses):
                raise ValueError(
                    "multiply_hessian needs the values of the losses: expected all "
                    "registered with targets, got one without. Pass targets to the "
                    "register function, or use multiply_fisher."
                )
            return functools.reduce(jnp.add, [loss.value() for loss in losses])

        def product(leaves: list[Array], v: list[Array]) -> list[Array]:
            return jax.jvp(jax.grad(value), (leaves,), (v,))[1]

        v = place.vector(parameter_structured_vector)
        check_forward_mode(place.graph, product, place.leaves, v)
        return jax.tree.unflatten(place.tree.treedef, product(place.leaves, v))

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"ImplicitExactCurvature has no {name!r} in kfac_jax; expected "
            "multiply_fisher, multiply_ggn, one of these with _factor or "
            "_factor_transpose, or multiply_hessian. For inner products with the "
            "Fisher use make_curvature(...).quadratic_form."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Where the curvature is taken.

    Attributes:
      outputs: the registered outputs, and the losses, as a function of the parameters.
      graph: its program.
      tree: describes the parameters.
      leaves: the parameters.
      size: N, or None for the leading axis of what is registered.
    """

    outputs: Callable[[list[Array]], Outputs]
    graph: Graph
    tree: TreeSpec
    leaves: list[Array]
    size: Any

    def vector(self, v: Params) -> list[Array]:
        """The leaves of a vector like the parameters."""
        return self.tree.leaves(v, "the vector v")

    def linearized(self) -> tuple[Callable[[list[Array]], Any], list[RegisteredLoss]]:
        """J as a function of leaves, and the losses."""

        def slope(leaves: list[Array], tangents: list[Array]) -> Any:
            return jax.jvp(self.outputs, (leaves,), (tangents,), has_aux=True)[1]

        check_forward_mode(self.graph, slope, self.leaves, self.leaves)
        _, push, losses = jax.linearize(self.outputs, self.leaves, has_aux=True)
        return push, losses

    def pull(self, push: Callable[[list[Array]], Any], cotangents: Any) -> Params:
        """`Jᵀ u`, like the parameters."""
        with reverse_mode(self.graph, len(self.leaves)):
            (product,) = jax.linear_transpose(push, self.leaves)(cotangents)
        return jax.tree.unflatten(self.tree.treedef, product)


def _of_size(loss: RegisteredLoss, size: Any) -> RegisteredLoss:
    """The loss divided by the size of the batch, if given, not by its leading axis."""
    if size is None:
        return loss
    scale = jnp.asarray(len(loss.z) / size).astype(loss.weight.dtype)
    return dataclasses.replace(loss, weight=loss.weight * scale)


def _inner(vectors: Any, losses: Sequence[RegisteredLoss]) -> list[Array]:
    """What B is multiplied by, one array for each loss."""
    what = "loss_inner_vectors"
    arguments.sequence(what, vectors, f"{len(losses)} arrays, one for each loss")
    shapes = [loss.z.shape for loss in losses]
    found = [arguments.real(f"{what}[{i}]", x) for i, x in enumerate(vectors)]
    if [x.shape for x in found] != shapes:
        raise ValueError(
            f"{what} must be shaped like what was registered: expected {shapes}, got "
            f"{[x.shape for x in found]}."
        )
    return found
