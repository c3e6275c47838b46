"""Errors that a user can act on.

Every message is one line, names the field or file at fault and says what to do instead. The command
line prints the line and exits with 2; in Python they are ordinary ValueErrors.
"""


class AquilineError(ValueError):
    """Bad input: the message names what is wrong and the remedy."""


class CheckpointError(AquilineError):
    """A model, draft or training checkpoint that cannot be read, or does not fit."""


class EngineError(AquilineError):
    """The engine cannot answer: it is starting, its queue is full, or it ended under the request.

    Attributes:
        busy: whether the queue is full; else the engine is away.
    """

    def __init__(self, message: str, busy: bool = False) -> None:
        super().__init__(message)
        self.busy = busy


class DataError(AquilineError):
    """Conversations or prompts that cannot be read; names the file and the line."""
