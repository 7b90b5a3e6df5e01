"""The shape of the package: imports point down, one door to Ultralytics, readable files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hsrloop

ROOT = Path(hsrloop.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = (
    {"errors", "rules", "config", "records", "events", "paths", "words"},
    {"ops"},
    {"hardware", "data", "model", "report"},
    {"train"},
    {"export", "bench", "study"},
    {"cli", "ui"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
VAGUE = {"utils", "misc", "helpers", "manager", "handler", "common"}


def package_of(path: Path) -> str:
    """Return the top-level part of hsrloop that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


INSIDE = [path for path in FILES if path != ROOT / "__init__.py"]


def test_every_part_has_a_layer() -> None:
    assert {package_of(path) for path in INSIDE} <= set(LEVEL)


@each(INSIDE)
def test_imports_point_down_and_not_sideways(path: Path) -> None:
    own = package_of(path)
    for name in imported(parse(path)):
        parts = name.split(".")
        if parts[0] != "hsrloop" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        other = parts[1]
        is_value = LEVEL[own] == 0 and LEVEL[other] == 0
        assert other == own or is_value or LEVEL[other] < LEVEL[own], f"{own} imports {name}"


@each(FILES)
def test_one_door_to_ultralytics(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(parse(path))}
    if path != ROOT / "model" / "yolo.py":
        assert "ultralytics" not in names


@each(FILES)
def test_one_place_asks_how_much_gpu_memory_is_free(path: Path) -> None:
    """Anywhere else a cap on this process would be overlooked."""
    if path != ROOT / "hardware" / "memory.py":
        assert "mem_get_info" not in path.read_text(encoding="utf-8")


@each(FILES)
def test_no_print(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@each(FILES)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name}: {length} lines"


@each(FILES)
def test_files_are_named_for_what_they_hold(path: Path) -> None:
    assert not VAGUE & set(path.relative_to(ROOT).with_suffix("").parts)


@each(FILES)
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(parse(path))


def test_modules_form_no_cycle() -> None:
    names = {
        ".".join(("hsrloop", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES
    }
    edges = {
        name: {
            found
            for target in imported(parse(path))
            for found in (target, target.rpartition(".")[0])
            if found in names and found != name
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def loaded_by(module: str, libraries: tuple[str, ...]) -> str:
    """Return which of these libraries a module loads."""
    code = f"import sys, {module}; print([m for m in {libraries} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


@pytest.mark.parametrize("module", ["hsrloop", "hsrloop.cli.main", "hsrloop.__main__"])
def test_doors_open_without_heavy_libraries(module: str) -> None:
    assert loaded_by(module, ("torch", "numpy", "ultralytics", "cv2", "rich")) == "[]"


def test_a_run_on_a_gpu_does_not_wait_for_what_compiles_for_the_cpu() -> None:
    assert loaded_by("hsrloop.train.run", ("torch", "numba")) == "['torch']"
