"""The estimates in the headers of the recipes are those of launch/plan.py."""

import pytest

from tests.plan.recipe_headers import CLUSTERS, GRIDS, recipe_file, with_estimates


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLUSTERS, *GRIDS])
def test_a_recipe_has_the_estimates_of_today(name: str) -> None:
    """If not: python -m tests.plan.recipe_headers."""
    text = recipe_file(name).read_text()
    assert with_estimates(text, name) == text
