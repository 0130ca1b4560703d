"""``group-layers`` and ``assign-stages`` on lowered JAX programs."""

from __future__ import annotations

import time
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import lowered
import optax
import pytest
from jaxlib.mlir import ir

from bactrian.passes.assign_stages import AssignStages
from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.documentation import example
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.group_layers import GroupLayers
from bactrian.passes.ir.attributes import BACKWARD, FORWARD, UPDATE, argument_roles, result_updates
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function


def _run(one_pass, module):
    ctx = PassContext(one_pass)
    with module.context, ir.Location.unknown():
        one_pass.apply(module, ctx)
        module.operation.verify()
    ctx.fail_if_errors()
    return ctx


class Grouped:
    """A grouped module, with what the contract promises checked."""

    def __init__(self, step, state, batch, **options):
        self.module = lowered.lower(step, state, batch)
        self.ctx = _run(GroupLayers(**options), self.module)
        self.num_layers = self.module.operation.attributes["bactrian.num_layers"].value
        main = main_function(self.module)
        self.flow = MainDataflow.of(main)
        self.roles, self.updates = argument_roles(main), result_updates(main)
        self.phases = [self._attribute(op, "bactrian.phase") for op in self.flow.ops]
        self.layers = [self._attribute(op, "bactrian.layer") for op in self.flow.ops]
        self._check()

    @staticmethod
    def _attribute(op, name):
        return op.attributes[name].value if name in op.attributes else None

    def _check(self):
        users = self.flow.users()
        for index, phase in enumerate(self.phases):
            assert (phase is None) == (self.layers[index] is None)
            if phase is None:
                continue
            assert 0 <= self.layers[index] < self.num_layers
            for value in self.flow.results[index]:
                for user in users[value]:
                    if self.phases[user] == phase == FORWARD:
                        assert self.layers[user] >= self.layers[index]
                    if self.phases[user] == phase == BACKWARD:
                        assert self.layers[user] <= self.layers[index]
        assert set(self.layers) - {None} == set(range(self.num_layers))

    def count(self, phase, *names):
        """Ops of a phase per layer; of some names if given."""
        found = Counter(
            layer
            for op, own, layer in zip(self.flow.ops, self.phases, self.layers, strict=True)
            if own == phase and (not names or op.name.split(".")[1] in names)
        )
        return [found[layer] for layer in range(self.num_layers)]

    def home(self, argument, phase=FORWARD):
        """The layers that read an argument in a phase."""
        return {self.layers[user] for user in self.flow.users()[argument] if self.phases[user] == phase}

    def check_updates(self):
        """Parameters of one layer are updated there, and optimizer state goes with its parameter."""
        returned = self.flow.operands[-1]
        for value, argument in zip(returned, self.updates, strict=True):
            producer = self.flow.producer[value]
            home = self.home(argument) if argument is not None else ()
            if len(home) == 1 and self.layers[producer] is not None:
                assert {self.layers[producer]} == home
                assert self.home(argument, BACKWARD) | self.home(argument, UPDATE) <= home


def _train(loss, params, tx=None, has_aux=False):
    """A train step of a loss of (params, batch), and its abstract state."""
    tx = tx or optax.sgd(0.1)

    def step(state, batch):
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(state["params"], batch)
        value, aux = value if has_aux else (value, ())
        value, grads, aux = lowered.boundary(value, grads, aux)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"opt": opt, "params": optax.apply_updates(state["params"], updates)}, value, aux

    state = jax.eval_shape(lambda p: {"opt": tx.init(p), "params": p}, params)
    return step, state


def _shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def _mlp(num_layers=8, width=64, mark=None, remat=False):
    def layer(x, w, b):
        return jax.nn.gelu(x @ w + b)

    layer = jax.checkpoint(layer) if remat else layer

    def loss(params, x):
        for number, (w, b) in enumerate(params):
            x = layer(x, w, b)
            if mark and number in mark:
                x = lowered.stage_boundary(x)
        return (x**2).mean()

    return loss, [(_shape(width, width), _shape(width)) for _ in range(num_layers)]


def test_an_mlp_is_cut_between_its_layers():
    step, state = _train(*_mlp(), optax.adam(1e-3))
    grouped = Grouped(step, state, _shape(32, 64), num_layers=4)
    assert grouped.count(FORWARD, "dot_general") == [2, 2, 2, 2]
    assert grouped.count(BACKWARD, "dot_general") == [3, 4, 4, 4]
    assert len(set(grouped.count(UPDATE, "sqrt"))) == 1
    assert grouped.ctx.counts["cut-bytes"] == 3 * 32 * 64 * 4
    grouped.check_updates()


def test_one_layer_holds_everything():
    step, state = _train(*_mlp(2))
    grouped = Grouped(step, state, _shape(32, 64))
    assert grouped.num_layers == 1


def test_stage_boundaries_say_where_to_cut():
    step, state = _train(*_mlp(mark={0, 4}))
    grouped = Grouped(step, state, _shape(32, 64))
    assert grouped.count(FORWARD, "dot_general") == [1, 4, 3]
    assert grouped.ctx.counts["markers"] == 4
    grouped.check_updates()
    fewer = Grouped(step, state, _shape(32, 64), num_layers=2)
    assert fewer.count(FORWARD, "dot_general") == [5, 3]
    with pytest.raises(ProgramError, match="cannot make 5 layers: the program has 2 stage boundaries"):
        Grouped(step, state, _shape(32, 64), num_layers=5)


def test_more_layers_than_products_is_an_error_with_both_numbers():
    step, state = _train(*_mlp(3))
    with pytest.raises(
        ProgramError, match="cannot make 4 layers: the forward phase has 3 matrix products or conv"
    ) as caught:
        Grouped(step, state, _shape(32, 64), num_layers=4)
    assert caught.value.fix == "num_layers <= 3"


def test_more_stages_than_products_is_an_error_about_stages():
    step, state = _train(*_mlp(3))
    with pytest.raises(ProgramError, match="4 stages need at least 4 layers, and the forward phase has 3") as caught:
        Grouped(step, state, _shape(32, 64), num_layers=4, num_stages=4)
    assert caught.value.fix == "num_stages <= 3"


def test_what_is_computed_again_lands_on_its_layer():
    step, state = _train(*_mlp(6, remat=True))
    grouped = Grouped(step, state, _shape(32, 64), num_layers=3)
    assert grouped.count(FORWARD, "dot_general") == [2, 2, 2]
    # Two products again, four of the gradient; the input's gradient is not needed.
    assert grouped.count(BACKWARD, "dot_general") == [5, 6, 6]
    grouped.check_updates()


def test_parameters_cast_at_the_start_are_cast_on_their_layer():
    def loss(params, x):
        half = [p.astype(jnp.bfloat16) for p in params]
        x = x.astype(jnp.bfloat16)
        for w in half:
            x = jnp.tanh(x @ w)
        return (x.astype(jnp.float32) ** 2).mean()

    step, state = _train(loss, [_shape(64, 64)] * 4)
    grouped = Grouped(step, state, _shape(32, 64), num_layers=4)
    assert grouped.ctx.counts["cut-bytes"] == 3 * 32 * 64 * 2
    grouped.check_updates()


def test_a_residual_net_is_cut_where_only_the_stream_crosses():
    def loss(params, x):
        for w, v in params:
            x = x + jax.nn.relu(x @ w) @ v
        return (x**2).mean()

    step, state = _train(loss, [(_shape(32, 128), _shape(128, 32)) for _ in range(4)])
    grouped = Grouped(step, state, _shape(16, 32), num_layers=4)
    assert grouped.count(FORWARD, "dot_general") == [2, 2, 2, 2]
    assert grouped.ctx.counts["cut-bytes"] == 3 * 16 * 32 * 4
    grouped.check_updates()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, memory=None):
        width = x.shape[-1]
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=False)(h)
        x = x + nn.Dropout(0.1, deterministic=False)(h)
        if memory is not None:
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), memory)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


class Gpt(nn.Module):
    num_blocks: int
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 64)
        x = embed(tokens) + self.param("position", nn.initializers.normal(), (16, 64))
        for _ in range(self.num_blocks):
            x = (nn.remat(Block) if self.remat else Block)()(x)
        return embed.attend(nn.LayerNorm()(x))


class EncoderDecoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 64)
        target = embed(tokens[:, ::-1])
        memory = embed(tokens)
        for _ in range(2):
            memory = Block()(memory)
        for _ in range(2):
            target = Block()(target, memory)
        return nn.Dense(64)(target)


def _language_model(model, tx=None):
    tokens = _shape(4, 16, dtype=jnp.int32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    params = jax.eval_shape(model.init, keys, tokens)
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def step(state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["count"])

        def loss(params):
            logits = model.apply(params, batch, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

        value, grads = jax.value_and_grad(loss)(state["params"])
        value, grads, _ = lowered.boundary(value, grads)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {"count": state["count"] + 1, "key": state["key"], "opt": opt}
        return {**new, "params": optax.apply_updates(state["params"], updates)}, value

    start = {"count": _shape(dtype=jnp.int32), "key": _shape(2, dtype=jnp.uint32)}
    return step, {**start, "opt": jax.eval_shape(tx.init, params), "params": params}, tokens


@pytest.mark.parametrize("remat", [False, True])
def test_gpt_blocks_are_alike(remat):
    grouped = Grouped(*_language_model(Gpt(4, remat)), num_layers=4)
    grouped.check_updates()
    dots = grouped.count(FORWARD, "dot_general")
    assert dots == [8, 8, 8, 9]
    backward = grouped.count(BACKWARD)
    assert len(set(backward[1:-1])) == 1
    assert len(set(grouped.count(UPDATE)[1:-1])) == 1
    assert grouped.ctx.counts["cut-bytes"] == 3 * 4 * 16 * 64 * 4
    largest = [a for a, role in enumerate(grouped.roles) if role == "state" and grouped.home(a) >= {0, 3}]
    assert len(largest) == 1, "the tied embedding is read by the first and the last layer"


def test_an_encoder_decoder_sends_its_memory_on():
    grouped = Grouped(*_language_model(EncoderDecoder()), num_layers=4, epsilon=0.3)
    grouped.check_updates()
    memory = 4 * 16 * 64 * 4
    # The encoder's stream, then memory and the decoder's stream, then that stream alone.
    assert grouped.ctx.counts["cut-bytes"] == (1 + 2 + 1) * memory


def test_a_conv_net_with_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x)))
            return nn.Dense(4)(x.mean((1, 2)))

    model, image = Net(), _shape(4, 8, 8, 8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def step(state, batch):
        def loss(params):
            out, new = model.apply({"params": params, "stats": state["stats"]}, batch, mutable=["batch_stats"])
            return (out**2).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        value, grads, stats = lowered.boundary(value, grads, stats)
        return {"params": lowered.sgd(state["params"], grads), "stats": stats}, value

    state = {"params": variables["params"], "stats": variables["batch_stats"]}
    grouped = Grouped(step, state, image, num_layers=4)
    assert grouped.count(FORWARD, "convolution") == [1, 1, 1, 1]
    assert grouped.ctx.counts["cut-bytes"] == 3 * 4 * 8 * 8 * 8 * 4


def test_the_result_does_not_depend_on_the_run():
    texts = {str(Grouped(*_language_model(Gpt(2)), num_layers=2).module) for _ in range(2)}
    assert len(texts) == 1


def test_stages_take_consecutive_layers():
    step, state = _train(*_mlp(6))
    grouped = Grouped(step, state, _shape(32, 64), num_layers=6)
    _run(AssignStages(num_stages=3), grouped.module)
    stages = [Grouped._attribute(op, "bactrian.stage") for op in grouped.flow.ops]
    pairs = {(layer, stage) for layer, stage in zip(grouped.layers, stages, strict=True) if layer is not None}
    assert sorted(pairs) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    meshes = [op.operation for op in grouped.module.body.operations if op.operation.name == "sdy.mesh"]
    assert [mesh.attributes["sym_name"].value for mesh in meshes] == ["stage0", "stage1", "stage2"]


def test_options_are_checked():
    for bad in ({"num-layers": "-1"}, {"epsilon": "-0.5"}, {"epsilon": "1001"}):
        with pytest.raises(ConfigError, match=r"must not be negative|must be from 0 to 1000"):
            GroupLayers.from_options(bad)
    for text, words in (("0,a", "integers"), ("1,2", "begin with 0"), ("0,2,2", "grow")):
        with pytest.raises(ConfigError, match=words):
            AssignStages.from_options({"boundaries": text})
    with pytest.raises(ConfigError, match="begin 2 stages, num-stages is 3"):
        AssignStages.from_options({"boundaries": "0,2", "num-stages": "3"})


@pytest.mark.parametrize("one_pass", [GroupLayers, AssignStages])
def test_the_documented_example_is_true(one_pass):
    before, after = example(one_pass)
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse(before)
        _run(one_pass(), module)
        assert str(module) == str(ir.Module.parse(after))


@pytest.mark.parametrize("num_layers", [8, pytest.param(24, marks=pytest.mark.long)])
def test_a_large_train_step_takes_about_a_second(num_layers):
    module = lowered.lower(*_language_model(Gpt(num_layers)))
    begin = time.process_time()
    _run(GroupLayers(num_layers=num_layers), module)
    _run(AssignStages(num_stages=8), module)
    assert time.process_time() - begin < num_layers / 5
