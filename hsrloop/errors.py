"""Every error a user can cause, as one tree.

HsrloopError              one clear line on stderr and exit code 2
|- ConfigError            an option, preset or configuration file
|- DatasetError           data.yaml, images, labels
|- WeightsError           base weights: missing, truncated, not YOLOv8, not safe to open
|- CheckpointError        a run that cannot be resumed
|- DeviceError            the device asked for is absent or unusable
|- OutputError            the output folder or its disk
|- ResourceError          memory ran out, and no smaller settings are left
|- DivergedError          losses or weights are no numbers any more
`- DependencyError        a library that an option needs is not installed

Only the command line turns these into exit code 2; anything else is a defect of hsrloop and keeps
its traceback.
"""

from __future__ import annotations


class HsrloopError(Exception):
    """Base of all errors that the user can mend; the message is the value, the rule, the remedy."""


class ConfigError(HsrloopError):
    """An option, a preset or a configuration file is wrong."""


class DatasetError(HsrloopError):
    """The data set cannot be used as it is."""


class WeightsError(HsrloopError):
    """Base weights are missing, damaged, of another kind, or not safe to open."""


class CheckpointError(HsrloopError):
    """A checkpoint cannot be resumed."""


class DeviceError(HsrloopError):
    """The device asked for is absent or cannot be used."""


class OutputError(HsrloopError):
    """The output folder cannot be written, or its disk is too full."""


class ResourceError(HsrloopError):
    """Memory ran out, and there is nothing smaller to try."""


class DivergedError(HsrloopError):
    """Training diverged: losses or weights are no finite numbers."""


class DependencyError(HsrloopError):
    """An optional library that a requested feature needs is not installed."""


def raised_from(error: BaseException) -> BaseException | None:
    """Return the error that one was raised from, or while handling; None: it was the first."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def first_line(error: BaseException) -> str:
    """Return what an error says first; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
