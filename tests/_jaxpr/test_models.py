"""Models of common libraries: every parameter is a layer, without a tag."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfac_jax
from kfac_jax import losses

KEY = jax.random.key(0)
IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 7
IMAGES = jax.random.normal(KEY, (3, 8, 8, 3), jnp.float32)
SEQUENCES = jax.random.normal(KEY, (3, 6, 4), jnp.float32)

# the libraries rely on promotion, which the other tests forbid
pytestmark = pytest.mark.usefixtures("promotion")


@pytest.fixture
def promotion():
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


class Block(nn.Module):
    """A transformer's block."""

    norm: type[nn.Module] = nn.LayerNorm
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        h = self.norm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype)
        x = x + attention(h, h)
        h = nn.Dense(16, dtype=self.dtype)(self.norm(dtype=self.dtype)(x))
        return x + nn.Dense(8, dtype=self.dtype)(nn.gelu(h))


class Language(nn.Module):
    """A transformer over tokens with learned positions."""

    norm: type[nn.Module] = nn.LayerNorm
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8, dtype=self.dtype)(ids)
        x = x + self.param("positions", nn.initializers.normal(), (6, 8)).astype(
            x.dtype
        )
        for _ in range(2):
            x = Block(self.norm, self.dtype)(x)
        return nn.Dense(7, dtype=self.dtype)(self.norm(dtype=self.dtype)(x))


class Tied(nn.Module):
    """A transformer whose table is the output layer too, with more positions."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8)
        positions = nn.Embed(9, 8)(jnp.arange(ids.shape[1]))
        return embed.attend(nn.LayerNorm()(Block()(embed(ids) + positions)))


class Step(nn.Module):
    """A rematerialised block as the body of a scan over layers."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _):
        return nn.remat(Block, prevent_cse=False)(dtype=self.dtype)(x), None


class Scanned(nn.Module):
    """A transformer whose layers are scanned and rematerialised."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8, dtype=self.dtype)(ids)
        layers = nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(self.dtype)(x, None)
        return nn.Dense(7, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


class Recurrent(nn.Module):
    """A recurrent net."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(self.cell(5))(x))


class ResNet(nn.Module):
    """Two residual blocks."""

    norm: str

    def normalize(self, x):
        if self.norm == "group":
            return nn.GroupNorm(2)(x)
        return nn.BatchNorm(use_running_average=False)(x)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        for stride in (1, 2):
            width, strides = 4 * stride, (stride, stride)
            h = nn.Conv(width, (3, 3), strides, use_bias=False)(x)
            h = self.normalize(nn.Conv(width, (3, 3))(nn.relu(self.normalize(h))))
            x = nn.Conv(width, (1, 1), strides)(x) if stride > 1 else x
            x = nn.relu(x + h)
        return nn.Dense(5)(x.mean((1, 2)))


class ResNet18(nn.Module):
    """The whole net."""

    norm: str

    @nn.compact
    def __call__(self, x):
        norm = {
            "batch": functools.partial(nn.BatchNorm, use_running_average=False),
            "group": nn.GroupNorm,
        }[self.norm]
        x = nn.relu(norm()(nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for block in range(8):
            width = 64 * 2 ** (block // 2)
            strides = (2, 2) if block in (2, 4, 6) else (1, 1)
            h = nn.Conv(width, (3, 3), strides, use_bias=False)(x)
            h = nn.Conv(width, (3, 3), use_bias=False)(nn.relu(norm()(h)))
            h = norm(scale_init=nn.initializers.zeros)(h)
            if x.shape != h.shape:
                x = norm()(nn.Conv(width, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + h)
        return nn.Dense(1000)(x.mean((1, 2)))


class UNet(nn.Module):
    """Down and up again by a transposed convolution."""

    @nn.compact
    def __call__(self, x):
        fine = nn.relu(nn.Conv(4, (3, 3))(x))
        coarse = nn.relu(nn.Conv(8, (3, 3), (2, 2))(fine))
        up = nn.ConvTranspose(4, (2, 2), (2, 2))(coarse)
        return nn.Conv(3, (1, 1))(jnp.concatenate([up, fine], -1))


def patches(x):
    x = nn.Conv(8, (4, 4), (4, 4))(x)
    return x.reshape(x.shape[0], -1, 8)


class ViT(nn.Module):
    """A vision transformer with a class token."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, [len(x), 1, 1]), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, 5, 8))
        return nn.Dense(4)(Block()(x)[:, 0])


class Mixer(nn.Module):
    """An MLP-Mixer's block."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(y))).swapaxes(1, 2)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(4)(x.mean(1))


class Experts(nn.Module):
    """A mixture of experts, each with its own bias."""

    @nn.compact
    def __call__(self, x):
        gates = jax.nn.softmax(nn.Dense(3)(x))
        normal = nn.initializers.normal()
        w1, b1 = self.param("w1", normal, (3, 4, 6)), self.param("b1", normal, (3, 6))
        w2 = self.param("w2", normal, (3, 6, 5))
        h = nn.relu(jnp.einsum("bti,eio->bteo", x, w1) + b1)
        return jnp.einsum("bteo,eok,bte->btk", h, w2, gates)


def linen(module):
    def build(x):
        variables = module.init(KEY, x)
        rest = {name: value for name, value in variables.items() if name != "params"}

        def apply(params, x):
            y = module.apply({"params": params, **rest}, x, mutable=list(rest))
            return y[0]

        return variables["params"], apply

    return build


class NnxBlock(nnx.Module):
    """A transformer's block with both norms."""

    def __init__(self, rngs, dtype):
        options = {"rngs": rngs, "dtype": dtype}
        self.layer_norm = nnx.LayerNorm(8, **options)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **options)
        self.rms_norm = nnx.RMSNorm(8, **options)
        self.up = nnx.Linear(8, 16, **options)
        self.down = nnx.Linear(16, 8, **options)

    def __call__(self, x):
        x = x + self.attention(self.layer_norm(x))
        return x + self.down(nnx.gelu(self.up(self.rms_norm(x))))


class NnxLanguage(nnx.Module):
    """A transformer over tokens, of one block or of several scanned ones."""

    def __init__(self, dtype=None, layers=0):
        rngs = nnx.Rngs(0)
        self.layers = layers
        self.embed = nnx.Embed(7, 8, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(8, 7, rngs=rngs, dtype=dtype)
        if not layers:
            self.blocks = NnxBlock(rngs, dtype)
            return

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return NnxBlock(rngs, dtype)

        self.blocks = stacked(rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        if not self.layers:
            return self.head(self.blocks(x))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x, block):
            return block(x)

        return self.head(through(x, self.blocks))


class NormalizedConvolutions(nnx.Module):
    """Convolutions with batch norm, whose statistics are not parameters."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 4, (3, 3), strides=(2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.depthwise(nnx.relu(self.norm(self.first(x))))
        return self.head(x.mean((1, 2)))


def nnx_model(make):
    def build(x):
        graph, params, rest = nnx.split(make(), nnx.Param, ...)
        # copied: a batch norm writes its running averages
        merge = functools.partial(nnx.merge, graph, copy=True)
        return params, lambda params, x: merge(params, rest)(x)

    return build


class EquinoxAttention(eqx.Module):
    """Attention under vmap."""

    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(KEY, 3)
        self.embed = eqx.nn.Embedding(7, 8, key=keys[0])
        self.norm = eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(
            2, 8, use_query_bias=True, key=keys[1]
        )
        self.head = eqx.nn.Linear(8, 5, key=keys[2])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        h = jax.vmap(self.norm)(x)
        return jax.vmap(self.head)(x + self.attention(h, h, h))


class EquinoxConvolutions(eqx.Module):
    """A convolution and a transposed one under vmap."""

    down: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d

    def __init__(self):
        self.down = eqx.nn.Conv2d(8, 4, 3, key=KEY)
        self.up = eqx.nn.ConvTranspose2d(4, 3, 2, 2, key=KEY)

    def __call__(self, x):
        return self.up(jax.nn.relu(self.down(x))).mean((1, 2))


def equinox(make):
    def build(x):
        params, static = eqx.partition(make(), eqx.is_inexact_array)
        return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)

    return build


def haiku(function):
    def build(x):
        model = hk.without_apply_rng(hk.transform(function))
        return model.init(KEY, x), model.apply

    return build


def haiku_convolutions(x):
    x = hk.Conv2D(4, 3, 2)(hk.LayerNorm(-1, True, True)(x))
    return hk.Linear(3)(jax.nn.relu(hk.GroupNorm(2)(x)).mean((1, 2)))


def haiku_resnet(x):
    """The whole net, whose state is the running averages of its norms."""
    model = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True))
    )
    params, state = model.init(KEY, x)
    return params, lambda params, x: model.apply(params, state, x)[0]


def gpt(x):
    """A GPT in plain JAX: stacked layers, scanned and rematerialised; a tied table."""
    keys = iter(jax.random.split(KEY, 9))
    new = lambda *shape: 0.1 * jax.random.normal(next(keys), shape)  # noqa: E731
    layers, d, vocabulary = 3, 8, 7
    params = {
        "table": new(vocabulary, d),
        "positions": new(10, d),
        "layers": {
            "qkv": new(layers, d, 3 * d),
            "out": new(layers, d, d),
            "up": new(layers, d, 4 * d),
            "up_bias": jnp.zeros((layers, 4 * d)),
            "down": new(layers, 4 * d, d),
            "norm": jnp.ones((layers, d)),
        },
    }

    def normalize(x, scale):
        return scale * x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def attend(x, p):
        b, t, _ = x.shape
        qkv = (x @ p["qkv"]).reshape(b, t, 3, 2, d // 2)
        q, k, v = (qkv[:, :, i] for i in range(3))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d)

    def block(x, p):
        x = x + attend(normalize(x, p["norm"]), p) @ p["out"]
        return x + jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"], None

    def apply(params, ids):
        x = params["table"][ids] + params["positions"][: ids.shape[1]]
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
        return x @ params["table"].T

    return params, apply


def ensemble(x):
    """Three nets at once."""
    params = {"w": jnp.ones((3, 4, 5)), "head": jnp.ones((3, 5, 2))}

    def apply(params, x):
        one = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]  # noqa: E731
        return jax.vmap(one, (0, None), 2)(params, x)

    return params, apply


def low_rank(x):
    """Two parameters with data between."""
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 5)), "c": jnp.ones((5, 3))}
    return params, lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]) @ p["c"]


MODELS = {
    "linen transformer": (linen(Language()), IDS),
    "linen transformer, RMS norm": (linen(Language(nn.RMSNorm)), IDS),
    "linen transformer, bf16": (linen(Language(dtype=jnp.bfloat16)), IDS),
    "linen transformer, scanned": (linen(Scanned()), IDS),
    "linen LSTM": (linen(Recurrent(nn.LSTMCell)), SEQUENCES),
    "linen tied transformer": (linen(Tied()), IDS),
    "linen LSTM, joined weights": (linen(Recurrent(nn.OptimizedLSTMCell)), SEQUENCES),
    "linen GRU": (linen(Recurrent(nn.GRUCell)), SEQUENCES),
    "linen ResNet, group norm": (linen(ResNet("group")), IMAGES),
    "linen ResNet, batch norm": (linen(ResNet("batch")), IMAGES),
    "linen U-Net": (linen(UNet()), IMAGES),
    "linen ViT": (linen(ViT()), IMAGES),
    "linen Mixer": (linen(Mixer()), IMAGES),
    "linen experts": (linen(Experts()), SEQUENCES),
    "nnx transformer": (nnx_model(NnxLanguage), IDS),
    "equinox MLP": (
        equinox(lambda: eqx.nn.MLP(4, 3, 8, 2, key=KEY)),
        SEQUENCES[:, 0],
    ),
    "equinox attention": (equinox(EquinoxAttention), IDS),
    "equinox convolutions": (equinox(EquinoxConvolutions), IMAGES),
    "haiku convolutions": (haiku(haiku_convolutions), IMAGES),
    "nnx convolutions": (nnx_model(NormalizedConvolutions), IMAGES),
    "plain GPT": (gpt, IDS),
    "ensemble": (ensemble, SEQUENCES),
    "low rank": (low_rank, SEQUENCES),
}


LIKE_OTHERS = {
    "linen transformer, RMS norm",
    "linen transformer, bf16",
    "linen tied transformer",
    "linen LSTM, joined weights",
    "linen GRU",
    "linen ResNet, batch norm",
    "linen ViT",
    "linen Mixer",
    "equinox convolutions",
}
"""Made of what the rest of the models is made of, too."""

TRACED = {
    "linen transformer, scanned, bf16": linen(Scanned(jnp.bfloat16)),
    "nnx transformer, bf16": nnx_model(lambda: NnxLanguage(jnp.bfloat16)),
    "nnx transformer, scanned": nnx_model(lambda: NnxLanguage(layers=3)),
    "nnx transformer, scanned, bf16": nnx_model(lambda: NnxLanguage(jnp.bfloat16, 3)),
}
"""Those that differ from others by their types or by a scan only."""

WHOLE = {
    "linen ResNet-18, batch norm": linen(ResNet18("batch")),
    "linen ResNet-18, group norm": linen(ResNet18("group")),
    "haiku ResNet-18": haiku_resnet,
}


def loss_of(apply):
    def loss_fn(params, x):
        z = apply(params, x)
        z = z.reshape(-1, z.shape[-1])
        labels = jnp.zeros(len(z), int)
        return losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    return loss_fn


def traced(build, x):
    """The plan and the factors after one batch, from shapes alone."""
    params = jax.eval_shape(lambda x: build(x)[0], x)
    apply = lambda params, x: build(x)[1](params, x)  # noqa: E731
    plan = kfac_jax.make_curvature(loss_of(apply), params, x, on_unmatched="error")

    def factors(params, x):
        statistics = plan.value_grad_and_statistics(params, x, rng=KEY)[2]
        return plan.update_factors(plan.init_factors(params), statistics, step=1)

    return plan, jax.eval_shape(factors, params, x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", WHOLE)
def test_every_parameter_of_a_large_model_is_covered(name):
    x = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    plan, factors = traced(WHOLE[name], x)
    covered = {"conv", "dense", "scale_and_shift", "scale", "shift"}
    assert {layer.kind for layer in plan.layers} <= covered
    assert sum(layer.kind == "conv" for layer in plan.layers) == 20
    for layer in plan.layers:
        found = {name: factor.shape for name, factor in factors[layer.name].items()}
        assert found == layer.factor_shapes


@pytest.mark.parametrize("name", TRACED)
def test_every_parameter_is_covered_in_other_types_and_scans(name):
    plan, factors = traced(TRACED[name], IDS)
    assert plan.totals.covered == plan.totals.parameters
    kinds = {"embedding", "dense", "scale", "shift"}
    assert {layer.kind for layer in plan.layers} <= kinds
    stacked = {layer.name for layer in plan.layers if layer.shape.stacked == (3,)}
    assert bool(stacked) == ("scanned" in name)
    for factor in jax.tree.leaves(factors):
        assert factor.dtype == jnp.float32


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n
        for n in MODELS
    ],
)
def test_every_parameter_is_covered(name):
    build, x = MODELS[name]
    params, apply = build(x)
    loss_fn = loss_of(apply)
    curvature = kfac_jax.make_curvature(loss_fn, params, x, on_unmatched="error")
    assert {"generic", "unused"}.isdisjoint(layer.kind for layer in curvature.layers)
    gather = jax.jit(curvature.value_grad_and_statistics)
    value, grads, statistics = gather(params, x, rng=KEY)
    expected = jax.jit(jax.value_and_grad(loss_fn))(params, x)
    tolerance = 0.1 if "bf16" in name else 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
        (value, grads),
        expected,
    )
    factors = curvature.update_factors(
        curvature.init_factors(params), statistics, step=1
    )
    for layer in curvature.layers:
        for factor in factors[layer.name].values():
            assert factor.dtype == jnp.float32
            assert np.isfinite(factor).all()
