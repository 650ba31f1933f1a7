"""The models that the paper compares, as changes of configs/default.py; the name after a colon chooses one.

    crystalframer train --config=jarvis:lightweight --workdir=runs/jarvis/lightweight/formation_energy

default        max frames, 64 Gaussians for each angle
lightweight    max frames, 16 narrower Gaussians for each angle
crystalformer  no frames: the baseline, Crystalformer (ICLR 2024)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lightweight": {
        "value_pe_angle_real": 16,
        "value_pe_angle_wscale": 1.0,
        "value_pe_dist_coef": 1.5,
        "value_pe_angle_coef": 6.0,
    },
    "crystalformer": {"value_pe_angle_real": 0, "frame_method": "no"},
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A target of the paper's tables and, by variant, the published mean absolute error on the test set.

    A variant is missing where no error is published.
    """

    target_set: str
    target: str
    published_mae: Mapping[str, float]


def with_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Gives a configuration the values of a variant; ConfigError naming the allowed ones if there is none of that name.

    Values that no variant speaks of stay as they are.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"variant {variant!r} is not available; allowed: {', '.join(VARIANTS)}")
    config.update(VARIANTS[variant])
    return config
