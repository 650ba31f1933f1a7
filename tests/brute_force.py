"""Float64 brute-force evaluation of CrystalFramer for one crystal, in plain numpy: what the tests compare with.

Everything is computed in the nested form of the papers over an explicit box of lattice images. For an atom i,
a head, and every atom j of the cell, with r_ijn = p_j + n L - p_i:

    z_ij = log sum_n exp(a_i |r_ijn|^2)                  width of the attention, a < 0
    A_ij = softmax over j of (q_i . k_j / sqrt(dk) + z_ij)
    w_ijn = exp(a_i |r_ijn|^2 - z_ij)                     average over the images inside the pair (i, j)

so that a quantity g(r) is averaged over the neighbors (j, n) to sum_j A_ij sum_n w_ijn g(r_ijn). There are no
neighbor rows, no cutoff by distance and no factorised Gaussians. Meant for a few tens of atoms. A head that attends
in reciprocal space has a z_ij of its own (see `reciprocal_sums`) and averages values v_j only.

Images, attention weights and frames are in brute_force_frames.py. Of `adaptive_cutoff_sigma` only 0 is read: the
images are then n in [-lattice_range, lattice_range]^3, of the positions as given, unless there is a cutoff_radius.

Shapes: n atoms, H heads, of which R attend in real space, dk and dv channels per head, K lattice images or
reciprocal vectors, D distance and Da angle Gaussians, T targets.
"""

import math

import numpy as np
from brute_force_frames import frames, image_shifts, log_sum_exp, max_frames, neighbors, pair_weights

__all__ = ["frames", "lattice_sums", "max_frames", "predict", "reciprocal_sums"]

_EPS = 1e-5  # added to the variance in every normalisation


def predict(config, params, numbers, positions, lattice, radius=16.0, frames=None):
    """Evaluates the whole model on one crystal, in evaluation mode.

    Args:
      config: official hyperparameters by their official names.
      params: official state dict, name -> array (any float dtype; linear weights are [out, in]).
      numbers: [n] atomic numbers. positions: [n, 3] Cartesian, Å. lattice: [3, 3], rows are the vectors, Å.
      radius: every periodic image within this distance of every atom is summed (and some farther ones), Å.
      frames: optional list with one [n, H, 3, 3] per block that replaces the computed frames (rows are the
        axes; only the first R heads are read, nothing in a block without real heads). Needed in comparisons with
        frame_method `pca` and `weighted_pca`: the signs of axes computed here are those of numpy's eigenvectors.

    Returns:
      dict with `output` [T] (raw, not de-standardised), and with one entry per block the lists `frames`
      [n, R, 3, 3] (None without angles or real heads) and `alphas` [n, H]: the exponent a of the attention,
      of |r|^2 in Å^-2 for the first R heads, of |k|^2 in Å^2 for the others.

    Raises ValueError if the configuration asks for something that is not written here.
    """
    _check_supported(config, frames)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    positions, lattice = np.asarray(positions, np.float64), np.asarray(lattice, np.float64)

    x = params["input_embeddings.weight"][:, np.asarray(numbers) - 1].T  # [n, model_dim]
    used_frames, alphas = [], []
    for block in range(config["num_layers"]):
        name = f"encoder.layers.{block}."
        given = None if frames is None else frames[block]
        attended, used, a = _self_attention(config, params, block, x, positions, lattice, radius, given)
        x = _encoder_norm(config, params, name + "norm1", x + attended)
        hidden = _ACTIVATIONS[config["t_activation"]](_linear(params, name + "linear1", x))
        x = _encoder_norm(config, params, name + "norm2", x + _linear(params, name + "linear2", hidden))
        used_frames, alphas = [*used_frames, used], [*alphas, a]
    x = _encoder_norm(config, params, "encoder.norm", x)
    return {"output": _head(config, params, x), "frames": used_frames, "alphas": alphas}


def lattice_sums(q, k, v, a, positions, lattice, frames, config, radius=16.0, block=0):
    """Attention-weighted sums over the periodic neighbors of every atom of one crystal, in one block.

    Args:
      q, k: [n, H, dk]. v: [n, H, dv]. a: [n, H] = -rho / (2 r0^2), Å^-2.
      positions: [n, 3], Å. lattice: [3, 3] rows, Å. frames: [n, H, 3 axes, 3] or None (no angle sums).
      config: official hyperparameters; the value_pe_*, cos_abs, scale_real and cutoff keys are read.
      radius: as in `predict`. block: index of the block, which selects its scale_real.

    Returns:
      value sum [n, H, dv]; distance-basis sum [n, H, D], self term (distance 0) included; angle-basis sum
      [n, H, 3, Da], self term left out of the sum but not of the softmax (Da = 0 without frames).
    """
    q, k, v, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, v, a, positions, lattice))
    n, heads, _ = q.shape
    shifts = image_shifts(positions, lattice, radius, _box(config))
    distance_centers, distance_sigma = _distance_centers(config, block)
    angle_count = config["value_pe_angle_real"] if frames is not None else 0
    angle_centers, angle_sigma = _angle_centers(config, angle_count)
    value_sum = np.zeros((n, heads, v.shape[-1]))
    distance_sum = np.zeros((n, heads, len(distance_centers)))
    angle_sum = np.zeros((n, heads, 3, len(angle_centers)))

    for i in range(n):
        distance, direction = neighbors(i, positions, shifts)  # [n, K], [n, K, 3]
        distance_basis = _gaussians(distance, distance_centers, distance_sigma)  # [n, K, D]
        for h in range(heads):
            attention, within_pair = pair_weights(q[i, h], k[:, h], a[i, h], distance)
            value_sum[i, h] = attention @ v[:, h]
            distance_sum[i, h] = attention @ np.einsum("jn,jnd->jd", within_pair, distance_basis)
            for axis in range(0 if frames is None else 3):
                cosine = direction @ frames[i, h, axis]  # [n, K]
                cosine = np.abs(cosine) if config["cos_abs"] else cosine
                angle_basis = _gaussians(cosine, angle_centers, angle_sigma)  # [n, K, Da]
                of_pairs = np.einsum("jn,jnd->jd", within_pair * (distance > 0), angle_basis)
                angle_sum[i, h, axis] = attention @ of_pairs
    return value_sum, distance_sum, angle_sum


def reciprocal_sums(q, k, v, a, positions, lattice, lattice_range):
    """Attention-weighted values of every atom of one crystal for heads that attend in reciprocal space.

    With V the volume of the cell and B its reciprocal vectors, 2 pi included, the softmax over the atoms j of the
    cell is that of q_i . k_j / sqrt(dk) + z_ij, where the sum has the reciprocal vectors g = n B, n in
    [-lattice_range, lattice_range]^3:

        z_ij = log max(sum_g exp(a_i |g|^2) cos(g . (p_j - p_i)), 1e-6) + 1.5 log(-4 pi a_i) - log V

    q, k: [n, H, dk]. v: [n, H, dv]. a: [n, H], negative, Å^2. positions: [n, 3], Å. lattice: [3, 3] rows, Å.
    Returns [n, H, dv].
    """
    q, k, v, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, v, a, positions, lattice))
    n, heads, dk = q.shape
    reciprocal = 2 * np.pi * np.linalg.inv(lattice).T  # rows, 1/Å
    vectors = image_shifts(positions, reciprocal, 0.0, box=lattice_range)  # [K, 3]
    result = np.zeros((n, heads, v.shape[-1]))
    for i in range(n):
        waves = np.cos((positions - positions[i]) @ vectors.T)  # [n, K]
        for h in range(heads):
            total = waves @ np.exp(a[i, h] * (vectors**2).sum(-1))  # [n]
            z = np.log(np.maximum(total, 1e-6))
            z += 1.5 * np.log(-4 * np.pi * a[i, h]) - np.log(abs(np.linalg.det(lattice)))
            score = k[:, h] @ q[i, h] / math.sqrt(dk) + z
            result[i, h] = np.exp(score - log_sum_exp(score)) @ v[:, h]
    return result


def _self_attention(config, params, block, x, positions, lattice, radius, given):
    """Multi-head attention of one block: (output [n, model_dim], frames [n, R, 3, 3] or None, a [n, H])."""
    name = f"encoder.layers.{block}.self_attn."
    heads = config["head_num"]
    dk = config["k_dim"] or config["model_dim"] // heads
    dv = config["v_dim"] or config["model_dim"] // heads
    bias_q, bias_k, bias_v = np.split(params[name + "in_proj_bias"], [heads * dk, 2 * heads * dk])
    q = (x @ params[name + "q_proj_weight"].T + bias_q).reshape(-1, heads, dk)
    k = (x @ params[name + "k_proj_weight"].T + bias_k).reshape(-1, heads, dk)
    v = (x @ params[name + "v_proj_weight"].T + bias_v).reshape(-1, heads, dv)
    width_logit = _width_logit(config, params, name, x, q)

    domain = _domain(config, block)
    real_heads = {"real": heads, "multihead": heads // 2}.get(domain, 0)
    real, reciprocal = np.s_[:, :real_heads], np.s_[:, real_heads:]
    a = np.zeros((len(x), heads))
    out = np.zeros((len(x), heads, dv))
    used = None
    if real_heads:
        a[real] = -_rho(config, "gauss_lb_real", width_logit[real]) / (2 * _scale(config, "scale_real", block) ** 2)
        if config["value_pe_angle_real"]:
            if given is None:
                inputs = q[real], k[real], a[real], positions, lattice
                used = frames(config["frame_method"], *inputs, radius, _box(config))
            else:
                used = np.asarray(given, np.float64)[real]
        sums = lattice_sums(q[real], k[real], v[real], a[real], positions, lattice, used, config, radius, block)
        out[real] = _project_sums(config, params, name, *sums)
    if real_heads < heads:
        rho = _rho(config, "gauss_lb_reci", width_logit[reciprocal])
        scale = _scale(config, "scale_reci", block)
        a[reciprocal] = -(scale**2) / (2 * rho) if domain == "RECI" else -rho * scale**2 / 2
        arrays = (array[reciprocal] for array in (q, k, v, a))
        out[reciprocal] = reciprocal_sums(*arrays, positions, lattice, config["lattice_range"])
    return _linear(params, name + "out_proj", out.reshape(-1, heads * dv)), used, a


def _project_sums(config, params, name, values, distance_sum, angle_sum):
    """The three sums of `lattice_sums`, projected and added: [n, R, dv]. Weights of other heads are left out."""
    out = values
    heads = out.shape[1]
    if config["value_pe_dist_real"]:
        weight = params[name + "pe_dist_proj"][0, :heads]  # [R, dv, D]
        out = out + config["value_pe_dist_coef"] * np.einsum("hvd,nhd->nhv", weight, distance_sum)
    for axis in range(3 if angle_sum.shape[-1] else 0):
        weight = params[f"{name}proj_angle{axis + 1}"][0, :heads]  # [R, dv, Da]
        projected = np.einsum("hvd,nhd->nhv", weight, angle_sum[:, :, axis])
        out = out + config["value_pe_angle_coef"] * projected
    return out


def _width_logit(config, params, name, x, q):
    """[n, H] what the width of the attention depends on, from the layer's input x [n, model_dim] or q [n, H, dk]."""
    n, heads, _ = q.shape
    weight = params[name + "lattice_pos_weights"].reshape(heads, -1)  # [H, dk or model_dim]
    if config["gauss_state"].startswith("q"):
        width_logit = (q * weight).sum(-1)
    elif config["gauss_state"] == "1":
        width_logit = np.tile(weight.sum(-1), (n, 1))
    else:
        width_logit = x @ weight.T
    if not config["normalize_gauss"]:
        return width_logit
    scale, shift = params[name + "gauss_scale"]
    return (width_logit + shift) * scale


def _rho(config, floor_key, width_logit):
    """Positive factor of the attention's exponent, above its floor: that of gauss_lb_real or gauss_lb_reci."""
    floor = config[floor_key]
    return (1 - floor) * _elu(config["positive_func_beta"] * width_logit / (1 - floor)) + 1


def _head(config, params, x):
    """Pooling over the atoms and the output layers: [n, model_dim] -> [T]."""
    before = config["pre_pooling_op"]
    if before.startswith("w"):
        x = _linear(params, "proj_before_pooling.0", x)
    if before == "w+bn+relu":
        x = _head_norm(config, params, "proj_before_pooling.1", x)
    if before != "no":
        x = _relu(x)
    x = x.mean(0) if config["pooling"] == "avr" else x.max(0)
    last = max(int(name.split(".")[1]) for name in params if name.startswith("mlp."))
    for layer in range(0, last, 3):  # Linear, normalisation, ReLU
        x = _linear(params, f"mlp.{layer}", x)
        x = _relu(_head_norm(config, params, f"mlp.{layer + 1}", x))
    return _linear(params, f"mlp.{last}", x)


def _head_norm(config, params, name, x):
    """Normalisation norm_type of the features [..., C] in the head; batch normalisation with its running statistics."""
    match config["norm_type"]:
        case "no":
            return x
        case "in":
            return _standardize(x)
        case "ln":
            return _layer_norm(params, name, x)
        case "bn":
            x = (x - params[name + ".running_mean"]) / np.sqrt(params[name + ".running_var"] + _EPS)
            return x * params[name + ".weight"] + params[name + ".bias"]


def _encoder_norm(config, params, name, x):
    """Layer normalisation in the encoder; none with t_fixup_init."""
    return x if config["t_fixup_init"] else _layer_norm(params, name, x)


def _layer_norm(params, name, x):
    return _standardize(x) * params[name + ".weight"] + params[name + ".bias"]


def _standardize(x):
    """Features [..., C] less their mean, over the root of their biased variance."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + _EPS)


def _domain(config, block):
    """Space of the block: real, reci, RECI or multihead; the two of an interleaving take turns."""
    domains = config["domain"].split("-")
    return domains[block % len(domains)]


def _scale(config, key, block):
    """scale_real, Å, or scale_reci of the block: one for all blocks, or a list that the blocks go round in."""
    scales = np.atleast_1d(config[key])
    return float(scales[block % len(scales)])


def _box(config):
    """lattice_range if the images are that box of the cell, None if they are found by radius."""
    whole_box = config.get("adaptive_cutoff_sigma") == 0 and not config.get("cutoff_radius")
    return config["lattice_range"] if whole_box else None


def _distance_centers(config, block):
    """Centers [D] and standard deviation of the distance Gaussians, Å."""
    count, r_max = config["value_pe_dist_real"], config["value_pe_dist_max"]
    if count == 0:
        return np.zeros(0), 1.0
    r_max = r_max if r_max > 0 else -r_max * _scale(config, "scale_real", block)
    return np.arange(1, count + 1) * r_max / count, config["value_pe_dist_wscale"] * r_max / count


def _angle_centers(config, count):
    """Centers [Da] and standard deviation of the Gaussians of a cosine."""
    if count == 0:
        return np.zeros(0), 1.0
    centers, spacing = np.linspace(0 if config["cos_abs"] else -1, 1, count, retstep=True)
    return centers, config["value_pe_angle_wscale"] * spacing


def _gaussians(x, centers, sigma):
    return np.exp(-((x[..., None] - centers) ** 2) / (2 * sigma**2))


def _linear(params, name, x):
    return x @ params[name + ".weight"].T + params[name + ".bias"]


def _relu(x):
    return np.maximum(x, 0)


def _elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


_ACTIVATIONS = {"relu": _relu, "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))}
_SUPPORTED = {
    "domain": ("real", "reci", "RECI", "multihead", "real-reci", "reci-real", "real-RECI", "RECI-real"),
    "gauss_state": ("q", "q-headdim", "q-kdim", "1", "x", "x-norm", "x-xavier", "x-xn2"),
    "value_pe_wave_real": (0,), "value_pe_dist_reci": (0,), "value_pe_wave_reci": (0,), "use_cgcnn_feat": (False,),
    "norm_type": ("no", "ln", "in", "bn"), "pooling": ("avr", "max"), "t_activation": tuple(_ACTIVATIONS),
    "pre_pooling_op": ("no", "relu", "w+relu", "w+bn+relu"),
}  # fmt: skip


def _check_supported(config, frames):
    supported = dict(_SUPPORTED)
    if config["value_pe_angle_real"] and frames is None:
        supported["frame_method"] = ("max", "max_static", "weighted_pca", "pca", "lattice")
    for key, allowed in supported.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"brute_force: {key}={config[key]!r} is not written here; allowed: {allowed}")
