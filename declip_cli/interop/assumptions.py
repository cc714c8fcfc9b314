"""What the checkpoint does not record: taken from the user (`--assume`), else assumed and reported."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from declip_cli.errors import ChoiceError, ConfigError

T = TypeVar("T")


def _activation(text: str) -> bool:
    return {"quick_gelu": True, "gelu": False}[text.lower()]


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _channels(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3:
        raise ValueError(text)
    return values


def _interpolation(text: str) -> str:
    return {"bilinear": "bilinear", "bicubic": "bicubic"}[text.lower()]


def _crop(text: str) -> str:
    return {"round": "round", "floor": "floor"}[text.lower()]


_KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "activation": (_activation, "quick_gelu or gelu"),
    "heads": (_count, "a whole number, of the image tower"),
    "text_heads": (_count, "a whole number"),
    "mean": (_channels, "one number or three with commas, in [0, 1]"),
    "std": (_channels, "one number or three with commas, in [0, 1]"),
    "resize": (_count, "pixels of the shorter side before the center crop"),
    "interpolation": (_interpolation, "bilinear or bicubic"),
    "crop": (_crop, "round or floor, of half an odd margin"),
}
PREPROCESSING_KEYS = ("mean", "std", "resize", "interpolation", "crop")
"""Keys that concern the images, not the towers."""


def parse_assumptions(words: Iterable[str]) -> dict[str, Any]:
    """Read the words of `--assume`.

    Args:
        words: such as `activation=gelu` or `mean=0.5,0.5,0.5`.

    Returns:
        Key → value.

    Raises:
        ConfigError: a key or a value is none that can be assumed.
    """
    given = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in _KEYS or not equals:
            raise ChoiceError(f"--assume has no {word!r:.60}", remedy=f"--assume takes KEY=VALUE: {', '.join(_KEYS)}")
        parse, expected = _KEYS[key]
        try:
            given[key] = parse(text)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"--assume {key} is {expected} (got {text!r:.60})", remedy=f"--assume {key}=VALUE"
            ) from error
    return given


@dataclass(slots=True)
class Assumptions:
    """Resolves what is unknown, and records each assumption."""

    given: Mapping[str, Any] = field(default_factory=dict)
    """By the user."""
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, known: T | None, usual: T, *, words: str) -> T:
        """Choose what the user said, else what is known, else what is usual.

        Args:
            key: of `--assume`.
            known: by the file or its project; None where neither says.
            usual: what to assume.
            words: what is assumed and why, a clause.

        Returns:
            The value.
        """
        if key in self.given:
            chosen: T = self.given[key]
            return chosen
        if known is not None:
            return known
        self.notes.append(f"assumed that {words}; the checkpoint does not say (else --assume {key}=…)")
        return usual
