"""Errors that users can mend: each message names what was wrong, where, and what would be right."""


class ConfigError(ValueError):
    """A config that cannot be trained as written. The message names the key, what was wrong and what would be right."""


class DataError(ValueError):
    """A row of the data that cannot be trained on. The message names it by sid and fid."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
