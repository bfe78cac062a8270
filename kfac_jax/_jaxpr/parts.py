"""Parameters that are cut in parts, each of which is a weight of its own.

`q, k, v = jnp.split(w, 3)`, `w[i]` of stacked layers and `w[:, :d]` are boxes of a
parameter. If the boxes that a program uses divide it up, each is a layer like one
whose parameter it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.core

from kfac_jax._jaxpr.graph import Graph, Node, is_value


class Box(NamedTuple):
    """Some entries of an array: along each axis those from a start to an end."""

    array_shape: tuple[int, ...]
    ends: tuple[tuple[int, int], ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the entries."""
        return tuple(slice(start, stop) for start, stop in self.ends)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of entries along each axis."""
        return tuple(stop - start for start, stop in self.ends)

    def __str__(self) -> str:
        """As an index: `[0]`, `[:,8:16]`."""
        pairs = [*zip(self.ends, self.array_shape, strict=True)]
        while pairs and pairs[-1][0] == (0, pairs[-1][1]):
            pairs.pop()
        shown = [
            ":" if (a, b) == (0, n) else str(a) if b == a + 1 else f"{a}:{b}"
            for (a, b), n in pairs
        ]
        return f"[{','.join(shown)}]"


class Part(NamedTuple):
    """A part of a parameter leaf, and the shape in which the program has it."""

    leaf: int
    box: Box
    shape: tuple[int, ...]


def partition(
    candidates: Mapping[int, Part | None], whole: Mapping[int, Sequence[int]]
) -> dict[int, Part]:
    """Chooses the computed weights that are parts.

    Args:
      candidates: by computed weight the part that it is, or None.
      whole: for each parameter that these weights are computed from its shape.

    Returns:
      The parts of the parameters that are divided up by all that is computed from them.
    """
    result: dict[int, Part] = {}
    for leaf, shape in whole.items():
        own = {i: part for i, part in candidates.items() if part and part.leaf == leaf}
        boxes = {part.box: part.shape for part in own.values()}
        one_shape = all(boxes[part.box] == part.shape for part in own.values())
        if one_shape and len(boxes) > 1 and _divide([*boxes], shape):
            result |= own
    return result


def _divide(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether each entry is in exactly one box."""
    apart = all(
        any(
            a[1] <= b[0] or b[1] <= a[0]
            for a, b in zip(one.ends, other.ends, strict=True)
        )
        for i, one in enumerate(boxes)
        for other in boxes[:i]
    )
    return apart and sum(math.prod(x.shape) for x in boxes) == math.prod(shape)


def part_of(
    graph: Graph,
    leaf: int,
    value: int,
    shape: Sequence[int],
    known: Callable[[Any], Any],
) -> Part | None:
    """The part of a parameter that a value is, in the parameter's order.

    Args:
      graph: the equations that lead from the parameter to the value, and nothing else.
      leaf: the parameter's index.
      value: its id.
      shape: its shape.
      known: the values of operands that are known while planning.

    Returns:
      The part; None if the value is anything else.
    """
    runs = {value: _Run(0, tuple(shape), _row_major(shape))}
    for node in graph.nodes:
        if not any(is_value(x) and x in runs for x in node.inputs):
            continue  # where a slice starts
        moved = _moved(node, runs, known)
        if moved is None:
            return None
        runs.update(zip(node.outputs, moved, strict=True))
    (output,) = graph.outputs
    found = runs.get(output)
    if found is None or not math.prod(found.shape):
        return None
    last = sum((n - 1) * step for n, step in zip(found.shape, found.steps, strict=True))
    corners = [_index(at, shape) for at in (found.start, found.start + last)]
    ends = tuple((a, b + 1) for a, b in zip(*corners, strict=True))
    box = Box(tuple(shape), ends)
    if _joined(box.shape, _row_major(shape)) != _joined(found.shape, found.steps):
        return None
    return Part(leaf, box, found.shape)


class _Run(NamedTuple):
    """Entries of an array in row-major order: where they start, and steps by axis."""

    start: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def cut(self, starts: Sequence[int], shape: Sequence[int]) -> "_Run":
        """Some entries along each axis."""
        start = sum(a * step for a, step in zip(starts, self.steps, strict=True))
        return _Run(self.start + start, tuple(shape), self.steps)

    def reshape(self, shape: Sequence[int]) -> "_Run | None":
        """The same entries in order; None where they have no steps by axis."""
        queue = _joined(self.shape, self.steps)
        steps: list[int] = []
        rest, step = queue.pop() if queue else (1, 1)
        for n in reversed(shape):
            if n == 1:
                steps.append(step)
                continue
            if rest == 1 and queue:
                rest, step = queue.pop()
            if rest % n:
                return None
            steps.append(step)
            rest, step = rest // n, step * n
        return _Run(self.start, tuple(shape), tuple(reversed(steps)))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _index(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    pairs = zip(_row_major(shape), shape, strict=True)
    return tuple(place // step % n for step, n in pairs)


def _joined(shape: Sequence[int], steps: Sequence[int]) -> list[tuple[int, int]]:
    """Lengths and steps without axes of length 1; axes that run on are one."""
    result: list[tuple[int, int]] = []
    for n, step in zip(shape, steps, strict=True):
        if n == 1:
            continue
        if result and result[-1][1] == n * step:
            n *= result.pop()[0]
        result.append((n, step))
    return result


def _moved(
    node: Node, runs: Mapping[int, _Run], known: Callable[[Any], Any]
) -> list[_Run] | None:
    """The entries of an equation's results; None for other equations."""
    first, *rest = node.inputs
    run = runs.get(first) if is_value(first) else None
    if run is None:
        return None
    match node.name:
        case "convert_element_type" | "copy":
            return [run]
        case "broadcast_in_dim" | "reshape" | "squeeze" if _keeps_order(node):
            moved = run.reshape(node.out_shape())
            return moved and [moved]
        case "slice" if all(x == 1 for x in node.params["strides"] or ()):
            return [run.cut(node.params["start_indices"], node.out_shape())]
        case "split":
            axis, starts = node.params["axis"], [0] * len(run.shape)
            parts: list[_Run] = []
            for i, size in enumerate(node.params["sizes"]):
                parts.append(run.cut(starts, node.out_shape(i)))
                starts[axis] += size
            return parts
        case "unstack":  # since JAX 0.12 what a loop over an array is
            return _unstacked(run, node)
        case "dynamic_slice":
            starts = [known(atom) for atom in rest]
            if any(x is None or isinstance(x, jax.core.Tracer) for x in starts):
                return None
            ends = zip(starts, run.shape, node.out_shape(), strict=True)
            at = [max(0, min(int(start), n - m)) for start, n, m in ends]
            return [run.cut(at, node.out_shape())]
        case _:
            return None


def _unstacked(run: _Run, node: Node) -> list[_Run] | None:
    axis, parts = node.params["axis"], []
    for i in range(len(node.outputs)):
        starts = [i if a == axis else 0 for a in range(len(run.shape))]
        shape = [1 if a == axis else n for a, n in enumerate(run.shape)]
        part = run.cut(starts, shape).reshape(node.out_shape(i))
        if part is None:
            return None
        parts.append(part)
    return parts


def _keeps_order(node: Node) -> bool:
    """Whether an equation only adds, drops, splits or joins axes."""
    match node.name:
        case "broadcast_in_dim":
            return math.prod(node.shape()) == math.prod(node.out_shape())
        case "reshape":
            return node.params["dimensions"] is None
        case _:
            return True
