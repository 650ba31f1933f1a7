"""What is known of single hyperparameters: allowed values, official keys without a counterpart, kinds of keys."""

from typing import Any

# Hyperparameters with a closed list of values.
ALLOWED_VALUES: dict[str, tuple] = {
    "domain": ("real", "reci", "RECI", "multihead", "real-reci", "reci-real", "real-RECI", "RECI-real"),
    "frame_method": ("max", "max_static", "weighted_pca", "pca", "lattice", "no"),
    "t_activation": ("relu", "gelu"),
    "pooling": ("avr", "max"),
    "pre_pooling_op": ("no", "relu", "w+relu", "w+bn+relu"),
    "norm_type": ("no", "bn", "ln", "in"),
    "gauss_state": ("q", "q-headdim", "q-kdim", "x", "x-norm", "x-xavier", "x-xn2", "1"),
    "cos_abs": (0, 1),
    "precision": ("float32", "float64", "bfloat16"),
    "optimizer": ("adamw", "adam", "sgd"),
    "lr_sch": (
        "const",
        "inverse_sqrt_nowarmup",
        "inverse_sqrt_nowarmup_dmodel",
        "inverse_sqrt_warmup",
        "inverse_sqrt_warmup_lrmax",
        "multistep",
        "cosine",
    ),
    "loss_func": ("L1", "MSE", "Smooth_L1"),
    "normalize_targets": ("scale_bias", "scale", "bias", "no"),
}

# Official hyperparameters without a counterpart: what takes their place.
WITHOUT_COUNTERPART: dict[str, str] = {
    "experiment_name": "the run is named by --workdir",
    "save_path": "the run is stored in --workdir",
    "encoder_name": "there is one encoder, CrystalFramer",
    "minimum_range": "neighbours are found by radius (adaptive_cutoff_sigma, cutoff_radius)",
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

# Hyperparameters that a trained model does not depend on.
TRAINING_KEYS = (
    "num_devices",
    "target_set",
    "seed",
    "n_epochs",
    "batch_size",
    "loss_func",
    "normalize_targets",
    "train_filter_min",
    "train_filter_max",
    "train_percent_check",
    "val_percent_check",
    "pretrained_model",
    "reinit_layers",
    "frozen_layers",
    "optimizer",
    "lr",
    "lr_sch",
    "sch_params",
    "adam_betas",
    "momentum",
    "weight_decay",
    "bias_weight_decay",
    "clip_norm",
    "clip_grad",
    "swa_epochs",
    "ema_decay",
    "freeze_bn_epochs",
    "model_checkpoint_save_top_k",
    "keep_last_checkpoints",
    "checkpoint_minutes",
    "ensemble_size",
)

# Those that may change when a run is continued, if asked for by name.
RESUMABLE_KEYS = (
    "n_epochs",
    "frozen_layers",
    "lr",
    "lr_sch",
    "sch_params",
    "adam_betas",
    "momentum",
    "weight_decay",
    "bias_weight_decay",
    "clip_norm",
    "clip_grad",
    "scale_grad",
    "dropout",
    "swa_epochs",
    "freeze_bn_epochs",
    "num_frame_samples",
)

# Those that may change unasked: they have no influence on the result.
UNIMPORTANT_KEYS = (
    "data_dir",
    "num_devices",
    "keep_last_checkpoints",
    "model_checkpoint_save_top_k",
    "checkpoint_minutes",
)

POSITIVE = (
    "num_layers",
    "model_dim",
    "head_num",
    "ff_dim",
    "batch_size",
    "n_epochs",
    "lr",
    "train_percent_check",
    "val_percent_check",
    "model_checkpoint_save_top_k",
    "keep_last_checkpoints",
    "checkpoint_minutes",
    "ensemble_size",
    "gauss_lb_real",
    "gauss_lb_reci",
    "lattice_range",
    "num_frame_samples",
    "positive_func_beta",
    "value_pe_dist_wscale",
    "value_pe_angle_wscale",
)
NOT_NEGATIVE = (
    "num_devices",
    "k_dim",
    "v_dim",
    "cutoff_radius",
    "dropout",
    "scale_grad",
    "tie_tolerance",
    "value_pe_dist_real",
    "value_pe_angle_real",
    "weight_decay",
    "bias_weight_decay",
    "clip_norm",
    "clip_grad",
    "momentum",
    "train_filter_min",
    "train_filter_max",
    "swa_epochs",
    "ema_decay",
    "freeze_bn_epochs",
    "seed",
)
