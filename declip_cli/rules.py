"""What numbers in settings may be; a rule is part of the annotation of its field."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, TypeAlias, get_args, get_type_hints

from declip_cli.errors import require


@dataclass(frozen=True, slots=True)
class Rule:
    """What a number must be; it is part of the annotation of its field. None is resolved later."""

    words: str
    """Follows the name of the setting in the message."""
    holds: Callable[[float], bool]


Fraction: TypeAlias = Annotated[float, Rule("is a fraction in [0, 1]", lambda value: 0 <= value <= 1)]
FractionBelow1: TypeAlias = Annotated[float, Rule("is in [0, 1)", lambda value: 0 <= value < 1)]
Positive: TypeAlias = Annotated[float, Rule("must be positive", lambda value: 0 < value < math.inf)]
NotNegative: TypeAlias = Annotated[float, Rule("cannot be negative", lambda value: value >= 0)]
AtLeast0: TypeAlias = Annotated[int, Rule("cannot be negative", lambda value: value >= 0)]
AtLeast1: TypeAlias = Annotated[int, Rule("must be at least 1", lambda value: value >= 1)]


def check_rules(section: str, config: Any) -> None:  # noqa: ANN401
    """Hold the fields of a section against the rules in their annotations.

    Raises:
        ConfigError: a value breaks its rule; the remedy is the default.
    """
    for key, rule, default in _rules_of(type(config)):
        value = getattr(config, key)
        named = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, item in named.items():
            message = f"{section}.{name} {rule.words} (got {item})"
            require(item is None or rule.holds(item), message, remedy=f"--set {section}.{name}={default}")


def _rules_of(kind: type) -> list[tuple[str, Rule, str]]:
    """List each rule of a section with the field's name and default, as `--set` takes it."""
    hints, found = get_type_hints(kind, include_extras=True), []
    for one in fields(kind):
        default = "…" if one.default is MISSING else "none" if one.default is None else str(one.default)
        for part in (hints[one.name], *get_args(hints[one.name])):
            rules = [extra for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Rule)]
            found += [(one.name, rule, default) for rule in rules]
    return found
