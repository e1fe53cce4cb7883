import ast
import tomllib
from pathlib import Path

import pytest

import tq_ao

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "LayerMaps",
    "LayerScheme",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantKVCacheConfig",
    "TurboQuantTensor",
    "quantize_kv_",
}


def test_public_names_are_these():
    assert set(tq_ao.__all__) == PUBLIC
    assert len(tq_ao.__all__) == len(PUBLIC)
    assert set(dir(tq_ao)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_documented(name):
    assert getattr(tq_ao, name).__name__ == name
    assert getattr(tq_ao, name).__doc__


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="TurboQuantCache"):
        _ = tq_ao.TurboQuantCash


def test_type_checkers_see_the_same_names():
    """They are imported lazily at run time, and under TYPE_CHECKING for everybody who reads types."""
    tree = ast.parse((ROOT / "tq_ao" / "__init__.py").read_text())
    names = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert names == PUBLIC


def test_version_is_the_one_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tq_ao.__version__ == project["version"]
