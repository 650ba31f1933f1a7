"""Float64 brute-force evaluation of CrystalFramer for one crystal, in plain numpy: what the tests compare with.

Everything is computed in the nested form of the papers over an explicit box of lattice images. For an atom i,
a head, and every atom j of the cell, with r_ijn = p_j + n L - p_i:

    z_ij = log sum_n exp(a_i |r_ijn|^2)                  width of the attention, a < 0
    A_ij = softmax over j of (q_i . k_j / sqrt(dk) + z_ij)
    w_ijn = exp(a_i |r_ijn|^2 - z_ij)                     average over the images inside the pair (i, j)

so that a quantity g(r) is averaged over the neighbors (j, n) to sum_j A_ij sum_n w_ijn g(r_ijn). There are no
neighbor rows, no cutoff by distance and no factorised Gaussians. Meant for a few tens of atoms.

Shapes: n atoms, H heads, dk and dv channels per head, K lattice images, D distance and Da angle Gaussians.
"""

import math

import numpy as np

_COLLINEAR = 0.9999  # a neighbor with |e1 . u| at or above this cannot define the second frame axis
_MIN_PERPENDICULARITY = 1e-5  # floor of 1 - |e1 . u| inside the logarithm of the second axis' score


def predict(config, params, numbers, positions, lattice, radius=16.0, frames=None):
    """Evaluates the whole model on one crystal.

    Args:
      config: official hyperparameters by their official names.
      params: official state dict, name -> array (any float dtype; linear weights are [out, in]).
      numbers: [n] atomic numbers. positions: [n, 3] Cartesian, Å. lattice: [3, 3], rows are the vectors, Å.
      radius: every periodic image within this distance of every atom is summed (and some farther ones), Å.
      frames: optional list with one [n, H, 3, 3] per block that replaces the computed frames (rows are the
        axes). Needed if frame_method is neither `max` nor absent.

    Returns:
      dict with `output` [T] (raw, not de-standardised), and with one entry per block the lists `frames`
      [n, H, 3, 3] (None for a model without angles) and `alphas` [n, H], the a = -rho / (2 r0^2) in Å^-2.

    Raises ValueError if the configuration asks for something that is not written here.
    """
    _check_supported(config, frames)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    positions, lattice = np.asarray(positions, np.float64), np.asarray(lattice, np.float64)

    x = params["input_embeddings.weight"][:, np.asarray(numbers) - 1].T  # [n, model_dim]
    used_frames, alphas = [], []
    for block in range(config["num_layers"]):
        name = f"encoder.layers.{block}."
        given = None if frames is None else np.asarray(frames[block], np.float64)
        attended, given, a = _self_attention(config, params, block, x, positions, lattice, radius, given)
        x = x + attended
        hidden = _ACTIVATIONS[config["t_activation"]](_linear(params, name + "linear1", x))
        x = x + _linear(params, name + "linear2", hidden)
        used_frames, alphas = [*used_frames, given], [*alphas, a]
    return {"output": _head(config, params, x), "frames": used_frames, "alphas": alphas}


def lattice_sums(q, k, v, a, positions, lattice, frames, config, radius=16.0, block=0):
    """Attention-weighted sums over the periodic neighbors of every atom of one crystal, in one block.

    Args:
      q, k: [n, H, dk]. v: [n, H, dv]. a: [n, H] = -rho / (2 r0^2), Å^-2.
      positions: [n, 3], Å. lattice: [3, 3] rows, Å. frames: [n, H, 3 axes, 3] or None (no angle sums).
      config: official hyperparameters; only the value_pe_*, cos_abs and scale_real keys are read.
      radius: as in `predict`. block: index of the block, which selects its scale_real.

    Returns:
      value sum [n, H, dv]; distance-basis sum [n, H, D], self term (distance 0) included; angle-basis sum
      [n, H, 3, Da], self term left out of the sum but not of the softmax (Da = 0 without frames).
    """
    q, k, v, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, v, a, positions, lattice))
    n, heads, dk = q.shape
    shifts = _image_shifts(positions, lattice, radius)
    distance_centers, distance_sigma = _distance_centers(config, block)
    angle_count = config["value_pe_angle_real"] if frames is not None else 0
    angle_centers, angle_sigma = _angle_centers(config, angle_count)
    value_sum = np.zeros((n, heads, v.shape[-1]))
    distance_sum = np.zeros((n, heads, len(distance_centers)))
    angle_sum = np.zeros((n, heads, 3, len(angle_centers)))

    for i in range(n):
        distance, direction = _neighbors(i, positions, shifts)  # [n, K], [n, K, 3]
        distance_basis = _gaussians(distance, distance_centers, distance_sigma)  # [n, K, D]
        for h in range(heads):
            exponent = a[i, h] * distance**2  # [n, K]
            z = _log_sum_exp(exponent)  # [n]
            within_pair = np.exp(exponent - z[:, None])  # [n, K], sums to 1 over the images
            score = k[:, h] @ q[i, h] / math.sqrt(dk) + z  # [n]
            attention = np.exp(score - _log_sum_exp(score))  # [n], sums to 1 over the atoms of the cell

            value_sum[i, h] = attention @ v[:, h]
            distance_sum[i, h] = attention @ np.einsum("jn,jnd->jd", within_pair, distance_basis)
            for axis in range(0 if frames is None else 3):
                cosine = direction @ frames[i, h, axis]  # [n, K]
                cosine = np.abs(cosine) if config["cos_abs"] else cosine
                angle_basis = _gaussians(cosine, angle_centers, angle_sigma)  # [n, K, Da]
                of_pairs = np.einsum("jn,jnd->jd", within_pair * (distance > 0), angle_basis)
                angle_sum[i, h, axis] = attention @ of_pairs
    return value_sum, distance_sum, angle_sum


def max_frames(q, k, a, positions, lattice, radius=16.0):
    """Frames of the method `max`: the neighbor with the largest logit, then the best one not along it.

    A logit is q_i . k_j / sqrt(dk) + a_i d^2; the second axis maximises logit + log(1 - |cosine to the first|).
    q, k: [n, H, dk]; a: [n, H], Å^-2; positions: [n, 3], Å; lattice: [3, 3] rows, Å; radius: Å. Returns
    [n, H, 3 axes, 3], right-handed and orthonormal, rows e1, e2, e3. Ties go to the first image found.
    """
    q, k, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, a, positions, lattice))
    n, heads, dk = q.shape
    shifts = _image_shifts(positions, lattice, radius)
    frames = np.zeros((n, heads, 3, 3))
    for i in range(n):
        distance, direction = _neighbors(i, positions, shifts)
        for h in range(heads):
            logit = (k[:, h] @ q[i, h] / math.sqrt(dk))[:, None] + a[i, h] * distance**2  # [n, K]
            logit = np.where(distance > 0, logit, -np.inf)  # never the atom itself
            e1 = direction[np.unravel_index(np.argmax(logit), logit.shape)]
            cosine = np.abs(direction @ e1)
            second = logit + np.log(np.maximum(1 - cosine, _MIN_PERPENDICULARITY))
            second = np.where(cosine < _COLLINEAR, second, -np.inf)
            u2 = direction[np.unravel_index(np.argmax(second), second.shape)]
            e2 = u2 - (u2 @ e1) * e1
            e2 /= np.linalg.norm(e2)
            frames[i, h] = e1, e2, np.cross(e1, e2)
    return frames


def _self_attention(config, params, block, x, positions, lattice, radius, frames):
    """Multi-head attention of one block: (output [n, model_dim], frames or None, a [n, H])."""
    name = f"encoder.layers.{block}.self_attn."
    heads = config["head_num"]
    dk = config["k_dim"] or config["model_dim"] // heads
    dv = config["v_dim"] or config["model_dim"] // heads
    bias_q, bias_k, bias_v = np.split(params[name + "in_proj_bias"], [heads * dk, 2 * heads * dk])
    q = (x @ params[name + "q_proj_weight"].T + bias_q).reshape(-1, heads, dk)
    k = (x @ params[name + "k_proj_weight"].T + bias_k).reshape(-1, heads, dk)
    v = (x @ params[name + "v_proj_weight"].T + bias_v).reshape(-1, heads, dv)

    scale, shift = params[name + "gauss_scale"]
    width_logit = (q * params[name + "lattice_pos_weights"].reshape(heads, dk)).sum(-1)
    width_logit = (width_logit + shift) * scale
    floor, beta = config["gauss_lb_real"], config["positive_func_beta"]
    rho = (1 - floor) * _elu(beta * width_logit / (1 - floor)) + 1
    a = -rho / (2 * _scale_real(config, block) ** 2)  # [n, H]

    if config["value_pe_angle_real"] == 0:
        frames = None
    elif frames is None:
        frames = max_frames(q, k, a, positions, lattice, radius)
    out, distance_sum, angle_sum = lattice_sums(q, k, v, a, positions, lattice, frames, config, radius, block)
    if config["value_pe_dist_real"]:
        weight = params[name + "pe_dist_proj"][0]  # [H, dv, D]
        out = out + config["value_pe_dist_coef"] * np.einsum("hvd,nhd->nhv", weight, distance_sum)
    for axis in range(0 if frames is None else 3):
        weight = params[f"{name}proj_angle{axis + 1}"][0]  # [H, dv, Da]
        projected = np.einsum("hvd,nhd->nhv", weight, angle_sum[:, :, axis])
        out = out + config["value_pe_angle_coef"] * projected
    return _linear(params, name + "out_proj", out.reshape(-1, heads * dv)), frames, a


def _head(config, params, x):
    """Pooling over the atoms and the output layers: [n, model_dim] -> [T]."""
    if config["pre_pooling_op"] == "w+relu":
        x = _linear(params, "proj_before_pooling.0", x)
    if config["pre_pooling_op"] in ("relu", "w+relu"):
        x = _relu(x)
    x = x.mean(0) if config["pooling"] == "avr" else x.max(0)
    last = max(int(name.split(".")[1]) for name in params if name.startswith("mlp."))
    for layer in range(0, last, 3):  # Linear, normalisation, ReLU
        x = _relu(_linear(params, f"mlp.{layer}", x))
    return _linear(params, f"mlp.{last}", x)


def _image_shifts(positions, lattice, radius):
    """[K, 3] translations n L, n in [-R1, R1] x ..., that hold every p_j + n L within radius of every p_i."""
    inverse = np.linalg.inv(lattice)
    heights = 1 / np.linalg.norm(inverse, axis=0)  # [3] distances between opposite faces of the cell, Å
    fractional = positions @ inverse
    reach = radius / heights + np.ptp(fractional, axis=0)
    axes = [np.arange(-limit, limit + 1) for limit in np.ceil(reach).astype(int)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3) @ lattice


def _neighbors(i, positions, shifts):
    """Distances [n, K] and unit vectors [n, K, 3] from atom i to every image; the atom itself has zeros."""
    vector = (positions - positions[i])[:, None] + shifts
    distance = np.linalg.norm(vector, axis=-1)
    return distance, vector / np.where(distance > 0, distance, 1)[..., None]


def _distance_centers(config, block):
    """Centers [D] and standard deviation of the distance Gaussians, Å."""
    count, r_max = config["value_pe_dist_real"], config["value_pe_dist_max"]
    if count == 0:
        return np.zeros(0), 1.0
    r_max = r_max if r_max > 0 else -r_max * _scale_real(config, block)
    return np.arange(1, count + 1) * r_max / count, config["value_pe_dist_wscale"] * r_max / count


def _angle_centers(config, count):
    """Centers [Da] and standard deviation of the Gaussians of a cosine."""
    if count == 0:
        return np.zeros(0), 1.0
    centers, spacing = np.linspace(0 if config["cos_abs"] else -1, 1, count, retstep=True)
    return centers, config["value_pe_angle_wscale"] * spacing


def _scale_real(config, block):
    """r0 of the block, Å: one for all blocks or one for each."""
    scales = np.atleast_1d(config["scale_real"])
    return float(scales[0] if len(scales) == 1 else scales[block])


def _gaussians(x, centers, sigma):
    return np.exp(-((x[..., None] - centers) ** 2) / (2 * sigma**2))


def _log_sum_exp(x):
    return x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))


def _linear(params, name, x):
    return x @ params[name + ".weight"].T + params[name + ".bias"]


def _relu(x):
    return np.maximum(x, 0)


def _elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


_ACTIVATIONS = {"relu": _relu, "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))}
_SUPPORTED = {
    "domain": ("real",), "gauss_state": ("q",), "normalize_gauss": (True,), "t_fixup_init": (True,),
    "value_pe_wave_real": (0,), "use_cgcnn_feat": (False,), "norm_type": ("no",), "pooling": ("avr", "max"),
    "pre_pooling_op": ("no", "relu", "w+relu"), "t_activation": tuple(_ACTIVATIONS),
}  # fmt: skip


def _check_supported(config, frames):
    supported = dict(_SUPPORTED)
    if config["value_pe_angle_real"] and frames is None:
        supported["frame_method"] = ("max",)
    for key, allowed in supported.items():
        if config[key] not in allowed:
            raise ValueError(f"brute_force: {key}={config[key]!r} is not written here; allowed: {allowed}")
