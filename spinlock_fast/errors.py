"""Errors that a user can act on, each with the exit status of the command line."""

from spinlock_fast.messages import printable


class SpinlockFastError(Exception):
    """Base of the errors below; each argument is one line that says what to do."""

    exit_status = 1
    repeats_rank_0 = False  # of a distributed run, whose rank 0 prints it

    @property
    def lines(self) -> list[str]:
        """One printable line per problem."""
        return [printable(str(problem)) for problem in self.args]

    def __str__(self) -> str:
        return "; ".join(self.lines)


class ConfigError(SpinlockFastError, ValueError):
    """A setting is unknown, of the wrong type, or impossible."""

    exit_status = 2


class DataError(SpinlockFastError, ValueError):
    """The data cannot be used: missing, unreadable, damaged, mismatched, constant, too few rows."""

    exit_status = 3


class OutputError(SpinlockFastError):
    """A result cannot be written."""

    exit_status = 4


class TrainingError(SpinlockFastError):
    """Training cannot continue, for instance because a loss is not finite."""


class DriftError(SpinlockFastError):
    """Rows that have drifted from those of training, where --fail-on asks for an error."""

    exit_status = 5


class DistributedError(SpinlockFastError):
    """Another process of a distributed run ended, or cannot be reached."""


class Interrupted(SpinlockFastError):  # noqa: N818 - the requested outcome, not an error
    """A signal stopped the run; the state to resume from has been saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: MemoryError of Python and NumPy, or torch's RuntimeError on a CPU or a GPU."""
    marks = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )
