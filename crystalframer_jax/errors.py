"""The base of all errors that the user can mend."""


class UserError(Exception):
    """Something in a file, a configuration or a run is wrong; the message is one line with the remedy.

    The command lines print it without a traceback.
    """
