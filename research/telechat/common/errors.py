"""Errors that the user can fix. A command prints their message as one line and exits with code 1 (common/command.py).

Each message says what is wrong (the file, line, key or tensor), what was expected, what was found and what to do.
"""


class UserError(Exception):
    """Base class of all errors a user can fix."""


class ConfigError(UserError, ValueError):
    """A recipe, option or setting that cannot be used."""


class OldVersionError(ConfigError):
    """A version older than any that is supported."""


class VocabError(ConfigError):
    """A vocabulary file, token or text that cannot be used."""


class TrainingStopped(ConfigError):
    """Training ended early for a reason that the user can fix; the message names the step."""


class OutputBusyError(ConfigError):
    """Another process is writing the output."""


class OverwriteError(ConfigError):
    """A file would be replaced that none of these commands has written."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used."""


class ConversationError(UserError, ValueError):
    """A conversation that cannot be rendered; the message names its faulty message."""


class RecordError(UserError, ValueError):
    """A record that cannot be used. `kind` is a short key for the statistics, the text says what was found."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class WorkerError(UserError, RuntimeError):
    """A worker process failed."""


class SimulationError(UserError, RuntimeError):
    """The simulated Ascend runtime cannot be made or does not load."""


class ExecutionError(UserError, RuntimeError):
    """A compiled graph cannot be executed by the interpreter, or computes something else than it should."""
