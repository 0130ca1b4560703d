"""A wide ResNet: bottlenecks whose middle has more channels."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bactrian.driver.models.optimizers import momentum
from bactrian.driver.models.parameters import Parameter, Tree, matrix
from bactrian.driver.models.training_program import Batch, TrainingProgram
from bactrian.driver.models.transformer import cross_entropy

BLOCKS = {14: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Bottlenecks of each of the four groups, by the depth that names a network."""


@dataclass(frozen=True)
class WideResNet:
    """A classifier of images (He et al., "Deep residual learning for image recognition", 2016; Zagoruyko and Komodakis,
    "Wide residual networks", 2016).

    All is float32. Norms take the mean and the variance of the microbatch; the running averages of them, which only an
    evaluation reads, are left out.

    Attributes:
        depth: one of `BLOCKS`.
        channels: of the first bottlenecks; each of the four groups has twice those of the one before.
        width: how many times as many the 3 × 3 convolution in the middle gives.
        size: rows and columns of an image.
        classes: that there are.
    """

    depth: int
    channels: int
    width: int
    size: int = 224
    classes: int = 1024

    def parameters(self) -> Tree:
        """A tree of `Parameter`."""
        blocks, inputs = list[Tree](), self.channels
        for group, number in enumerate(BLOCKS[self.depth]):
            channels = self.channels << group
            for _ in range(number):
                blocks.append(self._block_parameters(inputs, channels))
                inputs = 4 * channels
        return {
            "first": _convolution(7, 3, self.channels),
            "norm": _norm_parameters(self.channels),
            "blocks": blocks,
            "head": matrix(inputs, self.classes, inputs=inputs),
            "head_bias": Parameter((self.classes,)),
        }

    def _block_parameters(self, inputs: int, channels: int) -> Tree:
        inner = channels * self.width
        block = {
            "narrow": _convolution(1, inputs, channels),
            "norm_1": _norm_parameters(channels),
            "wide": _convolution(3, channels, inner),
            "norm_2": _norm_parameters(inner),
            "out": _convolution(1, inner, 4 * channels),
            "norm_3": _norm_parameters(4 * channels),
        }
        if inputs == 4 * channels:
            return block
        return block | {
            "shortcut": _convolution(1, inputs, 4 * channels),
            "shortcut_norm": _norm_parameters(4 * channels),
        }

    def logits(self, params: Tree, images: jax.Array) -> jax.Array:
        """What is predicted of each class: batch × classes.

        Args:
            params: of the shapes of `parameters`.
            images: batch × rows × columns × 3.
        """
        x = jax.nn.relu(_norm(params["norm"], _convolved(images, params["first"], 2)))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        blocks = iter(params["blocks"])
        for group, number in enumerate(BLOCKS[self.depth]):
            for position in range(number):
                x = _bottleneck(next(blocks), x, 2 if group and not position else 1)
        return x.mean((1, 2)) @ params["head"] + params["head_bias"]

    def loss(self, params: Tree, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats of ``batch["labels"]``, given ``batch["images"]``."""
        return cross_entropy(self.logits(params, batch["images"]), batch["labels"])

    def training(self, batch: int) -> TrainingProgram:
        """A step of gradient descent with momentum on so many images."""
        images = jax.ShapeDtypeStruct((batch, self.size, self.size, 3), jnp.float32)
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return TrainingProgram(self.parameters(), self.loss, {"images": images, "labels": labels}, momentum())


def _bottleneck(block: Tree, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu(_norm(block["norm_1"], _convolved(x, block["narrow"])))
    y = jax.nn.relu(_norm(block["norm_2"], _convolved(y, block["wide"], stride)))
    y = _norm(block["norm_3"], _convolved(y, block["out"]))
    if "shortcut" in block:
        x = _norm(block["shortcut_norm"], _convolved(x, block["shortcut"], stride))
    return jax.nn.relu(x + y)


def _convolution(size: int, inputs: int, outputs: int) -> Parameter:
    """A kernel for rectified inputs (He et al., "Delving deep into rectifiers", 2015)."""
    return matrix(size, size, inputs, outputs, inputs=size * size * inputs // 2)


def _convolved(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _norm_parameters(channels: int) -> Tree:
    return {"scale": Parameter((channels,), mean=1.0), "bias": Parameter((channels,))}


def _norm(params: Tree, x: jax.Array) -> jax.Array:
    """Batch normalization (Ioffe and Szegedy, "Batch normalization", 2015) over the microbatch."""
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
