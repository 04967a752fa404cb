"""A request's ``model`` says which adapters, at which version and weight; what it may not say is refused in words."""

from __future__ import annotations

import time

import pytest

from server.adapters.names import MAX_MODEL_CHARS, ModelRef, is_name, parse_model
from server.errors import InvalidRequest, ModelNotFound

DIGEST = "0123456789abcdef" * 4


def refusal(text: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse_model(text)
    assert caught.value.param == "model"
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "refs"),
    [
        ("helpdesk", (ModelRef("helpdesk"),)),
        ("9-v1.2_x", (ModelRef("9-v1.2_x"),)),
        ("helpdesk@ab12", (ModelRef("helpdesk", "ab12"),)),
        ("helpdesk@AB12", (ModelRef("helpdesk", "ab12"),)),
        (f"helpdesk@{DIGEST}", (ModelRef("helpdesk", DIGEST),)),
        ("helpdesk:0.7", (ModelRef("helpdesk", scale=0.7),)),
        ("helpdesk:.5", (ModelRef("helpdesk", scale=0.5),)),
        ("helpdesk:-1", (ModelRef("helpdesk", scale=-1.0),)),
        ("helpdesk:2.0", (ModelRef("helpdesk", scale=2.0),)),
        ("helpdesk:1.0000000000", (ModelRef("helpdesk"),)),
        ("helpdesk@ab12:0.7+json", (ModelRef("helpdesk", "ab12", 0.7), ModelRef("json"))),
        ("a+b+c+d", (ModelRef("a"), ModelRef("b"), ModelRef("c"), ModelRef("d"))),
        ("a+A", (ModelRef("a"), ModelRef("A"))),
        ("a@ab12+a@cd34+a", (ModelRef("a", "ab12"), ModelRef("a", "cd34"), ModelRef("a"))),
        ("n" * 128, (ModelRef("n" * 128),)),
    ],
)
def test_a_model_names_adapters_with_versions_and_weights(text: str, refs: tuple[ModelRef, ...]) -> None:
    assert parse_model(text) == refs


def test_minus_nothing_is_nothing() -> None:
    assert str(parse_model("a:-0")[0].scale) == "0.0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "..",
        ".",
        ".a",
        "-a",
        "_a",
        "a/b",
        "../a",
        "a\u2024b",
        "\uff41",
        "é",
        "n" * 129,
    ],
)
def test_what_is_no_name_and_no_more_than_a_name_is_no_model(text: str) -> None:
    assert not is_name(text)
    with pytest.raises(ModelNotFound) as caught:
        parse_model(text)
    assert caught.value.model == text


def test_a_long_text_is_not_repeated_whole() -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_model("x" * 10_000)
    assert caught.value.model == "x" * 200
    assert len(refusal("x" * 1000 + "@ab12")) < 300
    assert len(refusal("a:" + "9" * 1000)) < 300


@pytest.mark.parametrize("weight", [
    "", "nan", "inf", "-inf", "1e1", "1E0", "0x1", "1_0", "1.", ".", "-", "--1", " 1", "1 ", "1\n", "2.01",
    "-2.0000001", "0.12345678901", "1,5", "\u0661", "1:1", "0.5@ab12",
])  # fmt: skip
def test_a_weight_is_a_plain_number_from_minus_two_to_two(weight: str) -> None:
    message = refusal(f"a:{weight}")
    assert repr(weight) in message
    assert "from -2 to 2" in message


def test_a_weight_with_a_plus_sign_is_two_pieces() -> None:
    assert "'' after ':' is no weight" in refusal("a:+1")


@pytest.mark.parametrize("version", [
    "", "abc", DIGEST + "0", "xyzw", "ab12\n", "ab 12", "ab@12", "\uff41\uff42\u0661\u0662", "latest",
])  # fmt: skip
def test_a_version_is_the_beginning_of_a_digest(version: str) -> None:
    message = refusal(f"a@{version}")
    assert repr(version) in message
    assert "4 to 64 hex digits" in message


@pytest.mark.parametrize(("text", "name"), [
    ("@ab12", ""), (":1", ""), ("a+.b", ".b"), ("../a+b", "../a"), ("a\n:1", "a\n"), ("a+b\0", "b\0"), ("a +b", "a "),
    ("a\u2024b:1", "a\u2024b"), ("org/base:free", "org/base"), ("n" * 129 + "@ab12", "n" * 80),
])  # fmt: skip
def test_the_name_at_fault_is_shown(text: str, name: str) -> None:
    assert f"{name!r} is no adapter's name" in refusal(text)


@pytest.mark.parametrize("text", ["+", "a+", "+a", "a++b", "a+b+"])
def test_every_plus_has_an_adapter_on_both_sides(text: str) -> None:
    assert "both sides" in refusal(text)


def test_at_most_four_adapters_are_joined() -> None:
    assert "it joins 5 adapters with '+'; at most 4" in refusal("a+b+c+d+e")


@pytest.mark.parametrize("text", ["a+a", "a:0.5+b+a:0.7", "a@AB12+a@ab12:2"])
def test_an_adapter_stands_once(text: str) -> None:
    assert "stands in it already" in refusal(text)


@pytest.mark.parametrize("text", ["+" * 5_000_000, "a@" + "f" * 5_000_000, "a:" + "1" * 5_000_000, "a" * 5_000_000])
def test_millions_of_characters_are_refused_at_once(text: str) -> None:
    begin = time.perf_counter()
    with pytest.raises((InvalidRequest, ModelNotFound)):
        parse_model(text)
    assert time.perf_counter() - begin < 1


def test_the_longest_good_model_is_not_too_long() -> None:
    text = "+".join(f"{letter * 128}@{DIGEST}:-1.123456789" for letter in "abcd")
    assert [ref.name[0] for ref in parse_model(text)] == list("abcd")
    assert str(MAX_MODEL_CHARS) in refusal(text + "+" * MAX_MODEL_CHARS)
