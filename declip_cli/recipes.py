"""Find and read the recipes: published configurations as small TOML files in `assets/recipes/`."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from declip_cli.assets import asset_path
from declip_cli.config_files import read_toml
from declip_cli.errors import ChoiceError


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe, as far as its head tells."""

    name: str
    """What `--recipe` takes: the name of the file."""
    title: str
    """First line of the head."""
    notes: tuple[str, ...]
    """The other lines of the head: paper, cost, published result, what to mind."""
    path: Path


def list_recipes() -> list[Recipe]:
    """List the recipes that this installation brings along, in the order of their names."""
    return [_read_head(path) for path in sorted(asset_path("recipes").glob("*.toml"))]


def load_recipe(name: str) -> dict[str, Any]:
    """Read the settings of one recipe: section → key → value, for `config_files.build_config`.

    Raises:
        ChoiceError: there is no such recipe.
    """
    paths = {path.stem: path for path in asset_path("recipes").glob("*.toml")}
    if name not in paths:
        close = difflib.get_close_matches(name, paths, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ChoiceError(
            f"unknown recipe {name!r}", remedy=f"{hint}declip pretrain --list-recipes shows all {len(paths)}"
        )
    return read_toml(paths[name])


def recipe_of_data(path: object) -> str | None:
    """Name the recipe that was chosen for a data set: the one whose `data.path` is what `--data` names, if any."""
    found = (recipe for recipe in list_recipes() if path and read_toml(recipe.path).get("data", {}).get("path") == path)
    return next((recipe.name for recipe in found), None)


def _read_head(path: Path) -> Recipe:
    """Read the comment lines above the first setting."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# ").rstrip())
    return Recipe(name=path.stem, title=head[0].rstrip("."), notes=tuple(head[1:]), path=path)
