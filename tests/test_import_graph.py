"""Which module may import which: the methods know no host, hosts know no command, and there are no circles."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fairchem_scd"
HOSTS = ("fairchem", "torch_geometric", "fairchem_scd.fairchem1", "fairchem_scd.fairchem2")
TOOLS = ("fairchem_scd.commands", "fairchem_scd.testing")
FORBIDDEN = {
    "denoising": (*HOSTS, *TOOLS),
    "errors": (*HOSTS, *TOOLS, "torch", "fairchem_scd.denoising"),
    "fairchem1": (*TOOLS, "fairchem_scd.fairchem2"),
    "fairchem2": (*TOOLS, "fairchem_scd.fairchem1"),
    "testing": ("fairchem_scd.commands",),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, *, late: bool) -> set[str]:
    """Dotted names that a module imports; with `late` also inside functions and for type checkers."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if late else _at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not read"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found - {name}


def _at_import(tree: ast.AST):
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _at_import(node)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_no_arrow_leads_up(wing):
    own = {name: path for name, path in modules().items() if within(name, (f"fairchem_scd.{wing}",))}
    assert own
    for name, path in own.items():
        above = {other for other in imported(name, path, late=True) if within(other, FORBIDDEN[wing])}
        assert not above, f"{name} imports {', '.join(sorted(above))}"


def test_there_are_no_circles():
    known = modules()
    graph = {name: imported(name, path, late=False) & set(known) for name, path in known.items()}
    # `import a.b` runs a's __init__ too, which is a circle where that imports back; its own modules import each other.
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_reader_of_imports_sees_them():
    """A file that says what the test looks for, in every form."""
    path = PACKAGE / "fairchem1" / "hydra.py"
    found = imported("fairchem_scd.fairchem1.hydra", path, late=True)
    assert {"fairchem.core.models.base", "torch_geometric.data", "fairchem_scd.denoising.passes", "copy"} <= found
    assert not any(within(name, HOSTS) for name in imported("", PACKAGE / "denoising" / "passes.py", late=True))
