"""Wrong input is refused by an error that says what was expected; nothing changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import losses


def loss_fn(params, x, y):
    z = x @ params["w"] + params["b"][None]
    return losses.squared_error(z, y).sum(-1).mean()


def make_params(inputs=3, outputs=2):
    return {"w": jnp.ones((inputs, outputs)), "b": jnp.ones(outputs)}


def make_batch(inputs=3, outputs=2, cases=8):
    return jnp.ones((cases, inputs)), jnp.zeros((cases, outputs))


@functools.cache
def plan(inputs=3, outputs=2, **options):
    return kfac_jax.make_curvature(
        loss_fn, make_params(inputs, outputs), *make_batch(inputs, outputs), **options
    )


@functools.cache
def gathered(inputs=3, outputs=2):
    compute = jax.jit(plan(inputs, outputs).value_grad_and_statistics)
    key = jax.random.key(0)
    return compute(make_params(inputs, outputs), *make_batch(inputs, outputs), rng=key)


KINDS = {
    "scale_by_kfac": lambda: kfac_jax.scale_by_kfac(plan()),
    "kfac": lambda: kfac_jax.kfac(plan(), 0.1, 0.9, 1e-3),
}


@pytest.fixture(params=sorted(KINDS))
def tx(request):
    return KINDS[request.param]()


# -------------------------------------------------------------------- the loss function


def make(loss, params=None, batch=None, **options):
    params = make_params() if params is None else params
    return kfac_jax.make_curvature(
        loss, params, *(make_batch() if batch is None else batch), **options
    )


def per_case(params, x, y):
    return losses.squared_error(x @ params["w"], y).sum(-1)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (per_case, r"scalar.*float64\[8\].*mean\(\)"),
        (lambda p, x, y: (loss_fn(p, x, y), x), r"scalar.*has_aux=True"),
        (lambda p, x, y: None, r"scalar; loss_fn returned NoneType"),
        (lambda p, x, y: loss_fn(p, x, y).astype(int), r"real scalar.*int"),
        (lambda p, x, y: loss_fn(p, x, y).astype(complex), r"real scalar.*complex"),
    ],
)
def test_loss_that_is_no_real_scalar(loss, message):
    with pytest.raises(TypeError, match=message):
        make(loss)


def test_has_aux_without_auxiliary_data():
    with pytest.raises(TypeError, match=r"has_aux=True.*\(loss, aux\)"):
        make(loss_fn, has_aux=True)


def test_no_registered_loss():
    with pytest.raises(ValueError, match=r"No loss is registered.*kfac_jax\.losses"):
        make(lambda p, x, y: jnp.square(x @ p["w"] - y).sum(-1).mean())


@pytest.mark.parametrize(
    ("loss", "ratio"),
    [
        (lambda p, x, y: losses.squared_error(x @ p["w"], y).sum(), "8"),
        (lambda p, x, y: losses.squared_error(x @ p["w"], y).sum(-1).mean() / 2, "0.5"),
    ],
)
def test_registered_loss_of_another_scale(loss, ratio):
    with pytest.raises(ValueError, match=f"ratio returned/registered = {ratio}[:.]"):
        make(loss)


@pytest.mark.parametrize("targets", [True, False])
def test_the_comparison_of_losses_computes_no_more_than_it_needs(targets, caplog):
    """Without targets nothing; with them one program, constants included."""
    calls = []

    def called(x):
        calls.append(1)
        return x

    def loss(params, x, y):
        constant = jnp.arcsinh(jnp.linspace(1.0, 2.0, 3))[None]
        z = (x * constant) @ params["w"] + params["b"][None]
        kfac_jax.register_squared_error_loss(z, y if targets else None)
        shape = jax.ShapeDtypeStruct((), float)
        zero = 0 * jax.pure_callback(
            called, shape, jnp.sum(y), vmap_method="sequential"
        )
        return jnp.square(z - y).sum(-1).mean() + zero

    with jax.log_compiles(), caplog.at_level("WARNING"):
        make(loss)
    assert "asinh" not in caplog.text
    assert len(calls) == targets


def test_undeclared_penalty():
    def penalized(params, x, y):
        return loss_fn(params, x, y) + 0.5 * jnp.vdot(params["w"], params["w"])

    with pytest.warns(UserWarning, match="declare a penalty with `l2`"):
        make(penalized)


def test_leading_axes_that_disagree_when_the_plan_is_made():
    x, y = make_batch()
    with pytest.raises(ValueError, match=r"args\[0\]: 8, args\[1\]: 6"):
        make(loss_fn, batch=(x, y[:6]))
    shapes = jax.eval_shape(lambda: (x, y[:6]))
    with pytest.raises(ValueError, match=r"args\[0\]: 8, args\[1\]: 6"):
        make(loss_fn, batch=shapes)
    several = jax.eval_shape(lambda: (x, y, jnp.zeros(3)))
    with pytest.raises(ValueError, match=r"one leading axis.*args\[2\]: 3"):
        make(
            lambda p, x, y, c: loss_fn(p, x + c[None], y),
            batch=several,
            statistics_fraction=0.5,
            batch_argnums=(0, 2),
        )


@pytest.mark.parametrize("method", ["value_grad_and_statistics", "value_and_grad"])
def test_leading_axes_that_disagree_at_run_time(method):
    x, y = make_batch()
    options = {"rng": jax.random.key(0)} if "statistics" in method else {}
    with pytest.raises(ValueError, match=r"leading.*axes"):
        getattr(plan(), method)(make_params(), x, y[:6], **options)


# ----------------------------------------------------------------------- the parameters


@pytest.mark.parametrize("dtype", [int, complex, bool])
def test_parameters_that_are_not_real_floating_point(dtype):
    params = {**make_params(), "extra": jnp.ones(2, dtype)}
    with pytest.raises(TypeError, match=r"real floating point; got .* at 'extra'"):
        make(loss_fn, params)


@pytest.mark.parametrize("params", [{}, [], (), {"a": {}}, {"a": None}])
def test_empty_parameters(params):
    with pytest.raises(ValueError, match="params holds no arrays"):
        make(lambda p, x, y: losses.squared_error(x, x).mean(), params)


def call(method, params):
    curvature = plan()
    if method == "init":
        return kfac_jax.kfac(curvature).init(params)
    if method == "update":
        _, grads, statistics = gathered()
        tx = kfac_jax.kfac(curvature, 0.1, 0.9, 1e-3)
        state = tx.init(make_params())
        return tx.update(grads, state, params, statistics=statistics)
    if method == "matvec":
        return curvature.matvec(params, make_params(), *make_batch())
    if method == "matvec_vector":
        return curvature.matvec(make_params(), params, *make_batch())
    if method == "quadratic_form":
        return curvature.quadratic_form(make_params(), [params, params], *make_batch())
    if method in ("init_factors", "zero_statistics"):
        return getattr(curvature, method)(params)
    if method == "value_and_grad":
        return curvature.value_and_grad(params, *make_batch())
    return curvature.value_grad_and_statistics(
        params, *make_batch(), rng=jax.random.key(0)
    )


METHODS = [
    "value_grad_and_statistics",
    "value_and_grad",
    "init",
    "update",
    "matvec",
    "matvec_vector",
    "quadratic_form",
    "init_factors",
    "zero_statistics",
]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_another_structure(method):
    message = r"structure.*missing \['b'\].*\['c'\]"
    if method == "quadratic_form":  # a list of trees, or a tree with one more axis
        message = "vectors.*structure"
    with pytest.raises(ValueError, match=message):
        call(method, {"w": jnp.ones((3, 2)), "c": jnp.ones(2)})


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_another_shape(method):
    with pytest.raises(ValueError, match=r"shape \(3, 4\) at 'w'.*\(3, 2\)"):
        call(method, {"w": jnp.ones((3, 4)), "b": jnp.ones(2)})


# -------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": -1e-3}, r"l2 \(η\) must be .*got -0.001"),
        ({"l2": float("nan")}, r"l2 \(η\)"),
        ({"statistics_fraction": 0.0}, r"statistics_fraction \(τ1\).*got 0.0"),
        ({"statistics_fraction": 1.5}, r"statistics_fraction \(τ1\).*got 1.5"),
        ({"statistics_fraction": -0.1}, r"statistics_fraction \(τ1\)"),
        ({"num_samples": 0}, "num_samples must be an integer"),
        ({"num_samples": 1.5}, "num_samples must be an integer"),
        ({"estimation_mode": "fisher"}, 'estimation_mode must be one of "fisher_grad'),
        ({"on_unmatched": "raise"}, 'on_unmatched must be "warn", "error" or "ignore"'),
        ({"structure": "tridiagonal"}, "structure must be BlockDiagonal"),
        ({"weight_sharing": "both"}, "weight_sharing must be"),
        ({"blocks": {"no_such": None}}, "key 'no_such'.*no layer kind"),
    ],
)
def test_options_of_the_plan_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(loss_fn, **options)


@pytest.mark.parametrize(
    "blocks",
    [3, "Kronecker", {"dense": 3}, {"dense": "Diagonal"}, lambda layer: "Diagonal"],
)
def test_blocks_of_the_wrong_type(blocks):
    with pytest.raises(TypeError, match=r"blocks.*(Block|None)"):
        make(loss_fn, blocks=blocks)


def test_a_block_class_in_place_of_a_block():
    with pytest.raises(TypeError, match="blocks"):
        make(loss_fn, blocks=kfac_jax.blocks.Diagonal)


def test_unmatched_parameters_with_error():
    def unmatched(params, x, y):
        step = lambda w, _: (2 * w, x @ w)  # noqa: E731
        z = jax.lax.scan(step, params["w"], length=1)[1][0]
        return losses.squared_error(z, y).sum(-1).mean()

    with pytest.raises(ValueError, match=r"No layer covers 1 param.*\n.*w: .*\n.*at "):
        make(unmatched, {"w": jnp.ones((3, 2))}, on_unmatched="error")


@pytest.mark.parametrize(
    "damping", [-1e-3, np.float32(-1e-3), np.float64(-1e-3), float("nan")]
)
@pytest.mark.parametrize("kind", ["kfac", "scale_by_kfac"])
def test_negative_damping(kind, damping):
    with pytest.raises(ValueError, match=r"damping \(λ\)"):
        getattr(kfac_jax, kind)(plan(), damping=damping)


@pytest.mark.parametrize("damping", [-1.0, np.float32(-1.0), float("nan")])
@pytest.mark.parametrize("method", ["solve", "power", "logdet", "sample"])
def test_negative_damping_of_the_operator(method, damping):
    operator = plan().approximation(plan().init_factors(make_params()))
    arguments = {
        "solve": (make_params(),),
        "power": (make_params(), -0.5),
        "logdet": (),
        "sample": (jax.random.key(0),),
    }[method]
    with pytest.raises(ValueError, match=r"damping \(λ\) must be at least 0"):
        getattr(operator, method)(*arguments, damping=damping)


def test_unknown_modes_of_the_operator():
    operator = plan().approximation(plan().init_factors(make_params()))
    with pytest.raises(ValueError, match=r"damping_mode must be.*'tikhonov'"):
        operator.solve(make_params(), 1.0, damping_mode="tikhonov")
    with pytest.raises(ValueError, match=r"damping_mode must be.*'tikhonov'"):
        operator.power(make_params(), -1.0, 1.0, damping_mode="tikhonov")
    with pytest.raises(ValueError, match=r"damping_mode must be.*'tikhonov'"):
        operator.logdet(1.0, damping_mode="tikhonov")
    with pytest.raises(ValueError, match=r"the vector.*structure.*missing"):
        operator.matvec({"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"matrix must be .*; got 'gauss'"):
        plan().matvec(make_params(), make_params(), *make_batch(), matrix="gauss")
    with pytest.raises(ValueError, match="factors must have an entry for each layer"):
        plan().approximation({})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.5}, ValueError, r"momentum \(μ\)"),
        ({"momentum": -0.1}, ValueError, r"momentum \(μ\)"),
        ({"momentum": "nesterov"}, TypeError, "momentum must be"),
        ({"learning_rate": -0.1}, ValueError, r"learning_rate \(α\)"),
        ({"learning_rate": "adaptive"}, TypeError, "learning_rate must be"),
        ({"learning_rate": None}, TypeError, "learning_rate must be"),
        ({"damping": "adaptive"}, TypeError, "damping must be"),
        ({"damping": None}, TypeError, "damping must be"),
        ({"damping": True}, TypeError, "damping must be"),
        ({"decay": 1.0}, ValueError, r"decay \(ε\)"),
        ({"decay": -0.5}, ValueError, r"decay \(ε\)"),
        ({"inverse_every": 0}, ValueError, r"inverse_every \(T3\)"),
        ({"norm_constraint": -1.0}, ValueError, "norm_constraint"),
        ({"norm_constraint": "1"}, TypeError, "norm_constraint must be a number, a"),
        (
            {"norm_constraint": 1.0, "learning_rate": kfac_jax.QuadraticModel()},
            ValueError,
            "norm_constraint.*QuadraticModel",
        ),
        ({"distribution": "pmap"}, (TypeError, ValueError), "distribution"),
        ({"factored_damping": 0.1}, TypeError, r"None.*or a SeparateDamping.*got 0\.1"),
        (
            {"factored_damping": kfac_jax.SeparateDamping(), "learning_rate": 0.1},
            ValueError,
            r"expected learning_rate=QuadraticModel\(\); got float",
        ),
        (
            {
                "factored_damping": kfac_jax.SeparateDamping(every=20),
                "learning_rate": kfac_jax.QuadraticModel(),
                "inverse_every": 8,
            },
            ValueError,
            r"every \(T2\) must be a multiple of inverse_every \(T3\); got 20 and 8",
        ),
        (
            {
                "factored_damping": kfac_jax.SeparateDamping(),
                "learning_rate": kfac_jax.QuadraticModel(),
                "damping": 0.0,
            },
            ValueError,
            r"never leaves γ0.*= 0.*initial γ0",
        ),
    ],
)
def test_options_of_kfac(options, error, message):
    with pytest.raises(error, match=message):
        kfac_jax.kfac(plan(), **options)


@pytest.mark.parametrize("kind", ["kfac", "scale_by_kfac"])
@pytest.mark.parametrize("curvature", [loss_fn, None, 0.1])
def test_something_else_than_a_plan(kind, curvature):
    with pytest.raises(TypeError, match="plan from make_curvature"):
        getattr(kfac_jax, kind)(curvature)


def test_scale_by_kfac_takes_no_rule_for_the_damping():
    with pytest.raises(TypeError, match=r"LevenbergMarquardt.*use kfac"):
        kfac_jax.scale_by_kfac(plan(), kfac_jax.LevenbergMarquardt(1.0))


# -------------------------------------------------------------------------- at the step


@pytest.mark.parametrize("mode", ["fisher_gradients", "fisher_curvature_prop"])
def test_sampled_mode_without_a_key(mode):
    with pytest.raises(ValueError, match=f'"{mode}" samples; pass a key'):
        plan(estimation_mode=mode).value_grad_and_statistics(
            make_params(), *make_batch()
        )


def test_empirical_mode_without_targets():
    def without_targets(params, x, y):
        z = x @ params["w"] + params["b"][None]
        kfac_jax.register_squared_error_loss(z)
        return jnp.square(z - y).sum(-1).mean()

    curvature = make(without_targets, estimation_mode="fisher_empirical")
    with pytest.raises(ValueError, match=r"fisher_empirical.*needs the targets"):
        curvature.value_grad_and_statistics(make_params(), *make_batch())


def test_statistics_forgotten(tx):
    _, grads, _ = gathered()
    with pytest.raises(ValueError, match="needs the step's statistics"):
        tx.update(grads, tx.init(make_params()), make_params())


@pytest.mark.parametrize("wrong", [{}, 1.0, "layers", "tuple"])
def test_statistics_of_the_wrong_type(tx, wrong):
    _, grads, statistics = gathered()
    wrong = {"layers": statistics.layers, "tuple": tuple(statistics)}.get(
        wrong if isinstance(wrong, str) else "", wrong
    )
    with pytest.raises(TypeError, match=r"statistics must be what curvature.value"):
        tx.update(grads, tx.init(make_params()), make_params(), statistics=wrong)


def statistics_of_another_plan(which):
    if which == "names":
        w, (x, y) = jnp.ones((3, 2)), make_batch()
        other = kfac_jax.make_curvature(
            lambda w, x, y: losses.squared_error(x @ w, y).sum(-1).mean(), w, x, y
        )
        return other.zero_statistics(w)
    if which == "block":
        return plan(blocks=kfac_jax.blocks.Diagonal()).zero_statistics(make_params())
    sizes = {"larger": (4, 2), "one_output": (3, 1)}[which]
    return gathered(*sizes)[2]


@pytest.mark.parametrize("which", ["names", "block", "larger", "one_output"])
def test_statistics_of_another_plan(tx, which):
    """A one-output factor [1, 1] would broadcast, so shapes are compared."""
    _, grads, _ = gathered()
    statistics = statistics_of_another_plan(which)
    with pytest.raises(ValueError, match="statistics must have"):
        tx.update(grads, tx.init(make_params()), make_params(), statistics=statistics)


def test_state_of_another_plan(tx):
    _, grads, statistics = gathered()
    other = kfac_jax.kfac(plan(3, 1)).init(make_params(3, 1))
    with pytest.raises(ValueError, match=r"(factors|velocity|state)"):
        tx.update(grads, other, make_params(), statistics=statistics)


@pytest.mark.parametrize("state", [None, (), {}, optax.EmptyState()])
def test_state_that_init_did_not_make(tx, state):
    _, grads, statistics = gathered()
    with pytest.raises(TypeError, match=r"made by its init.*tx\.init\(params\)"):
        tx.update(grads, state, make_params(), statistics=statistics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"w": g["w"]}, r"grads .*structure.*missing \['b'\]"),
        (lambda g: {**g, "c": g["b"]}, r"grads .*structure.*unexpected \['c'\]"),
        (lambda g: [g["b"], g["w"]], r"grads .*structure"),
        (lambda g: {**g, "b": jnp.ones(3)}, r"grads .*shape \(3,\) at 'b'"),
        (lambda g: None, r"grads .*structure"),
    ],
)
def test_gradients_of_another_structure(tx, change, message):
    _, grads, statistics = gathered()
    with pytest.raises(ValueError, match=message):
        tx.update(
            change(grads), tx.init(make_params()), make_params(), statistics=statistics
        )


ADAPTIVE = [
    {},
    {"learning_rate": kfac_jax.QuadraticModel(), "damping": 1e-3},
    {"learning_rate": 0.1, "damping": kfac_jax.LevenbergMarquardt(1.0)},
    {
        "learning_rate": kfac_jax.QuadraticModel(),
        "factored_damping": kfac_jax.SeparateDamping(),
    },
]


@pytest.mark.parametrize("options", ADAPTIVE)
@pytest.mark.parametrize("missing", ["params", "value", "args", "tuple"])
def test_adaptive_rules_without_what_they_evaluate(options, missing):
    value, grads, statistics = gathered()
    tx = kfac_jax.kfac(plan(), **options)
    state, params = tx.init(make_params()), make_params()
    given = {"value": value, "args": make_batch(), "params": params}
    if missing == "tuple":  # args=x in place of args=(x, y)
        given["args"] = given["args"][0]
    else:
        del given[missing]
    with pytest.raises(ValueError, match=r"pass params, value= and args= \(a tuple"):
        tx.update(grads, state, statistics=statistics, **given)


def test_adaptive_rules_with_parameters_of_another_shape():
    value, grads, statistics = gathered()
    tx = kfac_jax.kfac(plan())
    with pytest.raises(ValueError, match=r"params .*shape \(3, 4\) at 'w'"):
        tx.update(
            grads,
            tx.init(make_params()),
            {"w": jnp.ones((3, 4)), "b": jnp.ones(2)},
            statistics=statistics,
            value=value,
            args=make_batch(),
        )


# ----------------------------------------------------------------------------- the tags

LOGITS, LABELS = jnp.ones((4, 3)), jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("softmax_cross_entropy", (LOGITS, LABELS[:2]), "targets of shape"),
        ("softmax_cross_entropy", (LOGITS, jnp.ones((4, 2))), "targets of shape"),
        ("softmax_cross_entropy", (LOGITS, LABELS, jnp.ones(3)), "mask must have"),
        ("softmax_cross_entropy", (LOGITS, LABELS, LOGITS), "mask must have"),
        ("sigmoid_cross_entropy", (LOGITS, LOGITS[:2]), "targets of the output's"),
        ("sigmoid_cross_entropy", (LOGITS, LOGITS, jnp.ones((4, 1))), "mask must have"),
        ("squared_error", (LOGITS, jnp.ones((4, 1))), "targets of the output's shape"),
        ("squared_error", (LOGITS, LOGITS, -1.0), "weight must be finite"),
        ("squared_error", (LOGITS, LOGITS, float("inf")), "weight must be finite"),
        ("squared_error", (LOGITS, LOGITS, float("nan")), "weight must be finite"),
        ("squared_error", (LOGITS, LOGITS, np.float32(-1.0)), "weight must be finite"),
        ("squared_error", (LOGITS, LOGITS, jnp.ones(4)), "weight must be a scalar"),
    ],
)
def test_registered_losses(function, arguments, message):
    register = getattr(kfac_jax, f"register_{function}_loss")
    with pytest.raises(ValueError, match=message):
        register(*arguments)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_variance_that_is_not_positive(variance):
    with pytest.raises(ValueError, match="finite positive variance"):
        kfac_jax.register_normal_predictive_distribution(LOGITS, LOGITS, variance)


def test_variance_that_is_not_a_number():
    register = kfac_jax.register_normal_predictive_distribution
    with pytest.raises(TypeError, match="fixed variance"):
        register(LOGITS, LOGITS, jnp.ones(3))
    with pytest.raises(TypeError, match="fixed variance"):
        jax.jit(lambda v: register(LOGITS, LOGITS, v))(1.0)


@pytest.mark.parametrize("dtype", [int, complex, bool])
@pytest.mark.parametrize(
    "function",
    [
        kfac_jax.register_softmax_cross_entropy_loss,
        kfac_jax.register_sigmoid_cross_entropy_loss,
        kfac_jax.register_squared_error_loss,
    ],
)
def test_registered_output_that_is_not_real(function, dtype):
    with pytest.raises(TypeError, match="must be real floating point"):
        function(LOGITS.astype(dtype))


def test_a_registered_output_without_an_axis_of_cases():
    """Refused by the plan: inside vmap one case alone is what is registered."""

    def scalar(w):
        kfac_jax.register_squared_error_loss(w.sum())
        return w.sum()

    def one_case(w):
        kfac_jax.register_softmax_cross_entropy_loss(w)
        return w.sum()

    for loss_fn in (scalar, one_case):
        with pytest.raises(ValueError, match="leading axis of cases"):
            kfac_jax.make_curvature(loss_fn, jnp.ones(3))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("dense", (LOGITS, LOGITS, jnp.ones((2, 3))), "register_dense expects"),
        ("dense", (LOGITS, LOGITS, jnp.ones(3)), "register_dense expects"),
        ("dense", (LOGITS, LOGITS, jnp.eye(3), jnp.ones(2)), "register_dense expects"),
        ("conv2d", (LOGITS, LOGITS, jnp.eye(3)), "register_conv2d expects"),
        ("scale_and_shift", (LOGITS, LOGITS), "got neither"),
        ("scale_and_shift", (LOGITS, LOGITS, jnp.ones(2)), "broadcast to y"),
        ("scale_and_shift", (LOGITS, LOGITS, None, jnp.ones(2)), "broadcast to y"),
    ],
)
def test_registered_layers(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(kfac_jax, f"register_{function}")(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "softmax_cross_entropy_with_integer_labels",
            (LOGITS, LABELS[:2]),
            "Labels of",
        ),
        (
            "softmax_cross_entropy_with_integer_labels",
            (LOGITS, LOGITS),
            "Integer labels",
        ),
        ("softmax_cross_entropy", (LOGITS, LABELS), "Labels of the logits' shape"),
        ("sigmoid_binary_cross_entropy", (LOGITS, LOGITS[:2]), "targets of the output"),
        ("squared_error", (LOGITS, LOGITS[:, :1]), "targets of the output's shape"),
        ("convex", (lambda z, t: z.sum(), LOGITS, LABELS[:2]), "one leading axis"),
    ],
)
def test_losses(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, function)(*arguments)


# ----------------------------------------------------------------- nothing is corrupted


def test_an_error_corrupts_nothing():
    """After every kind of error the plan and the transformation work as before."""
    curvature = make(loss_fn)
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 1e-3)
    params, batch, key = make_params(), make_batch(), jax.random.key(0)

    def step():
        _, grads, statistics = curvature.value_grad_and_statistics(
            params, *batch, rng=key
        )
        state = tx.init(params)
        return grads, statistics, tx.update(grads, state, params, statistics=statistics)

    before, identity = step(), (hash(curvature), str(curvature))
    grads, statistics, (_, state) = before
    for bad in (
        lambda: curvature.value_grad_and_statistics(params, *batch),
        lambda: curvature.value_grad_and_statistics({}, *batch, rng=key),
        lambda: curvature.value_grad_and_statistics(
            params, batch[0], batch[1][:2], rng=key
        ),
        lambda: tx.update({}, state, params, statistics=statistics),
        lambda: tx.update(grads, None, params, statistics=statistics),
        lambda: tx.update(grads, state, params),
        lambda: jax.jit(tx.update)(grads, state, params),
        lambda: tx.init({}),
    ):
        with pytest.raises((ValueError, TypeError)):
            bad()
    assert (hash(curvature), str(curvature)) == identity
    jax.tree.map(np.testing.assert_array_equal, step(), before)
