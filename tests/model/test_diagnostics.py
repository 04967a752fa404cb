"""``quickchange adapters check``: what it says of good and bad folders, and whether it finds a wrong engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AddedToken

from base_files.source import BaseSource, FolderBase
from base_files.stock_model import stock_model
from server.__main__ import main
from server.adapters.content.diagnostics import diagnose
from server.adapters.content.manifest import Manifest, read_manifest
from server.cli import adapters_check, parity
from server.errors import AdapterRejected
from server.lora.weights import LoRAWeights
from server.model.attention.interface import FlatAttention
from server.model.fused_ops import KernelRMSNorm, RotaryEmbedding
from tests.adapter_folders import BASE, LIMITS, make, tensors, write
from tests.model.peft_cases import CASES, base_of, make_adapter
from tests.serving import ROOT
from tests.tiny_models import build_tiny_base, tiny_tokenizer

LINEAR = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
SIDECAR = {
    "schema_version": 1,
    "base": {"name": "other\x1b[31m", "fingerprint": f"sha256:{'a' * 64}"},
    "created": "2026-01-01T00:00:00Z",
    "system_prompt": "Be brief.",
    "stop": ["###"],
    "sampling": {"temperature": 0.5, "max_tokens": 9},
}

Check = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def check(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """The exit status and everything that was printed, on a tiny base."""

    def run(folder: Path | str, *flags: str, base_model: Path = base) -> tuple[int, str]:
        settings = ["--base-model", str(base_model), "--adapters-dir", str(tmp_path), "--threads", "1"]
        status = main(["adapters", "check", str(folder), *settings, *flags])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter for the tiny base, of rank 2 on one linear."""
    path = tmp_path / "good"
    path.mkdir()
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(said))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    save_file({f"{LINEAR}A.weight": a, f"{LINEAR}B.weight": b}, path / "adapter_model.safetensors")
    return path


def change(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Change fields of the config, and tensors of the weights."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file({**load_file(weights), **(tensors or {})}, weights)


def test_a_demo_adapter_is_served_and_answers_as_under_peft(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "check", "json", "--adapters-dir", str(ROOT / "adapters"), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{ROOT / 'adapters' / 'json'}: served as json\n")
    for row in (
        "  files        README.md",
        "               adapter_model.safetensors  2,",
        "  kind         LORA as PEFT 0.21",
        "  config       r 16, lora_alpha 32.0\n",
        "  rank         16, scaling 2\n",
        "  modules      42 of the base's ",
        "q_proj 6",
        "), the base that the adapter was trained on\n",
        "  base check   by fingerprint\n",
        "  sampling     temperature 0.0, max_tokens 64\n",
        "  template     the base's\n",
        " bytes at most\n",
        "  delta norm   ",
        "  digests      version ",
        "  PEFT parity  passed: logits differ by ",
        "; 16 of 16 greedy tokens are equal\n",
        "  effect       the adapter changes the base's logits by up to 0.",
    ):
        assert row in said
    assert "problem" not in said


def test_a_folder_is_found_by_its_name_and_by_its_path(folder: Path, check: Check) -> None:
    for text in ("good", folder, f"{folder}/"):
        status, said = check(text, "--no-probe")
        assert status == 0 and "served as good" in said and "PEFT parity  not compared: --no-probe was given" in said
    status, said = check("nobody")
    assert status == 1 and "there is no folder nobody and no adapter of this name in " in said


def test_everything_that_is_wrong_is_told_at_once(folder: Path, check: Check) -> None:
    nan = torch.full((32, 2), float("nan"))
    change(folder, {f"{LINEAR}B.weight": nan, "what.ever": torch.ones(1)}, use_qalora=True, layer_replication=[[0, 1]])
    (folder / "quickchange.json").write_text(json.dumps(SIDECAR))
    (folder / "chat_template.jinja").write_text("{{ messages }} {% bad")
    (folder / "source.json").write_text('{"repo_id": "someone/parrot", "revision": "abc", "added": "today"}')
    folder = folder.rename(folder.with_name("a name"))
    status, said = check(folder)
    assert status == 1
    for problem in (
        "the folder's name is no model name",
        "layer_replication = [[0, 1]] is not supported",
        "use_qalora = True is not supported",
        "it was trained on another base (other\\x1b[31m, fingerprint sha256:aaaaaaaaaaaa)",
        "it brings a chat template of its own",
        "its chat template does not work",
        f"the weights of {LINEAR}B.weight hold NaN or infinity",
        "no part of a LoRA adapter for this base: what.ever",
    ):
        assert sum(problem in line for line in said.splitlines() if line.startswith("  problem      ")) == 1
    assert "the adapter's own, from another tool or a hub: not trusted" in said
    assert (
        "  prompt       9 characters: 'Be brief.'\n  stop         '###'\n  sampling     temperature 0.5, max_t" in said
    )
    assert "fetched from someone/parrot at abc, today" in said
    assert "PEFT parity" not in said and "\x1b" not in said


def test_of_pickled_weights_the_rest_is_judged_all_the_same(folder: Path, check: Check) -> None:
    change(folder, alora_invocation_tokens=[1])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    status, said = check(folder)
    assert status == 1
    assert "the weights are a pickle, which can run code when opened" in said and "alora_invocation_tokens" in said
    assert "  config       r 2, lora_alpha 4\n" in said


def test_another_kind_of_adapter_is_told_how_to_be_converted(folder: Path, check: Check) -> None:
    change(folder, peft_type="LOHA")
    status, said = check(folder)
    assert status == 1 and "quickchange adapters convert" in said and "  kind         LOHA\n" in said


def test_an_untrained_adapter_is_told_so(folder: Path, check: Check) -> None:
    change(folder, {f"{LINEAR}B.weight": torch.zeros(32, 2)})
    status, said = check(folder)
    assert status == 1 and "all its deltas are zero" in said


def test_a_link_is_followed_into_the_roots_alone(folder: Path, check: Check, tmp_path: Path) -> None:
    folder.with_name("link").symlink_to(folder)
    assert check("link", "--no-probe")[0] == 0
    for roots in ("", str(tmp_path / "elsewhere")):
        status, said = check("link", "--no-probe", f"--adapter-roots={roots}")
        assert status == 1 and "the folder is a link to '" in said and "--adapter-roots" in said
    status, said = check("link", "--no-probe", "--adapter-roots", f"{tmp_path / 'elsewhere'}:{folder.parent}")
    assert status == 0 and "served as link" in said


def test_a_strangers_chat_template_is_named_where_it_is_trusted(folder: Path, check: Check) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert check(folder, "--no-probe")[0] == 1
    status, said = check(folder, "--no-probe", "--trust-chat-templates")
    assert status == 0 and "the adapter's own, from another tool or a hub: trusted, rendered in a sandbox" in said


def _rename(folder: Path) -> None:
    folder.rename(folder.with_name("no name"))


def _cut(folder: Path) -> None:
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(200)


@pytest.mark.parametrize(
    "harm",
    [
        _rename,
        _cut,
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{,"),
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        lambda folder: (folder / "adapter_config.json").write_bytes(b" " * 2_000_000),
        lambda folder: (folder / "quickchange.json").write_text('{"base": 3}'),
        lambda folder: (folder / "quickchange.json").symlink_to("/dev/null"),
        lambda folder: (folder / "generation_config.json").write_text("3"),
        lambda folder: write(folder, config={"r": 2}),
        lambda folder: write(folder, config={"peft_type": "LORA", "use_dora": True, "lora_bias": True, "r": 2}),
        lambda folder: write(folder, config={"peft_type": "LORA", "r": 3, "lora_alpha": "much"}),
        lambda folder: write(folder, weights={name: tensor[:1] for name, tensor in tensors().items()}),
        lambda folder: write(folder, weights={name: tensor.int() for name, tensor in tensors().items()}),
    ],
)
def test_the_reason_why_the_server_refuses_a_folder_is_among_what_is_told(
    harm: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path, "good")
    harm(tmp_path / "good")
    (path,) = tmp_path.iterdir()
    with pytest.raises(AdapterRejected) as refused:
        read_manifest(path, BASE, LIMITS)
    found = diagnose(path, BASE, LIMITS)
    assert found.manifest is None and len(set(found.problems)) == len(found.problems) > 0
    assert found.problems[0] in refused.value.reason


def test_memory_over_the_limit_is_a_problem_of_an_adapter_that_is_told_all_the_same(tmp_path: Path) -> None:
    found = diagnose(make(tmp_path, "good"), BASE, replace(LIMITS, max_memory=10))
    assert found.plan is not None and ["the limit is 10" in problem for problem in found.problems] == [True]


def test_peft_is_kept_away_from_what_is_refused(folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "compare", lambda *given: pytest.fail("PEFT was asked"))
    change(folder, layer_replication=[[0, 1]])
    assert check(folder)[0] == 1


def test_peft_answers_by_stock_code(folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once PEFT's model, loaded after ours, shared our rotary embedding: an error in it could not be seen."""
    compare = parity.compare

    def without_ours(source: BaseSource, manifest: Manifest, answers: parity.Answers) -> parity.Parity:
        with monkeypatch.context() as patch:
            for ours, method in (
                (RotaryEmbedding, "__call__"),
                (KernelRMSNorm, "forward"),
                (FlatAttention, "__call__"),
            ):
                patch.setattr(ours, method, lambda *given, **named: pytest.fail("our code was called"))
            return compare(source, manifest, answers)

    monkeypatch.setattr(parity, "compare", without_ours)
    status, said = check(folder)
    assert (status, "PEFT parity  passed" in said) == (0, True), said


def test_peft_gets_names_and_numbers_in_place_of_a_strangers_expressions(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``(a+)+$`` would keep PEFT busy for ever, and ``auto_mapping`` would have it import a module."""
    seen: list[Manifest] = []
    compare = parity.compare

    def note(source: BaseSource, manifest: Manifest, answers: parity.Answers) -> parity.Parity:
        seen.append(manifest)
        return compare(source, manifest, answers)

    monkeypatch.setattr(parity, "compare", note)
    gadgets: dict[str, Any] = {
        "auto_mapping": {"parent_library": "this", "base_model_class": "x"},
        "megatron_core": "antigravity",
    }
    change(folder, target_modules="(a+)+$", rank_pattern={"(q_)+proj": 2}, alpha_pattern={".*(q|v)_proj": 3}, **gadgets)
    assert check(folder)[0] == 0
    config = parity._clean_config(seen[0])
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["rank_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 2}
    assert config["alpha_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 3}
    assert not gadgets.keys() & config.keys()


@pytest.mark.parametrize(
    ("case", "family"),
    [("patterns", "gpt2"), ("saved_tied", "llama_tied"), ("tokens", "llama"), ("experts", "qwen3_moe")],
)
def test_what_peft_made_answers_as_under_peft(case: str, family: str, tmp_path: Path, check: Check) -> None:
    base = base_of(family, torch.float32)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    make_adapter(base, CASES[case], family, tmp_path / "made")
    status, said = check("made", base_model=tmp_path / "base")
    assert (status, "PEFT parity  passed" in said) == (0, True), said


def test_names_inside_of_wrappers_answer_as_under_peft(folder: Path, check: Check) -> None:
    weights = folder / "adapter_model.safetensors"
    wrapped = LINEAR.replace("base_model.model.model.", "_orig_mod.base_model.model.model.language_model.")
    save_file({f"{wrapped}{half}.run.weight": load_file(weights)[f"{LINEAR}{half}.weight"] for half in "AB"}, weights)
    change(folder, bias=None, r=2.0, alpha_pattern={r"model\.language_model\..*": 16})
    status, said = check(folder)
    assert (status, "PEFT parity  passed" in said) == (0, True), said


def test_rows_trained_for_new_tokens_answer_as_under_peft_and_have_a_text(
    base: Path, tmp_path: Path, check: Check
) -> None:
    """Its tokens were accepted, and neither the prompt nor the answer had them."""
    tokenizer = tiny_tokenizer()
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<call>", special=True), AddedToken("<tool>")])
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[first, first + 1])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = get_peft_model(stock_model(FolderBase(base)), config)
        for name, tensor in model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                tensor.normal_()
        model.save_pretrained(str(tmp_path / "caller"))
    tokenizer.save_pretrained(tmp_path / "caller")
    status, said = check("caller")
    assert (status, "PEFT parity  passed" in said) == (0, True), said
    assert f"  tokens       '<call>' {first}, '<tool>' {first + 1}\n" in said


def test_an_engine_whose_scaling_is_one_percent_off_is_found(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoRAWeights.of

    def wrong(manifest: Manifest, modules: Mapping[str, torch.nn.Module]) -> LoRAWeights:
        weights = right(manifest, modules)
        deltas = {name: replace(one, b=None if one.b is None else one.b * 1.01) for name, one in weights.deltas.items()}
        return replace(weights, deltas=deltas)

    monkeypatch.setattr(LoRAWeights, "of", wrong)
    status, said = check(folder)
    assert (status, "PEFT parity  FAILED: logits differ by " in said) == (1, True), said


def test_where_peft_cannot_load_it_the_probe_failed(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "_clean_config", lambda manifest: {"r": 0})
    status, said = check(folder)
    assert status == 1 and "PEFT parity  FAILED: PEFT cannot load the adapter (ValueError: " in said


def test_a_large_base_is_not_loaded_twice(folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_check, "MAX_PROBED_BYTES", 1000)
    monkeypatch.setattr(parity, "compare", lambda *given: pytest.fail("PEFT was asked"))
    status, said = check(folder)
    assert status == 0 and "PEFT parity  not compared: the base's weights have 0.0 GB" in said
