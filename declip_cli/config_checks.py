"""Checks of configuration values: what must hold, and the sentence that is said where it does not."""

from collections.abc import Mapping

from declip_cli.errors import ConfigError


def require(condition: bool, message: str, *, remedy: str) -> None:
    """Raise ConfigError unless a condition on the configuration holds.

    Args:
        condition: what must be true.
        message: names the option and the values found and expected.
        remedy: how to mend it.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError(message, remedy=remedy)


def require_fractions(section: str, values: Mapping[str, float]) -> None:
    """Raise ConfigError unless every value lies in [0, 1].

    Args:
        section: the configuration section, for the message.
        values: key → value.

    Raises:
        ConfigError: a value is outside [0, 1].
    """
    for key, value in values.items():
        require(
            0.0 <= value <= 1.0,
            f"{section}.{key} is a fraction in [0, 1] (got {value})",
            remedy=f"--set {section}.{key}=…",
        )


def require_at_least(lowest: int, section: str, values: Mapping[str, float | None]) -> None:
    """Raise ConfigError unless every value is at least as large as a bound.

    Args:
        lowest: the bound.
        section: the configuration section, for the message.
        values: key → value; None is left to be settled later.

    Raises:
        ConfigError: a value is too small.
    """
    rule = f"must be at least {lowest}" if lowest else "cannot be negative"
    for key, value in values.items():
        message = f"{section}.{key} {rule} (got {value})"
        require(value is None or value >= lowest, message, remedy=f"--set {section}.{key}={lowest}")
