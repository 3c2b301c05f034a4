"""Errors that a user can act on, each with the exit status of the command line."""

from spinlock_fast.messages import printable


class SpinlockFastError(Exception):
    """Base of the errors below; its text is one printable line that says what to do."""

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(SpinlockFastError, ValueError):
    """A setting is unknown, of the wrong type, or impossible."""

    exit_status = 2


class DataError(SpinlockFastError, ValueError):
    """The data cannot serve: missing, unreadable, damaged, mismatched, constant, too few rows."""

    exit_status = 3


class OutputError(SpinlockFastError):
    """A result cannot be written."""

    exit_status = 4


class TrainingError(SpinlockFastError):
    """Training cannot go on, for instance because a loss is not finite."""


class Interrupted(SpinlockFastError):  # noqa: N818 - an order obeyed, not an error
    """A signal stopped the run; what can be resumed has been saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had: Python's and NumPy's MemoryError, and what torch raises on a CPU or a GPU."""
    marks = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )
