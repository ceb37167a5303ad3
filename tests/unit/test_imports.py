"""The layers: which module may import which, read from the source and in a new interpreter."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import s2l_ray

PACKAGE = Path(s2l_ray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"ray", "deepspeed", "transformers"}


def imported(tree: ast.AST, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, anywhere or only when it is loaded itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported(node, top_level_only)


def own_packages(path: Path, top_level_only: bool = False) -> set[str]:
    """The second piece of what is imported from s2l_ray, the first of anything else."""
    found = set()
    for name in imported(ast.parse(path.read_text()), top_level_only):
        pieces = name.split(".")
        found.add(".".join(pieces[:2]) if pieces[0] == "s2l_ray" else pieces[0])
    return found


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    name, names = relative(path), own_packages(path)
    lower = {
        "core": {"s2l_ray", "s2l_ray.core", "s2l_ray.config", "s2l_ray.errors"},
        "stages": {
            "s2l_ray",
            "s2l_ray.stages",
            "s2l_ray.core",
            "s2l_ray.config",
            "s2l_ray.errors",
            "s2l_ray.progress",
        },
        "config": {"s2l_ray", "s2l_ray.errors", "s2l_ray.config"},
        "errors.py": set(),
    }
    ours = {n for n in names if n.split(".")[0] == "s2l_ray"}
    layer = name.split("/")[0]
    if layer in lower:
        assert ours <= lower[layer]
    if layer != "stages" and name != "sweep.py":
        assert "ray" not in names


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    allowed = {"ray"} if relative(path).startswith("stages/") or path.name == "sweep.py" else set()
    assert not own_packages(path, top_level_only=True) & HEAVY - allowed


def test_the_command_line_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, s2l_ray.run; s2l_ray.run.config.describe();"
        "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed', 'faiss', 'matplotlib') "
        "if m in sys.modules])"
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
