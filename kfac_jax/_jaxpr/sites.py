"""Sites: the places where a program combines parameters with data."""

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Atom, Place
from kfac_jax._jaxpr.states import LOST, Examples, State
from kfac_jax._jaxpr.view import Layout


class Axes(NamedTuple):
    """The role of each axis of an array in a layer."""

    independent: tuple[int, ...]  # one layer for each entry
    rows: tuple[int, ...]  # the batch, and positions within an example
    features: tuple[int, ...]  # inputs, or outputs

    def arrange(self, value: Array) -> Array:
        """Brings the array to `[*independent, *rows, features]`."""
        moved = value.transpose((*self.independent, *self.rows, *self.features))
        lead = moved.shape[: len(self.independent) + len(self.rows)]
        return moved.reshape(*lead, math.prod(moved.shape[len(lead) :]))

    def examples(self, state: State) -> State:
        """The state with its axis as an index into `rows`; LOST if it is not a row."""
        if not isinstance(state, Examples):
            return state
        if state.axis not in self.rows:
            return LOST
        return dataclasses.replace(state, axis=self.rows.index(state.axis))


class Window(NamedTuple):
    """A run of entries along an axis.

    Of parameters that are joined, `length` is the run's. Of parameters that are cut, it
    is the length of the longer run that the entries were cut from.
    """

    axis: int
    start: int
    length: int


class Reader(abc.ABC):
    """How rows are read from the operands of one kind of linear layer.

    A frozen dataclass for each kind, beside the rule that recognises it.

    Attributes:
      kind: "dense", "conv", "embedding", "scale" or "shift".
      y_axes: the axes of the output that rows are read from.
    """

    kind: ClassVar[str]
    y_axes: Axes

    @abc.abstractmethod
    def rows(self, x: Array | None, dy: Array) -> tuple[Array, Array]:
        """Reads the rows of one use.

        Args:
          x: the input as the program has it; None for a shift, whose input is 1.
          dy: the cotangent of the output as the program has it.

        Returns:
          `[*independent, *rows, inputs]` and `[*independent, *rows, outputs]`.
        """

    @property
    def batch_axes(self) -> tuple[int, int] | None:
        """The batch axes of input and output; None if all rows are read at once."""
        return None

    def chunks(self, batch: int) -> tuple[int, int]:
        """How to read a batch in chunks, to save memory.

        Args:
          batch: the batch size.

        Returns:
          The number of full chunks and their size. A smaller one holds the remainder.
        """
        return 1, batch

    @property
    def is_partial(self) -> bool:
        """Whether the layer uses a cut parameter, or one joined to others."""
        return self.joins_outputs

    @property
    def joins_outputs(self) -> bool:
        """Whether other parameters' outputs are in the same array."""
        return False

    def counted(
        self, x: Array, dy: Array, scale: Any, homogeneous: bool, one_hot: bool
    ) -> tuple[Array, Array]:
        """Clears the rows that do not count: those whose `dy` is exactly zero.

        Such rows are masked, or routed to another expert. They add nothing to `G` in
        any case; cleared, they add nothing to `A` either.

        Args:
          x: inputs `[*e, b, s, i]`.
          dy: the outputs' cotangents `[*e, b, s, o]`.
          scale: the scalar factor of the inputs.
          homogeneous: whether to append the coordinate 1 to the inputs.
          one_hot: whether one-hot inputs stay integers.

        Returns:
          `x` and `dy`.
        """
        active = jnp.abs(dy).max(-1, keepdims=True) != 0
        if not jnp.issubdtype(x.dtype, jnp.floating):  # dot_general takes integers too
            x = x.astype(dy.dtype)
        if not is_one(scale):
            x = x * jnp.asarray(scale, x.dtype)
        if homogeneous:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        # after the 1 is appended, which must be cleared too
        return jnp.where(active, x, jnp.zeros((), x.dtype)), dy


def is_one(scale: Any) -> bool:
    """Whether a scale is known to be one, as a traced array never is."""
    return isinstance(scale, float | int) and scale == 1.0


def windowed(value: Array, windows: tuple[Window, ...]) -> Array:
    """Slices an array to the windows."""
    for axis, start, size in windows:
        value = jax.lax.slice_in_dim(value, start, start + size, axis=axis)
    return value


class Parameter(NamedTuple):
    """A parameter leaf, and how its entries become a layer's matrices or vectors."""

    leaf: int
    layout: Layout


class Computed(NamedTuple):
    """A weight that the program computes from parameters.

    Attributes:
      value: its id.
      form: "entry" if each entry is a function of the parameter's, and of others only
        by their norms and means; "right" or "left" if it is the matrix times another
        one on that side, up to a constant factor; else "other".
      copied: the axis along which the value holds copies of the weight, if any.
    """

    value: int
    form: str
    copied: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One use of a linear layer, `y[e, r, o] = Σ_i x[e, r, i] w[e, i, o] + b[e, o]`.

    Attributes:
      reader: how rows are read from input and output.
      output: the place of `y`, where statistics are gathered.
      x: the id (or literal) of the input, or of the operands that the reader reads it
        from; None for a shift, whose input is 1.
      weight: the weight, or None for a shift.
      bias: the bias added to `y`, or None.
      transposed: the layout of a dense layer's weight with inputs and outputs swapped.
      scale: the scalar factor between the leaf and what multiplies `x`.
      scans: the scans that run over the parameter, by their first result.
      repeated: whether a scan uses the parameter in all its steps.
      examples: which axis of the rows holds the examples (an index into the reader's
        `y_axes.rows`); LOST or None where that is not known.
      source: the user's source line.
      count: the number of rows of each independent layer, over the full batch.
      cases: for an input that does not depend on the batch, the number of cases that it
        stands for; 0 for other inputs.
      swapped: whether the layer uses the weight transposed, in the layout `transposed`.
      on_device: whether each device of a `shard_map` has its own examples there.
      computed: the weight that the layouts are of, if the parameter reaches the data by
        a map; None if it is the parameter itself.
      term: which of the layer's Kronecker products its statistics belong to, where the
        block is a sum of two.
    """

    reader: Reader
    output: Place
    x: Atom | tuple[Atom, ...] | None
    weight: Parameter | None
    bias: Parameter | None
    examples: State
    scale: Any
    scans: tuple[int, ...]
    repeated: bool
    source: str
    transposed: Layout | None = None
    count: int = 0
    cases: int = 0
    swapped: bool = False
    on_device: bool = False
    computed: Computed | None = None
    term: int = 0

    @property
    def kind(self) -> str:
        """The reader's kind."""
        return self.reader.kind

    @property
    def leaf(self) -> int:
        """The index of the used parameter: the weight or, for a shift, the bias."""
        parameter = self.weight or self.bias
        assert parameter is not None
        return parameter.leaf

    def canonical(
        self, x: Array | None, dy: Array, homogeneous: bool, *, one_hot: bool = True
    ) -> tuple[Array, Array]:
        """Brings `x` and `dy` to `[*independent, batch, shared, features]`.

        Rows whose `dy` is exactly zero (masked, or routed elsewhere) become zero in
        `x`. With `homogeneous`, `x` gets the coordinate 1 as its last feature. With
        `one_hot` an embedding's `x` are integers without a feature axis; those of
        cleared rows are out of bounds.

        Args:
          x: the input as the program has it; None for a shift.
          dy: the cotangent of the output as the program has it.
          homogeneous: whether the layer has a bias.
          one_hot: whether an embedding's inputs stay integers, or become one-hot rows.

        Returns:
          `x` and `dy` in the canonical layout.
        """
        inputs, outputs = (self._by_example(v) for v in self.reader.rows(x, dy))
        return self.reader.counted(inputs, outputs, self.scale, homogeneous, one_hot)

    def _by_example(self, value: Array) -> Array:
        """Splits `[*independent, *rows, features]` in examples and their positions.

        Each row counts as an example where the axis of examples is not known.
        """
        independent, rows, _ = self.reader.y_axes
        e, last = len(independent), len(independent) + len(rows)
        head, features = value.shape[:e], value.shape[-1]
        if not isinstance(self.examples, Examples):
            return value.reshape(*head, math.prod(value.shape[e:last]), 1, features)
        # The axis of examples has outer · size · inner entries. Only `size` is the
        # batch; the other two, and the other row axes, are positions in an example.
        axis, size, outer, inner = dataclasses.astuple(self.examples)
        at = e + axis
        before, after = value.shape[e:at], value.shape[at + 1 : last]
        split = value.reshape(*head, *before, outer, size, inner, *after, features)
        # no -1, which an array without entries leaves open
        positions = math.prod((*before, outer, inner, *after))
        moved = jnp.moveaxis(split, at + 1, e)
        return moved.reshape(*head, size, positions, features)


@dataclasses.dataclass(frozen=True, eq=False)
class OtherUse:
    """A use of a parameter that no layer covers, or that the user tagged generic."""

    leaf: int
    kind: str  # "generic" or "unmatched"
    reason: str
    source: str
    at: int | None = dataclasses.field(default=None, compare=False)  # a value there


Use = Site | OtherUse


def unmatched(uses: Iterable[Use]) -> set[int]:
    """The parameters that no layer covers."""
    return {x.leaf for x in uses if isinstance(x, OtherUse) and x.kind == "unmatched"}
