"""``quickchange adapters convert``: which of PEFT's adapters come out as LoRA, how near, and which are refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters.content.peft_config import parse_peft_config
from server.cli.convert.command import BY_MERGING, BY_PEFT, DEFAULT_MAX_ERROR, main
from tests.model.families import VOCAB_SIZE, build
from tests.model.tuner_outcomes import OUTCOMES, REFUSED, Outcome
from tests.tables import only

EXACT = 2e-5
"""Largest difference of logits, as a share of the largest logit, that float32 explains."""

OF_EACH_KIND = ("LoHa", "VeRA", "GraLoRA", "AdaLoRA", "LoRA, PiSSA", "LoKr", "OFT", "LoRA, DoRA")
"""Exact and approximate, by PEFT's own gain and by merging, at every rank that the table has."""

UNSERVED_FIELDS: tuple[dict[str, Any], ...] = (
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [3]},
    {"alora_invocation_tokens": [3]},
    {"layer_replication": [[0, 2], [1, 3]]},
    {"target_parameters": ["experts"]},
    {"lora_bias": True},
    {"bias": "all"},
    {"megatron_config": {"x": 1}, "megatron_core": "os"},
    {"arrow_config": {"top_k": 1}},
    {"init_lora_weights": "corda", "corda_config": {"cache_file": "x.pt"}},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "pissa_niter_4"},
    {"auto_mapping": {"parent_library": "evil", "base_model_class": "Run"}},
    {"auto_mapping": "evil"},
    {"task_type": "SEQ_CLS"},
)
"""What an adapter of a kind that is converted may not have."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of three layers and 64 dimensions."""
    folder = tmp_path_factory.mktemp("convert") / "base"
    build("llama").save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def make(outcome: Outcome, base: PreTrainedModel, folder: Path) -> Path:
    """An adapter of this kind with random weights, as PEFT saves it; ``base`` is left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = getattr(peft, outcome.config)(task_type="CAUSAL_LM", **outcome.fields)
        model = get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * outcome.noise)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(base: PreTrainedModel, adapter: Path | None = None) -> torch.Tensor:
    """Logits of the stock base, or of PEFT's model of it, [2, 24, vocabulary], on other prompts than the command's."""
    prompts = torch.randint(3, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(7))
    model: Any = base
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=prompts).logits
    return result


def convert(folder: Path, base: Path, *flags: str) -> int:
    """Run the command in this process, with adapters beside the folder that is converted."""
    out = folder.parent / "adapters"
    return main([str(folder), f"--base-model={base}", f"--adapters-dir={out}", "--threads=1", *flags])


def published(folder: Path) -> list[str]:
    """What the command has left, dot-names included."""
    out = folder.parent / "adapters"
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


def write(folder: Path, config: object) -> Path:
    """A folder that is an adapter by its names only."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def check_refused(
    folder: Path, base: Path, capsys: pytest.CaptureFixture[str], *words: str, flags: Sequence[str] = ()
) -> None:
    """Exit status 1, one sentence, nothing left behind."""
    assert convert(folder, base, *flags) == 1
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("quickchange: ")]
    for word in words:
        assert word in line, line
    assert said.out == "" and published(folder) == []


def exact_rank(outcome: Outcome) -> int:
    own = int(outcome.fields.get("r", outcome.fields.get("init_r")))
    return {"r": own, "2r": 2 * own, "kr": 2 * own, "r²": own * own}[outcome.rank]


def test_every_tuner_of_peft_is_either_converted_or_refused() -> None:
    """A PEFT that brings another tuner fails here: decide what becomes of it."""
    assert not (BY_PEFT | BY_MERGING) & set(REFUSED) and not BY_PEFT & BY_MERGING
    assert {kind.value for kind in PeftType} == BY_PEFT | BY_MERGING | set(REFUSED)
    proved = {getattr(peft, outcome.config)(**outcome.fields).peft_type.value for outcome in OUTCOMES.values()}
    assert proved == BY_PEFT | BY_MERGING


@pytest.mark.parametrize("name", only(OF_EACH_KIND, OUTCOMES))
def test_what_is_converted_answers_as_it_did(
    name: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome, base = OUTCOMES[name], load(base_folder)
    folder = make(outcome, base, tmp_path / "old")
    flags = ["--rank", str(exact_rank(outcome))] if outcome.how == "exact" else []
    assert convert(folder, base_folder, *flags) == 0, capsys.readouterr().err
    assert published(folder) == ["old-lora"]
    new = tmp_path / "adapters" / "old-lora"
    config = parse_peft_config(json.loads((new / "adapter_config.json").read_text(encoding="utf-8")))
    assert {len(tensor.shape) for tensor in load_file(new / "adapter_model.safetensors").values()} == {2}
    plain, wanted, got = logits(base), logits(base, folder), logits(base, new)
    off, effect = float((got - wanted).abs().max()), float((wanted - plain).abs().max())
    assert effect > 0.01 * float(plain.abs().max())
    if outcome.how == "exact":
        assert off / float(wanted.abs().max()) < EXACT and config.r == exact_rank(outcome)
    else:
        assert off / float(wanted.abs().max()) < DEFAULT_MAX_ERROR
        assert outcome.lost == pytest.approx(off / effect, rel=0.6), off / effect


@pytest.mark.parametrize("kind", [*REFUSED, "NEW_KIND", None, ["LORA"]])
def test_other_tuners_are_refused_before_anything_is_loaded(
    kind: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "old", {"peft_type": kind, "task_type": "CAUSAL_LM"})
    check_refused(folder, tmp_path / "no base", capsys, "peft_type", "cannot be written as LoRA")


@pytest.mark.parametrize("fields", UNSERVED_FIELDS, ids=lambda fields: next(iter(fields)))
def test_configs_that_lora_cannot_express_are_refused_before_anything_is_loaded(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "old", {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, **fields})
    check_refused(folder, tmp_path / "no base", capsys)


def test_a_pickle_is_refused_before_peft_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "old", {"peft_type": "LOHA"})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    check_refused(folder, tmp_path / "no base", capsys, "adapter_model.safetensors is missing", "pickle")


def test_a_field_that_peft_would_drop_is_refused(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "old", {"peft_type": "LORA", "r": 4, "use_new_variant": True, "another": None})
    check_refused(folder, base_folder, capsys, "knows no use_new_variant")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "old", {})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    check_refused(folder, tmp_path / "no base", capsys, "cannot be read")


@pytest.mark.parametrize("flags", [["--rank", "2"], ["--energy", "0.5"]])
def test_what_is_too_far_off_is_not_published(
    flags: list[str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(OUTCOMES["LoKr"], load(base_folder), tmp_path / "old")
    check_refused(folder, base_folder, capsys, "--max-error", "raise --rank, or --energy", flags=flags)


def test_a_weak_adapter_is_not_lost_within_the_error(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that C3A changes here is a hundredth of the largest logit: at rank 1 it would pass for converted."""
    folder = make(OUTCOMES["C3A"], load(base_folder), tmp_path / "old")
    check_refused(folder, base_folder, capsys, "of what the adapter changes", flags=["--rank=1", "--max-error=0.2"])


def test_ranks_and_sizes_that_the_server_refuses_are_refused(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(OUTCOMES["LoHa"], load(base_folder), tmp_path / "old")
    check_refused(folder, base_folder, capsys, "rank 16 exceeds max_lora_rank 8", flags=["--max-lora-rank=8"])
    check_refused(folder, base_folder, capsys, "max_adapter_bytes", flags=["--max-adapter-bytes=1000"])
    check_refused(folder, base_folder, capsys, "lower rank", flags=["--rank=33"])  # v_proj has 32 rows


@pytest.mark.parametrize("change", ["another layer", "a tensor less", "not a number", "nothing learned"])
def test_adapters_that_do_not_fit_are_refused(
    change: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT would load each of them, with a warning at most."""
    folder = make(OUTCOMES["LoHa"], load(base_folder), tmp_path / "old")
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[0]
    if change == "another layer":
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    elif change == "a tensor less":
        del weights[name]
    elif change == "not a number":
        weights[name][0] = float("nan")
    else:
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    check_refused(folder, base_folder, capsys)


def test_what_peft_does_not_convert_is_refused_with_its_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build("gpt2")
    base.save_pretrained(tmp_path / "base")
    outcome = Outcome("FourierFTConfig", {"n_frequency": 50, "target_modules": ["c_attn"]}, "exact")
    folder = make(outcome, base, tmp_path / "old")
    check_refused(folder, tmp_path / "base", capsys, "PEFT cannot write it as LoRA", "do not support LoRA conversion")


def test_the_transposed_linears_of_gpt2_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("gpt2")
    base.save_pretrained(tmp_path / "base")
    fields = {"r": 4, "init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    folder = make(Outcome("LoraConfig", fields, "exact", "2r"), base, tmp_path / "old")
    assert convert(folder, tmp_path / "base", "--rank=8") == 0, capsys.readouterr().err
    wanted, got = logits(base, folder), logits(base, tmp_path / "adapters" / "old-lora")
    assert float((got - wanted).abs().max()) < EXACT * float(wanted.abs().max())


def test_a_name_that_is_taken_is_kept(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(OUTCOMES["VeRA"], load(base_folder), tmp_path / "old")
    taken = tmp_path / "adapters" / "old-lora"
    taken.mkdir(parents=True)
    assert convert(folder, base_folder) == 1 and "exists already" in capsys.readouterr().err
    assert list(taken.iterdir()) == []
    assert convert(folder, base_folder, "--name", "new") == 0
    assert published(folder) == ["new", "old-lora"]


def test_how_an_adapter_wants_to_be_talked_to_and_where_it_is_from_go_along(base_folder: Path, tmp_path: Path) -> None:
    """Without ``source.json`` the template of somebody else's adapter would pass for the operator's own."""
    folder = make(OUTCOMES["VeRA"], load(base_folder), tmp_path / "old")
    texts = {"quickchange.json": "{}", "chat_template.jinja": "x", "tokenizer_config.json": "{}", "source.json": "{}"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "evil.py").write_text("1", encoding="utf-8")
    assert convert(folder, base_folder) == 0
    new = tmp_path / "adapters" / "old-lora"
    assert {path.name for path in new.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", *texts}


@pytest.mark.parametrize("flag", ["--rank=0", "--energy=1", "--max-error=-1", "--rank=two"])
def test_flags_out_of_range_are_bad_usage(flag: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path, tmp_path, flag)
    assert stopped.value.code == 2
