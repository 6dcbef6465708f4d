"""Errors a user can act on. Each carries the exit code with which the command line leaves."""


class MaeFastError(Exception):
    """Base of every error raised on purpose; the command line prints it in one line."""

    exit_code = 1


class ConfigError(MaeFastError, ValueError):
    """A configuration that cannot work, or a key that does not exist."""

    exit_code = 2


class BackendError(ConfigError):
    """A backend that was asked for by name cannot run; the message says why."""


class AccelerateError(ConfigError):
    """A model that the fused forward cannot stand for; the message says which part and why."""


class DataError(MaeFastError):
    """No usable videos, or more broken ones than the run allows."""

    exit_code = 65


class NonFiniteError(MaeFastError):
    """The loss was NaN or infinite more often than the run allows."""

    exit_code = 70


class CheckpointError(MaeFastError):
    """A checkpoint could not be written, or cannot be read."""

    exit_code = 73


class Interrupted(MaeFastError):
    """A signal, or a lost process: the run was saved and is resumed by the same command."""

    exit_code = 75
