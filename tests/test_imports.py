"""The layout shows the design: imports run one way, and ``import kvcar`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvcar

# A room may import rooms above it in this list, and its own files.
ORDER = [
    "errors",
    "registry",
    "version",
    "progress",
    "files",
    "geometry",
    "plan",
    "layout",
    "sizes",
    "record",
    "text",
    "kernels",
    "codecs",
    "models",
    "bundle",
    "cache",
    "context",
    "evaluate",
    "fit",
    "paper",
    "serve",
    "report",
    "cli",
]
PACKAGE = Path(kvcar.__file__).parent
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name != "__main__.py" and p != PACKAGE / "__init__.py"
}


def imports(name: str) -> set[str]:
    """Modules below kvcar that a module imports, inside functions too; what is for type checkers alone is left out."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
        elif (node.module or "").split(".")[0] == "kvcar":
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in MODULES else ".".join(base))
    return {each for each in found if each in MODULES and each != name}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    own = name.split(".")[0]
    assert own in ORDER
    for part in {each.split(".")[0] for each in imports(name)}:
        assert ORDER.index(part) <= ORDER.index(own), f"{own} must not import {part}"


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imports(name) for name in MODULES}
    cycles: list[str] = []
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            cycles.append(" -> ".join((*way[way.index(name) :], name)))
            return
        if name not in done:
            for each in sorted(graph[name]):
                visit(each, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert cycles == []


def test_nothing_but_the_command_line_imports_the_papers_wing():
    assert {n.split(".")[0] for n in MODULES if any(i.split(".")[0] == "paper" for i in imports(n))} <= {"paper", "cli"}


def test_nothing_imports_what_serving_engines_need():
    assert {n.split(".")[0] for n in MODULES if any(i.split(".")[0] == "serve" for i in imports(n))} <= {"serve"}


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
    assert sorted(kvcar.__all__) == sorted([*kvcar._HOMES, *kvcar._CALLABLE])
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvcar.nonsense
