"""Print the size of the project without tests: lines, functions, files, folders, and imports of `recipes/pretrain.py`.

python .ci/size.py
"""

import ast
import sys
from pathlib import Path
from statistics import quantiles

from libraries import ROOT

FOLDERS = (".ci", "evals", "modeling_nanochat", "recipes", "space", "tokenizer_train")
LONG_FILE, MANY_MODULES = 350, 15


def main() -> None:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    lengths = sorted((length, where) for path in paths for length, where in functions(path))
    counts = {folder: len(list(folder.glob("[!_]*.py"))) for folder in {path.parent for path in paths}}
    print(f"{sum(lines.values()):,} lines in {len(paths)} files")
    cuts = quantiles([length for length, _ in lengths], n=10)
    print(
        f"{len(lengths):,} functions: median {cuts[4]:.0f} lines, 90th percentile {cuts[8]:.0f}, "
        f"longest {lengths[-1][0]}"
    )
    print("longest:", ", ".join(f"{where} {length}" for length, where in reversed(lengths[-5:])))
    print(f"files over {LONG_FILE} lines:", listed({path: n for path, n in lines.items() if n > LONG_FILE}))
    print(f"folders over {MANY_MODULES} modules:", listed({path: n for path, n in counts.items() if n > MANY_MODULES}))
    print(f"recipes/pretrain.py reaches {len(reached(ROOT / 'recipes' / 'pretrain.py'))} modules")


def functions(path: Path) -> list[tuple[int, str]]:
    """Lines and name of each function, including nested ones."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}") for node in found]


def listed(numbers: dict[Path, int]) -> str:
    return ", ".join(f"{path.relative_to(ROOT)} {number}" for path, number in sorted(numbers.items())) or "none"


def reached(start: Path) -> set[Path]:
    """The project's non-empty files that `start` imports, directly or indirectly, also inside functions."""
    found, waiting = {start}, [start]
    while waiting:
        for path in imported(waiting.pop()) - found:
            found.add(path)
            waiting.append(path)
    return {path for path in found if path.stat().st_size}


def imported(path: Path) -> set[Path]:
    names: set[tuple[Path, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = path.parents[node.level - 1] if node.level else ROOT
            module = above / (node.module or "").replace(".", "/")
            names |= {(module, "")} | {(module, alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {(ROOT / alias.name.replace(".", "/"), "") for alias in node.names}
    candidates = {place for module, name in names for place in (module / name, (module / name).with_suffix(".py"))}
    files = {place / "__init__.py" if place.is_dir() else place for place in candidates}
    return {file for file in files if file.suffix == ".py" and file.is_file() and file.is_relative_to(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
