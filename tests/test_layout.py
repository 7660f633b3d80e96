"""Imports point one way, and no module hides another."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sami.core.entries import ENTRIES
from tests.runs import ROOT

LAYERS = ["sami.core", "sami", "finetune", "tools"]  # each may import those before it
FILES = [
    path for top in ("sami", "finetune", "tools") for path in sorted((ROOT / top).rglob("*.py"))
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(name: str) -> int | None:
    fitting = [i for i, top in enumerate(LAYERS) if name == top or name.startswith(f"{top}.")]
    return min(fitting, default=None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    own = layer(module_name(path))
    entries = {entry.module for entry in ENTRIES.values()}
    for name in imports(path):
        other = layer(name)
        assert other is None or other <= own, f"{path} imports {name} from above"
        assert name not in entries, f"{path} imports the entry {name}"


def test_no_circles():
    names = {module_name(path) for path in FILES}
    edges = {module_name(path): imports(path) & names for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_module_hides_another():
    """Under the launcher the folder of an entry is first on the path."""
    taken = set(sys.stdlib_module_names) | (packages_distributions().keys() - {"sami", "finetune"})
    for top in ("sami", "finetune"):
        for path in (ROOT / top).glob("*"):
            if path.stem != "__init__" and path.stem != "__pycache__":
                assert path.stem not in taken | {top}, f"{path} hides a module"


def test_the_wheel_has_every_package():
    """The list in pyproject.toml is by hand, because of what a wheel has as data."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        module_name(path)
        for top in ("sami", "finetune")
        for path in (ROOT / top).rglob("__init__.py")
    }
    data = {f"sami.share.{name}": name for name in ("configs", "tools", "slurm")}
    assert set(told["packages"]) == found | data.keys() and told["package-dir"] == data


def test_importing_does_nothing(monkeypatch):
    """No top-level statement calls anything but what defines."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                raise AssertionError(f"{path}:{node.lineno} runs something when imported")


def test_the_failures_table_names_tests_that_exist():
    rows = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs/data.md").read_text())
    assert len(rows) > 40
    for file, name in rows:
        assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text(), (
            f"{file} has no {name}"
        )
