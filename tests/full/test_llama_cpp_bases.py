"""Models that llama.cpp's own script converted to GGUF are read back: parameters, config, tokenizer."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from base_files.gguf.base import GGUFBase
from base_files.gguf.file import read_gguf
from base_files.gguf.pretokenizers import PRE_TOKENIZERS
from base_files.locate import find_base
from base_files.stock_model import stock_tokenizer
from tests.model.families import WINDOW, build_from
from tests.model.test_gguf_base import CASES, like, loaded, logits
from tests.model.test_gguf_tokenizer import HARD, ids_of
from tests.serving import ROOT

SENTENCE_PIECE = "sentencepiece==0.2.1"
BYTE_LEVEL = ("qwen3moe", "gpt-oss", "phi3, byte-level")
"""Cases whose converter takes a byte-level tokenizer; that of SmolLM2 is recognized by it."""
_GEMMA3 = like("llama", "Gemma3TextConfig", layers=7, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16)
BASES = {**CASES, "phi3, byte-level": CASES["phi3"], "gemma3": ("gemma3", _GEMMA3, {})}
del BASES["gemma3 without windows"]  # the script writes one for every model
"""The script does not write which layers of Gemma 3 see everything: it is every sixth."""
TRAIN = """
import sys, sentencepiece
corpus, prefix, spaced = sys.argv[1:]
sentencepiece.SentencePieceTrainer.train(
    input=corpus, model_prefix=prefix, vocab_size=900, model_type="bpe", byte_fallback=True, split_digits=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=spaced == "spaced",
)
"""
ENCODE = """
import json, sys, sentencepiece
processor = sentencepiece.SentencePieceProcessor(sys.argv[1])
print(json.dumps([processor.encode(text) for text in json.loads(sys.argv[2])]))
"""


class SentencePiece:
    """The library, installed into a folder of its own, and tokenizers that it trained there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), SENTENCE_PIECE]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        corpus = folder / "corpus.txt"
        pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
        corpus.write_text("\n".join([*pages, *HARD * 5]), encoding="utf-8")
        for spaced in ("spaced", "plain"):
            self._run(TRAIN, str(corpus), str(folder / spaced), spaced)

    def model(self, *, spaced: bool) -> Path:
        return self.folder / ("spaced.model" if spaced else "plain.model")

    def encode(self, texts: list[str], *, spaced: bool) -> list[list[int]]:
        ids: list[list[int]] = json.loads(self._run(ENCODE, str(self.model(spaced=spaced)), json.dumps(texts)))
        return ids

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    return SentencePiece(tmp_path_factory.mktemp("sentencepiece"))


def convert(folder: Path, llama_cpp: Path, *libraries: Path) -> Path:
    path = folder / "model.gguf"
    script = [str(llama_cpp / "convert_hf_to_gguf.py"), "--outtype", "f32", "--outfile", str(path), str(folder)]
    done = subprocess.run(
        [sys.executable, *script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [llama_cpp / "gguf-py", *libraries]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return path


def sized(config: PretrainedConfig, vocab_size: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.vocab_size = vocab_size
    return config


@pytest.mark.parametrize("case", BASES)
def test_a_converted_model_has_its_parameters_and_its_logits(
    case: str, llama_cpp: Path, sentence_piece: SentencePiece, smollm2: Path, tmp_path: Path
) -> None:
    architecture, config, _ = BASES[case]
    model = build_from(sized(config, 49152 if case in BYTE_LEVEL else 900))
    model.save_pretrained(tmp_path)
    if case in BYTE_LEVEL:
        stock_tokenizer(find_base(str(smollm2))).save_pretrained(tmp_path)
        described = tmp_path / "tokenizer_config.json"
        changed = json.loads(described.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        described.write_text(json.dumps(changed))
    else:
        spaced = not architecture.startswith("gemma")
        (tmp_path / "tokenizer.model").write_bytes(sentence_piece.model(spaced=spaced).read_bytes())
    path = convert(tmp_path, llama_cpp, sentence_piece.folder)
    assert read_gguf(path).metadata["general.architecture"] == architecture
    base = GGUFBase(path)
    found = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in base.tensors().items()}
    for name, parameter in model.named_parameters():
        shifted = architecture.startswith("gemma") and name.endswith("norm.weight")
        assert (found[name] - parameter).abs().max() <= (2**-23 if shifted else 0), name
    assert torch.equal(logits(loaded(base)), logits(model))


@pytest.mark.parametrize(("case", "spaced"), [("llama", True), ("gemma3", False)])
def test_a_tokenizer_of_sentence_piece_gives_its_own_ids(
    case: str, spaced: bool, llama_cpp: Path, sentence_piece: SentencePiece, tmp_path: Path
) -> None:
    build_from(sized(CASES[case][1], 900)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece.model(spaced=spaced).read_bytes())
    ours = GGUFBase(convert(tmp_path, llama_cpp, sentence_piece.folder)).tokenizer
    texts = [text for text in HARD if "<s>" not in text]  # which sentencepiece itself never reads as a token
    assert ids_of(ours.build(), texts, special=False) == sentence_piece.encode(texts, spaced=spaced)


def test_a_byte_level_tokenizer_is_the_same_after_a_conversion(llama_cpp: Path, smollm2: Path, tmp_path: Path) -> None:
    """llama.cpp knows a tokenizer by the ids of a text full of hard cases: it knows ours as SmolLM2's own."""
    tokenizer = stock_tokenizer(find_base(str(smollm2)))
    tokenizer.save_pretrained(tmp_path)
    build_from(sized(CASES["gpt-oss"][1], 49152)).save_pretrained(tmp_path)
    base = GGUFBase(convert(tmp_path, llama_cpp))
    assert read_gguf(base.path).metadata["tokenizer.ggml.pre"] == "smollm"
    again = stock_tokenizer(base)
    assert [again(text)["input_ids"] for text in HARD] == [tokenizer(text)["input_ids"] for text in HARD]
    assert again.chat_template == tokenizer.chat_template


def test_the_rules_are_those_that_llama_cpp_took_from_tokenizer_json(llama_cpp: Path) -> None:
    """Its own are rewritten for its engine of regular expressions; the originals stand beside them in comments."""
    source = (llama_cpp / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    originals = {
        json.loads(text) for text in re.findall(r'original regex from tokenizer.json\n\s*//\s*("(?:.*)")', source)
    }
    ours = {name: PRE_TOKENIZERS[name].patterns for name in ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")}
    assert {name: pattern for name, (pattern,) in ours.items() if pattern not in originals} == {}
    for name in ("deepseek-coder", "deepseek-v3"):
        for pattern in PRE_TOKENIZERS[name].patterns:
            assert json.dumps(pattern, ensure_ascii=False).replace(r"\\r\\n", r"\r\n") in source
