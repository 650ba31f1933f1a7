"""Every hyperparameter with its default: the JARVIS setting of the paper (names are the official project's).

The full model has 4 blocks, 951,809 trainable parameters and one frame per atom, head and block. Other files of this
folder start from here and change a few values; any value can be changed on the command line: `--config.lr=1e-3`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The default hyperparameters; every key a training run knows is listed here."""
    config = ConfigDict()

    # Data
    config.target_set = "mp_flla_2015"
    config.targets = "e_form"  # several: "e_form,e_above_hull"
    config.data_dir = ""  # where prepared data are cached; empty: the user's cache folder
    config.cutoff_radius = 0.0  # Å; 0: |adaptive_cutoff_sigma| * max(scale_real) / sqrt(gauss_lb_real)
    config.adaptive_cutoff_sigma = -3.5  # 0: all images n in [-lattice_range, lattice_range]^3 of each pair of atoms
    config.lattice_range = 2  # also of the wave vectors in the reciprocal domains

    # Model
    config.num_layers = 4
    config.model_dim = 128
    config.head_num = 8
    config.k_dim = 0  # per head; 0: model_dim / head_num
    config.v_dim = 0
    config.ff_dim = 512
    config.embedding_dim = (128,)  # widths of the layers between pooling and output
    config.t_activation = "relu"  # relu | gelu
    config.t_fixup_init = True  # False: layer norms
    # Without frames the domain may also be reci | RECI | multihead | real-reci | reci-real | real-RECI | RECI-real.
    config.domain = "real"
    config.frame_method = "max"  # max | max_static | weighted_pca | pca | lattice | no
    config.tie_tolerance = 1e-4  # neighbours whose score is this close to the best are ties for a frame axis
    config.pooling = "avr"  # avr | max
    config.pre_pooling_op = "no"  # no | relu | w+relu | w+bn+relu
    config.norm_type = "no"  # of the output layers: no | bn | ln | in
    config.dropout = 0.0
    config.precision = "float32"  # float32 | float64 | bfloat16 (dense layers of the blocks only)
    config.num_frame_samples = 1  # predictions average this many draws among tied frames; 1: no draw, the first

    # Width of the attention Gaussians
    config.scale_real = (1.4,)  # r0 in Å, one value or one for each block
    config.gauss_lb_real = 0.5
    config.scale_reci = (2.2,)  # Å, in the reciprocal domains
    config.gauss_lb_reci = 0.5
    config.gauss_state = "q"  # q | q-headdim | q-kdim | x | x-norm | x-xavier | x-xn2 | 1
    config.normalize_gauss = True
    config.positive_func_beta = 0.1

    # Value encodings: distances and angles
    config.value_pe_dist_real = 64  # number of Gaussians; 0: none
    config.value_pe_dist_coef = 1.0
    config.value_pe_dist_max = -10.0  # Å; negative: in units of scale_real
    config.value_pe_dist_wscale = 1.0
    config.value_pe_angle_real = 64  # number of Gaussians; 0: no frames (Crystalformer)
    config.value_pe_angle_coef = 1.0
    config.value_pe_angle_wscale = 4.0
    config.cos_abs = 0

    # Training
    config.seed = 123
    config.n_epochs = 2000
    config.batch_size = 256  # crystals of a step, on all devices together
    config.num_devices = 0  # of each process; 0: all that there are
    config.loss_func = "L1"  # L1 | MSE | Smooth_L1
    config.normalize_targets = "scale_bias"  # scale_bias | scale | bias | no
    config.train_filter_min = 0  # fewest and most atoms of a crystal to train on; 0: no limit
    config.train_filter_max = 0
    config.train_percent_check = 1.0  # share of the batches of an epoch to train on
    config.val_percent_check = 1.0  # share of the validation batches
    config.pretrained_model = ""  # a run directory whose weights training starts from
    config.reinit_layers = ""  # layers that start at random all the same: "output,dense_0"
    config.frozen_layers = ""  # layers that are not trained: "embedding,block_0"

    # Optimizer
    config.optimizer = "adamw"  # adamw | adam | sgd
    config.lr = 5e-4
    # const | inverse_sqrt_nowarmup | inverse_sqrt_nowarmup_dmodel | inverse_sqrt_warmup | inverse_sqrt_warmup_lrmax |
    # multistep | cosine
    config.lr_sch = "inverse_sqrt_nowarmup"
    config.sch_params = (4000.0,)  # steps: of the decay, of the warm-up, or of each drop (multistep)
    config.adam_betas = (0.9, 0.98)
    config.momentum = 0.9  # of sgd
    config.weight_decay = 1e-5
    config.bias_weight_decay = 0.01  # of biases, adamw only; the published numbers were made with 0.01
    config.clip_norm = 1.0  # of the whole gradient; 0: no clipping
    config.clip_grad = 0.0  # of each of its components; 0: no clipping
    config.scale_grad = 0.0  # largest factor by which gradients of rare elements are raised; 0: none

    # Averages of weights, checkpoints
    config.swa_epochs = 50  # epochs at the end whose weights are averaged; 0: none
    config.ema_decay = 0.0  # of an exponential moving average of the weights, such as 0.999; 0: none
    config.freeze_bn_epochs = 0  # epochs at the end in which BatchNorm keeps its statistics
    config.model_checkpoint_save_top_k = 1  # how many checkpoints with the smallest validation loss are kept
    config.keep_last_checkpoints = 2  # how many of the newest are kept
    config.checkpoint_minutes = 2.0  # longest time between checkpoints, also within an epoch
    config.ensemble_size = 1  # models to train, with the seeds seed, seed + 1, ...
    return config
