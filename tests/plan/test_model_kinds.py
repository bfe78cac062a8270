"""Kinds of models as people write them: what a plan covers, costs, and gets exactly.

`tests._jaxpr.test_models` has more of them, and asks only what covers them.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from tests.helpers import models, oracles
from tests.helpers.model_kinds import (
    generative,
    implicit,
    objectives,
    routed,
    sequences,
    vision,
)
from tests.helpers.model_kinds._kind import KEY, Kind

# the libraries rely on promotion, which the other tests forbid
pytestmark = pytest.mark.usefixtures("promotion")

COST = 4.0
"""The most that a gradient with statistics may cost, in gradients."""
NATIVE = 0.99
"""The least share of the parameters that layers must cover."""


@pytest.fixture(scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What is expected of a kind.

    Attributes:
      make: makes it.
      warns: the warnings of its plan that are documented, and where; empty for none.
      by_rule: parameters that are reported as uncovered, as documented.
      inexact: what says that `Full` is not for its layers, as documented.
      tolerance: of its exact blocks, relative to their largest entry.
      fast: its checks that run in `make test`.
    """

    make: Callable[[], Kind]
    warns: Sequence[str] = ()
    by_rule: Sequence[str] = ()
    inexact: str = ""
    tolerance: float = 1e-8
    fast: str = "plan"


# docs/losses.md, "Terms that are not registered"
REST = (r"The loss function returned .* but the registered loss is",)
# README, "Not there yet": weights inside of a function whose rule is not its body's
KEPT_RULE = (
    r"cell/w: is in a function whose custom derivative rule is not its body's",
)
# README, "Not there yet": what a contrastive loss or messages on a graph mix
MIXED = r"Full\(\) sums within an example, and which rows belong to one example could"
# The same, for the diagonal that a temperature has by default
MIXED_SCALAR = (r"log_scale: Diagonal\(\) sums within an example",)

KINDS = {
    "nnx ViT": Entry(
        make=vision.nnx_vit,
        tolerance=1e-6,  # jax.nn.dot_product_attention has its softmax in float32
        fast="",
    ),
    "Swin": Entry(make=vision.swin),
    "DETR": Entry(make=vision.detr),
    "ConvNeXt": Entry(make=vision.convnext, fast="plan cost full"),
    "MobileNet": Entry(make=vision.mobilenet, fast=""),
    "U-Net": Entry(make=vision.unet, fast="plan cost"),
    "linen LSTM": Entry(make=lambda: sequences.linen_rnn(nn.LSTMCell), fast=""),
    "linen GRU": Entry(make=lambda: sequences.linen_rnn(nn.GRUCell), fast=""),
    "haiku LSTM": Entry(make=lambda: sequences.haiku_rnn(hk.LSTM), fast=""),
    "haiku GRU": Entry(make=lambda: sequences.haiku_rnn(hk.GRU), fast="plan full"),
    "equinox LSTM": Entry(make=lambda: sequences.equinox_rnn(eqx.nn.LSTMCell), fast=""),
    "equinox GRU": Entry(
        make=lambda: sequences.equinox_rnn(eqx.nn.GRUCell), fast="plan cost"
    ),
    "recurrent, learned start": Entry(make=sequences.learned_start),
    "S4D by scan": Entry(make=lambda: sequences.s4d("scan"), fast="plan cost full"),
    "S4D by associative scan": Entry(make=lambda: sequences.s4d("associative_scan")),
    "S5": Entry(make=lambda: sequences.s4d("vmapped associative_scan")),
    "S4D by convolution": Entry(make=lambda: sequences.s4d("convolution")),
    "Mamba": Entry(make=sequences.mamba, fast="plan full"),
    "experts, top 1": Entry(make=lambda: routed.experts(1), fast=""),
    "experts, top 2": Entry(make=lambda: routed.experts(2), fast="plan cost full"),
    "experts, balanced": Entry(make=routed.balanced_experts, warns=REST),
    "graph network": Entry(make=routed.gnn, inexact=MIXED, fast="plan cost full"),
    "graph attention": Entry(make=routed.gat, inexact=MIXED, fast="plan full"),
    "RealNVP": Entry(make=generative.real_nvp, fast="plan full"),
    "VAE": Entry(make=generative.vae, warns=REST, fast="plan cost full step"),
    "diffusion U-Net": Entry(make=generative.diffusion),
    "DEQ by custom_vjp": Entry(
        make=lambda: implicit.equilibrium("custom_vjp"),
        warns=KEPT_RULE,
        by_rule=("cell/b", "cell/u", "cell/w"),
        fast="",
    ),
    "DEQ by custom_root": Entry(
        make=lambda: implicit.equilibrium("custom_root"),
        warns=KEPT_RULE,
        by_rule=("cell/b", "cell/u", "cell/w"),
        fast="",
    ),
    "DEQ, last step": Entry(
        make=lambda: implicit.equilibrium("last step"), fast="plan full"
    ),
    "hypernetwork": Entry(make=lambda: implicit.hypernetwork(False), fast="plan full"),
    "conditional hypernetwork": Entry(make=lambda: implicit.hypernetwork(True)),
    "linen weight norm": Entry(make=implicit.weight_norm, fast=""),
    "equinox weight norm": Entry(make=implicit.equinox_weight_norm, fast="plan full"),
    "GPT-2": Entry(make=objectives.gpt2, fast="plan full"),
    "PPO": Entry(make=objectives.ppo, fast="plan cost full step"),
    "InfoNCE": Entry(
        make=objectives.info_nce,
        warns=MIXED_SCALAR,
        inexact=MIXED,
        fast="plan cost full",
    ),
}

# ---------------------------------------------------------------- what fails as yet

NOT_CHEAP = {
    "U-Net": "9 c inputs of a kernel 3 × 3: their second moment alone is 3 gradients",
    "DETR": "queries attend to each other before they meet a case",
    "hypernetwork": "the gradient of each example by all generated weights",
    "linen weight norm": "the gradient of each example by the normed weight",
    "equinox weight norm": "the gradient of each example by the normed weight",
}
"""The statistics of these cost more than `COST` gradients."""


def of(check: str, *failing: tuple[dict[str, str], Any]) -> Any:
    """The table for one check: slow where it says so, and failures that are known.

    Args:
      check: its name in `Entry.fast`.
      *failing: reasons by kind, with what is raised for them.

    Returns:
      The decorator.
    """
    parameters = []
    for name, entry in KINDS.items():
        marks = [] if check in entry.fast.split() else [pytest.mark.slow]
        marks += [
            pytest.mark.xfail(strict=True, reason=reasons[name], raises=error)
            for reasons, error in failing
            if name in reasons
        ]
        parameters.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", parameters)


@functools.cache
def made(name: str) -> Kind:
    return KINDS[name].make()


@functools.cache
def planned(name: str) -> tuple[kfac_jax.Curvature, list[str]]:
    """The plan with defaults, and its warnings."""
    kind = made(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = kfac_jax.make_curvature(kind.loss_fn, kind.params, *kind.args)
    return plan, [str(x.message) for x in caught]


def check_sides(layer: kfac_jax.Layer) -> None:
    """No factor is larger than a side of the weight, of which a bias makes one longer.

    Args:
      layer: the layer.
    """
    *lead, inputs, outputs = layer.shape.matrix
    assert math.prod(layer.shape.matrix) == sum(map(math.prod, layer.shapes))
    weight = layer.shapes[0]
    linear = ("dense", "conv", "embedding", "tied")
    if layer.kind in linear and len(weight) > 1 and not lead:
        cuts = [
            {math.prod(weight[:k]), math.prod(weight[k:])}
            for k in range(len(weight) + 1)
        ]
        assert {inputs - len(layer.shapes) + 1, outputs} in cuts
    sides = {"input": inputs, "output": outputs}
    if layer.kind == "tied":
        sides |= {"transposed_input": outputs, "transposed_output": inputs}
    for name, shape in layer.factor_shapes.items():
        if name in sides:
            assert shape[-1] == shape[-2] <= sides[name]
            assert math.prod(shape[:-2]) <= math.prod(lead)
        else:
            assert name in ("diagonal", "input_diagonal", "output_diagonal")
            assert math.prod(shape) <= math.prod(layer.shape.matrix)


@of("plan")
def test_the_plan_covers_parameters_by_factors_of_their_sides(name):
    entry, (plan, told) = KINDS[name], planned(name)
    assert len(told) == len(entry.warns)
    for pattern, message in zip(entry.warns, told, strict=True):
        assert re.search(pattern, message)
    other = {"generic", "unmatched", "unused"}
    missing = [x for x in plan.layers if x.kind in other or x.reason]
    if entry.by_rule:
        assert [x.name for x in missing] == list(entry.by_rule)
    size = sum(
        math.prod(s) for x in missing for s in x.shapes if x.name not in entry.by_rule
    )
    assert size <= (1 - NATIVE) * plan.totals.parameters
    for layer in plan.layers:
        check_sides(layer)


@pytest.mark.sampled(2)
@of("cost", (NOT_CHEAP, pytest.fail.Exception))
def test_statistics_cost_a_few_gradients_at_most(name):
    """And do not change value and gradient."""
    kind, (plan, _) = made(name), planned(name)

    def statistics(params, *args):
        return plan.value_grad_and_statistics(params, *args, rng=KEY)

    both = [
        jax.jit(function).lower(kind.params, *kind.args).compile()
        for function in (jax.value_and_grad(kind.loss_fn), statistics)
    ]
    expected, found = (program(kind.params, *kind.args) for program in both)
    models.assert_trees_close(found[:2], expected, rtol=1e-6, atol=1e-9)
    gradient, with_statistics = (x.cost_analysis()["flops"] for x in both)
    if with_statistics > COST * gradient:
        pytest.fail(f"statistics cost {with_statistics / gradient:.1f} gradients")


@pytest.mark.sampled(3)
@of("full")
def test_full_blocks_are_the_exact_ones(name):
    entry, kind = KINDS[name], made(name)
    plan_of = functools.partial(
        kfac_jax.make_curvature,
        kind.loss_fn,
        kind.params,
        *kind.args,
        blocks=blocks.Full(),
        estimation_mode="ggn_exact",
        on_rest="ignore",
    )
    if entry.inexact:
        with pytest.raises(ValueError, match=entry.inexact):
            plan_of(on_unmatched="error")
        return
    plan = plan_of(on_unmatched="ignore" if entry.by_rule else "error")

    @jax.jit
    def dense(params, *args):
        factors = models.statistics_to_factors(plan, params, *args)
        return plan.approximation(factors).to_dense()

    found = np.asarray(dense(kind.params, *kind.args))
    exact = sum(
        oracles.ggn(
            lambda p, term=term: term.outputs(p, *kind.args),
            term.per_case,
            kind.params,
            *term.data,
        )
        for term in kind.terms
    )
    for layer in plan.layers:
        if layer.kind == "unmatched":
            assert layer.name in entry.by_rule
            continue
        own = models.places(plan, layer)
        wanted = exact[np.ix_(own, own)]
        assert wanted.any()
        np.testing.assert_allclose(
            found[np.ix_(own, own)],
            wanted,
            rtol=0,
            atol=entry.tolerance * np.abs(wanted).max(),
        )


@of("step")
def test_three_steps_are_finite_and_none_is_refused(name):
    kind, (plan, _) = made(name), planned(name)
    tx = kfac_jax.kfac(plan)
    if name == "DEQ by custom_vjp":  # README: exact products need forward mode
        tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1)
    step = jax.jit(models.traced_once(kfac_jax.make_step(plan, tx)))
    params, state = kind.params, tx.init(kind.params)
    values = []
    for key in jax.random.split(KEY, 3):
        params, state, value = step(params, state, key, *kind.args)
        values.append(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, values)))
    assert int(state.info.skipped_updates) == 0
    assert values[-1] < values[0]
