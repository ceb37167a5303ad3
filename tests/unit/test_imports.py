"""Which folder may import which: one table, read from the source; and the limits of size.

Imports inside functions count too, since they are arrows of the design like any other.
"""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import ray

import s2l_ray

PACKAGE = Path(s2l_ray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"ray", "torch", "deepspeed", "transformers"}
STAGE = ("config", "core", "contract", "edge", "progress", "errors")
COMMAND = (
    "config", "core", "contract", "edge", "pipeline", "stages", "progress", "display", "errors",
)  # fmt: skip
# Folder or module -> what of this package it may import besides itself: a name stands for all that
# lies below it. The longest entry that fits a module counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "": ("api",),
    "errors": (),
    "display": ("errors",),
    "progress": ("display",),
    "config": ("errors",),
    "core": ("core", "config", "errors", "progress"),
    "core.report.drawing": (),
    "core.report.pictures": ("core.report.data", "core.report.drawing"),
    "contract": ("config", "core", "errors"),
    "edge": ("config", "core", "contract", "errors", "progress"),
    "stages": ("contract", "stages"),
    "stages.training": STAGE,
    **{
        f"stages.{name}": STAGE
        for name in ("examples", "trajectories", "clusters", "subset", "evaluation", "report")
    },
    "stages.proxy": (*STAGE, "stages.training"),
    "stages.target": (*STAGE, "stages.training"),
    "pipeline": ("config", "core", "contract", "edge", "stages", "errors", "progress", "display"),
    "api": ("config", "core", "pipeline", "errors"),
    "demo": ("config", "core", "errors"),
    "run": (*COMMAND, "api", "demo"),
    "sweep": (*COMMAND, "run"),
    "check": (*COMMAND, "api", "run"),
    "init": (*COMMAND, "api", "run"),
    "status": ("api", "core", "pipeline", "run", "display", "errors"),
    "command": ("run",),
}
# Where Ray may be imported, and where when the module itself is loaded.
MAY_IMPORT_RAY = ("edge", "stages", "sweep")


def imported(tree: ast.AST, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, anywhere or only when it is loaded itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if _is_ours(name) else node.module or ""
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported(node, top_level_only)


def _is_ours(name: str) -> bool:
    """Whether this is a module or folder of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("s2l_ray") and (path.is_dir() or path.with_suffix(".py").is_file())


def module_of(path: Path) -> str:
    """The dotted name below s2l_ray; a package goes by its folder's."""
    pieces = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def ours(path: Path) -> set[str]:
    """What of this package a module imports, by names below s2l_ray."""
    names = (name for name in imported(ast.parse(path.read_text())) if name.startswith("s2l_ray."))
    return {name.removeprefix("s2l_ray.") for name in names}


def within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def entry_of(name: str) -> str:
    return max((entry for entry in MAY_IMPORT if within(name, entry)), key=len, default="")


def folder_of(name: str) -> str:
    """The folder that a module or package lies in; a module on top stands for itself."""
    if PACKAGE.joinpath(*name.split(".")).is_dir() or "." not in name:
        return name
    return name.rpartition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_a_module_imports_only_what_the_table_allows(path: Path) -> None:
    own = entry_of(module_of(path))
    allowed = (*MAY_IMPORT[own], *([own] if own else []))
    wrong = {name for name in ours(path) if not any(within(name, entry) for entry in allowed)}
    assert not wrong, f"{module_of(path)} must not import these"


def test_every_folder_has_its_line_in_the_table() -> None:
    folders = {module_of(path).split(".")[0] for path in MODULES}
    stages = {f"stages.{path.name}" for path in (PACKAGE / "stages").iterdir() if path.is_dir()}
    stages.discard("stages.__pycache__")
    assert folders | stages <= MAY_IMPORT.keys()


def test_there_is_no_circle_between_folders() -> None:
    arrows: dict[str, set[str]] = {}
    for path in MODULES:
        name = module_of(path)
        if path.name == "__init__.py" and name in ("", "stages"):
            # a table of what lies below it is no room of its own
            continue
        own = folder_of(name)
        arrows.setdefault(own, set()).update(
            folder for folder in map(folder_of, ours(path)) if folder != own
        )
    TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    name, tree = module_of(path), ast.parse(path.read_text())
    anywhere = {found.split(".")[0] for found in imported(tree)}
    loaded = {found.split(".")[0] for found in imported(tree, top_level_only=True)} & HEAVY
    if any(within(name, folder) for folder in MAY_IMPORT_RAY):
        loaded.discard("ray")
    else:
        assert "ray" not in anywhere
    if any(within(name, folder) for folder in ("core.model", "core.fidelity", "stages.training")):
        loaded.discard("torch")
    assert not loaded


# ------------------------------------------------------------------------------------------ sizes

LINES_OF_A_FILE, LINES_OF_A_FUNCTION, LINES_OF_A_CLASS = 400, 50, 150


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_files_functions_and_classes_stay_small(path: Path) -> None:
    text = path.read_text()
    large = {}
    if len(text.splitlines()) > LINES_OF_A_FILE:
        large[module_of(path)] = len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_class = isinstance(node, ast.ClassDef)
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > (LINES_OF_A_CLASS if is_class else LINES_OF_A_FUNCTION):
                large[node.name] = lines
    assert not large


# ---------------------------------------------------------------------------------------- loading


def test_the_command_line_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, s2l_ray.run; s2l_ray.run.config.describe();"
        "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed', 'faiss', 'matplotlib')"
        " if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_fence_of_the_unit_tests_holds() -> None:
    with pytest.raises(AssertionError, match="start no Ray"):
        ray.init(address="local", num_cpus=1)
    with pytest.raises(AssertionError, match="do not sleep"):
        time.sleep(0)
