"""GPU kernels (imported as `crystalframer_jax.kernels`) for what `crystalframer_jax.model` also does by XLA operations.

They are written in Pallas for its Triton backend. `crystalframer_jax.model.implementation` chooses between the two.
"""
