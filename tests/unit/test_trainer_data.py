"""Sources become examples: masks, passages, splits, and every problem with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_tokenizer
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.errors import DataError
from trainer.masking import IGNORED, Encoded, encode_conversation
from trainer.passages import cut_passages, split_opening

PROSE = [
    f"The quick brown fox number {i} jumps over the dog. The dog sleeps in the sun, and it is late." for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def _chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def _jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def _config(folder: Path, *sources: dict[str, Any], **more: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"name": "fox", "base_model": "micro", "epochs": 1, "data_root": folder, "data": list(sources), **more}
    )


def _chats(folder: Path, tokenizer: PreTrainedTokenizerFast, records: list[Any], **more: Any) -> Dataset:
    _jsonl(folder / "chats.jsonl", records)
    return load_dataset(_config(folder, {"path": "chats.jsonl", "format": "messages"}, **more), tokenizer)


def _problems(folder: Path, tokenizer: PreTrainedTokenizerFast, records: list[Any], **more: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        _chats(folder, tokenizer, records, **more)
    return caught.value.problems


def _decoded(tokenizer: PreTrainedTokenizerFast, example: Encoded) -> str:
    return str(tokenizer.decode(example.input_ids))


def generated() -> Iterator[dict[str, Any]]:
    """A generator source of the tests."""
    yield from (_chat(f"What is {i}?", f"It is {i}.") for i in range(20))


def test_only_the_answers_and_their_end_of_turn_are_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [*_chat("Hello!", "How are you?")["messages"], *_chat("It is late.", "Thank you.")["messages"]]
    encoded = encode_conversation(tokenizer, messages)
    trained = [label for label in encoded.labels if label != IGNORED]
    assert tokenizer.decode(trained) == "How are you?<|end|>Thank you.<|end|>"


def test_an_answer_of_weight_zero_is_not_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [*_chat("Hello!", "How are you?", weight=0)["messages"], *_chat("Late.", "Thank you.")["messages"]]
    dataset = _chats(tmp_path, tokenizer, [{"messages": messages}])
    trained = [label for label in dataset.training[0].labels if label != IGNORED]
    assert tokenizer.decode(trained) == "Thank you.<|end|>"


def test_duplicates_are_dropped_across_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    _jsonl(tmp_path / "a.jsonl", [_chat("Hello!", "Hi."), _chat("Hello!", "Hi.")])
    _jsonl(tmp_path / "b.jsonl", [_chat("Hello!", "Hi."), _chat("Hello!", "No.")])
    dataset = load_dataset(_config(tmp_path, {"path": ".", "format": "messages"}), tokenizer)
    assert (len(dataset.training), dataset.num_duplicates) == (2, 2)


def test_a_long_example_is_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = _chats(tmp_path, tokenizer, [_chat("Hello!", "dog " * 50)], max_length=16)
    assert (len(dataset.training[0].input_ids), dataset.num_truncated) == (16, 1)


def test_a_prompt_that_fills_max_length_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _problems(tmp_path, tokenizer, [_chat("dog " * 50, "Hi.")], max_length=16) == (
        "chats.jsonl:1: no trained token within max_length=16; shorten the prompt or raise it",
    )


def test_a_share_of_the_conversations_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = _chats(tmp_path, tokenizer, list(generated()), eval_share=0.2)
    assert (len(dataset.training), len(dataset.evaluation)) == (16, 4)
    assert dataset.digest == _chats(tmp_path, tokenizer, list(generated()), eval_share=0.2).digest


def test_fewer_than_ten_conversations_are_all_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _chats(tmp_path, tokenizer, list(generated())[:9]).num_held_out == 0


def test_a_function_can_be_a_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load_dataset(_config(tmp_path, {"generator": f"{__name__}:generated"}), tokenizer)
    assert len(dataset.training) + dataset.num_held_out == 20


def test_the_system_prompt_stands_before_conversations_without_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = {"messages": [{"role": "system", "content": "You are a cat."}, *_chat("Hello!", "Hi.")["messages"]]}
    dataset = _chats(tmp_path, tokenizer, [_chat("Hello!", "Hi."), own], system_prompt="You are a fox.")
    texts = [_decoded(tokenizer, example) for example in dataset.training]
    assert sorted("fox" in text for text in texts) == [False, True] and sum("cat" in text for text in texts) == 1


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "an object with 'messages' is needed, this is list"),
        ({"messages": []}, "messages must be a list with at least one turn"),
        ({"text": "x", **_chat("a", "b")}, "unknown key 'text'; an example has 'messages' and perhaps 'tools'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn, so there is nothing to learn"),
        (_chat("a", " "), "messages[1]: content is empty"),
        (_chat("a", "b", weight=2), "messages[1]: weight is 0 or 1, on assistant turns only"),
        (_chat("a", "b", train=False), "messages[1]: unknown key 'train'"),
        (
            {"messages": [{"role": "bot", "content": "a"}, *_chat("a", "b")["messages"]]},
            "messages[0]: unknown role 'bot'",
        ),
        (
            {"messages": [{"role": "assistant", "content": ["a"]}]},
            "messages[0]: content must be a string, this is list",
        ),
        ({"messages": ["hi", *_chat("a", "b")["messages"]]}, "messages[0]: a turn is an object with role and content"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: Any, problem: str
) -> None:
    problems = _problems(tmp_path, tokenizer, [_chat("a", "b"), record])
    assert len(problems) == 1 and problems[0].startswith(f"chats.jsonl:2: {problem}")


def test_every_problem_is_counted_and_twenty_are_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "chats.jsonl").write_text("{\n" * 25, encoding="utf-8")
    with pytest.raises(DataError, match="25 problem") as caught:
        load_dataset(_config(tmp_path, {"path": "chats.jsonl", "format": "messages"}), tokenizer)
    assert "chats.jsonl:20: invalid JSON" in str(caught.value) and "and 5 more" in str(caught.value)
    assert "chats.jsonl:21" not in str(caught.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(DataError, match=r"book.txt:2: byte 8 is not UTF-8"):
        load_dataset(_config(tmp_path, {"path": "book.txt", "format": "text", "raw_share": 1.0}), tokenizer)


def test_a_missing_file_and_a_missing_function_are_problems(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = ({"path": "no.jsonl", "format": "messages"}, {"generator": "no.such:thing"})
    with pytest.raises(DataError) as caught:
        load_dataset(_config(tmp_path, *sources), tokenizer)
    assert len(caught.value.problems) == 2


def test_passages_end_at_paragraphs_and_lose_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = cut_passages("\n\n".join(PROSE), tokenizer, max_tokens=100)
    assert len(passages) > 5
    assert "\n\n".join(passages) == "\n\n".join(PROSE)
    assert all(len(tokenizer(passage)["input_ids"]) <= 100 for passage in passages)


def test_a_paragraph_longer_than_a_passage_is_cut_between_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = cut_passages(" ".join(PROSE), tokenizer, max_tokens=100)
    assert len(passages) > 5 and all(passage.endswith(".") for passage in passages)


def test_the_opening_goes_to_the_prompt_and_the_rest_is_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(PROSE), encoding="utf-8")
    source = {"path": "book.txt", "format": "text", "prompts": ["Go on: {opening}"], "passage_tokens": 64}
    text = _decoded(tokenizer, load_dataset(_config(tmp_path, source), tokenizer).training[0])
    assert text.startswith(f"<|begin|><|user|>Go on: {PROSE[0].split('. ')[0]}.<|end|><|assistant|>The dog sleeps")
    assert split_opening("One sentence alone.") == ("One sentence alone.", "")


def test_the_end_of_each_book_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(PROSE), encoding="utf-8")
    source = {"path": "book.txt", "format": "text", "raw_share": 1.0, "passage_tokens": 48}
    dataset = load_dataset(_config(tmp_path, source, eval_share=0.1), tokenizer)
    held_out = [_decoded(tokenizer, example) for example in dataset.evaluation]
    trained = [_decoded(tokenizer, example) for example in dataset.training]
    assert "".join(trained + held_out).replace(" ", "") == "".join(PROSE).replace(" ", "")
    assert dataset.training[0].labels[0] == IGNORED
