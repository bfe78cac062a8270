"""BibTeX of what is in use."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_jax
from kfac_jax import blocks, citing
from tests.helpers import models

ALWAYS = {"kfac_jax", "martens2015kfac"}


def keys(*used):
    found = re.findall(r"^@\w+{([^,]+),$", kfac_jax.cite(*used), flags=re.MULTILINE)
    assert len(set(found)) == len(found)
    return set(found) - ALWAYS


def plan(**options):
    p = models.problem()
    return kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"blocks": blocks.Eigen()}, {"george2018eigenbasis"}),
        ({"blocks": {"dense": blocks.TNT()}}, {"ren2021tnt"}),
        ({"blocks": blocks.Kronecker(fit="kl")}, {"lin2025understanding"}),
        ({"weight_sharing": "reduce"}, {"eschenhagen2023kronecker"}),
        ({"estimation_mode": "ggn_exact"}, {"botev2017practical"}),
        ({"structure": kfac_jax.SampleSpace()}, {"chen2024empowering"}),
    ],
)
def test_what_a_plan_uses(options, expected):
    assert keys(plan(**options)) == expected


def test_convolutions():
    def loss_fn(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers
        )
        return kfac_jax.losses.squared_error(z, jnp.zeros_like(z)).sum((1, 2, 3)).mean()

    w, x = jnp.ones((3, 3, 1, 2)), jnp.ones((4, 5, 5, 1))
    curvature = kfac_jax.make_curvature(loss_fn, w, x)
    assert keys(curvature) == {"grosse2016kfc"}
    assert keys(kfac_jax.kfac(curvature)) == {"grosse2016kfc"}


def test_transformations_are_looked_through():
    curvature = plan()
    inner = kfac_jax.scale_by_kfac(curvature, devices=kfac_jax.OverAxis("axis"))
    tx = optax.chain(
        kfac_jax.graft(inner, optax.scale_by_adam()), kfac_jax.average_iterates()
    )
    expected = {
        "ba2017distributed",
        "agarwal2020disentangling",
        "polyak1992averaging",
    }
    assert keys(tx) == expected
    assert keys(kfac_jax.multi_steps(curvature, kfac_jax.kfac(curvature), 2)) == set()
    rows = plan(structure=kfac_jax.SampleSpace(), estimation_mode="fisher_exact")
    assert keys(kfac_jax.natural_gradient(rows)) == {"chen2024empowering"}
    spring = kfac_jax.natural_gradient(rows, momentum=kfac_jax.Spring(0.9))
    assert keys(spring) == {"chen2024empowering", "goldshlager2024spring"}


def test_modules_and_parts_of_devices():
    assert keys(kfac_jax.influence) == {"grosse2023influence"}
    over = kfac_jax.OverAxis("axis", state_axes="axis")
    assert keys(over) == {"ba2017distributed", "pauloski2021kaisa"}


def test_every_entry_is_cited_by_something_and_every_key_has_an_entry():
    tables = (citing._BY_TYPE, citing._BY_MODULE, citing._BY_MODE, citing._BY_FIT)
    named = {key for table in tables for keys in table.values() for key in keys}
    named |= {"grosse2016kfc", "eschenhagen2023kronecker", "pauloski2021kaisa"}
    assert set(citing._entries()) == named | ALWAYS


@pytest.mark.parametrize("thing", [3, optax.adam(1e-3), lambda x: x])
def test_what_holds_no_part_of_this_library_is_refused(thing):
    with pytest.raises(TypeError, match="in which nothing is found"):
        kfac_jax.cite(plan(), thing)


def test_nothing_is_refused():
    with pytest.raises(TypeError, match="cite needs what is in use"):
        kfac_jax.cite()
