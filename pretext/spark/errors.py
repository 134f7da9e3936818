"""The refusal that SparK's encoders raise."""


class SparseUnsupported(RuntimeError):
    """A backbone does something that has no exact sparse form; the message names the operation and the module.

    Not a TypeError: Python's operators would replace that by their own "unsupported operand" message.
    """
