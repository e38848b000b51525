"""The list of private names of other libraries is true and complete."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sdtpu_worker
from sdtpu_worker.worker.private_api import PRIVATE_NAMES

PACKAGE = Path(sdtpu_worker.__file__).parent
PUBLIC_IN_SPITE_OF_THEIR_NAMES = {"_replace", "_exit"}  # of named tuples, of os


@pytest.mark.parametrize(("owner", "name"), [(entry.owner, entry.name) for entry in PRIVATE_NAMES])
def test_a_private_name_is_there_in_the_installed_version(owner, name):
    module, _, class_name = owner.partition(":")
    found: Any = importlib.import_module(module)
    if class_name:
        found = getattr(found, class_name)
    assert hasattr(found, name) or is_set_on_instances(found, name), f"{owner} has no {name} any more"


def test_the_package_uses_no_private_name_of_another_library_that_is_not_on_the_list():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    own = {name for tree in trees for name in names_defined(tree)}
    used = {name for tree in trees for name in private_names_used(tree)}
    foreign = used - own - PUBLIC_IN_SPITE_OF_THEIR_NAMES
    listed = {entry.name for entry in PRIVATE_NAMES}
    assert foreign <= listed
    assert listed <= used | own, "listed, but used nowhere"


def is_set_on_instances(found: type, name: str) -> bool:
    """Return whether a class or one of its bases assigns the attribute to its instances."""
    return any(f"self.{name}" in inspect.getsource(base) for base in found.__mro__ if base is not object)


def names_defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def private_names_used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.attr if isinstance(node, ast.Attribute) else node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))
