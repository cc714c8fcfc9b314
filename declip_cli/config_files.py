"""Configurations in and out: TOML files, recipes, `--set section.key=value`, JSON beside the weights."""

import copy
import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from declip_cli.assets import asset_path
from declip_cli.errors import ChoiceError, ConfigError
from declip_cli.files import parse_json

T = TypeVar("T")
_RENAMED = {("data", "part"): "split", ("augment", "mode"): None}
"""Section and key of earlier versions → key of today; None where nothing reads it any more."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file: section → key → value, as written.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration file {path}: {error.strerror}", remedy="check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", remedy="write lines such as: batch_size = 256"
        ) from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a run, section → key → value: a TOML file, or the `config.json` that a run has written.

    Raises:
        ConfigError: the file is missing or is neither.
    """
    if path.suffix != ".json":
        return read_toml(path)
    try:
        settings = parse_json(path.read_bytes())["config"]
        if not isinstance(settings, dict):
            raise TypeError("config is not an object")
        return with_new_names(settings)[0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read the settings in {path}: {error}", remedy="--config takes a TOML file or a run's config.json"
        ) from error


def with_new_names(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename the keys of earlier versions in unchecked settings; return them and a note for each that changed."""
    renamed, notes = copy.deepcopy(dict(settings)), []
    for (section, old), new in _RENAMED.items():
        values = renamed.get(section)
        if isinstance(values, dict) and old in values:
            value = values.pop(old)
            if new is not None:
                values.setdefault(new, value)
            notes.append(f"note: {section}.{old} is " + (f"called {section}.{new} now" if new else "not used any more"))
    return renamed, notes


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn words `section.key=value` into nested sections; a value is TOML, or plain text where it is not.

    Raises:
        ConfigError: a word has no `=` or no section.
    """
    sections: dict[str, Any] = {}
    for word in assignments:
        dotted, equals, text = word.partition("=")
        names = dotted.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise ConfigError(
                f"--set wants section.key=value (got {word!r})", remedy="for example --set train.ema_decay=0.999"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for name in reversed(names):
            value = {name: value}
        merge_into(sections, value)
    return sections


def merge_into(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Overlay nested sections in place: deeper keys override, others stay."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def flatten(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested sections dotted keys; what is not a plain value becomes text."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def build_config(kind: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Make a configuration dataclass from nested values as TOML or JSON give them; `where` names this section.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            place = f"section [{where}]" if where else "the configuration"
            raise ConfigError(f"unknown key {dotted!r}", remedy=f"{hint}{place} has: {', '.join(sorted(hints))}")
        arguments[key] = _convert(hints[key], value, dotted)
    return kind(**arguments)


def _convert(hint: Any, value: Any, dotted: str) -> Any:  # noqa: ANN401
    if get_origin(hint) in (Union, UnionType):  # X | None
        if value is None or value == "none":
            return None
        (hint,) = (argument for argument in get_args(hint) if argument is not NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        _check(isinstance(value, Mapping), dotted, "a section", value)
        return build_config(hint, value, where=dotted)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        _check(isinstance(items, list | tuple), dotted, "a list", value)
        return tuple(_convert(arguments[0], item, dotted) for item in items)
    if origin is dict:
        _check(isinstance(value, Mapping), dotted, "a table", value)
        return {str(name): _convert(arguments[1], item, f"{dotted}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            words = ", ".join(str(word).lower() if isinstance(word, bool) else str(word) for word in arguments)
            raise ChoiceError(f"{dotted} must be one of {words} (got {value!r})", remedy=f"--set {dotted}=…")
        return value
    return _convert_plain(hint, value, dotted)


def _convert_plain(hint: type, value: Any, dotted: str) -> Any:  # noqa: ANN401
    if hint is float and value in ("inf", "-inf"):  # JSON has no infinity
        return float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, bool | int | float):  # `--set data.split=true` and the like are words
        return str(value).lower() if isinstance(value, bool) else str(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, hint.__name__)
    _check(type(value) is hint, dotted, kind, value)
    return value


def _check(is_right: bool, dotted: str, expected: str, value: Any) -> None:  # noqa: ANN401
    if not is_right:
        raise ConfigError(f"{dotted} must be {expected} (got {value!r})", remedy=f"--set {dotted}=…")


def to_plain(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Turn a configuration dataclass into nested values fit for JSON, infinities as text; `build_config` reads them."""

    def plain(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


def list_recipes() -> dict[str, str]:
    """Return the name of each recipe in `assets/recipes/` with its title, the first line of its file."""
    first_lines = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in _recipes().items()}
    return {name: line.strip("# .") for name, line in first_lines.items()}


def load_recipe(name: str) -> dict[str, Any]:
    """Read the settings of one recipe: section → key → value, for `build_config`.

    Raises:
        ChoiceError: there is no such recipe.
    """
    paths = _recipes()
    if name not in paths:
        close = difflib.get_close_matches(name, paths, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ChoiceError(
            f"unknown recipe {name!r}", remedy=f"{hint}declip pretrain --list-recipes shows all {len(paths)}"
        )
    return read_toml(paths[name])


def recipe_of_data(path: object) -> str | None:
    """Name the recipe that was chosen for a data set: the one whose `data.path` is what `--data` names, if any."""
    found = (name for name, file in _recipes().items() if path and read_toml(file).get("data", {}).get("path") == path)
    return next(found, None)


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(asset_path("recipes").glob("*.toml"))}
