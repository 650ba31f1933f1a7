"""Home of the GPU kernels (imported as `crystalframer_jax.kernels`).

A kernel here has the signature of the XLA reference in `crystalframer_jax.model.attention` and imports nothing but
jax. There is none yet: every device runs the reference.
"""
