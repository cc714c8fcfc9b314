"""Errors a user can fix: what happened, and what to do about it."""

from functools import partial
from typing import Any, ClassVar


class DeclipError(Exception):
    """Say what went wrong, where, what was found, what was expected, and how to fix it.

    Args:
        message: one sentence without a full stop, with the offending value in it.
        remedy: a command or an option that fixes it; printed on a line of its own.
    """

    exit_code: ClassVar[int] = 1
    """What the command ends with."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), remedy=self.remedy), (self.message,), vars(self)


class ConfigError(DeclipError):
    """An option, a recipe or a configuration key cannot be used."""


class ChoiceError(ConfigError):
    """A value that is not among the choices: wrong usage, like an unknown option."""

    exit_code: ClassVar[int] = 2


class DataError(DeclipError):
    """The user's images, captions, tables or shards cannot be read.

    Args:
        message: as of DeclipError.
        remedy: as of DeclipError.
        cause: a few words under which bad samples of the same kind are counted, such as `"corrupt"`.
    """

    def __init__(self, message: str, *, remedy: str, cause: str = "unreadable") -> None:
        super().__init__(message, remedy=remedy)
        self.cause = cause


class ModelError(DeclipError):
    """A model folder or checkpoint is missing, incomplete or does not fit."""


class TrainError(DeclipError):
    """A pre-training run cannot start or continue."""


class EvaluateError(DeclipError):
    """A data set cannot be scored."""


def require(condition: bool, message: str, *, remedy: str) -> None:
    """Raise ConfigError unless a condition on the configuration holds; the message names option and values."""
    if not condition:
        raise ConfigError(message, remedy=remedy)
