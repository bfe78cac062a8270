"""Views and layouts against numpy, on arrays that hold their own indices."""

import numpy as np
import pytest

from kfac_jax._jaxpr.view import source_view


def _reshape(*shape):
    return lambda v, a: (v.reshape(shape), a.reshape(shape))


def _transpose(*axes):
    return lambda v, a: (v.transpose(axes), a.transpose(axes))


def _squeeze(*axes):
    return lambda v, a: (v.squeeze(axes), a.squeeze(axes))


def _broadcast(shape, dimensions):
    def step(v, a):
        wide = [1] * len(shape)
        for size, d in zip(a.shape, dimensions, strict=True):
            wide[d] = size
        return v.broadcast(shape, dimensions), np.broadcast_to(a.reshape(wide), shape)

    return step


CHAINS = {
    "nothing": ((4, 6), []),
    "transpose": ((4, 6), [_transpose(1, 0)]),
    "split": ((4, 6), [_reshape(2, 2, 6)]),
    "merge": ((4, 6), [_reshape(24)]),
    "split after transpose": ((4, 6), [_transpose(1, 0), _reshape(3, 2, 4)]),
    "merge after transpose": ((4, 6), [_transpose(1, 0), _reshape(24)]),
    "split, swap, merge": (
        (4, 6),
        [_reshape(2, 2, 3, 2), _transpose(2, 0, 3, 1), _reshape(6, 4)],
    ),
    "split in three": ((24,), [_reshape(2, 12), _reshape(2, 3, 4)]),
    "split twice elsewhere": (
        (24,),
        [_reshape(2, 12), _transpose(1, 0), _reshape(3, 4, 2), _reshape(3, 2, 2, 2)],
    ),
    "across and back": ((2, 3), [_reshape(6), _reshape(2, 3)]),
    "ones": ((4, 1, 6), [_squeeze(1), _reshape(1, 4, 6, 1)]),
    "scalar": ((), [_reshape(1, 1)]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_layout_follows_the_entries(name):
    shape, steps = CHAINS[name]
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    view, moved = source_view(0, shape), array
    for step in steps:
        view, moved = step(view, moved)
    assert view.shape == moved.shape
    found = view.layout([[axis] for axis in view.axes])
    np.testing.assert_array_equal(found.to_matrix(array), moved)
    np.testing.assert_array_equal(found.from_matrix(moved), array)


def test_layout_groups_axes():
    array = np.arange(24).reshape(2, 3, 4)
    view = source_view(0, array.shape)
    found = view.layout([[view.axes[2], view.axes[0]], [view.axes[1]]])
    expected = array.transpose(2, 0, 1).reshape(8, 3)
    np.testing.assert_array_equal(found.to_matrix(array), expected)
    np.testing.assert_array_equal(found.from_matrix(expected), array)


def test_equal_bijections_have_equal_layouts():
    direct = source_view(0, (4, 6))
    detour = source_view(0, (4, 6)).reshape((2, 2, 6)).reshape((4, 6))
    layouts = [v.layout([[axis] for axis in v.axes]) for v in (direct, detour)]
    assert layouts[0] == layouts[1]
    assert hash(layouts[0]) == hash(layouts[1])


def test_reshape_across_pieces_is_refused():
    moved = source_view(0, (4, 6)).transpose((1, 0))
    assert moved.reshape((8, 3)) is None


def test_repeated_and_partial_entries_are_no_layout():
    wide = source_view(0, (3,)).broadcast((2, 3), (1,))
    assert wide.layout([[axis] for axis in wide.axes]) is None
    assert wide.layout([[wide.axes[1]]]) is not None
    view = source_view(0, (2, 3))
    assert view.layout([[view.axes[0]]]) is None


def test_broadcast_of_length_one_is_new():
    _, moved = _broadcast((5, 3), (0, 1))(source_view(0, (1, 3)), np.zeros((1, 3)))
    assert moved.shape == (5, 3)
    view = source_view(0, (1, 3)).broadcast((5, 3), (0, 1))
    assert all(piece.new for piece in view.axes[0])
    assert not any(piece.new for piece in view.axes[1])


def test_unstacked_keeps_the_scanned_axis_in_front():
    view = source_view(0, (5, 2, 3)).unstacked(0).transpose((1, 0))
    groups = [[a] for a in view.axes]
    array = np.arange(30).reshape(5, 2, 3)
    found = view.layout(groups)
    np.testing.assert_array_equal(found.to_matrix(array), array.transpose(0, 2, 1))
