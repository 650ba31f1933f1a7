"""The error of structures that cannot be used."""

from crystalframer_jax.errors import UserError


class CrystalError(UserError, ValueError):
    """A structure that cannot be used; the message is one line naming the file or record and the remedy."""
