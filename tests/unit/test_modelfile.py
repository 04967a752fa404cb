"""Ollama's Modelfile: read as Ollama reads it, and what of it becomes the sidecar."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapter_format.sidecar import parse_sidecar
from server.cli.convert.ollama import Modelfile, adapter_path, parse_modelfile, read_modelfile, read_wishes
from server.cli.convert.source import read_source
from server.cli.folders import NotPublished
from tests.adapter_folders import BASE

TEXT = '''\
# made by "ollama show"
from llama3.2
  Adapter ./lora.gguf
SYSTEM """You are
a "pirate".  # no comment
"""
PARAMETER temperature 0.5
PARAMETER stop "<|eot_id|>"
parameter STOP AI:
Parameter num_ctx 4096
MESSAGE user "Hi, there"
LICENSE "MIT"
'''


def named(modelfile: Modelfile) -> list[tuple[str, str, str]]:
    return [(one.name, one.key, one.value) for one in modelfile.instructions]


def test_instructions_come_in_any_case_with_quotes_and_comments() -> None:
    assert named(parse_modelfile(TEXT)) == [
        ("FROM", "", "llama3.2"),
        ("ADAPTER", "", "./lora.gguf"),
        ("SYSTEM", "", 'You are\na "pirate".  # no comment\n'),
        ("PARAMETER", "temperature", "0.5"),
        ("PARAMETER", "stop", "<|eot_id|>"),
        ("PARAMETER", "STOP", "AI:"),
        ("PARAMETER", "num_ctx", "4096"),
        ("MESSAGE", "user", "Hi, there"),
        ("LICENSE", "", "MIT"),
    ]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('SYSTEM "one\ntwo"', "one\ntwo"),
        ('SYSTEM """one" two"""', 'one" two'),
        ('SYSTEM """"one""""', '"one"'),
        ('SYSTEM ""', ""),
        ('SYSTEM """"""', ""),
        ('SYSTEM   it\'s "so" \t', 'it\'s "so"'),
        ("SYSTEM a # b", "a # b"),
        ("SYSTEM\tone", "one"),
        ("SYSTEM one\r\nLICENSE two", "one"),
        ('SYSTEM """\n#one\nSYSTEM two\n"""', "\n#one\nSYSTEM two\n"),
    ],
)
def test_a_value_is_read_by_ollamas_rules(line: str, value: str) -> None:
    assert parse_modelfile(f"FROM x\n{line}\n").values("SYSTEM") == [value]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SYSTEM x", "no FROM"),
        ("", "no FROM"),
        ("FROM", "line 1: 'FROM' is no instruction with a value"),
        ("FROM x\nSYTSEM y", "line 2: 'SYTSEM y' is no instruction"),
        ('FROM x\nSYSTEM "y', "line 2: the quote after SYSTEM is not closed"),
        ('FROM x\n\nSYSTEM """y"\n', "line 3: the quote"),
        ("FROM x\nPARAMETER stop", "line 2: PARAMETER needs a word and a value"),
        ("FROM x\nMESSAGE tool y", "line 2: the role of a MESSAGE is 'tool'"),
    ],
)
def test_what_ollama_refuses_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_modelfile(text)


def test_an_open_quote_over_a_whole_file_is_found_out_at_once() -> None:
    """Joined anew at each line, a megabyte of lines took minutes."""
    with pytest.raises(ValueError, match="not closed"):
        parse_modelfile('FROM x\nSYSTEM """' + "a\n" * 500_000)


def test_system_stop_and_sampling_become_the_sidecar() -> None:
    modelfile = parse_modelfile(
        TEXT + "PARAMETER top_k 40\nPARAMETER top_p 0.9\nPARAMETER min_p 0.05\nPARAMETER num_predict 99\n"
    )
    wishes = read_wishes(modelfile, chat_template=None)
    sidecar = parse_sidecar(wishes.sidecar_for(BASE, {}))
    assert sidecar.system_prompt == 'You are\na "pirate".  # no comment\n' and sidecar.stop == ["<|eot_id|>", "AI:"]
    assert sidecar.sampling is not None and sidecar.sampling.model_dump() == {
        "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "max_tokens": 99,
    }  # fmt: skip
    assert sidecar.base.fingerprint == BASE.fingerprint
    assert wishes.licences == ("MIT",)


def test_what_the_sidecar_cannot_say_is_named_with_its_value() -> None:
    more = "PARAMETER seed 1\nPARAMETER temperature 3\nPARAMETER num_predict -1\nPARAMETER top_k 0\nPARAMETER top_p 0\n"
    many = "".join(f"PARAMETER stop s{number}\n" for number in range(16))
    lost = read_wishes(parse_modelfile(TEXT + more + many + "REQUIRES 0.5\n"), chat_template=None).lost
    assert lost == (
        "PARAMETER num_ctx 4096",
        "PARAMETER seed 1",
        "PARAMETER temperature 3",
        "PARAMETER top_p 0",
        "PARAMETER stop s14",
        "PARAMETER stop s15",
        "REQUIRES 0.5 (a version of Ollama)",
        "MESSAGE (1 of them), which Ollama puts before conversations: send them yourself",
    )


def test_of_a_parameter_that_comes_twice_the_last_counts() -> None:
    text = "FROM x\nPARAMETER temperature 3\nPARAMETER temperature 1\nPARAMETER top_k 5\nPARAMETER top_k 0\n"
    wishes = read_wishes(parse_modelfile(text), chat_template=None)
    assert wishes.sidecar == {"sampling": {"temperature": 1.0}} and wishes.lost == ()


def test_a_parameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(NotPublished, match="PARAMETER top_k is 'many'"):
        read_wishes(parse_modelfile("FROM x\nPARAMETER top_k many\n"), chat_template=None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            'TEMPLATE "{{ range .Messages }}{{ end }}"',
            r"TEMPLATE, which cannot be .*: \{\{ range .Messages \}\} is not read",
        ),
        ("RENDERER qwen3-coder", "RENDERER, which is code of Ollama's own"),
    ],
)
def test_a_template_that_cannot_be_translated_is_not_dropped_in_silence(line: str, words: str, tmp_path: Path) -> None:
    modelfile, name = parse_modelfile(f"FROM x\n{line}\n"), line.partition(" ")[0]
    with pytest.raises(NotPublished, match=words + ".*--chat-template base"):
        read_wishes(modelfile, chat_template=None)
    kept = read_wishes(modelfile, chat_template="base")
    assert kept.sidecar == {} and kept.notes == (f"{name}: not used, the chat template is the base's own",)
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    given = read_wishes(modelfile, chat_template=str(tmp_path / "t.jinja"))
    assert given.sidecar == {"chat_template": "{{ messages }}"}


def test_a_simple_template_is_translated_unless_another_one_is_chosen() -> None:
    modelfile = parse_modelfile('FROM x\nTEMPLATE "{{ .Prompt }}"\n')
    assert read_wishes(modelfile, chat_template=None).template == "{{ .Prompt }}"
    assert read_wishes(modelfile, chat_template="base").template is None


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_chat_template_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NotPublished, match="--chat-template"):
        read_wishes(parse_modelfile("FROM x\n"), chat_template=str(path))


def test_the_adapter_is_found_from_the_modelfiles_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lora.gguf").touch()
    for text in ("./lora.gguf", "~/lora.gguf", str(tmp_path / "lora.gguf")):
        found = adapter_path(parse_modelfile(f"FROM x\nADAPTER {text}\n"), tmp_path / "Modelfile")
        assert found.resolve() == tmp_path / "lora.gguf"
    (tmp_path / "a.safetensors").touch()
    assert adapter_path(parse_modelfile("FROM x\nADAPTER a.safetensors\n"), tmp_path / "Modelfile") == tmp_path


@pytest.mark.parametrize(
    ("lines", "words"),
    [("", "no ADAPTER"), ("ADAPTER a\nADAPTER b\n", "2 ADAPTER lines"), ("ADAPTER none.gguf\n", "is not there")],
)
def test_without_one_adapter_there_is_no_folder(lines: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(NotPublished, match=words):
        adapter_path(parse_modelfile(f"FROM x\n{lines}"), tmp_path / "Modelfile")


@pytest.mark.parametrize("content", [None, b"\xff", b"FROM x\nx", b"#" * (1 << 20) + b"#"])
def test_a_file_that_is_no_modelfile_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "Modelfile").write_bytes(content)
    with pytest.raises(NotPublished, match="Modelfile"):
        read_modelfile(tmp_path / "Modelfile")


def test_a_fifo_in_place_of_a_modelfile_is_not_waited_for(tmp_path: Path) -> None:
    """The command waited for ever for somebody to write into it."""
    os.mkfifo(tmp_path / "Modelfile")
    with pytest.raises(NotPublished, match="it is no regular file"):
        read_source(tmp_path / "Modelfile", "modelfile", max_bytes=100, chat_template=None)
