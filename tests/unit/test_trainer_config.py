"""Recipes: what they accept, and what they say when they don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config import TextSource, TrainConfig, TrainerSettings, load_recipe
from trainer.errors import RecipeError

MINIMAL = "name: fox\nepochs: 1\ndata:\n  - {path: fox.jsonl, format: messages}\n"


def _load(folder: Path, text: str, *overrides: str) -> TrainConfig:
    recipe = folder / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return load_recipe(recipe, overrides, base_model="micro")


def test_a_recipe_of_three_keys_is_enough(tmp_path: Path) -> None:
    config = _load(tmp_path, MINIMAL)
    assert (config.base_model, config.lora.r, config.data_root) == ("micro", 8, tmp_path)


def test_data_root_is_relative_to_the_recipe(tmp_path: Path) -> None:
    assert _load(tmp_path, MINIMAL + "data_root: books\n").data_root == tmp_path / "books"


def test_set_lays_yaml_values_over_the_recipe(tmp_path: Path) -> None:
    source = "{path: book.txt, format: text, raw_share: 1}"
    config = _load(
        tmp_path, MINIMAL, "lora.r=4", "lr=1e-3", "stop=['#', '---']", f"data.0={source}", "data.0.clean=false"
    )
    assert (config.lora.r, config.lr, config.stop) == (4, 1e-3, ["#", "---"])
    assert isinstance(config.data[0], TextSource) and not config.data[0].clean


@pytest.mark.parametrize(
    "override", ["lora", "=4", "data.7.path=x", "data.x=1", "name.first=x", "stop=[", "lora=[].r=4"]
)
def test_set_names_the_argument_it_cannot_use(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        _load(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=4", "lora.rnk: unknown key (got 4); known here: r, alpha"),
        ("epoch=4", "epoch: unknown key (got 4); did you mean epochs?"),
        ("data.0.promts=[]", "data.0.promts: unknown key (got []); known here: format, path"),
        ("data.0.format=csv", "data.0: a source has 'path' and 'format: messages' or 'format: text', or 'generator'"),
        ("lr=0", "lr: Input should be greater than 0 (got 0)"),
        ("lr=fast", "lr: Input should be a valid number (got 'fast')"),
        ("name=../fox", "(got '../fox')"),
        ("epochs=null", "neither epochs nor max_steps: give one"),
        ("data.0={path: b.txt, format: text}", "data.0: prompts is empty: give at least one"),
        ("data.0={format: messages}", "data.0.path: is missing; add it"),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, MINIMAL, override)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["name: [", "- fox", "", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not YAML|is a mapping"):
        _load(tmp_path, text)


def test_the_base_comes_from_the_environment_or_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUICKCHANGE_BASE_MODEL", raising=False)
    assert TrainerSettings().base_model == "micro"
    Path(".env").write_text("QUICKCHANGE_BASE_MODEL=owner/name\n", encoding="utf-8")
    assert TrainerSettings().base_model == "owner/name"
    monkeypatch.setenv("QUICKCHANGE_BASE_MODEL", "/models/other")
    assert TrainerSettings().base_model == "/models/other"


def test_a_missing_recipe_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
