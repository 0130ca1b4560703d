"""A mixture of experts as in GShard: tokens choose two experts each, which have few places.

Lepikhin et al., "GShard: scaling giant models with conditional computation and automatic sharding", 2020, algorithm 1.
The auxiliary loss, which spreads tokens over experts, and the random choice of second experts are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bactrian.driver.models.parameters import Tree, matrix
from bactrian.passes.frame.errors import ConfigError


def expert_parameters(experts: int, width: int, inner: int) -> Tree:
    """Of a router, and of an MLP without biases for each expert."""
    return {
        "router": matrix(width, experts, inputs=width),
        "up": matrix(experts, width, inner, inputs=width),
        "down": matrix(experts, inner, width, inputs=inner),
    }


def mixture(params: Tree, x: jax.Array, group: int) -> jax.Array:
    """What the experts give of tokens, batch × length × width.

    Tokens of a group (g) send themselves (s) to places (c) at experts (e), by products with one-hot tensors.

    Args:
        params: of the shapes of `expert_parameters`.
        x: tokens, batch × length × width.
        group: how many tokens share the places of an expert; all, where there are fewer.

    Raises:
        ConfigError: the tokens don't divide into groups.
    """
    tokens, experts = x.shape[0] * x.shape[1], params["up"].shape[0]
    group = min(group, tokens)
    if tokens % group:
        raise ConfigError(
            f"cannot form groups of {group} tokens from {tokens}",
            why=f"a microbatch has {x.shape[0]} sequences of {x.shape[1]} tokens",
            fix=f"take microbatches of a multiple of {group} tokens, or of less than {group}",
        )
    grouped = x.reshape(tokens // group, group, x.shape[-1])
    gates = jax.nn.softmax((grouped @ params["router"].astype(x.dtype)).astype(jnp.float32))
    combine = top_two(gates, max(1, 2 * group // experts)).astype(x.dtype)
    sent = jnp.einsum("gsec,gsm->egcm", (combine > 0).astype(x.dtype), grouped)
    hidden = jax.nn.relu(jnp.einsum("egcm,emh->egch", sent, params["up"].astype(x.dtype)))
    made = jnp.einsum("egch,ehm->egcm", hidden, params["down"].astype(x.dtype))
    return jnp.einsum("gsec,egcm->gsm", combine, made).reshape(x.shape)


def top_two(gates: jax.Array, places: int) -> jax.Array:
    """The weight of each token (s) at each place (c) of each expert (e) of its group (g).

    A token goes to the two experts of its largest gates, whose sum its weights are shares of. An expert takes first
    choices before second ones, earlier tokens before later ones, and no more than it has places; who comes too late is
    not worked on by it.

    Args:
        gates: group × token × expert, float32.
        places: of an expert.

    >>> top_two(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]), 1)[0, :, :, 0]     # both first choices are expert 0
    Array([[0.75, 0.  ],
           [0.  , 0.5 ]], dtype=float32)
    """
    experts = gates.shape[-1]
    first = jax.nn.one_hot(gates.argmax(-1), experts)
    others = gates * (1 - first)
    second = jax.nn.one_hot(others.argmax(-1), experts)
    # The place of each choice at its expert: how many came before.
    place_first = jnp.cumsum(first, axis=1) - first
    place_second = jnp.cumsum(second, axis=1) - second + first.sum(1, keepdims=True)
    first, second = first * (place_first < places), second * (place_second < places)
    gate_first, gate_second = (gates * first).sum(-1), (others * second).sum(-1)
    total = gate_first + gate_second
    shares = jnp.where(total > 0, total, 1)

    def at_places(chosen: jax.Array, place: jax.Array, gate: jax.Array) -> jax.Array:
        number = (place * chosen).sum(-1).astype(jnp.int32)
        return jnp.einsum("gse,gsc->gsec", chosen * (gate / shares)[..., None], jax.nn.one_hot(number, places))

    return at_places(first, place_first, gate_first) + at_places(second, place_second, gate_second)
