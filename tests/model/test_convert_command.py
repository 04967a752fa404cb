"""``quickchange adapters convert`` on other trainers' adapters: what it publishes, says, and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.cli.convert.command import main
from tests.model.foreign_adapters import gguf_arrays, logits_of, make_peft, write_gguf, write_mlx
from tests.tiny_models import build_tiny_base

Say = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(base_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.eval()
    return model


@pytest.fixture
def source(base: PreTrainedModel, tmp_path: Path) -> Path:
    """PEFT's folder of the adapter that the others are made from."""
    return make_peft(base, tmp_path / "peft")


def convert(path: Path, base_folder: Path, tmp_path: Path, *flags: str) -> int:
    """Run the command in this process."""
    settings = [f"--base-model={base_folder}", "--served-model-name=tiny", f"--adapters-dir={tmp_path / 'adapters'}"]
    return main([str(path), *settings, "--threads=1", *flags])


def published(tmp_path: Path) -> list[str]:
    """What the command has left, dot-names included."""
    out = tmp_path / "adapters"
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


def same(base: PreTrainedModel, wanted: Path, got: Path) -> bool:
    theirs, ours = logits_of(base, wanted), logits_of(base, got)
    return float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_a_folder_of_mlx_lm_is_published_under_its_name(
    source: Path, base: PreTrainedModel, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    folder = write_mlx(tmp_path / "pirate", source)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "0000100_adapters.safetensors").write_bytes(b"x")
    assert convert(folder, base_folder, tmp_path) == 0
    made = tmp_path / "adapters" / "pirate"
    assert published(tmp_path) == ["pirate"] and same(base, source, made)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"}
    assert {path.name for path in made.iterdir()} == names
    size = (made / "adapter_model.safetensors").stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        f"pirate: mlx-lm's LoRA as PEFT's, of rank 4 on 14 modules, {size} bytes, in {made}",
        "checked: every tensor fits the base tiny by name and shape",
        "next: quickchange adapters check pirate",
    ]


@pytest.mark.parametrize("named", ["its file", "its folder"])
def test_a_gguf_lora_is_published_where_out_says(
    named: str, source: Path, base: PreTrainedModel, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    path = write_gguf(tmp_path / "pirate.gguf", gguf_arrays(source, base, "llama"))
    assert (
        convert(
            path if named == "its file" else tmp_path,
            base_folder,
            tmp_path,
            "--out",
            str(tmp_path / "elsewhere" / "mine"),
        )
        == 0
    )
    assert same(base, source, tmp_path / "elsewhere" / "mine") and published(tmp_path) == []
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"reading the base {base_folder}, against which it is checked", "converting a GGUF LoRA",
    ]  # fmt: skip
    assert said.out.splitlines()[-1] == f"next: quickchange adapters check {tmp_path / 'elsewhere' / 'mine'}"


MODELFILE = '''\
FROM llama3.2:1b
ADAPTER ./lora.gguf
SYSTEM """Answer as a "pirate"."""
TEMPLATE """{{ range .Messages }}{{ .Content }}{{ end }}"""
PARAMETER stop "<|end|>"
PARAMETER temperature 0.3
PARAMETER num_ctx 4096
LICENSE """MIT"""
'''


def test_a_modelfile_becomes_a_folder_with_a_sidecar_and_a_report(
    source: Path, base: PreTrainedModel, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    folder = tmp_path / "pirate"
    folder.mkdir()
    write_gguf(folder / "lora.gguf", gguf_arrays(source, base, "llama"))
    (folder / "Modelfile").write_text(MODELFILE)
    assert convert(folder / "Modelfile", base_folder, tmp_path) == 1
    assert "--chat-template base" in capsys.readouterr().err and published(tmp_path) == []
    assert convert(folder / "Modelfile", base_folder, tmp_path, "--chat-template", "base") == 0
    made = tmp_path / "adapters" / "pirate"
    assert same(base, source, made) and (made / "LICENSE").read_text() == "MIT\n"
    sidecar = json.loads((made / "quickchange.json").read_text())
    assert sidecar["schema_version"] == 2 and sidecar["base"]["fingerprint_v2"].startswith("sha256:")
    assert sidecar["system_prompt"] == 'Answer as a "pirate".'
    assert sidecar["stop"] == ["<|end|>"] and sidecar["sampling"] == {"temperature": 0.3}
    assert capsys.readouterr().out.splitlines()[1:] == [
        "FROM llama3.2:1b: here the base is tiny",
        "TEMPLATE: not used, the chat template is the base's own",
        "not carried over: PARAMETER num_ctx 4096",
        "checked: every tensor fits the base tiny by name and shape",
        "next: quickchange adapters check pirate",
    ]


TEMPLATE = (
    "{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}{{ if .Prompt }}<|user|>{{ .Prompt }}<|end|>{{ end }}"
    "<|assistant|>{{ .Response }}<|end|>"
)
"""That of the tiny base in Go's language; the token that begins a text is Ollama's to put before it."""


@pytest.mark.parametrize("ours", [True, False])
def test_a_simple_template_is_the_bases_or_goes_into_the_sidecar_as_jinja(
    ours: bool, source: Path, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    template = TEMPLATE if ours else TEMPLATE.replace("<|user|>", "USER: ")
    (tmp_path / "Modelfile").write_text(f'FROM x\nADAPTER ./peft\nTEMPLATE """{template}"""\n')
    assert convert(tmp_path / "Modelfile", base_folder, tmp_path, "--name=mine") == 0
    sidecar = json.loads((tmp_path / "adapters" / "mine" / "quickchange.json").read_text())
    said = capsys.readouterr().out
    if ours:
        assert "chat_template" not in sidecar and "TEMPLATE: it is the base's own chat template" in said
        return
    assert "TEMPLATE: translated to Jinja" in said
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    text = tokenizer.apply_chat_template(messages, chat_template=sidecar["chat_template"], tokenize=False)
    assert text == "<|begin|><|system|>Be brief.<|end|>USER: Hi<|end|><|assistant|>"


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_the_adapter_of_a_modelfile_may_be_a_folder(
    kind: str, source: Path, base: PreTrainedModel, base_folder: Path, tmp_path: Path
) -> None:
    if kind == "mlx":
        write_mlx(tmp_path / "mlx", source)
    (tmp_path / "Modelfile").write_text(f"FROM x\nADAPTER ./{kind}\n")
    assert convert(tmp_path / "Modelfile", base_folder, tmp_path, "--name=mine") == 0
    assert published(tmp_path) == ["mine"] and same(base, source, tmp_path / "adapters" / "mine")
    assert (tmp_path / "adapters" / "mine" / "quickchange.json").exists()


def test_what_does_not_fit_the_base_is_not_published(
    source: Path, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    folder = write_mlx(tmp_path / "pirate", source)
    tensors = load_file(folder / "adapters.safetensors")
    moved = {name.replace("layers.1", "layers.30"): tensor for name, tensor in tensors.items()}
    save_file(moved, folder / "adapters.safetensors")
    assert convert(folder, base_folder, tmp_path) == 1
    said = capsys.readouterr().err
    assert (
        "layers.30" in said
        and "(--base-model names the base that it was trained on)" in said
        and published(tmp_path) == []
    )


def test_a_base_that_is_not_there_is_told_before_anything_is_loaded(source: Path, tmp_path: Path) -> None:
    from base_files.errors import BaseNotFound

    folder = write_mlx(tmp_path / "pirate", source)
    with pytest.raises(BaseNotFound):
        convert(folder, tmp_path / "no base", tmp_path)
    assert published(tmp_path) == []


def test_a_broken_sidecar_beside_the_adapter_of_a_modelfile_is_refused_by_name(
    source: Path, base_folder: Path, tmp_path: Path, capsys: Say
) -> None:
    """It ended in a traceback of the JSON parser."""
    (source / "quickchange.json").write_text('{"schema_version')
    (tmp_path / "Modelfile").write_text("FROM x\nADAPTER ./peft\nSYSTEM Be brief.\n")
    assert convert(tmp_path / "Modelfile", base_folder, tmp_path, "--name=fox") == 1
    assert "quickchange.json beside the Modelfile's ADAPTER is not valid JSON" in capsys.readouterr().err
    assert published(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none", None, "there is no "),
        ("a.gguf", b"GGUF", "truncated or damaged"),
        ("a.gguf", b"PK\3\4", "a pickle of torch.save"),
        ("a.gguf", b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        ("a.gguf", b"something else", "no GGUF file"),
        ("a.bin", b"algg" + bytes(99), "an adapter of llama.cpp before GGUF"),
        ("Modelfile", b"FROM x\nADAPTER .\n", "holds neither PEFT's"),
        ("Modelfile", b"FROM x\n", "has no ADAPTER"),
        ("notes.txt", b"Hello", "no instruction"),
    ],
)
def test_what_is_no_adapter_is_refused_before_the_base_is_looked_for(
    name: str, content: bytes | None, words: str, tmp_path: Path, capsys: Say
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert convert(tmp_path / name, tmp_path / "no base", tmp_path, "--name=mine") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and published(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank=4"], "--rank is for other tuners of PEFT"),
        (["--max-error=0.1"], "--max-error is for other tuners of PEFT"),
        (["--chat-template=base"], "--chat-template is for a Modelfile"),
        (["--name=a", "--out=b"], "not allowed with"),
    ],
)
def test_a_flag_that_would_do_nothing_is_bad_usage(flags: list[str], words: str, tmp_path: Path, capsys: Say) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path / "a.gguf", tmp_path, tmp_path, *flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
