"""The map of the rooms: who may import whom. A newcomer reads the table first."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "declip_cli"
FLOOR_0 = {"errors", "files", "config", "presets", "config_files", "batch"}
FLOOR_0 |= {"assets", "cores", "distributed", "gradient_average", "process_group"}
MAY_IMPORT = {
    # floor 0: what everybody may know
    "errors": set(),
    "assets": {"errors"},
    "cores": set(),
    "files": set(),
    "rules": {"errors"},
    "config": {"errors", "rules"},
    "presets": {"config"},
    "config_files": {"errors", "files", "assets"},
    "batch": {"distributed"},
    "distributed": set(),
    "gradient_average": {"distributed"},
    "process_group": {"errors", "distributed"},
    # floor 1: bytes and strings, parameters, functions of tensors; they do not know each other
    "losses": set(),
    "token_wise_losses": set(),
    "contrastive_losses": set(),
    "data": FLOOR_0,
    "model": FLOOR_0,
    # pages for a browser, of numbers and images that others have found
    "pages": FLOOR_0 | {"data"},
    # floor 2: models of other projects; two embeddings at once
    "interop": FLOOR_0 | {"data", "model"},
    "methods": FLOOR_0 | {"losses", "contrastive_losses", "token_wise_losses", "model"},
    # what was asked becomes one resolved run
    "resolve": FLOOR_0 | {"model", "methods"},
    # floor 3: steps, scores; they do not know each other
    "train": FLOOR_0
    | {"losses", "data", "model", "interop", "methods", "resolve", "contrastive_losses", "token_wise_losses", "pages"},
    "evaluate": FLOOR_0 | {"losses", "data", "model", "pages"},
    # a page over what is found
    "serve": FLOOR_0 | {"data", "model", "evaluate", "pages"},
    # floor 4: words in, words out
    "cli": FLOOR_0
    | {"losses", "data", "model", "interop", "methods", "resolve", "train", "evaluate", "serve", "pages"},
    "__main__": {"cli"},
    "__init__": {"interop"},
}
DATA_FLOORS = (
    {"dataset", "seeding", "synonyms", "tokenizer"},
    {"storage", "decode", "color", "text_views", "order"},
    {"shards", "image_views"},
    {"sources", "pair_views"},
    {"files_dataset", "loader"},
    {"benchmarks", "loader_processes"},
    {"catalog", "stream"},
    {"prepare"},
)
"""The rooms of `data` from the ground up; each imports from floors below its own only."""
MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 50
MAX_ARGUMENTS = 8
HEAVY = ("torch", "torchvision", "cv2", "numpy", "accelerate", "faiss", "PIL", "safetensors")
MODULES = sorted(PACKAGE.rglob("*.py"))


def ident(path):
    return str(path.relative_to(PACKAGE))


@functools.cache
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


def test_a_room_imports_only_downward():
    wrong = [
        f"{ident(path)}:{line} imports {name}"
        for path in MODULES
        for name, line in imported_rooms(tree_of(path))
        if name not in MAY_IMPORT[room_of(path)] | {room_of(path)}
    ]
    assert not wrong


def test_a_room_of_data_imports_only_downward():
    floors = {room: number for number, rooms in enumerate(DATA_FLOORS) for room in rooms}
    for path in (PACKAGE / "data").rglob("*.py"):
        parts = path.relative_to(PACKAGE / "data").with_suffix("").parts
        if parts == ("__init__",):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("declip_cli.data"):
                inner = node.module.split(".")[2:3] or [alias.name for alias in node.names]
                for room in set(inner) - {parts[0]}:
                    assert floors[room] < floors[parts[0]], f"{ident(path)}:{node.lineno} imports {room}"


def test_imports_are_absolute():
    nodes = [(path, node) for path in MODULES for node in ast.walk(tree_of(path))]
    assert not [f"{ident(p)}:{n.lineno}" for p, n in nodes if isinstance(n, ast.ImportFrom) and n.level > 0]


def test_a_module_fits_one_idea():
    lines = {ident(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: count for name, count in lines.items() if count > MAX_MODULE_LINES}


def test_a_function_fits_one_screen():
    found = [(path, function) for path in MODULES for function in functions_of(tree_of(path))]
    # A command of the command line has an argument, and a few lines, for every option.
    found = [(p, f) for p, f in found if not (room_of(p) == "cli" and f.name == p.stem)]
    lines = {f"{ident(p)}:{f.name}": f.end_lineno - f.lineno + 1 for p, f in found}
    arguments = {f"{ident(p)}:{f.name}": len(arguments_of(f)) for p, f in found}
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}
    assert not {name: count for name, count in arguments.items() if count > MAX_ARGUMENTS}


def test_only_the_console_writes_to_the_terminal():
    writers = {"print", "typer.echo", "typer.secho", "sys.stdout", "sys.stderr", "Console", "rich.print"}
    # The version is asked for before any command, without the console's parts.
    allowed = {"cli/console.py": writers, "__main__.py": {"typer.echo"}}
    wrong = {}
    for path in MODULES:
        found = {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name | ast.Attribute)}
        wrong[ident(path)] = (found & writers) - allowed.get(ident(path), set())
    assert not {name: found for name, found in wrong.items() if found}


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
    for command in ("prepare", "pretrain", "zeroshot", "linear-probe", "retrieve", "export"):
        assert command in done.stdout
