"""Every hyperparameter, a row each: its name, default and what is known of it; the configurations that hold them.

The names are the official project's, the defaults the JARVIS setting of the paper: 4 blocks, 951,809 trainable
parameters and one frame per atom, head and block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from crystalframer_jax.structures.neighbors import LatticeBox

# Whether a value may change when a run is continued; ALWAYS: no result depends on it.
NEVER, IF_ASKED, ALWAYS = range(3)

# Limits of a value, each with a test and what the message says of a value that fails it.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    ">0": (lambda value: value > 0, "must be positive"),
    ">=0": (lambda value: value >= 0, "must not be negative"),
    "<1": (lambda value: value < 1, "must be below 1"),
    "<=1": (lambda value: value <= 1, "is a share: at most 1"),
}


# What nobody needs would take all memory, or no end. The most of an integer and of another number, if its row says
# nothing else; of the values in a list, of the characters in a text, of the parameters of a model.
MOST_INTEGER, MOST_NUMBER, MOST_ELEMENTS, MOST_CHARACTERS, MOST_PARAMETERS = 10**9, 1e300, 1000, 4096, 10**9
TRANSFORMS = ("none", "log10")  # of targets that are numbers
LOGIT = "logit"  # that of classes, whose probability is predicted
LARGEST_CUTOFF = 50.0  # Å: about 25,000 neighbors of every atom


def key(
    default: Any, *limits: str, most: float = 0, values: tuple = (), change: int = NEVER, official: bool = True
) -> Any:
    """Makes a row: the default (and with it the type), limits, a closed list of values; not `official`: ours alone.

    `most`: the largest size of a number, or of each in a list, that is taken, whatever its sign.
    """
    first = default[0] if isinstance(default, tuple) else default
    most = most or (MOST_INTEGER if isinstance(first, int) else MOST_NUMBER)
    known = {"limits": limits, "most": most, "values": values, "change": change, "official": official}
    return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class PredictionKeys:
    """What predictions depend on beside the model."""

    targets: tuple[str, ...] = key(("e_form",))  # given as "e_form,e_above_hull" or as a list of names
    # classification: all targets are classes, 0 or 1
    task: str = key("regression", values=("regression", "classification"), official=False)
    # what the model learns of a target; one, or one for each of the targets: "log10,none"
    target_transform: str = key("none", official=False)
    # learn what is left of a target when the composition has explained what it can, by least squares
    element_references: bool = key(False, official=False)
    # where prepared data are cached; empty: the user's cache folder
    data_dir: str = key("", change=ALWAYS, official=False)
    # Å; 0: |adaptive_cutoff_sigma| * max(scale_real) / sqrt(gauss_lb_real)
    cutoff_radius: float = key(0.0, ">=0", most=LARGEST_CUTOFF, official=False)
    # 0: all images n in [-lattice_range, lattice_range]^3 of each pair of atoms
    adaptive_cutoff_sigma: float = key(-3.5)
    # predictions average this many draws among tied frames; 1: no draw, the first
    num_frame_samples: int = key(1, ">0", most=10_000, change=IF_ASKED, official=False)


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """The model; lengths in Å."""

    num_layers: int = key(4, ">0", most=256)
    model_dim: int = key(128, ">0", most=65_536)
    head_num: int = key(8, ">0", most=1024)
    k_dim: int = key(0, ">=0", most=65_536)  # per head; 0: model_dim / head_num
    v_dim: int = key(0, ">=0", most=65_536)
    ff_dim: int = key(512, ">0", most=1_000_000)
    embedding_dim: tuple[int, ...] = key((128,), most=65_536)  # widths of the layers between pooling and output
    t_activation: str = key("relu", values=("relu", "gelu"))
    t_fixup_init: bool = key(True)  # False: layer norms
    # others than real without frames only
    domain: str = key(
        "real", values=("real", "reci", "RECI", "multihead", "real-reci", "reci-real", "real-RECI", "RECI-real")
    )
    frame_method: str = key("max", values=("max", "max_static", "weighted_pca", "pca", "lattice", "no"))
    # neighbors whose score is this close to the best are ties for a frame axis
    tie_tolerance: float = key(1e-4, ">=0", official=False)
    pooling: str = key("avr", values=("avr", "max"))
    pre_pooling_op: str = key("no", values=("no", "relu", "w+relu", "w+bn+relu"))
    norm_type: str = key("no", values=("no", "bn", "ln", "in"))  # of the output layers
    dropout: float = key(0.0, ">=0", "<1", change=IF_ASKED)
    # bfloat16: in the dense layers of the blocks only
    precision: str = key("float32", values=("float32", "float64", "bfloat16"), official=False)
    # of the wave vectors in the reciprocal domains; see also adaptive_cutoff_sigma
    lattice_range: int = key(2, ">0", most=10)

    # Width of the attention Gaussians
    scale_real: tuple[float, ...] = key((1.4,))  # r0, one value or one for each block
    gauss_lb_real: float = key(0.5, ">0", "<1")
    scale_reci: tuple[float, ...] = key((2.2,))  # in the reciprocal domains
    gauss_lb_reci: float = key(0.5, ">0", "<1")
    gauss_state: str = key("q", values=("q", "q-headdim", "q-kdim", "x", "x-norm", "x-xavier", "x-xn2", "1"))
    normalize_gauss: bool = key(True)
    positive_func_beta: float = key(0.1, ">0")

    # Value encodings: distances and angles
    value_pe_dist_real: int = key(64, ">=0", most=4096)  # number of Gaussians; 0: none
    value_pe_dist_coef: float = key(1.0)
    value_pe_dist_max: float = key(-10.0)  # negative: in units of scale_real
    value_pe_dist_wscale: float = key(1.0, ">0")
    value_pe_angle_real: int = key(64, ">=0", most=4096)  # number of Gaussians; 0: no frames (Crystalformer)
    value_pe_angle_coef: float = key(1.0)
    value_pe_angle_wscale: float = key(4.0, ">0")
    cos_abs: int = key(0, values=(0, 1))

    # largest factor by which gradients of rare elements are raised; 0: none
    scale_grad: float = key(0.0, ">=0", change=IF_ASKED)


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """What the batches of a model hold beside species and neighbor rows, and their floating-point type."""

    cells: bool = False  # the atoms of each cell, for attention in reciprocal space
    lattice_frames: bool = False
    scatter: bool = False  # for pca frames
    dtype: str = "float32"
    tie_tolerance: float = 1e-4  # Å, of the lengths of lattice vectors


NO_PARTS = BatchParts()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelKeys):
    """A model: k_dim and v_dim are not 0. Hashable: a static argument."""

    num_targets: int

    @property
    def uses_frames(self) -> bool:
        """False for Crystalformer, which has no angle encoding and therefore no frames."""
        return self.value_pe_angle_real > 0

    @property
    def dtype(self) -> np.dtype:
        """Type of parameters, positions and lattice sums."""
        return np.dtype("float64" if self.precision == "float64" else "float32")

    @property
    def parts(self) -> BatchParts:
        """What batches must hold beside the neighbor rows."""
        parts = BatchParts(
            cells=self.domain != "real", scatter=self.uses_frames and self.frame_method == "pca", dtype=self.dtype.name
        )
        if self.uses_frames and self.frame_method == "lattice":
            return dataclasses.replace(parts, lattice_frames=True, tie_tolerance=self.tie_tolerance)
        return parts

    @functools.cached_property
    def period_of_blocks(self) -> int:
        """Returns the smallest divisor of `num_layers` after which the settings of the blocks repeat."""
        settings = [
            (self.domain_of_block(block), self.scale_of_block(block), self.reciprocal_scale_of_block(block))
            for block in range(self.num_layers)
        ]
        divisors = (n for n in range(1, len(settings) + 1) if len(settings) % n == 0)
        return next(n for n in divisors if settings == settings[:n] * (len(settings) // n))

    def domain_of_block(self, block: int) -> str:
        """Returns real, reci, RECI or multihead; the domains of an interleaving take turns."""
        domains = self.domain.split("-")
        return domains[block % len(domains)]

    def scale_of_block(self, block: int) -> float:
        """Returns r0 of a block, Å; several take turns."""
        return self.scale_real[block % len(self.scale_real)]

    def reciprocal_scale_of_block(self, block: int) -> float:
        """Returns scale_reci of a block, Å; several take turns."""
        return self.scale_reci[block % len(self.scale_reci)]


@dataclasses.dataclass(frozen=True)
class TrainConfig(ModelKeys, PredictionKeys):
    """All hyperparameters as the user gave them, lists as tuples; its own are those of the training. Hashable."""

    target_set: str = key("mp_flla_2015")
    seed: int = key(123, ">=0", most=2**32)
    n_epochs: int = key(2000, ">0", most=10_000_000, change=IF_ASKED)
    batch_size: int = key(256, ">0", most=100_000)  # crystals of a step, on all devices together
    num_devices: int = key(0, ">=0", change=ALWAYS, official=False)  # of each process; 0: all that there are
    loss_func: str = key("L1", values=("L1", "MSE", "Smooth_L1"))
    # how training chooses among ties: at random, or as evaluation always does, by the crystal
    ties: str = key("drawn", values=("drawn", "intrinsic"), official=False)
    normalize_targets: str = key("scale_bias", values=("scale_bias", "scale", "bias", "no"))
    train_filter_min: int = key(0, ">=0")  # fewest and most atoms of a crystal to train on; 0: no limit
    train_filter_max: int = key(0, ">=0")
    train_percent_check: float = key(1.0, ">0", "<=1")  # share of the batches of an epoch to train on
    val_percent_check: float = key(1.0, ">0", "<=1")  # share of the validation batches
    pretrained_model: str = key("")  # a run directory whose weights training starts from
    reinit_layers: str = key("", official=False)  # layers that start at random all the same: "output,dense_0"
    frozen_layers: str = key("", change=IF_ASKED, official=False)  # layers that are not trained: "embedding,block_0"

    # Optimizer
    optimizer: str = key("adamw", values=("adamw", "adam", "sgd", "muon"))
    lr: float = key(5e-4, ">0", change=IF_ASKED)
    # batch_size that lr is for: with another, lr is multiplied by the root of their quotient; 0: it is taken as it is
    lr_batch_size: int = key(0, ">=0", most=100_000, change=IF_ASKED, official=False)
    lr_sch: str = key(
        "inverse_sqrt_nowarmup",
        values=(
            "const",
            "inverse_sqrt_nowarmup",
            "inverse_sqrt_nowarmup_dmodel",
            "inverse_sqrt_warmup",
            "inverse_sqrt_warmup_lrmax",
            "multistep",
            "cosine",
            "linear",
        ),
        change=IF_ASKED,
    )
    # steps: of the decay, of the warm-up (cosine, linear: below 1 a share of all steps), or of each drop (multistep)
    sch_params: tuple[float, ...] = key((4000.0,), change=IF_ASKED)
    adam_betas: tuple[float, ...] = key((0.9, 0.98), change=IF_ASKED)
    momentum: float = key(0.9, ">=0", "<1", change=IF_ASKED)  # of sgd
    weight_decay: float = key(1e-5, ">=0", change=IF_ASKED)
    # of biases, adamw only; the published numbers were made with 0.01
    bias_weight_decay: float = key(0.01, ">=0", change=IF_ASKED, official=False)
    clip_norm: float = key(1.0, ">=0", change=IF_ASKED)  # of the whole gradient; 0: no clipping
    clip_grad: float = key(0.0, ">=0", change=IF_ASKED)  # of each of its components; 0: no clipping

    # Averages of weights, checkpoints
    swa_epochs: int = key(50, ">=0", change=IF_ASKED)  # epochs at the end whose weights are averaged; 0: none
    # of an exponential moving average of the weights, such as 0.999; 0: none
    ema_decay: float = key(0.0, ">=0", "<1", official=False)
    # epochs at the end in which BatchNorm keeps its statistics
    freeze_bn_epochs: int = key(0, ">=0", change=IF_ASKED)
    # how many checkpoints with the smallest validation loss are kept
    model_checkpoint_save_top_k: int = key(1, ">0", change=ALWAYS)
    keep_last_checkpoints: int = key(2, ">0", change=ALWAYS, official=False)  # how many of the newest are kept
    # longest time between checkpoints, also within an epoch
    checkpoint_minutes: float = key(2.0, ">0", change=ALWAYS, official=False)
    ensemble_size: int = key(1, ">0", most=1000, official=False)  # models to train, with the seeds seed, seed + 1, ...
    # what predictions of an ensemble are, over its models
    ensemble_combine: str = key("median", values=("median", "mean"), change=ALWAYS, official=False)

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model alone; k_dim, v_dim = 0 become model_dim / head_num."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelKeys)}
        for name in ("k_dim", "v_dim"):
            values[name] = values[name] or self.model_dim // self.head_num
        return ModelConfig(num_targets=len(self.targets), **values)

    @property
    def transforms(self) -> tuple[str, ...]:
        """The transform of each target, "none" or "log10", or "logit" of classes."""
        if self.task == "classification":
            return (LOGIT,) * len(self.targets)
        names = tuple(name.strip() for name in self.target_transform.split(","))
        return names * len(self.targets) if len(names) == 1 else names

    @property
    def loss(self) -> str:
        """The loss, by its name in `training.loss`: classes have their own."""
        return "logistic" if self.task == "classification" else self.loss_func

    @property
    def cutoff(self) -> float | LatticeBox:
        """Radius r_c of the neighbor rows in Å, or (adaptive_cutoff_sigma=0) the box of lattice images.

        It is the radius given, else the window of the widest attention Gaussian: as many of its widths
        r0 / sqrt(gauss_lb) as adaptive_cutoff_sigma says. The sign, which in the official code decides whether the
        window follows the actual width of each Gaussian, makes no difference.
        """
        if self.cutoff_radius > 0:
            return float(self.cutoff_radius)
        if self.adaptive_cutoff_sigma == 0:
            return LatticeBox(self.lattice_range)
        return abs(self.adaptive_cutoff_sigma) * max(self.scale_real) / math.sqrt(self.gauss_lb_real)

    def as_dict(self) -> dict[str, Any]:
        """Returns all values by name as a user gives them, `targets` as one text."""
        return {name: getattr(self, name) for name in KEYS} | {"targets": ",".join(self.targets)}


KEYS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(TrainConfig)}


RESUMABLE_KEYS, UNIMPORTANT_KEYS = (
    tuple(name for name, row in KEYS.items() if row.metadata["change"] == change) for change in (IF_ASKED, ALWAYS)
)
# Those that a trained model does not depend on.
TRAINING_KEYS = tuple(name for name in KEYS if not hasattr(ModelKeys, name) and not hasattr(PredictionKeys, name))
ALLOWED_VALUES: dict[str, tuple] = {
    name: row.metadata["values"] for name, row in KEYS.items() if row.metadata["values"]
}

# Official hyperparameters without a counterpart: what takes their place.
WITHOUT_COUNTERPART: dict[str, str] = {
    "experiment_name": "the run is named by --workdir",
    "save_path": "the run is stored in --workdir",
    "encoder_name": "there is one encoder, CrystalFramer",
    "minimum_range": "neighbors are found by radius (adaptive_cutoff_sigma, cutoff_radius)",
    "frame_mode": "both distances and angles are encoded (value_pe_dist_real, value_pe_angle_real)",
    "use_cgcnn_feat": "the official code never defines these atom features and fails; elements have trained embeddings",
    "value_pe_wave_real": "the official CUDA code ignores wave encodings",
    "value_pe_wave_reci": "the official CUDA code ignores wave encodings",
    "value_pe_dist_reci": "reciprocal attention has no distances to encode",
    "num_workers": "batches are prepared in a background thread",
    "use_cuda_code": "the device is chosen by JAX",
    "reproduciblity_state": "runs are always reproducible (seed)",
    "symm_break_noise": "ties are broken by rule (tie_tolerance)",
}

# Those of them that would change the model, with the value that does not.
NEUTRAL_VALUES: dict[str, Any] = {
    "use_cgcnn_feat": False,
    "value_pe_wave_real": 0,
    "value_pe_wave_reci": 0,
    "value_pe_dist_reci": 0,
}
