"""A model with its loss, batch and optimizer: a train step, and arguments for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax

from bactrian.driver.capture.gradient_boundary import value_and_grad
from bactrian.driver.models.optimizers import Optimizer
from bactrian.driver.models.parameters import Tree, abstract, count, draw

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class TrainingProgram:
    """An ordinary train step, for `bactrian.parallelize`.

    Attributes:
        parameters: a tree of `Parameter`.
        loss: of parameters and a batch, a mean over the batch.
        batch: shapes and dtypes of the batch's entries, of the whole batch.
        optimizer: what updates the parameters.
    """

    parameters: Tree
    loss: Callable[[Tree, Batch], jax.Array]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    optimizer: Optimizer

    def step(self, state: Tree, batch: Batch) -> tuple[Tree, jax.Array]:
        """The next state and the loss."""
        loss, gradients = value_and_grad(self.loss)(state["params"], batch)
        params, optimizer = self.optimizer.update(gradients, state["optimizer"], state["params"])
        return {"params": params, "optimizer": optimizer}, loss

    def state(self, key: jax.Array) -> Tree:
        """The state before the first step."""
        params = draw(self.parameters, key)
        return {"params": params, "optimizer": self.optimizer.init(params)}

    def shapes(self) -> tuple[Tree, Mapping[str, jax.ShapeDtypeStruct]]:
        """Abstract arguments of the step: nothing is allocated, however large the model is."""
        params = abstract(self.parameters)
        return {"params": params, "optimizer": jax.eval_shape(self.optimizer.init, params)}, self.batch

    def with_batch(self, size: int) -> TrainingProgram:
        """The same with another number of examples in a step."""
        batch = {key: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype) for key, leaf in self.batch.items()}
        return replace(self, batch=batch)

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return count(self.parameters)
