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
