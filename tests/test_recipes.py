"""Recipes are found by name and by path, from any folder, and what is wrong with one is named."""

import pytest

import dino_jax
from dino_jax import recipes
from dino_jax.errors import UserError


def test_recipes_are_found_by_name():
    assert {"default", "vits16", "vitb8", "demo"} <= set(recipes.names())
    assert "__init__" not in recipes.names()
    assert dino_jax.get_config("vitb16").model.arch == "vit_base"
    assert recipes.get_config(str(recipes.FOLDER / "vitb16.py")) == recipes.get_config("vitb16")


def test_a_recipe_outside_of_the_checkout_starts_from_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dino_jax import recipes\n\n\n"
        "def get_config():\n"
        "    config = recipes.get_config('vits8')\n"
        "    config.optim.lr = 0.125\n"
        "    return config\n"
    )
    config = recipes.get_config("mine.py")
    assert (config.optim.lr, config.model.patch_size, config.is_locked) == (0.125, 8, True)
    assert recipes.get_config("vits8").optim.lr != 0.125


@pytest.mark.parametrize("recipe", ["vits32", "configs/vits32.py", "__init__", ""])
def test_an_unknown_recipe_lists_those_that_there_are(recipe):
    with pytest.raises(UserError, match=rf"no recipe '{recipe}'.*vits16.*vits8"):
        recipes.get_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", r"mine.py:1: SyntaxError: "),
        ("rate = 1 / 0\n", r"mine.py:1: ZeroDivisionError: division by zero"),
        (
            "from dino_jax.recipes import get_config as base\ndef get_config():\n    base().optim.lrr = 1\n",
            r'mine.py:3: AttributeError: .*"lr" instead of "lrr"',
        ),
        ("def get_config():\n    return {}\n", r"mine.py: get_config\(\) returns dict: return a ConfigDict"),
        ("lr = 1\n", r"mine.py has no get_config\(\)"),
    ],
)
def test_mistakes_in_a_recipe_name_the_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        recipes.get_config(str(tmp_path / "mine.py"))
