"""Compares what the library computed of a program with the oracle."""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax
from kfac_jax.blocks import TNT, Diagonal, Full, Identity, Kronecker
from kfac_jax.operator.mapped import Mapped
from kfac_jax.statistics import sample_space
from tests.fuzz import expectations
from tests.fuzz import programs as p
from tests.fuzz.cases import TOLERANCE, Case, Numbers, compute, make

DAMPING = 1e-2


def close(found: Any, expected: Any, tolerance: float, what: str, scale: float = 0.0):
    """Compares arrays, to a fraction of the largest entry."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert np.isfinite(found).all(), f"{what}: not finite"
    size = max(np.abs(expected).max(initial=0.0), scale)
    error = np.abs(found - expected).max(initial=0.0)
    assert error <= tolerance * size + 1e-13, (
        f"{what}: differs by {error:.3g} of {size:.3g}\n{_corner(found)}\n"
        f"{_corner(expected)}"
    )


def _corner(x: np.ndarray) -> np.ndarray:
    return x[tuple(slice(4) for _ in x.shape)]


def check_values(case: Case, numbers: Numbers) -> None:
    """Value and gradient are JAX's own, and the harness agrees with itself."""
    flat = numbers.flat.reshape(numbers.outputs.shape)
    close(flat, numbers.outputs, case.tolerance, "harness: flat output")
    value, grads = numbers.plain
    for name, (own, own_grads, _, _) in numbers.found.items():
        tolerance = min(case.tolerance, 1e-2)
        close(own, value, tolerance, f"{name}: value")
        assert jax.tree.structure(own_grads) == jax.tree.structure(grads)
        scale = max(np.abs(np.asarray(g, float)).max() for g in grads.values())
        for path, gradient in grads.items():
            assert own_grads[path].dtype == gradient.dtype
            what = f"{name}: gradient of {path}"
            close(own_grads[path], gradient, case.tolerance, what, scale)


def check_factors(case: Case, numbers: Numbers) -> None:
    """Factors have the report's shapes, and are symmetric and positive semidefinite."""
    for name, plan in case.plans.items():
        factors = numbers.found[name][2]
        assert set(factors) == {layer.name for layer in plan.layers}
        for layer in plan.layers:
            own = factors[layer.name]
            assert {k: v.shape for k, v in own.items()} == layer.factor_shapes
            for key, x in own.items():
                assert np.isfinite(x).all(), (layer.name, key)
                if key.endswith("diagonal"):
                    assert (x >= 0).all(), (layer.name, key)
                    continue
                limit = 1e-12 if case.tolerance == TOLERANCE["float64"] else 1e-5
                limit *= np.abs(x).max(initial=0.0) * x.shape[-1]
                assert np.abs(x - x.swapaxes(-1, -2)).max() <= limit, (layer.name, key)
                assert np.linalg.eigvalsh(x).min() >= -limit, (layer.name, key)


def _positions(case: Case) -> dict[str, np.ndarray]:
    """Where each parameter's entries are among all."""
    result, start = {}, 0
    for path in sorted(case.params):
        size = case.params[path].size
        result[path] = np.arange(start, start + size)
        start += size
    return result


def _slices(case: Case, index: int, chosen: tuple[str, ...] = p.STACKED) -> np.ndarray:
    """For each entry of a parameter the number of its slice in nests of some kinds."""
    param = case.program.params[index]
    kinds = {
        op.id: op.kind for op, _ in p.walk(case.program.body) if isinstance(op, p.Nest)
    }
    found = np.zeros(param.shape, int)
    for axis, nest in enumerate(param.nests):
        if kinds[nest] in chosen:
            at = np.arange(param.shape[axis])
            at = at.reshape([-1 if a == axis else 1 for a in range(len(param.shape))])
            found = found * param.shape[axis] + at
    return found.reshape(-1)


def _params(case: Case, layer: Any) -> list[tuple[str, np.ndarray]]:
    """A layer's parameters, and their entries or those of the parts that it has."""
    result: list[tuple[str, np.ndarray]] = []
    for path, box in zip(
        layer.params, layer.boxes or [None] * len(layer.params), strict=True
    ):
        name = path.partition("[")[0]
        entries = np.arange(case.params[name].size).reshape(case.params[name].shape)
        result.append((name, entries[() if box is None else box.slices].reshape(-1)))
    return result


def _own(case: Case, layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A layer's entries among all, and the slice that each belongs to."""
    places, own = _positions(case), _params(case, layer)
    at = np.concatenate([places[name][entries] for name, entries in own])
    slices = [_slices(case, int(name[1:]))[entries] for name, entries in own]
    return at, np.concatenate(slices)


def _same_member(case: Case, layer: Any) -> np.ndarray:
    """Which pairs of a layer's entries are of the same member of ensembles.

    Where members share their inputs, or have none (a shift), they are outputs of one
    layer, which has curvature between them.
    """
    own = np.concatenate(
        [
            _slices(case, int(name[1:]), ("ensemble",))[entries]
            for name, entries in _params(case, layer)
        ]
    )
    return own[:, None] == own[None, :]


def check_blocks(case: Case, numbers: Numbers) -> dict[str, int]:
    """Every block is what it says; returns how many of which were compared."""
    counts: dict[str, int] = {}
    scale = np.abs(numbers.exact).max(initial=0.0)
    for name, plan in case.plans.items():
        matrix = np.asarray(numbers.found[name][3], float)
        outside = np.ones_like(matrix, bool)
        for layer in plan.layers:
            at, slices = _own(case, layer)
            grid = np.ix_(at, at)
            outside[grid] = False
            found, exact = matrix[grid], numbers.exact[grid]
            what = f"{name}: {layer.name} ({layer.kind}, {layer.block!r})"
            kind = type(layer.block).__name__ if layer.tagged else layer.kind
            counts[kind] = counts.get(kind, 0) + 1
            if not layer.tagged:
                _check_untagged(layer, found, exact, what, scale)
            elif isinstance(layer.block, Full):
                if layer.shape.stacked:  # whose slices are blocks of their own
                    exact = exact * (slices[:, None] == slices[None, :])
                close(found, exact, case.tolerance, what, scale)
            elif isinstance(layer.block, Diagonal):
                expected = np.diag(np.diag(exact))
                close(found, expected, case.tolerance, what, scale)
            elif isinstance(layer.block, TNT):
                trace, expected = np.trace(found), np.trace(exact)
                close(trace, expected, case.tolerance, what, scale)
            elif layer.name in _mapped(plan):  # whose oracle is test_parts_and_maps
                assert isinstance(layer.block, Kronecker)
                assert np.isfinite(found).all(), what
                least = np.linalg.eigvalsh(found).min(initial=0.0)
                assert least >= -1e-6 * np.trace(found) - 1e-12 * scale, what
            else:
                assert isinstance(layer.block, Kronecker)
                if _has_rounding(case, numbers, layer):
                    counts["not compared"] = counts.get("not compared", 0) + 1
                    continue
                expected = kronecker(case, numbers, layer)
                found = found * _same_member(case, layer)
                size = np.abs(expected).max(initial=0.0)
                close(found, expected, case.tolerance, what, max(size, 1e-4 * scale))
        assert not matrix[outside].any(), f"{name}: between layers"
    return counts


def _mapped(plan: Any) -> set[str]:
    """Layers whose factors are those of a weight that is computed from them."""
    return {group.name for group in plan.groups if isinstance(group, Mapped)}


def _check_untagged(
    layer: Any, found: Any, exact: Any, what: str, scale: float
) -> None:
    """A diagonal of random squares: its mean is exact, and where it is not zero.

    Of parameters that the loss does not depend on, both are squares of rounding.
    """
    if layer.kind == "unused":
        assert not exact.any(), f"{what}: said to be unused"
        assert isinstance(layer.block, Identity)
        return
    diagonal, own = np.diag(found), np.diag(exact)
    assert (found == np.diag(diagonal)).all() and (diagonal >= 0).all(), what
    tiny = max(1e-10 * own.max(initial=0.0), 1e-24 * scale)
    assert (diagonal[own > tiny] > 0).all(), f"{what}: zero though used"
    assert (diagonal[own == 0] <= tiny + 1e-13).all(), f"{what}: not zero"


# ------------------------------------------------------------------ Kronecker products


def _terms(case: Case, numbers: Numbers, layer: Any) -> Iterator[tuple[Any, Any, Any]]:
    """For each linear map of a layer's parameters: entries, input and output rows.

    Uses of one map go together: `[e, rows, i]` and `[k, e, rows, o]`.
    """
    (weight, mine), *rest = _params(case, layer)
    bias = int(rest[0][0][1:]) if rest else None
    groups: dict[Any, list[Any]] = {}
    at = _positions(case)
    all_uses = zip(numbers.uses, numbers.inputs, numbers.roots, strict=True)
    for index, (use, x, root) in enumerate(all_uses):
        if use.param != int(weight[1:]) or not np.any(root):  # no gradient: no use
            continue
        if not np.isin(use.entries, mine).all():  # of another part
            continue
        entries, x = at[weight][use.entries], np.asarray(x, float)
        if layer.kind == "shift" and entries.shape[1] > 1:
            entries, x, root = _by_place(entries, x, root)
        if layer.kind == "embedding":  # one-hot rows stay so
            root = root * use.scale
        else:
            x = x * use.scale
        if bias is not None:
            last = _added(case, numbers, bias, index)
            assert last is not None, (
                f"{layer.name}: {rest[0][0]} is not added to all outputs of {weight}"
            )
            last = at[rest[0][0]][last][:, None]
            entries = np.concatenate([entries, last], 1)
            x = np.concatenate([x, np.ones_like(x[..., :1])], -1)
        key = entries.shape, tuple(entries.reshape(-1))
        groups.setdefault(key, []).append((entries, x, root))
    for parts in groups.values():
        entries = parts[0][0]
        inputs = np.concatenate([x for _, x, _ in parts], 1)
        yield entries, inputs, np.concatenate([root for _, _, root in parts], 2)


def _by_place(entries: np.ndarray, x: np.ndarray, root: np.ndarray) -> tuple[Any, ...]:
    """Rows of a table that are added to positions in turn, as one shift of them all."""
    places = int(x[0].argmax(-1).max()) + 1
    entries = entries[:, :places].reshape(1, 1, -1)
    root = root.reshape(len(root), 1, -1, entries.size)
    return entries, np.ones((1, root.shape[2], 1)), root


def _added(case: Case, numbers: Numbers, bias: int, index: int) -> np.ndarray | None:
    """The entries `[e, o]` of a parameter that is added to the output of a use.

    It is if its own rows, of what comes after, have the same gradient.
    """
    root = numbers.roots[index]
    k, e, rows, o = root.shape
    after = slice(index + 1, None)
    for use, own in zip(numbers.uses[after], numbers.roots[after], strict=True):
        shift = use.param == bias and use.scale == 1 and use.entries.shape[:2] == (1, 1)
        if not shift or own.shape != (k, 1, rows, e * o):
            continue
        moved = np.moveaxis(own.reshape(k, rows, e, o), 2, 1)
        if np.abs(moved - root).max() <= case.tolerance * np.abs(root).max():
            return use.entries.reshape(e, o)
    return None


def _has_rounding(case: Case, numbers: Numbers, layer: Any) -> bool:
    """Whether what would be zero without rounding makes a row count that should not.

    Then the number of rows is chance. Such layers are counted as "not compared".
    """
    limit = 1e-12 if case.tolerance == TOLERANCE["float64"] else 1e-5
    for _, _, root in _terms(case, numbers, layer):
        size = np.abs(root).max((0, 3))
        if ((size > 0) & (size < limit * size.max())).any():
            return True
    return False


def factors_of(x: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`A [e, i, i]`, the mean over rows that have a gradient, and `G [e, o, o]`."""
    active = (root != 0).any((0, 3))  # [e, rows]
    x = x * active[..., None]
    count = np.maximum(active.sum(1), 1)[:, None, None]
    return (
        np.einsum("eri,erj->eij", x, x) / count,
        np.einsum("kero,kerp->eop", root, root),
    )


def kronecker(case: Case, numbers: Numbers, layer: Any) -> np.ndarray:
    """The layer's block by the definition, over its parameters."""
    own, _ = _own(case, layer)
    total = np.zeros_like(numbers.exact)
    terms = list(_terms(case, numbers, layer))
    for entries, x, root in terms:
        a, g = factors_of(x, root)
        for e, (left, right) in enumerate(zip(a, g, strict=True)):
            at = entries[e].reshape(-1)
            total[np.ix_(at, at)] += np.kron(left, right)
    found = total[np.ix_(own, own)]
    if layer.kind != "tied":
        return found
    return _nearest(layer, found)


def _nearest(layer: Any, matrix: np.ndarray) -> np.ndarray:
    """The Kronecker product nearest to a sum of two, slice by slice."""
    shape = layer.shape
    order = layer.to_matrix([np.arange(len(matrix)).reshape(layer.shapes[0])])
    result = np.zeros_like(matrix)
    for entries in np.asarray(order).reshape(-1, shape.inputs, shape.outputs):
        at = np.ix_(entries.reshape(-1), entries.reshape(-1))
        i, o = entries.shape
        moved = matrix[at].reshape(i, o, i, o).transpose(0, 2, 1, 3)
        u, s, v = np.linalg.svd(moved.reshape(i * i, o * o))
        left, right = u[:, 0].reshape(i, i), s[0] * v[0].reshape(o, o)
        result[at] = np.kron(left, right)
    return result


def check_theory(case: Case, numbers: Numbers) -> int:
    """Kronecker blocks are the exact ones where theory says so; returns how many."""
    exact_for = expectations.kronecker_is_exact(case.program)
    plan, scale = case.plans["kronecker"], np.abs(numbers.exact).max(initial=0.0)
    matrix, count = np.asarray(numbers.found["kronecker"][3], float), 0
    for layer in plan.layers:
        index = int(_params(case, layer)[0][0][1:])
        if index not in exact_for or not isinstance(layer.block, Kronecker):
            continue
        if not layer.tagged or layer.kind == "tied" or layer.name in _mapped(plan):
            continue
        count += 1
        for entries, _, _ in _terms(case, numbers, layer):
            for one in entries:
                grid = np.ix_(one.reshape(-1), one.reshape(-1))
                what = f"theory: {layer.name}"
                close(matrix[grid], numbers.exact[grid], case.tolerance, what, scale)
    return count


# ---------------------------------------------------------------------- the report


def check_report(case: Case) -> None:
    """Each parameter is in one row; nothing unmatched is silent."""
    for name, plan in case.plans.items():
        sizes = dict.fromkeys(case.params, 0)
        for layer in plan.layers:
            for path, entries in _params(case, layer):
                sizes[path] += len(entries)
        assert sizes == {path: x.size for path, x in case.params.items()}
        text = str(plan)
        table, *rest = text.split("Not covered by a layer:")
        rows = {line.split()[0]: line for line in table.splitlines()[2:] if line}
        unmatched = [layer for layer in plan.layers if layer.kind == "unmatched"]
        for layer in plan.layers:
            assert bool(layer.reason) == (layer.kind in ("unmatched", "unused"))
            first, *others = layer.params
            words = rows[first].split()
            assert words[2] == layer.kind and words[4] == type(layer.block).__name__
            assert words[3] == str(layer.uses)
            assert all(len(rows[path].split()) == 2 for path in others)
            if layer.reason:
                assert f"{layer.name}: {layer.reason}" in rest[0]
        covered = sum(
            len(entries)
            for layer in plan.layers
            if not layer.reason
            for _, entries in _params(case, layer)
        )
        assert plan.totals.covered == covered
        assert len(case.warned[name]) == bool(unmatched), case.warned[name]
        for layer in unmatched:
            assert f"{layer.name}: {layer.reason}" in case.warned[name][0]
    expectations.check_coverage(case.program, case.plans["kronecker"])


def check_error(case: Case) -> None:
    """`on_unmatched="error"` names what is not covered, or makes the same plan."""
    plan = case.plans["kronecker"]
    shapes = jax.eval_shape(lambda: (case.params, *case.data))
    lost = [layer for layer in plan.layers if layer.kind == "unmatched"]
    try:
        strict = kfac_jax.make_curvature(
            case.loss_fn, *shapes, estimation_mode="ggn_exact", on_unmatched="error"
        )
    except ValueError as error:
        assert lost, f"refused without a reason: {error}"
        for layer in lost:
            assert f"{layer.name}: {layer.reason}" in str(error)
        return
    assert not lost, "error was not raised"
    assert strict.layers == plan.layers


def check_steps(case: Case) -> None:
    """Two steps of the optimizer: finite, of one structure, compiled once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = kfac_jax.make_curvature(case.loss_fn, case.params, *case.data)
    tx = kfac_jax.kfac(plan, learning_rate=0.1, momentum=0.9, damping=DAMPING)

    @jax.jit
    def step(params: Any, state: Any, key: Any, *data: Any) -> Any:
        value, grads, statistics = plan.value_grad_and_statistics(
            params, *data, rng=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        moved = jax.tree.map(jnp.add, params, updates)
        return moved, state, value

    params, state = case.params, jax.jit(tx.init)(case.params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for key in jax.random.split(jax.random.key(case.program.seed), 2):
        params, state, value = step(params, state, key, *case.data)
        assert np.isfinite(value)
        for leaf in jax.tree.leaves((params, state.factors)):
            assert np.isfinite(np.asarray(leaf, float)).all()
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        jax.tree.map(
            lambda a, b: _same_type(a, b), jax.eval_shape(lambda: case.params), params
        )
    assert step._cache_size() == 1, "the second step recompiled"


def _same_type(a: Any, b: Any) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype


def check_rows(case: Case, numbers: Numbers) -> str:
    """In the sample space `T = U Uᵀ`, where `Uᵀ U` is the exact matrix.

    Args:
      case: the program.
      numbers: what was computed of it.

    Returns:
      What was compared: products with U as well, the eigenvalues of T alone (functions
      with a `custom_vjp` have no forward mode), or nothing, as there is no T.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = kfac_jax.make_curvature(
            case.loss_fn,
            *jax.eval_shape(lambda: (case.params, *case.data)),
            estimation_mode="ggn_exact",
            structure=kfac_jax.SampleSpace(),
            on_unmatched="ignore",
        )
    if "there is no T" in str(plan):
        return "no rows"

    @jax.jit
    def compute(params: Any, data: Any) -> tuple[Any, Any]:
        matrix = plan.gram(params, *data)
        rows = sample_space.products(plan, params, data, [])

        def pull(w: Any) -> Any:
            return jnp.concatenate([x.reshape(-1).astype(float) for x in rows.pull(w)])

        return matrix, jax.vmap(pull)(jnp.eye(len(matrix)))

    limit = case.tolerance * np.trace(numbers.exact)
    try:
        matrix, u = jax.tree.map(np.asarray, compute(case.params, case.data))
    except ValueError as error:
        assert "forward mode" in str(error), error
        matrix = np.asarray(jax.jit(plan.gram)(case.params, *case.data))
        found, expected = (
            np.sort(np.linalg.eigvalsh(x))[::-1] for x in (matrix, numbers.exact)
        )
        size = max(len(found), len(expected))
        found, expected = (np.pad(x, (0, size - len(x))) for x in (found, expected))
        close(found, expected, case.tolerance, "eigenvalues of T", limit)
        return "rows' eigenvalues"
    close(u.T @ u, numbers.exact, case.tolerance, "Uᵀ U", limit)
    close(matrix, u @ u.T, case.tolerance, "T", limit)
    return "rows"


def check(program: p.Program, *, steps: bool, rows: bool) -> dict[str, int]:
    """All checks of one program; returns how many blocks of which kind there were.

    Args:
      program: the program.
      steps: whether to try the optimizer and the policy "error", too.
      rows: whether to try the sample space, too.

    Returns:
      Counts by kind of block.
    """
    case = make(program)
    check_report(case)
    numbers = compute(case)
    check_values(case, numbers)
    check_factors(case, numbers)
    counts = check_blocks(case, numbers)
    counts["exact Kronecker"] = check_theory(case, numbers)
    if rows:
        counts[check_rows(case, numbers)] = 1
    if steps:
        check_error(case)
        check_steps(case)
    return counts
