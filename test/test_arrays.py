"""Distributed arrays: what they say, what they refuse, and the way to the host and back."""

import operator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    assert jax.tree.leaves({"a": array})[0] is array


@pytest.mark.parametrize(
    "use",
    [
        lambda a: a + 1,
        lambda a: 1 - a,
        lambda a: a @ a,
        operator.neg,
        lambda a: a == 1,
        lambda a: a < 1,
        lambda a: a[0],
        len,
        list,
        bool,
        float,
        int,
        np.asarray,
        jnp.asarray,
        np.sin,
        lambda a: np.ones((2, 3)) * a,
        lambda a: jnp.ones((2, 3)) * a,
    ],
)
def test_it_refuses_to_be_an_array(use):
    with pytest.raises(BactrianError, match=r"bactrian\.gather") as error:
        use(distributed())
    assert "state['w']" in str(error.value)


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


class FakeRank:
    """One rank of several that run in this process: the others' part of a collective is given."""

    def __init__(self, rank, size, sent):
        self.rank, self.size, self._sent = rank, size, sent

    def broadcast_array(self, array, root):
        if self.rank == root:
            self._sent.append(array.copy())
        else:
            array[...] = self._sent[-1]

    def allgather(self, value):
        return [*self._sent, value]


def test_the_owner_broadcasts():
    sent = []
    place = ArgumentPlacement(0, 0, "w", (2, 3), np.dtype("float32"), (1,), {}, {1: (1,)})
    piece = jnp.arange(6.0).reshape(2, 3)
    owner = bactrian.gather(DistributedArray(place, {1: piece}, FakeRank(1, 2, sent)))
    other = bactrian.gather(DistributedArray(place, {}, FakeRank(0, 2, sent)))
    np.testing.assert_array_equal(owner, other)
    np.testing.assert_array_equal(owner, piece)


def test_a_stage_that_spans_ranks_is_assembled():
    place = ArgumentPlacement(0, 0, "w", (4, 3), np.dtype("float32"), (0,), {}, {0: (0, 1)})
    rest = np.full((2, 3), 7, np.float32)
    shard = SimpleNamespace(index=(slice(0, 2), slice(None)), data=jnp.ones((2, 3)), replica_id=0)
    piece = SimpleNamespace(is_fully_replicated=False, is_deleted=lambda: False, addressable_shards=[shard])
    comm = FakeRank(1, 2, [[((slice(2, 4), slice(None)), rest)]])
    out = bactrian.gather(DistributedArray(place, {0: piece}, comm))
    np.testing.assert_array_equal(out, np.concatenate([np.ones((2, 3), np.float32), rest]))
