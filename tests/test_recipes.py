"""Every recipe in recipes/ is one convert.py can run."""

from pathlib import Path

import pytest

from tq_ao.embedded import EMBEDDED
from tq_ao.models import ALIASES
from tq_ao.recipe import load

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    recipe = load(path)
    assert recipe.model in ALIASES or recipe.model in EMBEDDED
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"python scripts/convert.py --recipe recipes/{path.name}" in line for line in comments)


def test_the_starting_set_is_there():
    assert {"smollm2-135m", "gemma-3-270m", "gemma-2b", "tinyllama-1.1b-chat"} <= {path.stem for path in RECIPES}
