"""States as mutable dataclasses that are pytrees, and the moving average among them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.compat._devices import pmean_if_pmap

T = TypeVar("T")
Class = TypeVar("Class", bound=type[Any])


class State:
    """The base of states; subclasses are made pytrees by `register_state_class`."""

    def copy(self) -> Self:
        """A state of its own, with the same arrays."""
        return jax.tree.map(lambda x: x, self)


@dataclass_transform(eq_default=False)
def register_state_class(class_type: Class) -> Class:
    """Makes a subclass of `State` a dataclass and a pytree, all fields being children.

    >>> import jax
    >>> @register_state_class
    ... class Count(State):
    ...     count: Array
    >>> jax.tree.leaves(Count(count=3))
    [3]
    """
    made: Any = dataclasses.dataclass(eq=False)(class_type)
    names = [field.name for field in dataclasses.fields(made)]
    jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])
    return made


def _add(x: Any, y: Any, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda p, q: a * p + b * q, x, y)


@register_state_class
class WeightedMovingAverage(State, Generic[T]):
    """A running weighted mean of arrays or trees, which `update` changes in place.

    Attributes:
      weight: the total weight so far.
      value: the mean so far; None before the first.

    >>> average = WeightedMovingAverage.zeros_array((2,))
    >>> average.update(jnp.ones(2), old_weight_multiplier=0.95, new_weight=1.0)
    >>> average.value
    Array([1., 1.], dtype=float32)
    """

    weight: Any  # []
    value: Any

    @classmethod
    def zeros_array(
        cls, shape: tuple[int, ...], dtype: Any = None
    ) -> "WeightedMovingAverage[Array]":
        """An average of no arrays, of a shape."""
        value = jnp.zeros(shape, dtype)
        return WeightedMovingAverage(weight=jnp.zeros((), value.dtype), value=value)

    @classmethod
    def zeros_like(cls, value: T) -> "WeightedMovingAverage[T]":
        """An average of no trees like `value`."""
        zeros = jax.tree.map(jnp.zeros_like, value)
        dtype = jnp.result_type(*jax.tree.leaves(zeros))
        return WeightedMovingAverage(weight=jnp.zeros((), dtype), value=zeros)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value, an array."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Of the value, an array."""
        return self.value.ndim

    @property
    def dtype(self) -> Any:
        """Of the value, an array."""
        return self.value.dtype

    def update(
        self,
        value: T,
        old_weight_multiplier: Any,
        new_weight: Any,
        add_function: Callable[[T, T, Any, Any], T] = _add,
    ) -> None:
        """Multiplies the weight so far, and takes in a value with a weight of its own.

        Args:
          value: like those before.
          old_weight_multiplier: what the weight so far is multiplied by.
          new_weight: the weight of the value.
          add_function: `(x, y, a, b) -> a x + b y`.
        """
        if self.value is None:
            self.value = jax.tree.map(jnp.zeros_like, value)
        old = self.weight * old_weight_multiplier
        total = old + new_weight
        positive = jnp.where(total == 0, 1, total).astype(total.dtype)
        self.value = add_function(
            self.value, value, old / positive, new_weight / positive
        )
        self.weight = total

    def sync(self, pmap_axis_name: str | None) -> None:
        """Averages the value over the devices of an axis, if that is mapped."""
        self.value = pmean_if_pmap(self.value, pmap_axis_name)

    def clear(self, value_to_none: bool = False) -> None:
        """Forgets all values."""
        self.weight = jnp.zeros_like(self.weight)
        zeros = jax.tree.map(jnp.zeros_like, self.value)
        self.value = None if value_to_none else zeros

    def value_and_clear(self) -> Any:
        """The value, which is then forgotten."""
        value = self.value
        self.clear()
        return value
