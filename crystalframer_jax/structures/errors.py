"""The errors of structures that cannot be used."""

from collections.abc import Sequence

from crystalframer_jax.errors import UserError


class CrystalError(UserError, ValueError):
    """A structure that cannot be used; the message is one line naming the file or record and the remedy."""


class SiteError(CrystalError):
    """A structure that cannot be used because of some of its sites."""

    def __init__(self, message: str, sites: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.sites = tuple(sites)  # numbers, from 0; of a site and its own image twice the same
