"""A training script of two stages for jobs of several ranks, as text; tests append to it or put failures around it."""

SCRIPT = """
import os, sys, time
import jax.numpy as jnp
import numpy as np
import bactrian

rng = np.random.default_rng(3)
batch = {"x": rng.normal(size=(8, 6)).astype(np.float32), "y": rng.normal(size=(8, 6)).astype(np.float32)}
state = {"params": [rng.normal(size=(6, 6)).astype(np.float32) for _ in range(4)], "count": jnp.int32(0)}

def train(state, batch):
    def loss(params):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["y"]) ** 2)

    value, gradients = bactrian.value_and_grad(loss)(state["params"])
    new = [w - 0.1 * g for w, g in zip(state["params"], gradients)]
    return {"params": new, "count": state["count"] + 1}, value

make = lambda **options: bactrian.parallelize(**{"num_stages": 2, "num_microbatches": 2, **options})(train)
"""

TRAIN = (
    SCRIPT
    + """
step = make()
for number in range(int(os.environ.get("NUM_STEPS", "3"))):
    state, loss = step(state, batch)
    print("step", number, "done", flush=True)
    if number == 1:
        print("ready", flush=True)
"""
)
