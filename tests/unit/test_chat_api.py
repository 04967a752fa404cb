"""Whole answers: what goes to the engine, what comes back, and that everything taken is given back."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from server.api.app import create_app
from server.sequence import LoRARequest
from tests.fakes import BASE, EOS, FakeEngine, Script, adapter, ask, encode, server_state, small_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ONE: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def test_an_answer_has_every_required_key() -> None:
    answer = ask(create_app(server_state(FakeEngine())), "POST", CHAT, json=ONE).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert isinstance(answer.pop("created"), int)
    completion = len(encode("hello there")) + 1
    prompt = len(small_tokenizer().apply_chat_template(ONE["messages"], add_generation_prompt=True, return_dict=False))
    assert answer == {
        "object": "chat.completion",
        "model": BASE,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_an_adapter_is_asked_by_its_weights_and_shown_by_its_version() -> None:
    engine = FakeEngine()
    response = ask(create_app(server_state(engine, adapter("poet"))), "POST", CHAT, json={**ONE, "model": "poet"})
    assert engine.submitted[0].adapters == (LoRARequest("poet-weights"),)
    assert engine.submitted[0].eos_ids == {EOS}
    assert response.headers["x-quickchange-adapter"] == "poet@poet-version"
    assert response.json()["model"] == "poet"


def test_the_base_has_no_adapter() -> None:
    engine = FakeEngine()
    response = ask(create_app(server_state(engine)), "POST", CHAT, json=ONE)
    assert engine.submitted[0].adapters == ()
    assert "x-quickchange-adapter" not in response.headers


def test_the_adapters_defaults_apply_where_the_request_is_silent() -> None:
    engine = FakeEngine([Script("the cat sat on the mat")])
    poet = adapter("poet", stop=(" on",), temperature=0.2, max_tokens=7, system_prompt="You rhyme.")
    app = create_app(server_state(engine, poet))
    answer = ask(app, "POST", CHAT, json={**ONE, "model": "poet"}).json()
    assert answer["choices"][0]["message"]["content"] == "the cat sat"
    assert (engine.submitted[0].params.temperature, engine.submitted[0].max_tokens) == (0.2, 7)
    assert "You rhyme." in small_tokenizer().decode(list(engine.submitted[0].prompt_ids))
    own = [{"role": "developer", "content": "Speak plainly."}, *ONE["messages"]]
    ask(app, "POST", CHAT, json={**ONE, "model": "poet", "messages": own, "max_tokens": 3})
    assert "You rhyme." not in small_tokenizer().decode(list(engine.submitted[1].prompt_ids))
    assert engine.submitted[1].max_tokens == 3


def test_several_answers_come_in_their_order() -> None:
    engine = FakeEngine([Script("slow", delay=0.005), Script("quick"), Script("cut off", then="length")])
    answer = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, "n": 3, "seed": 4}).json()
    found = [(each["index"], each["message"]["content"], each["finish_reason"]) for each in answer["choices"]]
    assert found == [(0, "slow", "stop"), (1, "quick", "stop"), (2, "cut off", "length")]
    assert [each.params.seed for each in engine.submitted] == [4, 5, 6]
    tokens = len(encode("slow")) + 1 + len(encode("quick")) + 1 + len(encode("cut off"))
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["usage"]["prompt_tokens"] == len(engine.submitted[0].prompt_ids)


def test_a_stop_string_ends_the_sequence_in_the_engine() -> None:
    engine = FakeEngine([Script("hello there", then="hang")])
    answer = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, "stop": " there"}).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert engine.num_open == 0


def test_half_a_stop_string_is_part_of_the_answer() -> None:
    engine = FakeEngine([Script("hello there", then="length")])
    answer = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, "stop": ["there!"]}).json()
    assert answer["choices"][0]["message"]["content"] == "hello there"


def test_prompts_of_a_completion_are_answered_in_order() -> None:
    scripts = [Script(text) for text in ("a", "b", "c", "d")]
    body = {"model": BASE, "prompt": ["hello", "the cat"], "n": 2}
    answer = ask(create_app(server_state(FakeEngine(scripts))), "POST", COMPLETIONS, json=body).json()
    assert answer["object"] == "text_completion"
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate("abcd"))
    assert answer["usage"]["prompt_tokens"] == len(encode("hello")) + len(encode("the cat"))


def test_token_ids_of_a_prompt_go_to_the_engine_as_they_are() -> None:
    engine = FakeEngine()
    ask(create_app(server_state(engine)), "POST", COMPLETIONS, json={"model": BASE, "prompt": [9, 8, 7]})
    assert engine.submitted[0].prompt_ids == (9, 8, 7)


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    body = {"model": BASE, "prompt": [9, 10**6]}
    response = ask(create_app(server_state(FakeEngine())), "POST", COMPLETIONS, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("engine", "change", "status"),
    [
        (FakeEngine([Script(then="stop")]), {}, 200),
        (FakeEngine([Script(then="hang")]), {"stop": "there"}, 200),
        (FakeEngine([Script("", then="fail")]), {}, 500),
        (FakeEngine([Script("", then="die")]), {}, 503),
        (FakeEngine([Script("hello"), Script("", then="fail")]), {"n": 2}, None),
        (FakeEngine(alive=False), {}, 503),
        (FakeEngine(capacity=2), {"n": 3}, 503),
        (FakeEngine(max_model_len=4), {}, 400),
        (FakeEngine(), {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x" * 999}]}, 400),
        (FakeEngine(), {"model": "nobody"}, 404),
    ],
)
def test_on_every_way_out_leases_and_sequences_are_given_back(
    engine: FakeEngine, change: dict[str, Any], status: int | None, stream: bool
) -> None:
    state = server_state(engine, adapter("poet"))
    response = ask(create_app(state), "POST", CHAT, json={**ONE, "model": "poet", "stream": stream, **change})
    assert status is None or response.status_code == status
    assert state.adapters.cache.num_leases("poet-weights") == 0
    assert engine.num_open == 0


def test_a_submission_that_fails_half_way_leaves_nothing_behind() -> None:
    """The queue may fill between the check and the last of several sequences."""

    class Filling(FakeEngine):
        def check_capacity(self, num_sequences: int, *, owner: str | None = None) -> None:
            if num_sequences == 1:
                super().check_capacity(1)

    engine = Filling(capacity=2)
    state = server_state(engine, adapter("poet"))
    response = ask(create_app(state), "POST", CHAT, json={**ONE, "model": "poet", "n": 3})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert (len(engine.submitted), engine.num_open) == (2, 0)
    assert state.adapters.cache.num_leases("poet-weights") == 0


def test_a_full_queue_is_found_before_the_prompt_is_rendered() -> None:
    body = {**ONE, "messages": [{"role": "user", "content": "far too long " * 1000}]}
    assert ask(create_app(server_state(FakeEngine(capacity=0))), "POST", CHAT, json=body).status_code == 503


def test_requests_are_counted_by_adapter_and_reason() -> None:
    state = server_state(FakeEngine([Script(), Script(then="length"), Script(then="fail")]), adapter("poet"))
    app = create_app(state)
    for body in ({**ONE, "model": "poet", "n": 2}, ONE):
        ask(app, "POST", CHAT, json=body)
    value = state.metrics.registry.get_sample_value
    assert value("quickchange_requests_total", {"adapter": "poet", "finish_reason": "stop"}) == 1
    assert value("quickchange_requests_total", {"adapter": "poet", "finish_reason": "length"}) == 1
    assert value("quickchange_requests_total", {"adapter": "base", "finish_reason": "failed"}) == 1
    assert value("quickchange_generated_tokens_total", {"adapter": "poet"}) == 2 * len(encode("hello there")) + 1
    assert value("quickchange_request_duration_seconds_count") == 2
    assert value("quickchange_time_to_first_token_seconds_count") == 2


def test_a_request_is_one_line_in_the_log_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(server_state(FakeEngine(), adapter("poet")))
    with caplog.at_level(logging.INFO, logger="quickchange.request"):
        ask(app, "POST", CHAT, json={**ONE, "model": "poet", "n": 2}, headers={"x-request-id": "id-1"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "quickchange.request"]
    assert "request_id=id-1 adapter=poet@poet-version finish=stop,stop" in line
    assert "hello" not in line


def test_models_are_the_base_and_its_adapters() -> None:
    app = create_app(server_state(FakeEngine(), adapter("poet"), adapter("clerk")))
    listed = ask(app, "GET", "/v1/models").json()
    assert [(each["id"], each["root"], each["parent"]) for each in listed["data"]] == [
        (BASE, BASE, None),
        ("clerk", "clerk", BASE),
        ("poet", "poet", BASE),
    ]
    poet = ask(app, "GET", "/v1/models/poet").json()
    assert poet.items() >= listed["data"][2].items()
    assert (poet["state"], poet["leases"], poet["base_check"]) == ("ready", 0, "shapes")
    for unknown in ("nobody", "no%2Fbody", "..%2Fpoet"):
        error = ask(app, "GET", f"/v1/models/{unknown}").json()["error"]
        assert error["code"] == "model_not_found"


def test_health_follows_the_engine() -> None:
    assert ask(create_app(server_state(FakeEngine())), "GET", "/health").json() == {"status": "ok"}
    assert ask(create_app(server_state(FakeEngine(alive=False))), "GET", "/health").status_code == 503


def test_metrics_speak_the_format_that_is_asked_for() -> None:
    app = create_app(server_state(FakeEngine()))
    plain = ask(app, "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    accept = "application/openmetrics-text; version=1.0.0"
    modern = ask(app, "GET", "/metrics", headers={"accept": accept})
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


def test_the_version_can_be_asked_for() -> None:
    assert ask(create_app(server_state(FakeEngine())), "GET", "/version").json() == {"version": "0.0.test"}


@pytest.mark.parametrize(("field", "value"), [("stop_token_ids", [3, 10**6]), ("logit_bias", {"3": 1, "1000000": 1})])
def test_tokens_that_the_base_does_not_have_are_refused_by_name(field: str, value: object) -> None:
    engine = FakeEngine()
    for stream in (False, True):
        response = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, field: value, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, field, "invalid_value")
        assert "1000000" in error["message"]
    assert engine.submitted == []


def test_stop_token_ids_end_an_answer_and_are_not_in_it() -> None:
    there = encode(" there")
    engine = FakeEngine([Script(ids=encode("hello"), then="stop")])
    answer = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, "stop_token_ids": there}).json()
    assert engine.submitted[0].eos_ids == {EOS, *there}
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("hello", "stop")


def test_every_answer_of_a_request_has_its_processors() -> None:
    engine = FakeEngine()
    body = {"model": BASE, "prompt": ["a", "b"], "n": 2, "seed": 3, "presence_penalty": 1, "logit_bias": {"5": -1}}
    ask(create_app(server_state(engine)), "POST", COMPLETIONS, json=body)
    assert [each.params.seed for each in engine.submitted] == [3, 4, 3, 4]
    assert {each.params.processors for each in engine.submitted} == {
        (("presence_penalty", 1.0), ("logit_bias", ((5, -1.0),)))
    }
