"""The layout shows the design: imports run one way, and ``import kvcar`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvcar

ORDER = [
    "errors",
    "registry",
    "shapes",
    "plan",
    "progress",
    "version",
    "record",
    "processes",
    "entropy",
    "kernels",
    "codecs",
    "models",
    "bundle",
    "planner",
    "fit",
    "train",
    "profiles",
    "runtime",
    "evaluate",
    "report",
    "reproduce",
    "cli",
]
PACKAGE = Path(kvcar.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py")


def imported_parts(path: Path) -> set[str]:
    """First components, below kvcar, of everything that a module imports."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (
                list(here[: len(here) - node.level])
                if path.name != "__init__.py"
                else list(here[:-1][: len(here) - node.level])
            )
            target = base + (node.module or "").split(".")
            found.update([target[0]] if target[0] else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcar."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in ORDER
    for part in imported_parts(path):
        assert part in ORDER, f"{path} imports {part}"
        assert ORDER.index(part) <= ORDER.index(own), f"{own} must not import {part}"


def test_fit_planner_and_runtime_meet_only_in_a_bundle():
    for path in MODULES:
        parts = path.relative_to(PACKAGE).parts
        if parts[0] == "runtime":
            assert not imported_parts(path) & {"fit", "planner"}
        if parts[0] == "planner":
            assert not imported_parts(path) & {"fit", "runtime", "models"}


def test_importing_kvcar_brings_in_nothing_heavy():
    code = (
        "import sys, kvcar; print([m for m in ('torch', 'transformers', 'triton', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", kvcar.__all__)
def test_public_names_exist_and_are_documented(name):
    found = getattr(kvcar, name)
    assert name == "__version__" or found.__doc__


def test_no_other_public_names():
    assert sorted(kvcar.__all__) == sorted(kvcar._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvcar.nonsense
