"""Errors that a user can act on.

Every message is one line, names the field or file at fault and says what to do instead. The command
line prints the line and exits with 2; in Python they are ordinary ValueErrors.
"""


class AquilineError(ValueError):
    """Bad input: the message names what is wrong and the remedy."""


class CheckpointError(AquilineError):
    """A model, draft or training checkpoint that cannot be read, or does not fit."""


class DataError(AquilineError):
    """Conversations or prompts that cannot be read; names the file and the line."""
