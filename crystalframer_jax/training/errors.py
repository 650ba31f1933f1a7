"""What ends a training."""

from crystalframer_jax.errors import UserError


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says where and why."""
