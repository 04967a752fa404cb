"""lm-eval's ``local-completions`` on a server gives the log likelihoods of its ``hf`` with PEFT on the same adapter.

lm-eval is installed into an environment of its own, which sees this one's torch, transformers and PEFT.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from base_files.locate import find_base
from tests.serving import ROOT, ServerProcess, running_server

PACKAGES = ("lm-eval==0.4.13", "aiohttp", "requests", "tenacity", "tqdm", "tiktoken")
TOLERANCE = 1e-4
"""Of the log likelihood of a continuation, in float32."""
INT8_DIFFERENCE = 0.03
"""The mean difference in int8, as a share of the log likelihood; measured: 0.006 (AVX512-VNNI)."""
HF_ERROR = 1e-5
"""Of ``hf`` itself, a token of SmolLM2: it takes the softmax of 49,152 logits in float32. Measured: 9e-6."""
NAMES = ("micro", "helpdesk", "tolstoy")
SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

kind, arguments, pairs = json.load(sys.stdin)
model = get_model(kind)(**arguments)
asked = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
json.dump(model.loglikelihood(asked), sys.stdout)
"""
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "To sort a list in Python, call sorted(items) or items.sort().",
    "Once upon a time there was a fox who lived at the edge of a small wood.",
    "Water boils at one hundred degrees; ice melts at zero.",
    "She sells sea shells by the sea shore. " * 10,
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
]
PAIRS = [(text[:cut], text[cut:]) for text in TEXTS for cut in (len(text) // 4, 3 * len(text) // 4)]


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter that has lm-eval."""
    folder = tmp_path_factory.mktemp("lm-eval")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.fail(f"lm-eval cannot be installed, and this test needs it: {done.stderr[-500:]}")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "with_torch.pth").write_text(sysconfig.get_path("purelib"))
    return python


def evaluate(python: str, kind: str, arguments: dict[str, Any], pairs: list[tuple[str, str]]) -> list[Any]:
    """The log likelihood of each continuation, and whether it is greedy, by one of lm-eval's models."""
    done = subprocess.run(
        [python, "-c", SCRIPT], input=json.dumps([kind, arguments, pairs]), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


def served(python: str, server: ServerProcess, name: str, tokenizer: Path, pairs: list[tuple[str, str]]) -> list[Any]:
    """By ``local-completions``: several requests at once, of several prompts each."""
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": name,
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 3,
        "batch_size": 2,
    }
    return evaluate(python, "local-completions", arguments, pairs)


def by_hf(python: str, base: dict[str, Any], adapters: Iterable[str]) -> list[list[Any]]:
    """By ``hf``: the base, and PEFT's adapters on it.

    Without its cache of logits, which takes two pairs of one text for one, wherever the text is cut.
    """
    fields = {**base, "dtype": "float32", "device": "cpu", "batch_size": 1, "logits_cache": False}
    models: list[dict[str, Any]] = [{}, *({"peft": str(ROOT / "adapters" / name)} for name in adapters)]
    return [evaluate(python, "hf", {**fields, **more}, PAIRS) for more in models]


def by_server(python: str, names: Sequence[str], tokenizer: Path, *flags: str) -> list[list[Any]]:
    """By a server of its own, with all models at once."""
    with running_server("--adapters-dir", "adapters", *flags) as server, ThreadPoolExecutor() as threads:
        running = [threads.submit(served, python, server, name, tokenizer, PAIRS) for name in names]
        return [each.result() for each in running]


@pytest.fixture(scope="module")
def expected(lm_eval: str) -> list[list[Any]]:
    """By ``hf``, of micro and two adapters."""
    return by_hf(lm_eval, {"pretrained": str(find_base("micro").path)}, NAMES[1:])


def check(found: list[list[Any]], expected: list[list[Any]], tolerances: Sequence[float]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for (likelihood, is_greedy), (other, other_is_greedy), tolerance in zip(ours, theirs, tolerances, strict=True):
            assert likelihood == pytest.approx(other, abs=tolerance)
            assert is_greedy == other_is_greedy
    assert len({pairs[0][0] for pairs in found}) == len(found), "the adapters changed nothing"


def test_log_likelihoods_are_those_of_hf_and_peft_with_all_models_at_once(
    lm_eval: str, expected: list[list[Any]]
) -> None:
    flags = ("--quantization", "none", "--dtype", "float32")
    check(by_server(lm_eval, NAMES, find_base("micro").path, *flags), expected, [TOLERANCE] * len(PAIRS))


def test_in_int8_they_differ_a_little(lm_eval: str, expected: list[list[Any]]) -> None:
    found = by_server(lm_eval, NAMES, find_base("micro").path, "--quantization", "int8")
    pairs = zip(chain(*found), chain(*expected), strict=True)
    differences = [abs(ours - theirs) / abs(theirs) for (ours, _), (theirs, _) in pairs]
    assert sum(differences) / len(differences) < INT8_DIFFERENCE


def test_on_smollm2_they_are_those_of_hf_and_peft(
    lm_eval: str, smollm2: Path, stock_smollm2_tokenizer: Any, tmp_path: Path
) -> None:
    stock_smollm2_tokenizer.save_pretrained(tmp_path)
    base = {"pretrained": str(smollm2.parent), "gguf_file": smollm2.name, "tokenizer": str(tmp_path)}
    names = ("smollm2", "smollm2-helpdesk")
    flags = ("--base-model", "smollm2", "--quantization", "none", "--dtype", "float32")
    lengths = [len(stock_smollm2_tokenizer(continuation)["input_ids"]) for _, continuation in PAIRS]
    tolerances = [TOLERANCE + HF_ERROR * length for length in lengths]
    check(by_server(lm_eval, names, tmp_path, *flags), by_hf(lm_eval, base, names[1:]), tolerances)
