"""What theory and the documentation say of a program, from its description alone."""

import collections
from collections.abc import Sequence
from typing import Any

from tests.fuzz import programs as p
from tests.fuzz.interpreter import LINEAR, LINEAR_MIXERS
from tests.fuzz.problem import GAUSSIAN
from tests.fuzz.views import VIEWS

CUSTOM = ("custom_jvp", "custom_vjp")
REPEATING = ("scan", "unrolled", "map", "positions scan", "positions vmap", "ensemble")


def is_linear(op: p.Op) -> bool:
    """Whether an operation is linear (or affine) with coefficients free of data."""
    if isinstance(op, p.Act):
        return op.name in LINEAR
    if isinstance(op, p.Mix):
        return op.name in LINEAR_MIXERS
    if isinstance(op, p.Norm):
        return op.kind == "none"
    if isinstance(op, p.Gate | p.Rnn | p.Cond):
        return False
    return all(is_linear(inner) for body in p.bodies(op) for inner in body)


def _after(body: Sequence[p.Op], path: Sequence[int]) -> bool:
    """Whether all that follows an operation is linear, loops around it included."""
    at, *inner = path
    op = body[at]
    if not all(map(is_linear, body[at + 1 :])):
        return False
    if not inner:
        return True
    if isinstance(op, p.Cond):
        return False
    if isinstance(op, p.Nest) and op.kind in p.STACKED and not is_linear(op):
        return False
    return _after(p.bodies(op)[0], inner)


def _paths(body: Sequence[p.Op]) -> list[tuple[p.Op, tuple[int, ...], list[p.Op]]]:
    """Each operation with its place in nested first bodies, and what it is in."""
    found: list[tuple[p.Op, tuple[int, ...], list[p.Op]]] = []
    for i, op in enumerate(body):
        found.append((op, (i,), []))
        for inner in p.bodies(op):
            for deep, path, inside in _paths(inner):
                found.append((deep, (i, *path), [op, *inside]))
    return found


def kronecker_is_exact(program: p.Program) -> set[int]:
    """Parameters whose Kronecker block is the exact one.

    Those of a dense layer that is used once for each example, at one position, if there
    is one example only (`F = x xᵀ ⊗ E[dy dyᵀ]`), or if all that follows is linear and
    the loss is a squared error, so that `E[dy dyᵀ]` is the same for all examples.
    """
    counts: dict[int, int] = collections.Counter(
        index
        for op, _ in p.walk(program.body)
        for weight in p.weights(op)
        for index in weight.params
    )
    pooled = program.positions == 0
    found: set[int] = set()
    for op, path, inside in _paths(program.body):
        if isinstance(op, p.Pool):
            pooled = True
        if not isinstance(op, p.Dense | p.Heads | p.Embed) or not pooled:
            continue
        nests = [x for x in inside if isinstance(x, p.Nest)]
        if any(isinstance(x, p.Cond) for x in inside):
            continue
        if any(x.kind in REPEATING for x in nests):
            continue
        stacks = {x.id for x in nests if x.kind in p.STACKED}
        linear = program.loss.kind in GAUSSIAN and _after(program.body, path)
        if program.batch == 1 or linear:
            found |= {
                i
                for i in op.weight.params
                if counts[i] == 1 and stacks <= {*program.params[i].nests}
            }
    return found


def check_coverage(program: p.Program, plan: Any) -> None:
    """What must be a layer is one; what cannot be is reported.

    Args:
      program: the description.
      plan: with the default blocks.
    """
    kinds = {
        int(path.partition("[")[0][1:]): layer.kind
        for layer in plan.layers
        for path in layer.params
    }
    # functions under these get all parameters, those too that they do not use, but for
    # which their rules may give gradients
    hidden = any(
        isinstance(op, p.Nest)
        and op.kind in CUSTOM
        and any(isinstance(x, p.Cond) for x in inside)
        for op, inside in p.walk(program.body)
    )
    # a layer behind these has the same inputs for all examples
    constant = any(
        isinstance(op, p.Embed) and op.how == "places" and not op.add
        for op, _ in p.walk(program.body)
    )
    uses: dict[int, list[tuple[p.Op, p.Weight, list[p.Op]]]] = {}
    for op, _, inside in _paths(program.body):
        for weight in p.weights(op):
            for index in weight.params:
                uses.setdefault(index, []).append((op, weight, inside))
    for index, own in uses.items():
        kind = kinds[index]
        if all(weight.view == "stopped" for _, weight, _ in own):
            # a tag, or a derivative of the user's own, may let a gradient pass
            plain = not any(
                getattr(op, "tag", False)
                or any(x.kind in CUSTOM for x in inside if isinstance(x, p.Nest))
                for op, _, inside in own
            )
            fits = kind == "unused" or not plain or (hidden and kind == "unmatched")
            assert fits, f"{p.name(index)} is called {kind}"
        if not (hidden or constant) and _must_be_covered(own):
            op, weight, _ = own[0]
            names = {"dense", "embedding", "unused"}
            names |= {"shift"} if weight is getattr(op, "bias", None) else set()
            assert kind in names, f"{p.name(index)} is called {kind}"


def _must_be_covered(own: Sequence[tuple[p.Op, p.Weight, list[p.Op]]]) -> bool:
    """All uses are the same plain product, and none is in a place with limits.

    These are loops over a stack's slices, and conditionals of which a `vmap` makes a
    choice for each example: that chooses between parameters, too.
    """
    first, weight, _ = own[0]
    if not isinstance(first, p.Dense) or len(weight.params) > 1:
        return False
    # a tag of a layer whose weight is generic has no layer for its bias either
    if any(isinstance(op, p.Dense) and op.tag for op, _, _ in own):
        return False
    same = {(type(op), w.view, getattr(op, "out", 0)) for op, w, _ in own}
    sliced = any(
        isinstance(x, p.Cond) or (isinstance(x, p.Nest) and x.kind == "unrolled")
        for _, _, inside in own
        for x in inside
    )
    return len(same) == 1 and VIEWS[weight.view].covered and not sliced
