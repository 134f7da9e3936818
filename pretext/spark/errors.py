"""What SparK refuses, and what it warns of."""


class SparseUnsupported(RuntimeError):
    """A backbone does something that has no exact sparse form; the message names the operation and the module.

    Not a TypeError: Python's operators would replace that by their own "unsupported operand" message.
    """


class UntrainedWarning(UserWarning):
    """A good part of the backbone has no part in the maps that are used: it keeps the weights it has."""
