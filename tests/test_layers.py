"""The map of the rooms: who may import whom. A newcomer reads the table first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "declip_cli"
FLOOR_0 = {"errors", "config", "config_files", "batch", "assets", "distributed", "recipes"}
MAY_IMPORT = {
    # floor 0: what everybody may know
    "errors": set(),
    "assets": {"errors"},
    "config": {"errors"},
    "config_files": {"errors", "config"},
    "recipes": {"errors", "assets", "config_files"},
    "batch": set(),
    "distributed": set(),
    # floor 1: bytes and strings, parameters, functions of tensors; they do not know each other
    "losses": set(),
    "data": FLOOR_0,
    "model": FLOOR_0,
    # floor 2: two embeddings at once
    "methods": FLOOR_0 | {"losses", "model"},
    # floor 3: steps, scores; they do not know each other
    "train": FLOOR_0 | {"losses", "data", "model", "methods"},
    "evaluate": FLOOR_0 | {"losses", "data", "model"},
    # floor 4: words in, words out
    "cli": FLOOR_0 | {"losses", "data", "model", "methods", "train", "evaluate"},
    "__main__": {"cli"},
    "__init__": set(),
}
MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 50
MAX_ARGUMENTS = 8
HEAVY = ("torch", "torchvision", "cv2", "numpy", "accelerate", "faiss", "PIL", "safetensors")
MODULES = sorted(PACKAGE.rglob("*.py"))


def ident(path):
    return str(path.relative_to(PACKAGE))


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(tree):
    """Name every room of the package that a module imports, inside functions too, with the line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "declip_cli":
            names = [f"declip_cli.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "declip_cli" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def arguments_of(function):
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
    return names + [a.arg for a in (given.vararg, given.kwarg) if a is not None]


def test_the_map_has_every_room():
    assert {room_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_a_room_imports_only_downward(path):
    room = room_of(path)
    wrong = [
        f"line {line}: {name}" for name, line in imported_rooms(tree_of(path)) if name not in MAY_IMPORT[room] | {room}
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_imports_are_absolute(path):
    assert not [n.lineno for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom) and n.level > 0]


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_a_module_fits_one_idea(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_a_function_fits_one_screen(path):
    long, wide = {}, {}
    for function in functions_of(tree_of(path)):
        lines = function.end_lineno - function.lineno + 1
        # A command of the command line has an argument, and a few lines, for every option.
        is_command = room_of(path) == "cli" and function.name == path.stem
        if lines > MAX_FUNCTION_LINES and not is_command:
            long[function.name] = lines
        if len(arguments_of(function)) > MAX_ARGUMENTS and not is_command:
            wide[function.name] = len(arguments_of(function))
    assert not long
    assert not wide


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_only_the_console_writes_to_the_terminal(path):
    writers = {"print", "typer.echo", "typer.secho", "sys.stdout", "sys.stderr", "Console", "rich.print"}
    found = {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name | ast.Attribute)}
    # The version is asked for before any command, without the console's parts.
    allowed = {"cli/console.py": writers, "__main__.py": {"typer.echo"}}.get(ident(path), set())
    assert not (found & writers) - allowed


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_front_door_opens_without_heavy_libraries():
    code = f"import sys, declip_cli.__main__; print([name for name in {HEAVY} if name in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_is_shown_without_torch():
    code = (
        "import sys\nfrom declip_cli.__main__ import main\nsys.argv = ['declip', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    sys.exit(100 if 'torch' in sys.modules else end.code)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "pretrain", "zeroshot", "linear-probe", "retrieve"):
        assert command in done.stdout
