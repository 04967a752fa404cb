"""From recipe to folder: what is published is what was trained, and what fails leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_format import publishing
from base_files.fingerprint import base_fingerprint, base_fingerprint_v2
from base_files.source import FolderBase
from base_files.weights_sample import sample_of
from tests.tiny_models import build_tiny_base
from trainer import card
from trainer import publish as publish_module
from trainer import run as run_module
from trainer.__main__ import main
from trainer.generate import cut_at_stop
from trainer.loss import full_logits
from trainer.micro.tokenizer import END

SCHEMA = Path(__file__).parents[1] / "contract" / "sidecar.schema.json"
PUBLISHED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "quickchange.json"}
PROBE = torch.arange(100, 120).unsqueeze(0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe beside its data and a tiny base."""
    base = build_tiny_base(tmp_path / "base")
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: fox\nbase_model: {base}\nmax_steps: 4\nlr: 1e-2\nmax_length: 64\ndtype: float32\n"
        "data: [{path: chats.jsonl, format: messages}]\nstop: ['###']\nsampling: {temperature: 0.5, max_tokens: 8}\n"
        "samples: ['What is 3?']\ndescription: Knows numbers.\n",
        encoding="utf-8",
    )
    return path


def _train(recipe: Path, *options: str) -> int:
    return main(["train", str(recipe), "--out", str(recipe.parent / "out" / "fox"), *options])


def _entries(recipe: Path) -> list[str]:
    folder = recipe.parent / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _fail(*_: Any, **__: Any) -> None:
    raise OSError("disk full")


def test_the_published_folder_says_what_was_trained(recipe: Path) -> None:
    assert _train(recipe, "--set", "lora.r=4") == 0
    folder = recipe.parent / "out" / "fox"
    assert {path.name for path in folder.iterdir()} == PUBLISHED and _entries(recipe) == ["fox"]
    sidecar = json.loads((folder / "quickchange.json").read_text(encoding="utf-8"))
    jsonschema.validate(sidecar, json.loads(SCHEMA.read_text(encoding="utf-8")))
    base = recipe.parent / "base"
    fingerprints = {"fingerprint": base_fingerprint(base), "fingerprint_v2": base_fingerprint_v2(base)}
    sampled = sample_of(FolderBase(base))
    assert sampled is not None
    sample = sampled.to_json()
    assert sidecar["schema_version"] == 2 and sidecar["base"] == {"name": "base", **fingerprints, "sample": sample}
    assert sidecar["end_tokens"] == [END]
    assert sidecar["stop"] == ["###"] and sidecar["sampling"] == {"temperature": 0.5, "max_tokens": 8}
    assert sidecar["training"]["recipe"]["lora"] == {"r": 4}
    assert sidecar["metrics"]["eval_loss"] < sidecar["metrics"]["base_eval_loss"]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "base" and config["r"] == 4
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# fox" in card and "Knows numbers." in card and "**What is 3?**" in card


def test_nothing_published_names_a_path_of_this_machine(recipe: Path) -> None:
    assert _train(recipe) == 0
    for name in PUBLISHED - {"loss.png"}:
        assert str(recipe.parent).encode() not in (recipe.parent / "out" / "fox" / name).read_bytes(), name


def test_the_published_folder_gives_in_peft_the_logits_of_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def watched(model: PeftModel, *arguments: Any, **options: Any) -> None:
        with torch.inference_mode():
            trained.append(full_logits(model, PROBE))
        publish_module.publish(model, *arguments, **options)

    monkeypatch.setattr(run_module, "publish", watched)
    assert _train(recipe) == 0
    base = AutoModelForCausalLM.from_pretrained(recipe.parent / "base")
    untouched = full_logits(base, PROBE)
    loaded = full_logits(PeftModel.from_pretrained(base, recipe.parent / "out" / "fox"), PROBE)
    torch.testing.assert_close(loaded, trained[0], rtol=0, atol=1e-4)
    assert not torch.allclose(loaded, untouched, atol=1e-3)


def test_weights_published_in_bfloat16_are_those_that_were_evaluated(recipe: Path) -> None:
    """``publish`` compares the logits of the file, read back, with those of the model in memory."""
    assert _train(recipe, "--set", "lora.save_dtype=bfloat16") == 0
    weights = load_file(recipe.parent / "out" / "fox" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    full = recipe.parent / "full"
    assert main(["train", str(recipe), "--out", str(full)]) == 0
    for name, weight in load_file(full / "adapter_model.safetensors").items():
        assert weight.dtype == torch.float32 and torch.equal(weight.to(torch.bfloat16), weights[name]), name


def test_published_files_have_the_modes_of_any_other_file(recipe: Path) -> None:
    """Once, safetensors' own 0600 was published, and a server of another user could not read the weights."""
    assert _train(recipe) == 0
    ordinary = recipe.parent / "ordinary"
    ordinary.touch()
    for path in (recipe.parent / "out" / "fox").iterdir():
        assert path.stat().st_mode == ordinary.stat().st_mode, path.name


def test_training_again_replaces_the_folder(recipe: Path) -> None:
    assert _train(recipe) == 0
    before = (recipe.parent / "out" / "fox" / "adapter_model.safetensors").read_bytes()
    assert _train(recipe, "--set", "seed=2") == 0
    assert (recipe.parent / "out" / "fox" / "adapter_model.safetensors").read_bytes() != before
    assert _entries(recipe) == ["fox"]


def test_the_same_recipe_gives_the_same_bytes(recipe: Path) -> None:
    folder = recipe.parent / "out" / "fox"
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert _train(recipe) == 0
    first = [(folder / name).read_bytes() for name in names]
    assert _train(recipe) == 0
    assert [(folder / name).read_bytes() for name in names] == first


def test_a_folder_that_is_no_adapter_is_never_replaced(recipe: Path) -> None:
    precious = recipe.parent / "out" / "fox" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work", encoding="utf-8")
    assert _train(recipe) == 2
    assert precious.exists()


@pytest.mark.parametrize("name", ["save_adapter", "plot_loss", "_verify", "_settle", "_rename"])
def test_a_failure_while_publishing_leaves_the_old_folder_and_nothing_else(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A full disk was a traceback at the end of a long run, and not a sentence."""
    assert _train(recipe) == 0
    before = (recipe.parent / "out" / "fox" / "quickchange.json").read_bytes()
    monkeypatch.setattr(publishing if name in ("_settle", "_rename") else publish_module, name, _fail)
    assert _train(recipe) == 1
    assert "out/fox cannot be written: disk full; nothing was published" in capsys.readouterr().err
    assert _entries(recipe) == ["fox"]
    assert (recipe.parent / "out" / "fox" / "quickchange.json").read_bytes() == before


def test_a_rename_that_fails_puts_the_old_folder_back(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(recipe) == 0
    rename = Path.rename

    def fail_on_partial(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_partial)
    assert _train(recipe) == 1
    assert "out/fox cannot be written: disk full" in capsys.readouterr().err
    assert _entries(recipe) == ["fox"] and (recipe.parent / "out" / "fox" / "README.md").exists()


def test_weights_that_read_back_differently_are_not_published(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = publish_module.save_adapter

    def save_rounded(model: PeftModel, folder: Path, **options: Any) -> None:
        copies = {name: p.data.clone() for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if name in copies:
                parameter.data.mul_(1.5)
        save(model, folder, **options)
        for name, parameter in model.named_parameters():
            if name in copies:
                parameter.data.copy_(copies[name])

    monkeypatch.setattr(publish_module, "save_adapter", save_rounded)
    assert _train(recipe) == 1
    assert "logits differ from training's" in capsys.readouterr().err
    assert _entries(recipe) == []


def test_an_adapter_that_changes_nothing_is_not_published(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(recipe, "--set", "lr=1e-30") == 1
    assert "changes nothing" in capsys.readouterr().err
    assert _entries(recipe) == []


@pytest.mark.parametrize("stage", ["train", "_verify"])
def test_an_interrupted_run_leaves_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module if stage == "train" else publish_module, stage, interrupt)
    assert _train(recipe) == 1
    assert "an unfinished adapter is not published" in capsys.readouterr().err
    assert _entries(recipe) == []


def test_bad_data_and_a_context_too_long_exit_with_2(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(recipe, "--set", "max_length=9999") == 2
    assert "at most 256" in capsys.readouterr().err
    (recipe.parent / "chats.jsonl").write_text("{}", encoding="utf-8")
    assert _train(recipe) == 2
    assert "chats.jsonl:1: messages must be a list" in capsys.readouterr().err


def test_an_answer_ends_before_its_first_stop_string() -> None:
    assert cut_at_stop("one ### two --- three", ["---", "###"]) == "one "
    assert cut_at_stop("one", ["#"]) == "one"


def test_without_matplotlib_a_card_has_no_picture_and_the_command_that_installs_it_is_printed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    assert _train(recipe) == 0
    folder = recipe.parent / "out" / "fox"
    assert {path.name for path in folder.iterdir()} == PUBLISHED - {"loss.png"}
    assert "loss.png" not in (folder / "README.md").read_text(encoding="utf-8")
    assert "pip install 'quickchange[plot]'" in capsys.readouterr().err
