"""Errors a user can cause. Each message states the rule, the values and the way out."""


class UserError(ValueError):
    """Base of everything a user can put right; entry points print it without a traceback."""


class ConfigError(UserError):
    """A configuration field is unknown, malformed, or contradicts another field."""


class DataError(UserError):
    """A record, file or token store breaks a rule; the message starts with ``file:line`` where one exists."""


class StopError(DataError):
    """Stops also where bad records are dropped: a case the user asked to stop at, or a file that is broken."""


class CheckpointError(UserError):
    """A checkpoint is absent, incomplete, or belongs to another model."""
