"""What capture writes into the module, how it finds the state, and what it refuses with the user's line."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bactrian
from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.capture.lower_step import capture
from bactrian.driver.capture.reference_step import reference
from bactrian.passes.frame.errors import ConfigError, ProgramError

W = np.ones((4, 3), np.float32)
X = np.ones((8, 4), np.float32)


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


def sgd(w, x):
    value, g = bactrian.value_and_grad(loss)(w, x)
    return w - 0.1 * g, value


def roles(captured):
    return {a.path: a.role for a in captured.arguments}


def refused(step, *args, message, error=ProgramError, here=True, **options):
    with pytest.raises(error, match=message) as caught:
        capture(step, args, **options)
    if here:
        assert "test_capture.py" in caught.value.where
    return caught.value


# ---- the module ----


def test_the_module_says_roles_updates_and_paths():
    captured = capture(sgd, (W, X), num_microbatches=4, schedule="gpipe")
    module = captured.module()
    assert module.operation.verify()
    text = module.operation.get_asm(enable_debug_info=True)
    assert 'bactrian.num_microbatches = 4 : i64, bactrian.schedule = "gpipe"' in text
    assert '%arg0: tensor<4x3xf32> {bactrian.role = "state"} loc("w")' in text
    assert '%arg1: tensor<2x4xf32> {bactrian.role = "batch"} loc("x")' in text
    assert 'tensor<4x3xf32> {bactrian.updates = 0 : i64, jax.result_info = "result[0]"}' in text
    assert 'kinds = "loss,gradient", reductions = "mean,mean"' in text
    assert "microbatch_index" not in text
    assert "test_capture.py" in text


def test_paths_of_arguments_of_every_kind():
    def step(state, x, *rest, scale):
        value, g = bactrian.value_and_grad(loss)(state["params"]["w"], x)
        return {"params": {"w": state["params"]["w"] - g * rest[0] * scale["s"]}}, value

    args = ({"params": {"w": W}}, X, np.float32(1))
    captured = capture(step, args, {"scale": {"s": 2.0}}, num_microbatches=2)
    assert roles(captured) == {
        "state['params']['w']": "state",
        "x": "batch",
        "rest[0]": "constant",
        "scale['s']": "constant",
    }


def test_a_batch_given_by_keyword_is_batch():
    captured = capture(sgd, (W,), {"x": X}, num_microbatches=2)
    assert roles(captured) == {"w": "state", "x": "batch"}
    np.testing.assert_array_equal(reference(captured, (W,), {"x": X})[1], reference(captured, (W, X))[1])


def test_abstract_and_distributed_arguments():
    placement = ArgumentPlacement(0, 0, "w", (4, 3), jnp.dtype("float32"), (0,))
    concrete = capture(sgd, (W, X), num_microbatches=2)
    for w in (jax.ShapeDtypeStruct((4, 3), jnp.float32), DistributedArray(placement, {}), W.astype(np.float64)):
        captured = capture(sgd, (w, jax.ShapeDtypeStruct((8, 4), jnp.float32)), num_microbatches=2)
        assert captured.fingerprint == concrete.fingerprint
        assert captured.call_signature == concrete.call_signature


def test_x_shape_is_the_microbatch_s():
    seen = []

    def step(w, x):
        seen.append(x.shape)
        return sgd(w, x)

    capture(step, (W, X), num_microbatches=4)
    assert seen == [(2, 4)]


def test_the_fingerprint_is_of_program_statics_and_options():
    base = capture(sgd, (W, X), num_microbatches=2)

    def step(w, x, mode):
        return sgd(w, x)

    prints = {
        base.fingerprint,
        capture(sgd, (W, X), num_microbatches=4).fingerprint,
        capture(sgd, (W, X), num_microbatches=2, schedule="gpipe").fingerprint,
        capture(step, (W, X, "a"), num_microbatches=2).fingerprint,
        capture(step, (W, X, "b"), num_microbatches=2).fingerprint,
    }
    assert len(prints) == 5
    assert capture(sgd, (W, X), num_microbatches=2).fingerprint == base.fingerprint


def test_the_fingerprint_is_the_same_in_every_process():
    program = (
        "import jax, jax.numpy as jnp, bactrian\n"
        "from bactrian.driver.capture.lower_step import capture\n"
        "def step(s, x):\n"
        "    v, g = bactrian.value_and_grad(lambda w: jnp.mean(s['f'](x @ w)))(s['w'])\n"
        "    return dict(s, w=s['w'] - g), v\n"
        "print(capture(step, ({'w': jnp.ones((3, 2)), 'f': jax.nn.gelu}, jnp.ones((4, 3)))).fingerprint)\n"
    )
    runs = [subprocess.check_output([sys.executable, "-c", program], cwd=".") for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_call_that_was_not_captured():
    captured = capture(sgd, (W, X), num_microbatches=2)
    with pytest.raises(ProgramError, match="not those it was captured with") as error:
        captured.flatten((W, X[:4]))
    assert "x was float32[8, 4] and is float32[4, 4]" in error.value.why


# ---- state ----


def test_two_alike_in_order_and_read_only():
    def step(a, x, b, frozen, n):
        value, (ga, gb) = bactrian.value_and_grad(lambda a, b: loss(a + b, x) + jnp.sum(frozen), argnums=(0, 1))(a, b)
        return a - ga, b - gb, value, n

    captured = capture(step, (W, X, W, W[0], 3), num_microbatches=2)
    assert roles(captured) == {"a": "state", "x": "batch", "b": "state", "frozen": "constant", "n": "constant"}
    assert [a.updated_by for a in captured.arguments] == [0, None, 1, None, None]


def test_a_whole_tuple_is_one_argument():
    def step(state, x):
        w, n = state
        _, g = bactrian.value_and_grad(loss)(w, x)
        return w - g, n + 1

    captured = capture(step, ((W, jnp.int32(0)), X))
    assert roles(captured) == {"state[0]": "state", "state[1]": "state", "x": "batch"}


def test_a_loss_or_an_unrelated_metric_is_never_a_next_value():
    def step(w, x, rate):
        (value, size), g = bactrian.value_and_grad(lambda w: (loss(w, x), jnp.max(x)), has_aux=True)(w)
        return w - rate * g, value, size

    assert roles(capture(step, (W, X, jnp.float32(0.1))))["rate"] == "constant"


def ema(params, x, average):
    value, g = bactrian.value_and_grad(loss)(params + average, x)
    return params - g, value


def test_a_python_number_in_the_state_is_traced_once():
    def step(state, x):
        value, g = bactrian.value_and_grad(loss)(state["w"], x)
        return {"w": state["w"] - g, "n": state["n"] + 1}, value

    captured = capture(step, ({"w": W, "n": 0}, X), num_microbatches=2)
    info, result = captured.arguments[0], captured.results[0]
    assert (info.role, info.path, info.weak_type, result.weak_type) == ("state", "state['n']", True, True)
    placement = ArgumentPlacement(0, 0, info.path, (), info.dtype, (0,), weak_type=result.weak_type)
    captured.flatten(({"w": W, "n": DistributedArray(placement, {})}, X))


def test_ambiguous_state_asks_for_a_mapping():
    error = refused(ema, W, X, W, message="cannot tell the next value of arguments 0 .* 2")
    assert "state={0: 0}" in error.fix
    captured = capture(ema, (W, X, W), state={2: 0})
    assert roles(captured) == {"params": "constant", "x": "batch", "average": "state"}


def test_a_mapping_to_none_is_read_only():
    assert roles(capture(sgd, (W, X), state={0: None}))["w"] == "constant"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: 0}, "names argument 1"),
        ({7: 0}, "names argument 7"),
        ({0: 5}, "result has 2 elements"),
        ({0: 1}, r"w is float32\[4,3\] and becomes float32\[\]"),
    ],
)
def test_a_wrong_mapping(state, message):
    refused(sgd, W, X, state=state, message=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.astype(jnp.bfloat16), r"state\['w'\] is float32\[4,3\] and becomes bfloat16\[4,3\]"),
        (lambda w: w[:2], r"state\['w'\] is float32\[4,3\] and becomes float32\[2,3\]"),
    ],
)
@pytest.mark.parametrize("state", [None, {0: 0}])
def test_state_that_changes_dtype_or_shape(change, message, state):
    def step(state, x):
        value, g = bactrian.value_and_grad(loss)(state["w"], x)
        return {"w": change(state["w"] - g), "n": state["n"] + 1}, value

    refused(step, {"w": W, "n": jnp.int32(0)}, X, state=state, message=message)


def test_state_that_changes_structure():
    def step(state, x):
        value, g = bactrian.value_and_grad(loss)(state["w"], x)
        return {"w": state["w"] - g, "momentum": g}, value

    refused(step, {"w": W}, X, message=r"state gained \['momentum'\]")


def test_a_bare_array_that_changes_dtype():
    def step(w, x):
        value, g = bactrian.value_and_grad(loss)(w, x)
        return (w - g).astype(jnp.float16), value

    refused(step, W, X, message=r"w is float32\[4,3\] and becomes float16\[4,3\]")


# ---- what is refused ----


def test_batches_that_do_not_divide():
    error = refused(sgd, W, X, num_microbatches=3, message="x has 8 rows, which 3 microbatches do not divide")
    assert "multiple of 3" in error.fix

    def step(w, batch):
        return sgd(w, batch["x"])

    refused(step, W, {"x": X, "n": np.int32(8)}, message=r"batch\['n'\] is a scalar", num_microbatches=2)
    refused(sgd, W, X, error=ConfigError, message="batch_argnums has 2", batch_argnums=(2,))
    refused(sgd, W, X, error=ConfigError, message="num_microbatches is 0", num_microbatches=0, here=False)


def test_no_boundary():
    def step(w, x):
        value, g = jax.value_and_grad(loss)(w, x)
        return w - g, value

    refused(step, W, X, message="no gradient boundary", here=False)


def test_two_boundaries_also_in_jitted_functions():
    def step(w, x):
        g = jax.jit(bactrian.grad(loss))(w, x)
        return w - g - bactrian.grad(loss)(w, x)

    error = refused(step, W, X, message="2 gradient boundaries")
    assert error.where.count("test_capture.py") == 2


def in_scan(w, x):
    return jax.lax.scan(lambda w, _: (w - bactrian.grad(loss)(w, x), None), w, length=2)[0]


def in_cond(w, x):
    return jax.lax.cond(w[0, 0] > 0, lambda: bactrian.grad(loss)(w, x), lambda: w)


def in_while(w, x):
    return jax.lax.while_loop(lambda w: w[0, 0] > 0, lambda w: w - bactrian.grad(loss)(w, x), w)


def in_vmap(w, x):
    return w - jnp.sum(jax.vmap(lambda row: bactrian.grad(loss)(w, row[None]))(x), 0)


def in_checkpoint(w, x):
    return jax.checkpoint(lambda w: w - jax.jit(bactrian.grad(loss))(w, x))(w)


@pytest.mark.parametrize("step", [in_scan, in_cond, in_while, in_vmap, in_checkpoint])
def test_a_boundary_inside_of_control_flow(step):
    refused(step, W, X, message="gradient boundary is inside of")


def with_print(w, x):
    jax.debug.print("{}", w[0, 0])
    return sgd(w, x)


def with_callback(w, x):
    y = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(w.shape, w.dtype), w)
    return sgd(y + w, x)


def with_io(w, x):
    jax.experimental.io_callback(print, None, w, ordered=True)
    return sgd(w, x)


def with_print_in_scan(w, x):
    def body(carry, _):
        jax.debug.callback(print, carry)
        return carry * 2, None

    return sgd(jax.lax.scan(body, w, length=2)[0], x)


@pytest.mark.parametrize("step", [with_print, with_callback, with_io, with_print_in_scan])
def test_side_effects(step):
    import jax.experimental  # noqa: F401

    refused(step, W, X, message="side effect or host callback")


def test_a_value_donated_inside_and_used_again():
    @functools.partial(jax.jit, donate_argnums=0)
    def consume(w):
        return w * 2

    def step(w, x):
        y = consume(w)
        return sgd(w + y, x)

    assert "test_capture.py" in refused(step, W, X, message="donated value was used a second time").why


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x[x > 0].sum(),
        lambda x: x.sum() if x[0, 0] > 0 else 0.0,
        lambda x: jnp.zeros(int(x[0, 0])).sum(),
        lambda x: np.asarray(x).sum(),
    ],
)
def test_shapes_and_control_flow_that_depend_on_data(bad):
    def step(w, x):
        value, g = bactrian.value_and_grad(lambda w: loss(w, x) + bad(x))(w)
        return w - g, value

    error = refused(step, W, X, message="can't be traced")
    assert isinstance(error.__cause__, Exception)


def test_a_result_that_depends_on_the_batch_below_the_boundary():
    def step(w, x):
        value, g = bactrian.value_and_grad(loss)(w, x)
        return w - g, value, {"size": jnp.sum(x)}

    error = refused(step, W, X, num_microbatches=2, message=r"result\[2\]\['size'\] depends on the batch")
    assert "aux" in error.fix


def test_the_batch_index_below_the_boundary():
    def step(w, x):
        value, g = bactrian.value_and_grad(loss)(w, x)
        return w - g * bactrian.microbatch_index(), value

    refused(step, W, X, num_microbatches=2, message=r"result\[0\] depends on the batch")


def test_a_gradient_in_a_forward_only_function():
    refused(sgd, W, X, forward_only=True, message="forward-only function takes a gradient")


def test_an_unknown_out_reduction():
    options = {"forward_only": True, "out_reduction": "median"}
    refused(lambda w, x: x @ w, W, X, error=ConfigError, message="unknown reduction 'median'", **options)


def test_errors_of_the_user_s_function_come_through():
    with pytest.raises(TypeError, match="scalar-output"):
        capture(lambda w, x: bactrian.grad(lambda w: x @ w)(w), (W, X))
    with pytest.raises(KeyError):
        capture(lambda w, x: {}["a"], (W, X))


def test_an_unhashable_static_leaf():
    class Thing:
        __hash__ = None

    refused(lambda w, x, t: sgd(w, x), W, X, Thing(), message="neither an array nor hashable: .*Thing")


def test_nothing_of_a_failed_capture_stays():
    refused(in_scan, W, X, message="inside of")
    assert bactrian.microbatch_index() == 0
    value, _ = bactrian.value_and_grad(loss)(W, X)
    assert value == loss(W, X)
