"""The errors that users meet; each is also the builtin that a handler would expect.

Every message says what happened with which value, then what to do.
"""


class ProbeError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedModelError(ProbeError, NotImplementedError):
    """The attention of this model cannot be reached."""


class WiringError(ProbeError, RuntimeError):
    """What was read is not what the model computed: nothing that follows could be trusted."""


class StoreError(ProbeError, OSError):
    """A store cannot be read, written or resumed."""


class InputError(ProbeError, ValueError):
    """A value given by the user cannot be used."""


def first_line(error: Exception) -> str:
    r"""What an error of another package says, in one line.

    Example:
        >>> first_line(ValueError("\n no such file\nsee below"))
        'no such file'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
