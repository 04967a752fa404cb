"""``aliases.toml``: a name stands for models, users stay where they were, and a file in error says where."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from server.adapters.aliases import MAX_ALIASES_BYTES, Alias, parse_aliases


def alias(value: str, name: str = "support") -> Alias:
    return parse_aliases(f"{name} = {value}".encode())[name]


def refusal(text: str | bytes) -> str:
    with pytest.raises(ValueError, match=r"^aliases\.toml") as caught:
        parse_aliases(text.encode() if isinstance(text, str) else text)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_a_name_stands_for_a_model() -> None:
    aliases = parse_aliases(b'support = "helpdesk"\n"v1.0" = "helpdesk@ab12:0.7+json"\n')
    assert [aliases["support"].choose("someone"), aliases["v1.0"].choose(None)] == [
        "helpdesk",
        "helpdesk@ab12:0.7+json",
    ]


def test_an_empty_file_has_no_aliases() -> None:
    assert parse_aliases(b"# nothing yet\n") == {}


@pytest.mark.parametrize(
    "text", ['{"helpdesk@ab12" = 9, "helpdesk@cd34" = 1}', '{"helpdesk@ab12" = 0.9, "helpdesk@cd34" = 0.1}']
)
def test_weights_are_shares_of_their_sum(text: str) -> None:
    assert [(target.model, target.share) for target in alias(text).targets] == [
        ("helpdesk@ab12", 0.9),
        ("helpdesk@cd34", 0.1),
    ]


def test_a_table_of_its_own_is_the_same_as_one_in_a_line() -> None:
    assert (
        parse_aliases(b'[support]\n"helpdesk@ab12" = 9\nplain = 1\n')["support"].choose(None, lambda: 0.95) == "plain"
    )


def test_users_are_spread_by_the_weights_and_stay() -> None:
    split = alias("{stable = 0.9, canary = 0.1}")
    chosen = {f"user-{number}": split.choose(f"user-{number}") for number in range(4000)}
    assert 320 < Counter(chosen.values())["canary"] < 480
    again = alias("{stable = 0.9, canary = 0.1}")
    assert all(again.choose(user) == model for user, model in chosen.items())


def test_a_users_place_is_a_part_of_the_contract() -> None:
    """A server of another version, or another server beside this one, must send a user to the same model."""
    split = alias("{a = 1, b = 1, c = 1, d = 1}")
    assert "".join(split.choose(f"user-{number}") for number in range(16)) == "dbcccbaabdaacdbd"


def test_a_growing_canary_moves_users_only_into_it() -> None:
    users = [f"user-{number}" for number in range(2000)]
    before, moved = alias("{stable = 0.9, canary = 0.1}"), 0
    for weight in (0.2, 0.5, 0.99, 1):
        after = alias(f"{{stable = {1 - weight or 1e-9}, canary = {weight}}}")
        for user in users:
            if before.choose(user) != after.choose(user):
                assert (before.choose(user), after.choose(user)) == ("stable", "canary")
                moved += 1
        before = after
    assert moved > 1700


def test_two_aliases_draw_their_canaries_from_different_users() -> None:
    first, second = alias("{a = 1, b = 1}", "first"), alias("{a = 1, b = 1}", "second")
    same = sum(first.choose(str(number)) == second.choose(str(number)) for number in range(1000))
    assert 400 < same < 600


@pytest.mark.parametrize("user", [None, ""])
def test_without_a_user_the_model_is_drawn(user: str | None) -> None:
    split = alias("{stable = 0.9, canary = 0.1}")
    assert [split.choose(user, lambda at=place: at) for place in (0.0, 0.89, 0.91, 1 - 2**-53)] == [  # type: ignore[misc]
        "stable",
        "stable",
        "canary",
        "canary",
    ]
    draw = random.Random(0).random
    assert 50 < Counter(split.choose(user, draw) for _ in range(1000))["canary"] < 150


def test_a_place_beyond_the_rounded_sum_is_the_last_targets() -> None:
    assert alias("{a = 0.1, b = 0.1, c = 0.1}").choose(None, lambda: 1.0) == "c"


@pytest.mark.parametrize("user", ["a" * 100_000, "\0", "\ud800", "é\n"])
def test_any_user_has_a_place(user: str) -> None:
    assert alias("{a = 1, b = 1}").choose(user) in "ab"


@pytest.mark.parametrize(("text", "words"), [
    ("support =", ["not valid TOML"]),
    (b"\xff\xfe", ["not valid TOML"]),
    ('a = "x"\na = "y"', ["not valid TOML"]),
    ("a = " + "[" * 100_000, ["not valid TOML"]),
    ('" a" = "x"', ["' a' is no alias name"]),
    ('"a\u200b" = "x"', ["is no alias name"]),
    ('"../a" = "x"', ["'../a' is no alias name"]),
    (f'"{"n" * 129}" = "x"', ["is no alias name", "128 printable characters"]),
    ('"a\\n" = "x"', ["'a\\n' is no alias name"]),
    ('".." = "x"', ["'..' is no alias name"]),
    ("support = 3", ["alias 'support' is 3", "must be a model or a table"]),
    ('support = ["x"]', ["alias 'support' is ['x']"]),
    ("support = {}", ["alias 'support' is {}"]),
    ('support = ""', ["alias 'support' points at ''", "no model's name"]),
    ('support = "../x"', ["alias 'support' points at '../x'", "no model's name"]),
    ('support = "x:nan"', ["alias 'support' points at 'x:nan'", "is no weight"]),
    ('support = {"x@1" = 1}', ["alias 'support' points at 'x@1'", "is no version"]),
    ('v1.0 = "x"', ["alias 'v1' gives '0' the weight 'x'", "names with dots need quotes"]),
    ("support = {v1.0 = 1}", ["alias 'support' has a table at 'v1'", "in quotes"]),
    ('support = "helpdesk"\nhelpdesk = "x"', ["alias 'support' points at 'helpdesk'", "is an alias"]),
    ('support = {"x+helpdesk@ab12" = 1}\nhelpdesk = "x"', ["'x+helpdesk@ab12'", "'helpdesk' is an alias"]),
    ('support = "support@ab12"', ["alias 'support' points at 'support@ab12'", "'support' is an alias"]),
    ("# " + "x" * MAX_ALIASES_BYTES, ["the limit is 1048576"]),
])  # fmt: skip
def test_a_file_in_error_says_where(text: str | bytes, words: list[str]) -> None:
    message = refusal(text)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "weight", ["0", "-1", "0.0", "nan", "inf", "-inf", "true", '"1"', "1e10", "1" + "0" * 400, "[1]"]
)
def test_a_weight_is_a_positive_number(weight: str) -> None:
    message = refusal(f"support = {{stable = 1, canary = {weight}}}")
    assert "alias 'support' gives 'canary' the weight" in message
    assert "it must be a positive number" in message
