"""Distributed arrays: what they say, what they refuse, and the way to the host and back."""

import copy
import dataclasses
import io
import operator
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import bactrian
from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.passes.frame.errors import BactrianError, ProgramError
from bactrian.runtime.control import SingleProcess


def placement(number=0, path="state['w']", value=None, stages=(0, 1), **options):
    value = np.ones((2, 3), np.float32) if value is None else value
    shardings = {stage: SingleDeviceSharding(jax.devices()[0]) for stage in stages}
    return ArgumentPlacement(
        number, 0, path, value.shape, value.dtype, stages, shardings, dict.fromkeys(stages, (0,)), **options
    )


def distributed(**options):
    place = placement(**options)
    return DistributedArray(place, {stage: jnp.arange(6.0).reshape(2, 3) for stage in place.stages})


def test_it_says_what_it_is():
    array = distributed()
    assert repr(array) == "DistributedArray(state['w'], float32[2,3], stages 0, 1, on one device)"
    assert (array.shape, array.dtype, array.ndim, array.size, array.stages) == ((2, 3), np.float32, 2, 6, (0, 1))
    assert (array.itemsize, array.nbytes, len(array), array.is_fully_addressable) == (4, 24, 2, True)
    assert array.is_fully_replicated and array.sharding == array.piece(0).sharding
    assert jax.block_until_ready(array) is array
    assert jax.tree.leaves({"a": array})[0] is array


def elsewhere(**options):
    """An array of which this process holds nothing."""
    place = dataclasses.replace(placement(**options), shardings={})
    return DistributedArray(place, {})


def scalar(value, make=jnp.asarray):
    value = make(value)
    place = placement(path="state.step", value=value, stages=(0,))
    return DistributedArray(place, {0: value})


NEVER = [
    lambda a: a + 1,
    lambda a: 1 - a,
    lambda a: np.ones((2, 3)) * a,
    lambda a: jnp.ones((2, 3)) * a,
    lambda a: a @ a,
    operator.neg,
    lambda a: a == 1,
    lambda a: a < 1,
    lambda a: operator.setitem(a, 0, 1),
    lambda a: 1 in a,
    bool,
    float,
    int,
    jnp.asarray,
    jnp.mean,
    jnp.sum,
    lambda a: jax.lax.add(a, a),
    jax.nn.relu,
    lambda a: jax.eval_shape(jnp.sin, a),
    lambda a: jax.jit(lambda x: x + a)(np.float32(1)),
    lambda a: jax.jit(lambda w: w.sum())(a),
    lambda a: jax.vmap(jnp.sin)(a),
    lambda a: jax.grad(lambda w: w.sum())(a),
    lambda a: optax.tree.norm({"w": a}),
    lambda a: a.astype(jnp.bfloat16),
    lambda a: a.at[0].set(1),
    lambda a: a.addressable_shards,
    lambda a: a.T,
]
ELSEWHERE = [
    np.asarray,
    np.sin,
    np.mean,
    lambda a: jax.device_get({"w": a}),
    pickle.dumps,
    lambda a: a.tolist(),
    lambda a: a[0],
    list,
    lambda a: a.sharding,
]


@pytest.mark.parametrize(
    ("use", "make"), [(use, distributed) for use in NEVER] + [(use, elsewhere) for use in ELSEWHERE]
)
def test_what_it_refuses_names_gather(use, make):
    with pytest.raises(BactrianError, match=r"bactrian\.gather") as error:
        use(make())
    assert "state['w']" in str(error.value) and "test_arrays.py" in error.value.where


def test_an_nnx_module_may_hold_it():
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_raw_value(distributed())
    assert jax.typeof(model.kernel.get_raw_value()).str_short() == "float32[2,3]"
    graph, state = nnx.split(model)
    assert nnx.merge(graph, state).kernel.get_raw_value() is model.kernel.get_raw_value()
    np.testing.assert_array_equal(
        bactrian.gather(nnx.state(model))["kernel"].get_raw_value(), np.arange(6).reshape(2, 3)
    )
    assert "shape=(2, 3)" in str(model)


@pytest.mark.parametrize("name", [name for name in dir(jax.Array) if not name.startswith("_")])
def test_every_attribute_of_an_array_is_there_or_names_gather(name):
    try:
        getattr(distributed(), name)
    except AttributeError as error:
        assert isinstance(error, BactrianError) and "bactrian.gather" in error.fix


def test_libraries_take_it_for_an_array():
    array = distributed()
    assert isinstance(array, jax.Array) and eqx.is_inexact_array(array)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, {"w": array})
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, {"w": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(restored["w"], np.arange(6.0).reshape(2, 3))
    read = flax.serialization.msgpack_restore(flax.serialization.to_bytes({"w": array}))
    np.testing.assert_array_equal(read["w"], restored["w"])


def test_it_converts_where_its_values_are():
    array = distributed()
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    for convert in (
        np.asarray,
        jax.device_get,
        lambda a: pickle.loads(pickle.dumps(a)),
        lambda a: np.array(a.tolist()),
    ):
        values = convert(array)
        assert isinstance(values, np.ndarray)
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.asarray(array, np.float16), expected.astype(np.float16))
    assert np.mean(array) == 2.5
    assert array[1, 0] == 3 and [row[0] for row in array] == [0, 3]
    array.donate("train.py:3")
    with pytest.raises(ProgramError, match="donated value"):
        np.asarray(array)


def test_a_typed_key_is_gathered():
    key = jax.random.key(3)
    words = DistributedArray(placement(value=key, stages=(0,), key_impl="threefry2x32"), {0: jax.random.key_data(key)})
    for use in (np.asarray, jax.device_get, pickle.dumps):
        with pytest.raises(BactrianError, match=r"bactrian\.gather"):
            use(words)
    assert words.nbytes == key.nbytes == 8


def test_rows_of_several_stages_are_put_together():
    place = placement(rows={0: (0, 1), 1: (1, 2)})
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = DistributedArray(place, {0: jnp.asarray(values[:1]), 1: jnp.asarray(values[1:])})
    np.testing.assert_array_equal(np.asarray(array), values)
    half = DistributedArray(dataclasses.replace(place, shardings={0: place.shardings[0]}), {0: jnp.asarray(values[:1])})
    assert not half.is_fully_addressable and array.is_fully_addressable and not array.is_fully_replicated


def test_a_scalar_is_a_number():
    step = scalar(7)
    assert (int(step), float(step), complex(step), step.item(), step.tolist(), bool(step)) == (7, 7.0, 7, 7, 7, True)
    assert (step % 4, 10 - step, divmod(step, 4), -step, round(step), [*range(9)][step]) == (3, 3, (1, 3), -7, 7, 7)
    assert step + jnp.int32(1) == 8 and np.float32(2) * step == 14
    assert step == 7 and step < 8 and step in (6, 7) and step - step == 0 and np.int32(1) + step == 8
    assert (f"{step}", f"{step:03d}", str(step)) == ("7", "007", "7")
    assert f"{scalar(0.5):.2f}" == "0.50"
    assert float(scalar(2, lambda x: jnp.asarray(x, jnp.bfloat16)) * 1.5) == 3.0
    with pytest.raises(TypeError, match="unhashable"):
        hash(step)
    for use in (int, lambda a: a % 4, lambda a: f"{a:d}"):
        with pytest.raises(BactrianError, match=r"bactrian\.gather"):
            use(elsewhere(value=jnp.asarray(7)))
    assert str(elsewhere(value=jnp.asarray(7))).startswith("DistributedArray(")


def test_a_copy_outlives_a_donation():
    array = distributed()
    for copied in (array.copy(), copy.copy(array), copy.deepcopy({"w": array})["w"]):
        assert isinstance(copied, DistributedArray) and copied.placement is array.placement
        assert all(copied.piece(stage) is not array.piece(stage) for stage in (0, 1))
    for piece in array.donate("here").values():
        piece.delete()
    assert array.is_deleted() and not copied.is_deleted()
    np.testing.assert_array_equal(bactrian.gather(copied), np.arange(6.0).reshape(2, 3))


def test_a_donated_value_is_refused_with_both_lines():
    array = distributed()
    pieces = array.donate("train.py:12")
    assert set(pieces) == {0, 1}
    assert "donated" in repr(array)
    for use in (bactrian.gather, lambda a: a.piece(0), lambda a: a.donate()):
        with pytest.raises(ProgramError, match="a donated value was used a second time") as error:
            use(array)
        assert "train.py:12" in error.value.why
        assert "test_arrays.py" in error.value.where


def test_a_deleted_piece_is_a_donated_value():
    array = distributed()
    array.pieces[1].delete()
    with pytest.raises(ProgramError, match="donated value"):
        bactrian.gather(array)


def test_gather_makes_numpy_everywhere():
    key = jax.random.key(3)
    words = DistributedArray(placement(value=key, stages=(0,), key_impl="threefry2x32"), {0: jax.random.key_data(key)})
    tree = {"d": distributed(), "j": jnp.ones(2), "k": words, "local": key, "n": np.ones(1), "s": "text", "none": None}
    out = bactrian.gather(tree)
    assert type(out["d"]) is np.ndarray and type(out["j"]) is np.ndarray
    np.testing.assert_array_equal(out["d"], np.arange(6.0).reshape(2, 3))
    assert out["k"] == key and out["local"] is key
    assert (out["s"], out["none"]) == ("text", None)


def step_of(*values):
    placements = [
        placement(i, f"state[{i}]", v, key_impl=jax.random.key_impl(v) if isinstance(v, jax.Array) else None)
        for i, v in enumerate(values)
    ]
    return SimpleNamespace(placements=placements, control=SingleProcess())


def test_put_is_the_inverse_of_gather():
    w, key = np.arange(6, dtype=np.float32).reshape(2, 3), jax.random.key(1)
    state = {"a": w, "f": jax.nn.gelu, "k": key}
    there = bactrian.put(state, step_of(w, key))
    assert isinstance(there["a"], DistributedArray) and there["f"] is jax.nn.gelu
    assert set(there["k"].pieces) == {0, 1} and there["k"].piece(1).dtype == np.uint32
    back = bactrian.gather(there)
    np.testing.assert_array_equal(back["a"], w)
    assert back["k"] == key


def test_put_of_what_fits_nothing():
    w = np.ones((2, 3), np.float32)
    with pytest.raises(ProgramError, match="fits 0 arguments") as error:
        bactrian.put({"a": np.ones(3)}, step_of(w))
    assert "state[0]" in error.value.why
    step = step_of(w)
    other = ArgumentPlacement(1, 2, "other", w.shape, w.dtype, (0,), step.placements[0].shardings, {0: (0,)})
    step.placements.append(other)
    with pytest.raises(ProgramError, match="fits 2 arguments"):
        bactrian.put(w, step)
    assert bactrian.put(w, step, argnum=2).path == "other"


class ThreadRank(SingleProcess):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, meet, told):
        self.rank, self.size, self._meet, self._told = rank, size, meet, told

    def allgather(self, value):
        self._told[self.rank] = value
        self._meet.wait(10)
        everyone = list(self._told)
        self._meet.wait(10)
        return everyone

    def broadcast_array(self, array, root):
        array[...] = self.allgather(array.copy())[root]


def on_ranks(size, function):
    """What the function gives on each of so many ranks, which it is called with."""
    meet, told = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: function(ThreadRank(rank, size, meet, told)), range(size)))


def test_the_owner_broadcasts():
    place = ArgumentPlacement(0, 0, "w", (2, 3), np.dtype("float32"), (1,), {}, {1: (1,)})
    piece = jnp.arange(6.0).reshape(2, 3)
    pieces = [{}, {1: piece}]
    for values in on_ranks(2, lambda rank: bactrian.gather(DistributedArray(place, pieces[rank.rank], rank))):
        np.testing.assert_array_equal(values, piece)


def test_a_stage_that_spans_ranks_is_assembled():
    place = ArgumentPlacement(0, 0, "w", (5, 3), np.dtype("float32"), (0,), {}, {0: (0, 1)})
    whole = np.arange(15, dtype=np.float32).reshape(5, 3)

    def piece_of(rank):
        """Rank 0 holds the first rows, rank 1 the others in two shards, of which one is a copy of rank 0's."""
        rows = [(slice(0, 2), 0)] if rank == 0 else [(slice(2, 3), 0), (slice(0, 2), 1), (slice(3, 5), 0)]
        shards = [SimpleNamespace(index=(r, slice(None)), data=jnp.asarray(whole[r]), replica_id=i) for r, i in rows]
        return SimpleNamespace(is_fully_replicated=False, is_deleted=lambda: False, addressable_shards=shards)

    for values in on_ranks(2, lambda rank: bactrian.gather(DistributedArray(place, {0: piece_of(rank.rank)}, rank))):
        np.testing.assert_array_equal(values, whole)


def test_put_where_a_step_keeps_its_state():
    @bactrian.parallelize(num_stages=1)
    def step(w, x):
        loss, g = bactrian.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - g, loss

    w, x = np.ones((4, 3), np.float32), np.ones((2, 4), np.float32)
    assert bactrian.put(w, step) is w  # its first call will put it there
    step(w, x)
    there = bactrian.put(w, step)
    assert isinstance(there, DistributedArray) and there.path == "w"
    np.testing.assert_array_equal(bactrian.gather(step(there, x)[0]), bactrian.gather(step(w, x)[0]))


@pytest.mark.parametrize("read", [np.asarray, bactrian.gather, jax.device_get])
def test_what_was_read_stays_after_the_next_step(read):
    @bactrian.parallelize(num_stages=1)
    def step(w, x):
        loss, g = bactrian.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - g, loss

    x = np.ones((2, 4), np.float32)
    w, _ = step(np.ones((4, 3), np.float32), x)
    values = read(w)
    before = np.array(values)
    for _ in range(3):
        w, _ = step(w, x)
    np.testing.assert_array_equal(values, before)
