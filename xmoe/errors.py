"""The mistakes a user can make, as exceptions whose message is one line: what was found, what was expected, what to try.

Commands print the message after `error: ` and exit with 2 (see :mod:`xmoe.command`). Our own invariants are `assert`s.
"""


class XmoeError(Exception):
    """Base of all errors that are the user's to mend."""


class ConfigError(XmoeError):
    """A setting, flag or combination of settings that cannot work."""


class DataError(XmoeError):
    """Text, rows or statistics that are missing, malformed or too small."""


class CheckpointError(XmoeError):
    """A checkpoint that is missing, incomplete, contradictory or of another model."""
