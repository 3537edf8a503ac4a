"""Which part of the project may know which: arrows between rooms and inside `recipes/training`, no import circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {  # room -> those it may import, or name by a path
    "modeling_nanochat": set(),
    "tokenizer_train": {"modeling_nanochat"},
    "evals": {"modeling_nanochat"},
    "space": {"modeling_nanochat"},
    "recipes": {"modeling_nanochat", "evals", "tokenizer_train", "space"},  # the last two as commands of the ladder
}
# From the bottom up: a module imports from its own line or from those above it.
TRAINING = [
    {"device", "learning", "processes", "stopping"},
    {"attention", "data", "optim"},
    {"arguments"},
    {"checkpoint", "model_card", "stage"},
    {"batch_size", "evaluation", "inheritance", "progress"},
    {"loop"},
    {"setup", "trl"},
]
MODULES_OF_A_FOLDER = 15


def modules() -> dict[str, Path]:
    """Dotted name -> file, packages by the name of their folder."""
    paths = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The project's own modules that `name` imports, in functions too."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return {module for module in found if module in MODULES}


def strings(name: str) -> list[str]:
    """String constants of a module without its docstrings, which may tell the reader of other rooms."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told)
    return [node.value for node in nodes if isinstance(node.value, str)]


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_rooms_below_it(name):
    assert {room(module) for module in imports(name)} <= ROOMS[room(name)] | {room(name)}


@pytest.mark.parametrize("name", MODULES)
def test_no_string_leads_into_a_room_above(name):
    """As a path that is run or read, or a module that is run by its name."""
    others = ROOMS.keys() - ROOMS[room(name)] - {room(name)}
    place = re.compile(rf"(?<![\w.])({'|'.join(sorted(others))})[/.]\w") if others else re.compile(r"(?!)")
    assert [text for text in strings(name) if place.search(text)] == []


def level(module: str) -> int | None:
    """The line of TRAINING that has the module or its folder; None outside of `recipes/training`."""
    parts = module.split(".")
    if parts[:2] != ["recipes", "training"] or len(parts) == 2:
        return None
    return next(number for number, line in enumerate(TRAINING) if parts[2] in line)


@pytest.mark.parametrize("name", [name for name in MODULES if level(name) is not None])
def test_inside_training_arrows_run_downwards(name):
    for module in imports(name):
        above = level(module)
        assert above is None or above <= level(name), f"{name} imports {module}"
        if module.startswith("recipes."):
            assert above is not None or module == "recipes.training", f"{name} imports {module}, which stands above"


def test_there_is_no_circle_of_imports():
    """Packages aside, whose `__init__` gives the names of the modules in it."""
    graph = {name: {module for module in imports(name) if MODULES[module].name != "__init__.py"} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MODULES_OF_A_FOLDER
