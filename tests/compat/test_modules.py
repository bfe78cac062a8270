"""Modules for programs already written for the existing JAX K-FAC library.

Numbers called published are those of its release 0.0.8, run on its own.
"""

import dataclasses
import functools
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.compat import (
    _native_blocks,
    curvature_blocks,
    curvature_estimator,
    tag_graph_matcher,
    utils,
)
from kfac_jax.compat._native_blocks import native_blocks
from tests.helpers import models

NAMES = {  # where programs of the first two tiers find what
    "utils": """
    Array Numeric Scalar PRNGKey Params Batch FuncState inner_product scalar_mul norm
    product replicate_all_local_devices broadcast_all_local_devices p_split p_split_num
    make_different_rng_key_on_all_devices get_first psum_if_pmap pmean_if_pmap
    wrap_if_pmap psd_inv pi_adjusted_kronecker_inverse WeightedMovingAverage
    first_dim_is_size auto_scope_method
    """,
    "layers_and_loss_tags": """
    layer_tag register_dense register_repeated_dense register_conv2d register_generic
    register_scale_and_shift LayerMetaData LayerData
    """,
    "tag_graph_matcher": """
    GraphPattern DEFAULT_GRAPH_PATTERNS _dense _dense_parameter_extractor
    """,
    "curvature_blocks": """
    CurvatureBlock Diagonal Full KroneckerFactored ScaledIdentity NaiveDiagonal
    NaiveFull NaiveTNT DenseDiagonal DenseFull DenseTNT DenseTwoKroneckerFactored
    RepeatedDenseKroneckerFactored Conv2DDiagonal Conv2DFull Conv2DTNT
    Conv2DTwoKroneckerFactored ScaleAndShiftDiagonal ScaleAndShiftFull LayerVjpData
    """,
    "": """
    CurvatureBlock KroneckerFactored DenseTwoKroneckerFactored NaiveDiagonal
    RepeatedDenseKroneckerFactored ScaleAndShiftDiagonal ScaleAndShiftFull LayerVjpData
    set_default_tag_to_block_ctor get_default_tag_to_block_ctor
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_programs_look_for_them(module):
    found = operator.attrgetter(module)(kfac_jax) if module else kfac_jax
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing


# --------------------------------------------------------------------- trees as vectors

TREE = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}


def test_arithmetic_of_trees():
    double = utils.scalar_mul(TREE, 2.0)
    flat = np.concatenate([np.arange(3.0), np.ones(4)])
    assert utils.inner_product(TREE, double) == pytest.approx(2 * flat @ flat)
    assert utils.inner_product(TREE, TREE, in_float64=True).dtype == jnp.float64
    assert utils.norm(TREE) == pytest.approx(np.linalg.norm(flat))
    assert utils.product([2, 3, 4.0]) == 24.0
    assert utils.product([]) == 1
    assert utils.default_batch_size_extractor(TREE) == 3


def test_leading_axes_are_compared():
    assert utils.first_dim_is_size(3, TREE["a"], jnp.ones((3, 1)))
    assert not utils.first_dim_is_size(3, TREE["a"], TREE["b"])


def test_types_serve_in_annotations_and_checks():
    def step(params: utils.Params, rng: utils.PRNGKey, x: utils.Numeric | None):
        return utils.PyTree[utils.Array] | utils.FuncState | utils.Batch

    assert step(TREE, jax.random.key(0), 1.0)
    assert isinstance(1.0, utils.Numeric)
    assert isinstance(jnp.ones(()), utils.Numeric)
    assert not isinstance(jnp.ones(()), utils.Scalar)


# ------------------------------------------------------------------------ local devices

DEVICES = 8


def over_devices(function):
    return jax.pmap(function, axis_name="i")


@models.EIGHT_DEVICES
def test_copies_are_taken_by_pmap_as_they_are():
    state = utils.replicate_all_local_devices({"w": TREE["b"], "n": 2}, "i")
    each = utils.broadcast_all_local_devices(jnp.arange(float(DEVICES)))
    assert state["w"].shape == (DEVICES, 2, 2)
    assert state["n"].shape == (DEVICES,)
    assert len(state["w"].sharding.device_set) == len(each.sharding.device_set) == 8

    same = over_devices(lambda state, x: (state, x))
    with jax.transfer_guard("disallow"):  # neither from the host nor between devices
        moved = same(state, each)
    models.assert_trees_equal(moved, (state, each))
    np.testing.assert_array_equal(each, np.arange(8.0))
    models.assert_trees_equal(utils.get_first(state)["w"], TREE["b"])


@models.EIGHT_DEVICES
def test_the_first_device_is_read_from_any_array():
    rows = np.arange(16.0).reshape(8, 2)
    spread = utils.broadcast_all_local_devices(jnp.asarray(rows))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    obj = [spread, jnp.asarray(rows), rows, jax.device_put(jnp.asarray(rows), along)]
    for first in [*utils.get_first(obj), jax.jit(utils.get_first)(rows)]:
        np.testing.assert_array_equal(first, rows[0])
    assert len(utils.get_first(spread).sharding.device_set) == 1
    assert utils.get_first({"a": 1.0, "b": None}) == {"a": 1.0, "b": None}


@models.EIGHT_DEVICES
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_differ_between_devices(make):
    keys = utils.make_different_rng_key_on_all_devices(make(0))
    one, two = utils.p_split(keys)
    parts = utils.p_split_num(one, 3)
    assert len(parts) == 3
    draw = over_devices(lambda key: jax.random.uniform(key))
    drawn = np.stack([draw(k) for k in (keys, two, *parts)])
    assert len(np.unique(drawn)) == 5 * DEVICES
    expected = jax.random.split(utils.get_first(keys))
    assert utils.get_first(draw(two)) == jax.random.uniform(expected[1])


@models.EIGHT_DEVICES
def test_keys_are_the_published_ones():
    keys = utils.make_different_rng_key_on_all_devices(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(keys[0], [4165894930, 804218099])
    np.testing.assert_array_equal(keys[1], [1353695780, 2116000888])


@models.EIGHT_DEVICES
def test_collectives_are_for_mapped_axes_only():
    x = jnp.arange(float(DEVICES))
    scaled = utils.wrap_if_pmap(lambda x, axis: 2 * jax.lax.psum(x, axis))

    def inside(x):
        assert utils.in_pmap("i")
        assert not utils.in_pmap("j")
        assert not utils.in_pmap(None)
        names = ("i", "j", None)
        return [f(x, name) for f in functions for name in names]

    functions = utils.psum_if_pmap, utils.pmean_if_pmap, scaled
    found = np.stack(over_devices(inside)(x)).reshape(3, 3, DEVICES)
    np.testing.assert_array_equal(found[:, 0], [[28.0] * 8, [3.5] * 8, [56.0] * 8])
    np.testing.assert_array_equal(found[:, 1:], np.broadcast_to(x, (3, 2, 8)))
    assert not utils.in_pmap("i")
    models.assert_trees_equal(utils.psum_if_pmap(TREE, "i"), TREE)


# -------------------------------------------------------------------- positive matrices

A = jnp.asarray([[2.0, 1.0], [1.0, 3.0]])
B = jnp.diag(jnp.asarray([1.0, 2.0, 4.0]))
PUBLISHED = [  # factors, and entries of their inverses with damping 0.1
    ((A,), [[0.56261343, -0.1814882]]),
    ((A, B), [[0.51070942, -0.15348941], [0.74001383, 0.0, 0.0]]),
    ((A, B, A), [[0.46784546, -0.13463346], [0.66171338, 0.0], [0.46784546]]),
    ((A, jnp.full((1, 1), 3.0)), [[0.53582835, -0.17664671], [0.36514837]]),
    ((jnp.full((1, 1), 3.0), jnp.full((1, 1), 6.0)), [[0.23505025], [0.23505025]]),
    ((A, jnp.full(3, 3.0)), [[0.45997698, -0.13986696], [0.32734933] * 3]),
    ((A, 0 * B), [[3.16227766, 0.0], [3.16227766, 0.0]]),
    ((A, jnp.zeros((1, 1))), [[3.16227766, 0.0], [3.16227766]]),
]


@pytest.mark.parametrize("factors, expected", PUBLISHED)
def test_damped_factors_are_the_published_ones(factors, expected):
    found = utils.pi_adjusted_kronecker_inverse(*factors, damping=0.1)
    assert [x.shape for x in found] == [x.shape for x in factors]
    for x, entries in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.ravel()[: len(entries)], entries, atol=1e-8)


def test_damped_factors_are_those_of_the_paper():
    """`(A + π √λ I)⁻¹ ⊗ (B + √λ / π I)⁻¹`, however it is split between the two."""
    found = np.kron(*utils.pi_adjusted_kronecker_inverse(A, B, damping=0.1))
    pi = np.sqrt((np.trace(A) / 2) / (np.trace(B) / 3))
    damped = A + pi * np.sqrt(0.1) * np.eye(2), B + np.sqrt(0.1) / pi * np.eye(3)
    np.testing.assert_allclose(found, np.linalg.inv(np.kron(*damped)), rtol=1e-12)
    inverse = utils.psd_inv(jnp.stack([A, 2 * A]))
    np.testing.assert_allclose(inverse[0], np.linalg.inv(A), rtol=1e-12)
    mapped = jax.vmap(utils.psd_inv)(jnp.stack([A, 2 * A]))
    np.testing.assert_allclose(mapped, inverse, rtol=1e-12)
    assert jnp.isnan(utils.psd_inv(-A)).all()


# ------------------------------------------------------------------ averages and states


def test_averages_are_updated_in_place():
    average = utils.WeightedMovingAverage.zeros_array((2,))
    average.update(jnp.ones(2), old_weight_multiplier=0.5, new_weight=2.0)
    average.update(jnp.zeros(2), old_weight_multiplier=0.5, new_weight=2.0)
    np.testing.assert_allclose(average.value, [1 / 3, 1 / 3])
    assert average.weight == 3.0
    assert (average.shape, average.ndim, average.dtype) == ((2,), 1, jnp.float64)

    copy = average.copy()
    np.testing.assert_allclose(copy.value_and_clear(), [1 / 3, 1 / 3])
    assert (copy.weight, *copy.value) == (0.0, 0.0, 0.0)
    assert average.weight == 3.0
    copy.clear(value_to_none=True)
    assert copy.value is None
    copy.update(jnp.ones(2), old_weight_multiplier=0.5, new_weight=0.0)
    np.testing.assert_array_equal(copy.value, 0.0)


@models.EIGHT_DEVICES
def test_averages_are_trees_which_pmap_averages():
    def mean(average, x):
        average.update({"x": x}, 0.0, 1.0)
        average.sync("i")
        return average

    zeros = utils.WeightedMovingAverage.zeros_like({"x": jnp.zeros(())})
    start = utils.replicate_all_local_devices(zeros)
    found = utils.get_first(over_devices(mean)(start, jnp.arange(8.0)))
    assert found.value["x"] == 3.5
    stored = pickle.loads(pickle.dumps(found))
    assert isinstance(stored, utils.WeightedMovingAverage)
    models.assert_trees_equal(stored.value, found.value)


def test_methods_run_in_a_scope_of_their_name():
    class Block:
        @utils.auto_scope_method
        def update(self, x, scale=1.0):
            return scale * jnp.sin(x)

    jaxpr = jax.make_jaxpr(lambda x: Block().update(x, scale=2.0))(1.0)
    scopes = {str(eqn.source_info.name_stack) for eqn in jaxpr.eqns}
    assert scopes == {"Block_update"}


# --------------------------------------------------- a program with tags of its own

Tags = kfac_jax.layers_and_loss_tags


def walkers(params, x):
    """A network on each walker's electrons `[b, s, i]`, with one output per walker."""
    h = jnp.tanh(x @ params["w"] + jnp.broadcast_to(params["b"], (*x.shape[:2], 4)))
    return (h.sum(1) @ params["last"])[:, 0]


def tagged(params, x):
    y = x @ params["w"] + jnp.broadcast_to(params["b"], (*x.shape[:2], 4))
    y = kfac_jax.register_dense(
        y, x, params["w"], params["b"], variant="repeated_dense"
    )
    h = jnp.tanh(y).sum(1)
    # the result is thrown away, as programs do
    Tags.register_dense(h @ params["last"], h, params["last"], type="full")
    return (h @ params["last"])[:, 0]


def loss_of(network):
    def loss_fn(params, x):
        z = network(params, x)
        kfac_jax.register_normal_predictive_distribution(z[:, None])
        return z.mean()

    return loss_fn


PARAMS = {
    "w": models.array(0, 3, 4),
    "b": models.array(1, 4),
    "last": models.array(2, 4, 1),
}
X = models.array(3, 6, 5, 3)


class RepeatedDense(kfac_jax.RepeatedDenseKroneckerFactored):
    """A block as such programs write them."""

    @utils.register_state_class
    class State(kfac_jax.KroneckerFactored.State):
        """With something of its own."""

        repeats: utils.WeightedMovingAverage

    def fixed_scale(self) -> utils.Numeric:
        (x_shape,) = self.inputs_shapes
        return float(utils.product(x_shape) // (x_shape[0] * x_shape[-1]))

    @utils.auto_scope_method
    def update_curvature_matrix_estimate(
        self,
        state: kfac_jax.KroneckerFactored.State,
        estimation_data: kfac_jax.LayerVjpData[jax.Array],
        ema_old: utils.Numeric,
        ema_new: utils.Numeric,
        identity_weight: utils.Numeric,
        batch_size: utils.Numeric,
    ) -> kfac_jax.KroneckerFactored.State:
        raise AssertionError("never called")


PATTERN = tag_graph_matcher.GraphPattern(
    name="repeated_dense",
    tag_primitive=Tags.layer_tag,
    compute_func=functools.partial(tag_graph_matcher._dense, axes=1),
    parameters_extractor_func=functools.partial(
        tag_graph_matcher._dense_parameter_extractor, variant="repeated_dense"
    ),
    example_args=[np.zeros((3, 2, 5)), [np.zeros((5, 4)), np.zeros(4)]],
)


KRONECKER = blocks.Kronecker(exact_scalars=True)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(_native_blocks, "_registered", {})


def plan_of(network, blocks=None):
    return kfac_jax.make_curvature(
        loss_of(network), PARAMS, X, blocks=blocks, estimation_mode="fisher_exact"
    )


def test_a_program_of_ones_own_blocks_gets_native_ones_and_a_warning():
    kfac_jax.set_default_tag_to_block_ctor("repeated_dense", RepeatedDense)
    assert kfac_jax.get_default_tag_to_block_ctor("repeated_dense") is RepeatedDense
    with pytest.warns(UserWarning, match="native blocks in place of custom") as caught:
        rule = native_blocks({"dense": kfac_jax.DenseTwoKroneckerFactored})
    (warning,) = caught
    assert warning.filename == __file__
    for word in ("RepeatedDense", "fixed_scale", "blocks.Kronecker()"):
        assert word in str(warning.message)
    assert "(tag 'repeated_dense'), without its State, fixed_scale, update" in str(
        warning.message
    )
    assert [x.block for x in plan_of(tagged, rule).layers] == [KRONECKER] * 2


def test_states_of_such_blocks_are_trees():
    average = utils.WeightedMovingAverage.zeros_array((2, 2))
    state = RepeatedDense.State(cache=None, factors=(average, average), repeats=average)
    assert len(jax.tree.leaves(state)) == 6
    published = kfac_jax.RepeatedDenseKroneckerFactored.State
    diagonal, full = kfac_jax.NaiveDiagonal.State, kfac_jax.ScaleAndShiftFull.State
    found = [
        [f.name for f in dataclasses.fields(x)] for x in (published, diagonal, full)
    ]
    assert found == [
        ["cache", "factors", "average_repeats"],
        ["cache", "diagonal_factors"],
        ["cache", "matrix"],
    ]
    data = kfac_jax.LayerVjpData(
        primals=Tags.LayerData(inputs=(X,), outputs=(X,), params=()),
        tangents=Tags.LayerData(inputs=(), outputs=(X,), params=()),
    )
    assert data.primals.inputs == data.tangents.outputs == (X,)


def test_tagged_layers_have_the_factors_of_those_found():
    plain, marked = plan_of(walkers), plan_of(tagged)
    _, _, expected = plain.value_grad_and_statistics(PARAMS, X)
    _, _, found = marked.value_grad_and_statistics(PARAMS, X)
    models.assert_trees_close(found, expected)


def test_layer_tag_binds_what_it_is_told():
    meta = Tags.LayerMetaData(
        variant="repeated_dense",
        outputs_index=(0,),
        inputs_index=(1,),
        params_index=(2, 3),
    )

    def bound(params, x):
        y = x @ params["w"] + jnp.broadcast_to(params["b"], (*x.shape[:2], 4))
        y = Tags.layer_tag.bind(y, x, params["w"], params["b"], meta=meta, name="first")
        generic = Tags.LayerMetaData(
            variant="generic", outputs_index=(0,), inputs_index=(), params_index=(0,)
        )
        last = Tags.layer_tag.bind(params["last"], meta=generic)
        return (jnp.tanh(y).sum(1) @ last)[:, 0]

    assert [x.kind for x in plan_of(bound).layers] == ["dense", "generic"]
    conv = Tags.LayerMetaData(
        variant="conv2d", outputs_index=(0,), inputs_index=(1,), params_index=(2,)
    )
    with pytest.raises(ValueError, match="expects a dense layer, or a parameter"):
        Tags.layer_tag.bind(X, X, X, meta=conv)


def test_registering_takes_a_variant_wherever_it_is():
    x, w, s = jnp.ones((2, 3, 3, 1)), jnp.ones((2, 2, 1, 4)), jnp.ones(1)
    y = jnp.ones((2, 3, 3, 4))
    for module in (kfac_jax, Tags):
        module.register_conv2d(y, x, w, variant="conv")
        module.register_scale_and_shift(
            x * s[0], x, s, variant="scale", has_shift=False
        )
        module.register_generic(w)
    out = Tags.register_repeated_dense(x @ jnp.ones((1, 2)), x, jnp.ones((1, 2)))
    assert out.shape == (2, 3, 3, 2)


# --------------------------------------------------------------------------- patterns


def test_patterns_describe_layers_and_can_be_joined():
    patterns = (PATTERN, *tag_graph_matcher.DEFAULT_GRAPH_PATTERNS)
    assert patterns == (PATTERN,) + tag_graph_matcher.DEFAULT_GRAPH_PATTERNS  # noqa: RUF005
    tag_graph_matcher.check_graph_patterns(patterns)
    for pattern in patterns:
        jaxpr = jax.make_jaxpr(pattern.compute_func)(*pattern.example_args)
        extracted = pattern.parameters_extractor_func(jaxpr.eqns[::-1])
        has_bias = len(pattern.example_args[1]) == 2
        assert extracted["meta"].params_index == ((2, 3) if has_bias else (2,))
        variant = "repeated_dense" if "repeated" in pattern.name else "dense"
        assert extracted["meta"].variant == variant
        assert "dimension_numbers" in extracted


@pytest.mark.parametrize("with_reshape", [False, True])
def test_dense_patterns_compute_dense_layers(with_reshape):
    x, w, b = (
        models.array(i, *s) for i, s in enumerate([(6, 3, 5), (3, 5, 2, 7), (2, 7)])
    )
    found = tag_graph_matcher._dense(x, [w, b], axes=2, with_reshape=with_reshape)
    expected = np.einsum("bij,ijkl->bkl", x, w) + np.asarray(b)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    bare = tag_graph_matcher._dense(x, [w], 2, with_reshape)
    np.testing.assert_allclose(bare, np.einsum("bij,ijkl->bkl", x, w), rtol=1e-12)


# -------------------------------------------------------------- blocks by their names

NATIVE = {  # tag and block there, kind and block here
    ("dense", kfac_jax.DenseTwoKroneckerFactored): None,
    ("repeated_dense", kfac_jax.RepeatedDenseKroneckerFactored): None,
    ("generic", kfac_jax.NaiveDiagonal): None,
    ("scale_and_shift", kfac_jax.ScaleAndShiftDiagonal): None,
    ("conv2d", curvature_blocks.Conv2DTwoKroneckerFactored): None,
    ("my_variant", kfac_jax.DenseTwoKroneckerFactored): None,
    ("dense", curvature_blocks.DenseFull): ("dense", blocks.Full()),
    ("dense_tag", curvature_blocks.DenseTNT): ("dense", blocks.TNT()),
    ("dense", curvature_blocks.NaiveTNT): ("dense", blocks.TNT()),
    ("dense", curvature_blocks.DenseDiagonal): ("dense", blocks.Diagonal()),
    ("dense", curvature_blocks.ScaledIdentity): ("dense", blocks.Identity()),
    ("conv2d", curvature_blocks.Conv2DFull): ("conv", blocks.Full()),
    ("conv2d", curvature_blocks.Conv2DTNT): ("conv", blocks.TNT()),
    ("conv2d", curvature_blocks.Conv2DDiagonal): ("conv", blocks.Diagonal()),
    ("scale_and_shift", kfac_jax.ScaleAndShiftFull): ("shift", blocks.Full()),
    ("generic", curvature_blocks.ScaledIdentity): ("unmatched", blocks.Identity()),
    ("dense", blocks.Eigen()): ("dense", blocks.Eigen()),
}


@pytest.mark.parametrize("tag, ctor", NATIVE)
def test_blocks_have_native_ones(tag, ctor):
    rule = native_blocks({tag: ctor})
    if NATIVE[tag, ctor] is None:
        assert not rule.kinds
    else:
        kind, block = NATIVE[tag, ctor]
        assert dict(rule.kinds)[kind] == block


def test_a_tag_s_block_is_that_of_its_layers_only():
    def apply(params, x):
        x = jnp.tanh(x.sum(1) @ params["w"]) * params["b"][None, :]
        return (x @ kfac_jax.register_generic(params["last"]))[:, 0]

    rule = native_blocks({"dense": curvature_blocks.DenseFull, "conv2d": blocks.TNT()})
    plan = plan_of(apply, rule)
    assert [(x.kind, x.block) for x in plan.layers] == [
        ("scale", blocks.Diagonal()),
        ("generic", blocks.Diagonal()),
        ("dense", blocks.Full()),
    ]
    assert hash(rule) == hash(
        native_blocks({"dense": blocks.Full(), "conv2d": blocks.TNT()})
    )


def test_blocks_of_convolutions_and_of_scales_are_chosen_by_their_tags():
    params = {"k": models.array(4, 2, 2, 1, 3), "s": models.array(5, 3)}
    images = models.array(6, 4, 3, 3, 1)

    def loss_fn(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = kfac_jax.register_conv2d(y, x, params["k"], variant="conv2d")
        z = jnp.tanh(y).sum((1, 2))
        z = kfac_jax.register_scale_and_shift(z * params["s"][None], z, params["s"])
        kfac_jax.register_normal_predictive_distribution(z)
        return z.mean()

    rule = native_blocks(
        {
            "conv2d": curvature_blocks.Conv2DDiagonal,
            "scale_and_shift": kfac_jax.ScaleAndShiftFull,
        }
    )
    plans = [
        kfac_jax.make_curvature(loss_fn, params, images, blocks=b)
        for b in (native_blocks(), rule)
    ]
    found = [[x.block for x in plan.layers] for plan in plans]
    assert found[0] == [KRONECKER, blocks.Diagonal()]
    assert found[1] == [blocks.Diagonal(), blocks.Full()]


def test_defaults_are_set_for_several_tags():
    kfac_jax.set_default_tag_to_block_ctor("dense_tag", blocks.Full())
    kfac_jax.set_default_tag_to_block_ctor("generic", blocks.Identity())
    found = dict(native_blocks().kinds)
    assert found["dense"] == blocks.Full()
    assert found["generic"] == found["unmatched"] == blocks.Identity()
    assert native_blocks({"dense": blocks.TNT()}).kinds[0] == ("dense", blocks.TNT())
    default = curvature_estimator.get_default_tag_to_block_ctor
    assert default("conv2d") is curvature_blocks.Conv2DTwoKroneckerFactored
    assert default("unknown") is None


def test_every_kind_of_override_is_noticed():
    class Mixin:
        def scale(self):
            raise AssertionError("never called")

    class Mixed(Mixin, kfac_jax.DenseTwoKroneckerFactored):
        pass

    class Same(kfac_jax.DenseTwoKroneckerFactored):
        """Overrides nothing."""

    masked = functools.partial(curvature_blocks.DenseFull, eigen_threshold=3)
    twice = functools.partial(masked, eigen_threshold=4)
    assert not native_blocks({"dense": Same}).kinds
    for ctor, missing in ((Mixed, "scale"), (twice, "eigen_threshold")):
        with pytest.warns(
            UserWarning, match=rf"\(tag 'dense'\), without its {missing}"
        ):
            native_blocks({"dense": ctor})


class Alone(kfac_jax.CurvatureBlock):
    pass


REFUSED = {
    "one derived from it, or a block of kfac_jax.blocks; got <function": (
        TypeError,
        lambda: native_blocks({"dense": lambda equation: None}),
    ),
    "derives from no block that has a native counterpart": (
        ValueError,
        lambda: native_blocks({"dense": Alone}),
    ),
    "is expected with scale 1; got another": (
        ValueError,
        lambda: native_blocks(
            {"dense": functools.partial(curvature_blocks.ScaledIdentity, scale=2.0)}
        ),
    ),
    "'my_variant' stands for no kind of layer, so its block Full() cannot be": (
        ValueError,
        lambda: native_blocks({"my_variant": curvature_blocks.DenseFull}),
    ),
    "are of one kind, 'dense', here; expected one block for them": (
        ValueError,
        lambda: native_blocks({"repeated_dense": curvature_blocks.DenseFull}),
    ),
    "only describes a block, and is not instantiated": (
        TypeError,
        lambda: RepeatedDense(None),
    ),
    f"with an entry for each of the {jax.local_device_count()} local devices": (
        ValueError,
        lambda: utils.broadcast_all_local_devices(jnp.ones(16)),
    ),
    "inner_product expects obj1 and obj2 of the same structure and shapes": (
        ValueError,
        lambda: utils.inner_product(TREE, {"a": TREE["a"]}),
    ),
    "kfac_jax.utils has no 'tree_is_empty': expected one of the names": (
        AttributeError,
        lambda: utils.tree_is_empty,
    ),
    "GraphPattern expects kfac_jax.layers_and_loss_tags.layer_tag as its": (
        TypeError,
        lambda: tag_graph_matcher.GraphPattern("mine", None, sum, dict, []),
    ),
    "expects functions as compute_func, parameters_extractor_func and": (
        TypeError,
        lambda: tag_graph_matcher.GraphPattern("mine", Tags.layer_tag, sum, None, []),
    ),
    "expects a sequence of tag_graph_matcher.GraphPattern; got 'dense'": (
        TypeError,
        lambda: tag_graph_matcher.check_graph_patterns((PATTERN, "dense")),
    ),
    "_dense_parameter_extractor expects the equations of one dense layer": (
        ValueError,
        lambda: tag_graph_matcher._dense_parameter_extractor([]),
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused(text):
    error, function = REFUSED[text]
    with pytest.raises(error, match=functools.reduce(_escape, "()[]", text)):
        function()


def _escape(text, character):
    return text.replace(character, "\\" + character)
