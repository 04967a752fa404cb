"""What requests may say, and what it comes to."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.generation import completion_length, overlay, sampling_params, stop_strings
from server.api.protocol import IGNORED, NEUTRAL, ChatRequest, CompletionRequest
from server.errors import ContextLengthExceeded, UnsupportedParameter
from server.sequence import SamplingParams

NOTHING = GenerationDefaults()


def chat(**fields: Any) -> ChatRequest:
    """A chat request with these fields."""
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def completion(prompt: object, **fields: Any) -> CompletionRequest:
    """A completion request for this prompt."""
    return CompletionRequest.model_validate({"model": "m", "prompt": prompt, **fields})


def test_null_means_absent() -> None:
    names = [name for name in ChatRequest.model_fields if name not in ("model", "messages")]
    assert chat(**dict.fromkeys([*names, *NEUTRAL, *IGNORED])) == chat()


@pytest.mark.parametrize("field", ChatRequest.neutral)
def test_a_field_that_is_not_honoured_may_ask_for_nothing_only(field: str) -> None:
    for value in ChatRequest.neutral[field]:
        assert chat(**{field: value}) == chat()
    with pytest.raises(UnsupportedParameter) as caught:
        chat(**{field: {"anything": "else"}})
    assert caught.value.param == field


def test_false_is_not_zero() -> None:
    for field in ("top_logprobs", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens"):
        with pytest.raises(ValidationError):
            chat(**{field: False})


def test_a_completion_may_ask_for_no_likeliest_tokens() -> None:
    """Since chat honours ``top_logprobs``, completions refused even 0, which clients send as their default."""
    assert completion("x", top_logprobs=0) == completion("x")
    with pytest.raises(UnsupportedParameter):
        completion("x", top_logprobs=1)


def test_log_probabilities_are_asked_for_as_at_openai() -> None:
    """By a boolean in chat and a number in completions; there 0 asks for those of the chosen tokens alone."""
    assert [chat(**fields).num_logprobs for fields in ({}, {"logprobs": False}, {"top_logprobs": 0})] == [None] * 3
    assert [chat(logprobs=True, top_logprobs=count).num_logprobs for count in (None, 0, 1, 20)] == [0, 0, 1, 20]
    assert [completion("x", logprobs=count).num_logprobs for count in (None, False, 0, 5)] == [None, None, 0, 5]
    for fields in ({"top_logprobs": 1}, {"logprobs": False, "top_logprobs": 5}):
        with pytest.raises(ValidationError, match="only allowed when 'logprobs' is true"):
            chat(**fields)
    for fields in ({"logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}):
        with pytest.raises(ValidationError):
            chat(**fields)
    for value in (True, 6, -1, "5", 1.5):
        with pytest.raises(ValidationError):
            completion("x", logprobs=value)


NOTHING_ASKED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "min_tokens": 0,
    "stop_token_ids": [],
}


@pytest.mark.parametrize("field", NOTHING_ASKED)
def test_a_penalty_that_asks_for_nothing_makes_no_processor(field: str) -> None:
    for value in (NOTHING_ASKED[field], None):
        assert sampling_params(chat(**{field: value}), NOTHING, index=0) == SamplingParams()


def test_an_empty_list_of_stop_strings_asks_for_none() -> None:
    """It was a 400; clients send it where nothing was set."""
    assert stop_strings(chat(stop=[]), NOTHING) == stop_strings(completion("x", stop=[]), NOTHING) == ()


def test_processors_get_the_values_that_were_asked() -> None:
    asked = {"frequency_penalty": -2, "presence_penalty": 0.5, "repetition_penalty": 1.25, "min_tokens": 3}
    for request in (chat(**asked, logit_bias={"7": -100, "0": 1.5}), completion("x", **asked, logit_bias={"7": -100})):
        params = sampling_params(request, NOTHING, index=0)
        biases = dict(params.processors).pop("logit_bias")
        assert biases == ((7, -100.0), (0, 1.5))[: len(biases)]
        assert {name: value for name, value in params.processors if name != "logit_bias"} == asked


OUT_OF_RANGE: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (2.1, -2.1, "1", math.nan),
    "presence_penalty": (2.1, -2.1, "1", math.inf),
    "repetition_penalty": (0, -1, 1000, math.inf, "1"),
    "min_tokens": (-1, 1.5, "1", 2**31),
    "stop_token_ids": (3, [-1], ["3"], [True], [1.5], [0] * 1025),
    "logit_bias": (
        *([], "x", {str(token): 1 for token in range(1025)}),
        *({key: 1} for key in ("a", "-1", "07", "1.5", "", "7 ", 7)),
        *({"7": bias} for bias in (100.5, -101, "1", True, None, math.nan, math.inf)),
    ),
}


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_the_name_of_their_field(field: str) -> None:
    for value in OUT_OF_RANGE[field]:
        with pytest.raises(ValidationError) as caught:
            chat(**{field: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_an_answer_cannot_be_longer_than_its_limit_and_as_short() -> None:
    assert chat(min_tokens=5, max_tokens=5).min_tokens == 5
    for limit in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(ValidationError, match="the 4 tokens that the answer may have"):
            chat(**{"min_tokens": 5, limit: 4})


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_a_field_without_effect_is_accepted(field: str) -> None:
    assert chat(**{field: {"any": "thing"}}) == chat()


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).max_completion == 5
    assert chat(max_tokens=3).max_completion == 3


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "y",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    assert chat(messages=[{"role": "user", "content": "x"}, message]).messages[1].role == "assistant"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_a_prompt_may_be_written_in_four_ways(prompt: object, prompts: object) -> None:
    assert completion(prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], 3, [True], [-1], [[]], ["x", 1], [1, [2]], {"a": 1}, ["\ud800"], ["x"] * 129])
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(ValidationError):
        completion(prompt)


def test_prompts_and_answers_are_bounded_together() -> None:
    with pytest.raises(ValidationError):
        completion(["x"] * 20, n=8)


def test_the_request_goes_before_the_adapter_and_the_adapter_before_the_base() -> None:
    base = GenerationDefaults(temperature=0.1, top_p=0.2, top_k=3, stop=("base",))
    adapter = GenerationDefaults(top_p=0.5, top_k=4, stop=("adapter",), system_prompt="s")
    defaults = overlay(adapter, base)
    assert defaults == GenerationDefaults(
        stop=("adapter", "base"), system_prompt="s", temperature=0.1, top_p=0.5, top_k=4, min_p=None, max_tokens=None
    )
    request = chat(top_k=5, stop=["request", "adapter"])
    assert sampling_params(request, defaults, index=0) == SamplingParams(temperature=0.1, top_p=0.5, top_k=5)
    assert stop_strings(request, defaults) == ("request", "adapter", "base")


def test_zero_is_a_wish_and_not_the_absence_of_one() -> None:
    defaults = GenerationDefaults(temperature=0.7, top_k=40, min_p=0.1)
    params = sampling_params(chat(temperature=0, top_k=0, min_p=0), defaults, index=0)
    assert (params.temperature, params.top_k, params.min_p) == (0.0, 0, 0.0)


def test_minus_one_turns_top_k_off() -> None:
    assert sampling_params(chat(top_k=-1), GenerationDefaults(top_k=40), index=0).top_k == 0


def test_each_answer_has_a_seed_of_its_own() -> None:
    assert [sampling_params(chat(seed=7), NOTHING, index=index).seed for index in range(3)] == [7, 8, 9]
    assert sampling_params(chat(), NOTHING, index=1).seed is None


def test_a_completion_is_as_long_as_asked_or_as_there_is_room_for() -> None:
    assert completion_length(10, asked=None, default=512, limit=64) == 54
    assert completion_length(10, asked=None, default=5, limit=64) == 5
    assert completion_length(10, asked=54, default=5, limit=64) == 54
    assert completion_length(10, asked=55, default=5, limit=64) == 54
    for prompt, asked in ((64, 1), (64, None), (65, None)):
        with pytest.raises(ContextLengthExceeded):
            completion_length(prompt, asked=asked, default=5, limit=64)


def test_every_honoured_field_is_in_the_first_table_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8").partition("## Other fields")[0]
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == fields
