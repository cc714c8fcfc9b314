"""Write the parts of the documentation that follow from the code: `python -m tests.generate_docs`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `PARTS`.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import typer.main

from declip_cli import config
from declip_cli.__main__ import app
from declip_cli.config_files import list_recipes
from declip_cli.data.benchmarks.known import known_sets
from tests.test_layers import MAY_IMPORT, MODULES, PACKAGE, room_of

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m tests.generate_docs"
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def pages():
    """Paths of all pages, the README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text):
    """The text of a page with each generated part as the code is now."""
    return _PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}", text)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text):
    return " ".join(str(text).split()).replace("|", "\\|") or " "


def settings():
    sections = get_type_hints(config.RunConfig)
    meanings = _field_docstrings()
    parts = []
    for name, kind in sections.items():
        rows = []
        for field in dataclasses.fields(kind):
            default = getattr(kind(), field.name)
            choices = _choices(get_type_hints(kind)[field.name])
            meaning = re.sub(r"\bNone\b", "`none`", meanings.get((kind.__name__, field.name), ""))
            meaning += f" One of {', '.join(f'`{_as_toml(choice)}`' for choice in choices)}." if choices else ""
            rows.append((f"`{name}.{field.name}`", f"`{_as_toml(default)}`", meaning))
        title = f"## {name}\n\n{ast.get_docstring(_class_of(kind.__name__))}\n\n"
        parts.append(title + table(("key", "default", "meaning"), rows))
    return "\n\n".join(parts)


def _config_tree():
    return ast.parse(Path(config.__file__).read_text(encoding="utf-8"))


def _class_of(name):
    return next(node for node in _config_tree().body if isinstance(node, ast.ClassDef) and node.name == name)


def _field_docstrings():
    found = {}
    for kind in _config_tree().body:
        for field, after in zip(getattr(kind, "body", ()), getattr(kind, "body", ())[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[kind.name, field.target.id] = ast.literal_eval(after.value)
    return found


def _choices(hint):
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := _choices(part))), ())


def _as_toml(value):
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{}"
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value).lower()


def commands():
    group, parts = typer.main.get_command(app), []
    for name, command in group.commands.items():
        rows = [
            (" ".join(f"`{word}`" for word in _words(one)), _default(one), one.help or "")
            for one in command.params
            if not one.hidden and one.name != "help"
        ]
        parts.append(f"## declip {name}\n\n{_paragraphs(command.help)}\n\n{table(('option', 'default', 'what'), rows)}")
    return "\n\n".join(parts)


def _paragraphs(text):
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _words(option):
    if option.param_type_name == "argument":
        return [(option.metavar or option.name).upper()]
    return [*option.opts, *option.secondary_opts]


def _default(option):
    if isinstance(option.show_default, str):
        return option.show_default
    value = getattr(option.default, "value", option.default)
    if callable(value) or value in (None, "", False, True, [], ()):
        return ""
    return f"`{value}`"


def recipes():
    rows = []
    for name, title in list_recipes().items():
        head = (ROOT / "assets" / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        facts = dict(re.findall(r"^# ([a-z ]+): (.*)$", head, re.M))
        rows.append(
            (f"`{name}`", title, facts.get("cost", ""), facts.get("result") or facts.get("published result", ""))
        )
    return table(("recipe", "what", "cost", "result"), rows)


def sets():
    rows = [
        (
            f"`{one.name}`",
            one.tasks,
            one.num_classes or "",
            one.metric.replace("_", " "),
            f"`{one.markers[0]}`" if one.markers else "comes along",
            one.wants,
        )
        for one in known_sets().values()
    ]
    return table(("name", "for", "classes", "metric", "expected below the data root", "files"), rows)


def rooms():
    parts = []
    for room in MAY_IMPORT:
        inside = [path for path in MODULES if room_of(path) == room]
        below = ", ".join(f"`{name}`" for name in sorted(MAY_IMPORT[room])) or "nothing of the package"
        rows = [(f"`{path.relative_to(PACKAGE)}`", _first_line(path)) for path in inside]
        parts.append((room, below, rows))
    single = [(*rows[0], below) for _, below, rows in parts if len(rows) == 1]
    text = table(("module", "what it is for", "may import"), single)
    for room, below, rows in parts:
        if len(rows) > 1:
            title = next(words for path, words in rows if path == f"`{room}/__init__.py`")
            modules = [row for row in rows if not row[0].endswith("__init__.py`")]
            text += f"\n\n### {room}\n\n{title} May import: {below}.\n\n{table(('module', 'what it is for'), modules)}"
    return text


def _first_line(path):
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]


PARTS = {
    "settings": settings,
    "commands": commands,
    "recipes": recipes,
    "sets": sets,
    "rooms": rooms,
}


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
