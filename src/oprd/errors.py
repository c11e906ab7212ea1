"""What can go wrong, by kind. Every message says what was given, what is allowed, what to do."""


class OprdError(ValueError):
    """Base of every error a user can cause; the command line prints it without a traceback and exits with 2."""


class ConfigError(OprdError):
    """A recipe key, value or combination is not allowed."""


class DataError(OprdError):
    """A dataset is missing, empty or malformed."""


class OverlongPrompt(DataError):
    """A prompt leaves no room for a completion."""


class ModelError(OprdError):
    """A model or tokenizer cannot be used as asked."""


class TeacherMismatch(OprdError):
    """The teacher does not provide what the objective needs, or does not fit the student."""


class ServerError(OprdError):
    """A server, a teacher's or one that writes rollouts, cannot be used, or its budget is used up. What a teacher answered
    before is in the cache."""


class DoesNotFit(OprdError):
    """The run needs more memory than its device has."""


class RunFolderError(OprdError):
    """The output folder, or a checkpoint in it, cannot be used."""


class DiskError(OprdError):
    """A file cannot be written, because the disk is full or read-only; the command line exits with 3."""


class TrainingStopped(OprdError):
    """Training stopped by itself: the cause is in the message, the last checkpoint is intact."""


class Interrupted(Exception):
    """The user asked to stop, by a signal; a checkpoint of the last whole step is on disk."""

    def __init__(self, message: str = "stopped", signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal
