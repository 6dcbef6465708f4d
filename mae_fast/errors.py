"""Errors a user can act on. Each carries the exit code with which the command line leaves.

0    done
1    a defect of mae_fast: a traceback
2    wrong arguments or configuration (ConfigError and its kinds)
65   no usable videos, a damaged index or list (DataError)
70   not finite too often (NonFiniteError)
71   too little memory (OutOfMemory)
73   cannot write, or a checkpoint cannot be read (WriteError, CheckpointError)
75   told to stop: saved, the same command goes on (Interrupted)
130  Ctrl-C outside of a run
141  whoever read the output is gone
"""


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


class OutOfMemory(MaeFastError):
    """A device's memory does not hold a step: the run was saved."""

    exit_code = 71


class WriteError(MaeFastError):
    """A file could not be written: a full or read-only disk, or something else in its place."""

    exit_code = 73


class CheckpointError(MaeFastError):
    """A checkpoint could not be written, or cannot be read."""

    exit_code = 73


class Interrupted(MaeFastError):
    """A signal (`told`) or a `lost` process: the run was saved, and the same command resumes it."""

    exit_code = 75
    told, lost = 0, False
