"""Small models and train steps, as named cases: what the numerics tests run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import bactrian

WIDTH, HEADS, VOCABULARY, SEQUENCE, BATCH, STEPS = 32, 4, 64, 16, 8, 3
BLOCKS = 2  # of a transformer
LAYERS = 4  # of an MLP or a conv net
MAX_STAGES = 4

Loss = Callable[..., Any]


class Model(NamedTuple):
    """Parameters, per-step extras (statistics, or an empty dict) and ``loss(params, extra, batch, key)``.

    The loss is the mean over the examples it gets, and returns ``(loss, new extra)``. ``data(random, step)`` makes a batch.
    """

    params: Any
    extra: Any
    loss: Loss
    data: Callable[[np.random.Generator], dict[str, np.ndarray]]
    zero_gradient_leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A train step, where it starts, the further arguments of each step, and how it is parallelized."""

    step: Callable[..., Any]
    state: Any
    batches: list[tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    max_stages: int = MAX_STAGES
    zero_gradient_leaves: tuple[str, ...] = ()
    next_state: Callable[[Any], Any] = lambda result: result[0]


@dataclass(frozen=True)
class Case:
    """A program by name; ``make`` builds it anew each time."""

    name: str
    make: Callable[[], Built]


# Data


def token_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens and the tokens to predict."""
    tokens = random.integers(0, VOCABULARY, (BATCH, SEQUENCE + 1), dtype=np.int32)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def pair_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Source tokens, target tokens and the tokens to predict."""
    return token_data(random) | {"source": random.integers(0, VOCABULARY, (BATCH, SEQUENCE), dtype=np.int32)}


def vector_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Vectors to regress."""
    x, y = random.standard_normal((2, BATCH, WIDTH), dtype=np.float32)
    return {"x": x, "y": y}


def image_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Images and their classes."""
    x = random.standard_normal((BATCH, 8, 8, 3), dtype=np.float32)
    return {"x": x, "y": random.integers(0, 10, BATCH, dtype=np.int32)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all elements."""
    return jnp.square(prediction - target).mean()


# One MLP, y = x + relu(x W + b), in four frameworks


def mlp_plain(layers: int = LAYERS) -> Model:
    """A list of dicts and a loop."""
    keys = jax.random.split(jax.random.PRNGKey(0), layers)
    params = [{"w": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, "b": jnp.zeros(WIDTH)} for key in keys]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        x = batch["x"]
        for layer in params:
            x = x + jax.nn.relu(x @ layer["w"] + layer["b"])
        return squared_error(x, batch["y"]), extra

    return Model(params, {}, loss, vector_data)


def mlp_linen() -> Model:
    """A compact linen module."""

    class Mlp(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(LAYERS):
                x = x + linen.relu(linen.Dense(WIDTH)(x))
            return x

    model = Mlp()

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(model.apply({"params": params}, batch["x"]), batch["y"]), extra

    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, WIDTH)))["params"]
    return Model(params, {}, loss, vector_data)


def mlp_nnx() -> Model:
    """An nnx module, split into a graph and a state."""

    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = x + nnx.relu(layer(x))
            return x

    graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(nnx.merge(graph, params)(batch["x"]), batch["y"]), extra

    return Model(params, {}, loss, vector_data)


class EquinoxMlp(eqx.Module):
    """Linear layers, and an activation as a static leaf of the tree."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.PRNGKey(0), LAYERS)
        self.layers = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys]
        self.activation = jax.nn.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + self.activation(layer(x))
        return x


def mlp_equinox() -> Model:
    """A whole equinox module, its activation included, as the state."""

    def loss(model: EquinoxMlp, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(jax.vmap(model)(batch["x"]), batch["y"]), extra

    return Model(EquinoxMlp(), {}, loss, vector_data)


# One GPT in four frameworks


def causal_mask(length: int) -> jax.Array:
    """True where a query may look."""
    return jnp.tril(jnp.ones((length, length), bool))


def gpt_plain() -> Model:
    """Blocks as dicts; attention by einsum."""
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 64))

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    def block() -> dict[str, jax.Array]:
        return {
            "scale1": jnp.ones(WIDTH),
            "qkv": matrix(WIDTH, 3 * WIDTH),
            "out": matrix(WIDTH, WIDTH),
            "scale2": jnp.ones(WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH),
        }

    params = {
        "embedding": matrix(WIDTH, VOCABULARY).T,
        "position": matrix(WIDTH, SEQUENCE).T,
        "blocks": [block() for _ in range(BLOCKS)],
        "head": matrix(WIDTH, VOCABULARY),
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale

    def attend(x: jax.Array, weights: Any) -> jax.Array:
        b, s, _ = x.shape
        q, k, v = jnp.moveaxis((x @ weights["qkv"]).reshape(b, s, 3, HEADS, WIDTH // HEADS), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
        scores = jnp.where(causal_mask(s), scores, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, s, WIDTH) @ weights["out"]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        x = params["embedding"][batch["x"]] + params["position"]
        for weights in params["blocks"]:
            x = x + attend(norm(x, weights["scale1"]), weights)
            x = x + jax.nn.gelu(norm(x, weights["scale2"]) @ weights["up"]) @ weights["down"]
        return cross_entropy(x @ params["head"], batch["y"]), extra

    return Model(params, {}, loss, token_data)


class LinenBlock(linen.Module):
    """Attention and MLP with dropout; with ``memory``, also attention to an encoder's output."""

    dropout: float = 0.0
    causal: bool = True

    @linen.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        attention = functools.partial(linen.MultiHeadDotProductAttention, HEADS)
        fixed = self.dropout == 0.0
        h = attention()(linen.LayerNorm()(x), mask=causal_mask(x.shape[1]) if self.causal else None)
        x = x + linen.Dropout(self.dropout, deterministic=fixed)(h)
        if memory is not None:
            x = x + attention()(linen.LayerNorm()(x), memory)
        h = linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(linen.LayerNorm()(x))))
        return x + linen.Dropout(self.dropout, deterministic=fixed)(h)


class LinenGpt(linen.Module):
    """A GPT; the head may be the embedding, and each block may be rematerialized."""

    tied: bool
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + self.param("position", linen.initializers.normal(0.1), (SEQUENCE, WIDTH))
        block = linen.remat(LinenBlock) if self.remat else LinenBlock
        for number in range(BLOCKS):
            x = block(self.dropout, name=f"block{number}")(x)
        x = linen.LayerNorm()(x)
        return embed.attend(x) if self.tied else linen.Dense(VOCABULARY)(x)


def gpt_linen(tied: bool = False, dropout: float = 0.0, remat: bool = False) -> Model:
    """The GPT with everything that linen has to offer."""
    model = LinenGpt(tied, dropout, remat)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        rngs = {"dropout": jax.random.fold_in(key, bactrian.microbatch_index())} if dropout else {}
        return cross_entropy(model.apply({"params": params}, batch["x"], rngs=rngs), batch["y"]), extra

    keys = {"params": jax.random.PRNGKey(0), "dropout": jax.random.PRNGKey(1)}
    params = model.init(keys, jnp.zeros((1, SEQUENCE), jnp.int32))["params"]
    return Model(params, {}, loss, token_data, ("key/bias",))


class NnxBlock(nnx.Module):
    """Attention and MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=causal_mask(x.shape[1]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxGpt(nnx.Module):
    """A GPT."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.position = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(SEQUENCE, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gpt_nnx() -> Model:
    """Split, merged in the loss."""
    graph, params, rest = nnx.split(NnxGpt(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(nnx.merge(graph, params, rest)(batch["x"]), batch["y"]), extra

    return Model(params, {}, loss, token_data, ("key/bias",))


class EquinoxBlock(eqx.Module):
    """Attention and MLP of one sequence."""

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        key1, key2 = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key1)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=key2)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=causal_mask(len(x)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class EquinoxGpt(eqx.Module):
    """A GPT of one sequence."""

    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, BLOCKS + 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.position = jax.random.normal(keys[1], (SEQUENCE, WIDTH)) / 10
        self.blocks = [EquinoxBlock(key) for key in keys[3:]]
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[2])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def gpt_equinox() -> Model:
    """Partitioned: the arrays are the state, the rest is closed over."""
    arrays, static = eqx.partition(EquinoxGpt(jax.random.PRNGKey(0)), eqx.is_array)

    def loss(arrays: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(jax.vmap(eqx.combine(arrays, static))(batch["x"]), batch["y"]), extra

    return Model(arrays, {}, loss, token_data)


# An encoder read by each decoder layer, and batch statistics


class EncoderDecoder(linen.Module):
    """Both decoder blocks read the encoder's output."""

    @linen.compact
    def __call__(self, source: jax.Array, tokens: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCABULARY, WIDTH)
        memory = LinenBlock(causal=False, name="encoder")(embed(source))
        x = embed(tokens)
        for number in range(2):
            x = LinenBlock(name=f"decoder{number}")(x, memory)
        return linen.Dense(VOCABULARY)(x)


def encoder_decoder() -> Model:
    """The encoder's gradient is a sum over the decoder's layers."""
    model = EncoderDecoder()

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(model.apply({"params": params}, batch["source"], batch["x"]), batch["y"]), extra

    tokens = jnp.zeros((1, SEQUENCE), jnp.int32)
    return Model(model.init(jax.random.PRNGKey(0), tokens, tokens)["params"], {}, loss, pair_data, ("key/bias",))


class ConvNet(linen.Module):
    """Residual convolutions with batch normalization."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(16, (3, 3), use_bias=False)(x)
        for _ in range(LAYERS):
            h = linen.Conv(16, (3, 3), use_bias=False)(x)
            x = x + linen.relu(linen.BatchNorm(use_running_average=False)(h))
        return linen.Dense(10)(x.mean((1, 2)))


def conv_net() -> Model:
    """Batch statistics are part of the state and come back as aux."""
    model = ConvNet()

    def loss(params: Any, statistics: Any, batch: Any, key: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        logits, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return cross_entropy(logits, batch["y"]), new["batch_stats"]

    variables = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 8, 8, 3)))
    return Model(variables["params"], variables["batch_stats"], loss, image_data)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp/plain": mlp_plain,
    "mlp/linen": mlp_linen,
    "mlp/nnx": mlp_nnx,
    "mlp/equinox": mlp_equinox,
    "gpt/plain": gpt_plain,
    "gpt/nnx": gpt_nnx,
    "gpt/equinox": gpt_equinox,
    "encoder-decoder/linen": encoder_decoder,
    "conv/linen": conv_net,
} | {
    f"gpt{'-tied' * tied}{'-dropout' * (dropout > 0)}{'-remat' * remat}/linen": functools.partial(
        gpt_linen, tied, dropout, remat
    )
    for tied in (False, True)
    for dropout in (0.0, 0.1)
    for remat in (False, True)
}

# Covers each pair of tied, dropout and remat; the others run with --long.
GPT_COVER = ("gpt/linen", "gpt-dropout-remat/linen", "gpt-tied-remat/linen", "gpt-tied-dropout/linen")
# The frameworks differ in their pytrees: the MLP is made with each, the GPT with two.
MODELS_COVER = (*(name for name in MODELS if not name.startswith("gpt")), "gpt/plain", *GPT_COVER)
SMALL_COVER = ("mlp/plain", "gpt-tied-dropout/linen", "encoder-decoder/linen", "conv/linen")  # under mpirun

# Optimizers


def skip_if_not_finite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leave parameters and optimizer state as they are when any gradient is not finite."""

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradients))
        updates, new = inner.update(gradients, state, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0.0), updates)
        return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

    return optax.GradientTransformation(inner.init, update)


def adamw() -> optax.GradientTransformation:
    """AdamW with warm-up, a global norm and an all-finite check: two groups of scalars over all stages."""
    schedule = optax.linear_schedule(1e-4, 1e-3, 10)
    return skip_if_not_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-2),
    "adamw": adamw,
}


def arrays_of(tree: Any) -> Any:
    """The tree with ``None`` in the place of functions and other static leaves."""
    return eqx.filter(tree, eqx.is_array)


def on_host(tree: Any) -> Any:
    """Arrays as numpy arrays, so that no one can donate them away; keys stay as they are."""

    def leaf(x: Any) -> Any:
        return np.asarray(x) if eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(leaf, tree)


def batches(data: Callable[[np.random.Generator], Any], steps: int = STEPS) -> list[tuple[Any, ...]]:
    """The same data each time."""
    random = np.random.default_rng(0)
    return [(data(random),) for _ in range(steps)]


def train_case(
    model: str,
    optimizer: str = "sgd",
    loss: str = "mean",
    microbatches: int = 4,
    stages: int = 2,
    schedule: str = "1f1b",
    result: str = "state",
    **_: Any,
) -> Case:
    """A model, an optimizer and a loss as one train step; ``result`` may be ``"gradients"`` to get these too."""
    names = (model, optimizer, loss, f"m{microbatches}", f"s{stages}", schedule, result)

    def make() -> Built:
        built, tx = MODELS[model](), OPTIMIZERS[optimizer]()
        scale = 1.0 if loss == "mean" else BATCH / microbatches  # a sum over examples, not a mean

        def total(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
            value, extra = built.loss(params, extra, batch, key)
            return value * scale, extra

        def step(state: Any, batch: Any) -> Any:
            arrays, static = eqx.partition(state["params"], eqx.is_array)
            value_and_grad = bactrian.value_and_grad(
                lambda arrays, *rest: total(eqx.combine(arrays, static), *rest), has_aux=True, reduction=loss
            )
            (value, extra), gradients = value_and_grad(arrays, state["extra"], batch, state["key"])
            if loss == "sum":
                scaled = jax.tree.map(lambda g: g / BATCH, gradients)  # else the step would be too long
            else:
                scaled = gradients
            updates, opt = tx.update(scaled, state["opt"], arrays)
            params = eqx.apply_updates(state["params"], updates)
            key = jax.random.fold_in(state["key"], 1)
            new = {"params": params, "opt": opt, "extra": extra, "key": key}
            return (new, value, gradients) if result == "gradients" else (new, value)

        state = on_host(
            {
                "params": built.params,
                "opt": tx.init(arrays_of(built.params)),
                "extra": built.extra,
                "key": jax.random.PRNGKey(42),
            }
        )
        options = {"num_stages": stages, "num_microbatches": microbatches, "schedule": schedule}
        return Built(step, state, batches(built.data), options, zero_gradient_leaves=built.zero_gradient_leaves)

    return Case("-".join(names), make)


# Traps that a system of this kind fell into before


def matrices(*names: str) -> dict[str, np.ndarray]:
    """A square matrix per name."""
    random = np.random.default_rng(1)
    return {name: random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5 for name in names}


def sgd_step(
    loss: Callable[[Any, Any], jax.Array], reduction: str = "mean", rate: float = 0.1
) -> Callable[[Any, Any], Any]:
    """``params -> params - rate * gradient`` of ``loss(params, batch)``."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss, reduction=reduction)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), value

    return step


def options(stages: int, microbatches: int, **more: Any) -> dict[str, Any]:
    """Arguments of ``parallelize``."""
    return {"num_stages": stages, "num_microbatches": microbatches, **more}


def tied(stages: int) -> Built:
    """One matrix read by the first layer, the last, and with three stages the middle one too."""
    params = matrices("shared", "a", "b", "c", "d")

    def loss(params: Any, batch: Any) -> jax.Array:
        x = jnp.tanh(batch["x"] @ params["shared"])
        x = bactrian.stage_boundary(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]))
        if stages == 3:
            x = bactrian.stage_boundary(jnp.tanh(jnp.tanh(x @ params["shared"]) @ params["c"]))
        return squared_error(jnp.tanh(x @ params["d"]) @ params["shared"].T, batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(stages, 4))


def read_by_three() -> Built:
    """A value read by three layers of different stages: its gradient is a sum over stages."""
    params = matrices("encoder", "a", "b", "c", "d")

    def loss(params: Any, batch: Any) -> jax.Array:
        memory = jnp.tanh(batch["x"] @ params["encoder"])
        x = memory
        for name in "abcd":
            x = jnp.tanh(x @ params[name]) + memory
        return squared_error(x, batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(4, 4))


def chain_loss(names: str) -> Callable[[Any, Any], jax.Array]:
    """``tanh(x W)`` for each name."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for name in names:
            x = jnp.tanh(x @ params[name])
        return squared_error(x, batch["y"])

    return loss


def empty_update() -> Built:
    """Nothing is updated: the gradients themselves are the result."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(chain_loss("abcd"))(params, batch)
        return {"loss": value, "gradients": gradients}

    state = matrices(*"abcd")
    return Built(step, state, batches(vector_data), options(2, 4, state={}), next_state=lambda _: state)


def no_gradient() -> Built:
    """One parameter is never read, one only behind ``stop_gradient``."""
    params = matrices("a", "b", "c", "frozen", "unused")

    def loss(params: Any, batch: Any) -> jax.Array:
        x = jnp.tanh(batch["x"] @ params["a"]) @ jax.lax.stop_gradient(params["frozen"])
        return squared_error(jnp.tanh(x @ params["b"]) @ params["c"], batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(2, 4))


def aux_outputs() -> Built:
    """Integer and floating aux with each of the four reductions, and a norm over all stages."""
    params = matrices(*"abcd")
    reductions = {"spread": "mean", "positive": "sum", "tail": "last", "each": "concat"}

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        best = x.argmax(-1).astype(jnp.int32)
        aux = {"spread": x.std(), "positive": (x > 0).sum(dtype=jnp.int32), "tail": x, "each": {"best": best, "x": x}}
        return squared_error(x, batch["y"]), aux

    def step(params: Any, batch: Any) -> Any:
        value_and_grad = bactrian.value_and_grad(loss, has_aux=True, aux_reduction=reductions)
        (value, aux), gradients = value_and_grad(params, batch)
        norm = optax.tree.norm(gradients)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value, aux, norm

    return Built(step, params, batches(vector_data), options(2, 4))


def result_is_input() -> Built:
    """A part of the state and a read-only argument come back as they are."""
    state = {"params": matrices(*"abcd"), "temperature": np.float32(2.0), "count": np.int32(0)}

    def step(state: Any, batch: Any, rate: Any) -> Any:
        params, value = sgd_step(chain_loss("abcd"))(state["params"], batch)
        new = {"params": params, "temperature": state["temperature"], "count": state["count"] + 1}
        return new, value, rate

    return Built(step, state, [(*b, np.float32(0.5)) for b in batches(vector_data)], options(2, 4))


def chain(names: str, stages: int, microbatches: int, reduction: str = "mean") -> Built:
    """A plain chain of layers with SGD."""
    rate = 0.1 if reduction == "mean" else 0.1 / microbatches
    step = sgd_step(chain_loss(names), reduction, rate)
    return Built(step, matrices(*names), batches(vector_data), options(stages, microbatches))


def weightless(stages: int) -> Built:
    """The middle stage has neither weights nor a result: with ``stages=2``, only a middle layer."""
    params = matrices("a", "d")
    rotation = np.linalg.qr(matrices("fixed")["fixed"])[0]

    def loss(params: Any, batch: Any) -> jax.Array:
        x = bactrian.stage_boundary(jnp.tanh(batch["x"] @ params["a"]))
        x = jnp.sin(3.0 * x @ rotation) * jax.nn.sigmoid(x)
        if stages == 3:
            x = bactrian.stage_boundary(x)
        return squared_error(x @ params["d"], batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(stages, 4))


def random_numbers(typed: bool) -> Built:
    """Dropout by the key of the state and the number of the microbatch; the key moves on each step."""
    key = jax.random.key(3) if typed else np.asarray(jax.random.PRNGKey(3))
    state = {"params": matrices(*"abcd"), "key": key}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, key = batch["x"], jax.random.fold_in(key, bactrian.microbatch_index())
        for number, name in enumerate("abcd"):
            keep = jax.random.bernoulli(jax.random.fold_in(key, number), 0.9, x.shape)
            x = jnp.where(keep, jnp.tanh(x @ params[name]) / 0.9, 0.0)
        return squared_error(x, batch["y"])

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state["params"], batch, state["key"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradients)
        return {"params": params, "key": jax.random.split(state["key"])[0]}, value

    return Built(step, state, batches(vector_data), options(2, 4))


def not_finite(transform: Callable[[optax.GradientTransformation], optax.GradientTransformation]) -> Built:
    """The second batch has an infinity: that step must change nothing."""
    # Adam makes a step of a gradient that is nothing but rounding noise: ``eps`` keeps it small.
    tx = transform(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-5)))
    params = matrices(*"abcd")
    data = batches(vector_data)
    data[1][0]["y"][3, 5] = np.inf

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(chain_loss("abcd"))(state["params"], batch)
        updates, opt = tx.update(gradients, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    return Built(step, on_host({"params": params, "opt": tx.init(params)}), data, options(2, 4))


def several_arguments() -> Built:
    """State, two batch arguments, a read-only rate; ``bactrian.grad`` with two differentiated arguments."""
    weights, biases = matrices(*"abcd"), {name: np.zeros(WIDTH, np.float32) for name in "abcd"}

    def loss(weights: Any, biases: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for name in "abcd":
            x = jnp.tanh(x @ weights[name] + biases[name])
        return squared_error(x, y)

    def step(state: Any, x: jax.Array, y: jax.Array, rate: Any) -> Any:
        gradients = bactrian.grad(loss, argnums=(0, 1))(state["weights"], state["biases"], x, y)
        old = (state["weights"], state["biases"])
        weights, biases = jax.tree.map(lambda p, g: p - rate * g, old, gradients)
        return {"weights": weights, "biases": biases}, rate * 2

    data = [(b["x"], b["y"], np.float32(0.1)) for (b,) in batches(vector_data)]
    return Built(step, {"weights": weights, "biases": biases}, data, options(2, 4, batch_argnums=(1, 2)))


TRAPS = tuple(
    Case(name, make)
    for name, make in {
        "tied-two-stages": functools.partial(tied, 2),
        "tied-three-stages": functools.partial(tied, 3),
        "value-read-by-three-layers": read_by_three,
        "empty-update": empty_update,
        "parameter-without-gradient": no_gradient,
        "aux-outputs": aux_outputs,
        "result-is-input": result_is_input,
        "odd-layers-2-stages": functools.partial(chain, "abcde", 2, 4),
        "odd-layers-4-stages": functools.partial(chain, "abcde", 4, 4),
        "fewer-microbatches-than-stages": functools.partial(chain, "abcd", 4, 2),
        "one-microbatch": functools.partial(chain, "abcd", 4, 1),
        "sum-1": functools.partial(chain, "abcd", 2, 1, "sum"),
        "sum-2": functools.partial(chain, "abcd", 2, 2, "sum"),
        "sum-4": functools.partial(chain, "abcd", 2, 4, "sum"),
        "layer-without-weights": functools.partial(weightless, 2),
        "stage-without-output": functools.partial(weightless, 3),
        "random-numbers": functools.partial(random_numbers, False),
        "random-numbers-typed-key": functools.partial(random_numbers, True),
        "skip-not-finite": functools.partial(not_finite, skip_if_not_finite),
        "apply-if-finite": functools.partial(not_finite, lambda tx: optax.apply_if_finite(tx, 5)),
        "several-arguments": several_arguments,
    }.items()
)
