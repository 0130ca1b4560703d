"""The models of Alpa's evaluation by name, at full size.

Zheng et al., "Alpa: automating inter- and intra-operator parallelism for distributed deep learning", OSDI 2022, section 8:
sizes from its tables, and how many devices each model was run on (of 16 GB, 8 in a host; none for those that were not).
GPT and the mixtures see 1,024 sequences of 1,024 tokens in a step, in half precision; wide ResNets 1,536 images of
224 × 224 in single precision (1,520 on 64 devices). The MLPs and experts of the mixtures are 8 times as wide as the blocks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import jax.numpy as jnp

from bactrian.driver.models.training_program import TrainingProgram
from bactrian.driver.models.transformer import Transformer
from bactrian.driver.models.wide_resnet import WideResNet
from bactrian.passes.frame.errors import ConfigError


@dataclass(frozen=True)
class SuiteModel:
    """A model of the suite.

    Attributes:
        model: what it is.
        devices: that it was run on, 0 where it was not.
        batch: sequences or images of a step.
    """

    model: Transformer | WideResNet
    devices: int
    batch: int

    def training(self) -> TrainingProgram:
        """Its train step."""
        return self.model.training(self.batch)


def _gpt(layers: int, width: int, heads: int, devices: int = 0) -> SuiteModel:
    return SuiteModel(Transformer(layers, width, heads, 51200, 1024, dtype=jnp.bfloat16), devices, 1024)


def _mixture(layers: int, width: int, experts: int, devices: int = 0) -> SuiteModel:
    model = Transformer(layers, width, 16, 32000, 1024, 8 * width, experts, dtype=jnp.bfloat16)
    return SuiteModel(model, devices, 1024)


def _wide_resnet(depth: int, channels: int, width: int, devices: int, batch: int = 1536) -> SuiteModel:
    return SuiteModel(WideResNet(depth, channels, width), devices, batch)


SUITE: dict[str, SuiteModel] = {
    "gpt-125M": _gpt(12, 768, 12),
    "gpt-350M": _gpt(24, 1024, 16, 1),
    "gpt-760M": _gpt(24, 1536, 16, 2),
    "gpt-1.3B": _gpt(24, 2048, 32, 4),
    "gpt-2.6B": _gpt(32, 2560, 32, 8),
    "gpt-6.7B": _gpt(32, 4096, 32, 16),
    "gpt-15B": _gpt(48, 5120, 40, 32),
    "gpt-39B": _gpt(48, 8192, 64, 64),
    "gpt-76B": _gpt(60, 10240, 80),
    "moe-380M": _mixture(8, 768, 8, 1),
    "moe-690M": _mixture(8, 768, 16, 2),
    "moe-1.3B": _mixture(16, 768, 16, 4),
    "moe-2.4B": _mixture(16, 1024, 16, 8),
    "moe-10B": _mixture(16, 1536, 32, 16),
    "moe-27B": _mixture(16, 2048, 48, 32),
    "moe-70B": _mixture(32, 2048, 64, 64),
    "moe-140B": _mixture(32, 2048, 128),
    "wresnet-250M": _wide_resnet(50, 160, 2, 1),
    "wresnet-500M": _wide_resnet(50, 224, 2, 2),
    "wresnet-1B": _wide_resnet(50, 320, 2, 4),
    "wresnet-2B": _wide_resnet(50, 448, 2, 8),
    "wresnet-4B": _wide_resnet(50, 640, 2, 16),
    "wresnet-6.8B": _wide_resnet(50, 320, 16, 32),
    "wresnet-13B": _wide_resnet(101, 320, 16, 64, 1520),
}
"""By name: the family, and the parameters that it is called after."""


def model_named(name: str) -> SuiteModel:
    """A model of the suite.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SUITE:
        by_fold = {known.casefold(): known for known in SUITE}
        close = difflib.get_close_matches(name.casefold(), by_fold, 3)
        fix = (
            f"did you mean {' or '.join(by_fold[each] for each in close)}?"
            if close
            else f"name one of {', '.join(SUITE)}"
        )
        raise ConfigError(f"there is no model {name!r}", fix=fix)
    return SUITE[name]


def small(family: str) -> TrainingProgram:
    """A model of a family (``gpt``, ``moe``, ``wresnet``) that a few cores train in seconds: float32, 16 examples."""
    gpt = Transformer(2, 128, 8, 512, 128)
    models = {"gpt": gpt, "moe": replace(gpt, experts=8), "wresnet": WideResNet(14, 16, 2, 64, 128)}
    return models[family].training(16)
