"""How an adapter wants to be talked to, from its sidecar and from what trainers leave beside PEFT's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.adapters.content.folder import folder_state
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Manifest, read_manifest
from server.adapters.reader import AdapterReader
from server.api.app import create_app
from server.api.generation import completion_length, end_ids, overlay, sampling_params, stop_strings
from server.api.protocol import ChatRequest
from server.errors import AdapterRejected
from server.text.prompt import PromptRenderer
from tests import fakes
from tests.adapter_folders import BASE, CONFIG, LIMITS, SIDECAR, make, write
from tests.fakes import EOS, FakeEngine, Script, adapter, adapter_with, ask, encode, server_state, small_tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
TEMPLATE, OTHER = "{{ messages[0].content }}!", "{{ messages[0].content }}?"
SIDECAR_FILE, TEMPLATE_FILE, SOURCE_FILE = "quickchange.json", "chat_template.jinja", "source.json"
TOKENIZER_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "good")


def put(path: Path, files: dict[str, Any]) -> None:
    """Write files into a folder: text as it is, anything else as JSON; None takes a file away."""
    for name, content in files.items():
        if content is None:
            (path / name).unlink()
        elif isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def read(path: Path, *, trusted: bool = True) -> Manifest:
    base = replace(BASE, chat_template=fakes.TEMPLATE)
    return read_manifest(path, base, replace(LIMITS, trust_chat_templates=trusted))


def sidecar(**said: Any) -> dict[str, Any]:
    return {SIDECAR_FILE: SIDECAR | said}


def request(**said: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "good", "messages": USER} | said)


def ends(defaults: GenerationDefaults, *stop: str) -> frozenset[int]:
    """Token ids that end an answer, beside the base's."""
    asked = request(stop=list(stop)) if stop else request()
    return end_ids(defaults, stop_strings(asked, defaults), PromptRenderer(small_tokenizer()))


SOURCES: list[dict[str, Any]] = [
    sidecar(chat_template=TEMPLATE),
    {TEMPLATE_FILE: TEMPLATE},
    {TOKENIZER_FILE: {"chat_template": TEMPLATE}},
    {
        TOKENIZER_FILE: {
            "chat_template": [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": TEMPLATE}]
        }
    },
]


@pytest.mark.parametrize("files", SOURCES)
def test_a_chat_template_comes_from_any_of_its_files(folder: Path, files: dict[str, Any]) -> None:
    put(folder, files)
    assert read(folder).defaults.chat_template == TEMPLATE


def test_the_sidecars_template_goes_before_the_file_and_the_file_before_the_tokenizers(folder: Path) -> None:
    put(folder, {TOKENIZER_FILE: {"chat_template": "c"}})
    assert read(folder).defaults.chat_template == "c"
    put(folder, {TEMPLATE_FILE: "b"})
    assert read(folder).defaults.chat_template == "b"
    put(folder, sidecar(chat_template="a"))
    assert read(folder).defaults.chat_template == "a"


@pytest.mark.parametrize(
    "files",
    [
        {},
        sidecar(),
        {TEMPLATE_FILE: ""},
        {TOKENIZER_FILE: {}},
        {TOKENIZER_FILE: {"chat_template": None}},
        {TOKENIZER_FILE: {"chat_template": ""}},
        {TOKENIZER_FILE: {"chat_template": []}},
        {TOKENIZER_FILE: {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}},
        {TOKENIZER_FILE: {"chat_template": {"default": TEMPLATE}}},
    ],
)
def test_without_a_template_of_its_own_an_adapter_has_the_bases(folder: Path, files: dict[str, Any]) -> None:
    put(folder, files)
    assert read(folder, trusted=False).defaults.chat_template is None


@pytest.mark.parametrize("files", SOURCES[1:])
def test_a_strangers_template_needs_the_operators_word(folder: Path, files: dict[str, Any]) -> None:
    put(folder, files)
    with pytest.raises(AdapterRejected, match="--trust-chat-templates"):
        read(folder, trusted=False)
    assert read(folder, trusted=True).defaults.chat_template == TEMPLATE


def test_our_own_trainers_template_needs_nobodys_word(folder: Path) -> None:
    put(folder, sidecar(chat_template=TEMPLATE))
    assert read(folder, trusted=False).defaults.chat_template == TEMPLATE


def test_a_folder_from_elsewhere_makes_even_the_sidecars_template_a_strangers(folder: Path) -> None:
    put(folder, sidecar(chat_template=TEMPLATE) | {SOURCE_FILE: {"repo": "someone/something"}})
    with pytest.raises(AdapterRejected, match="--trust-chat-templates"):
        read(folder, trusted=False)
    put(folder, {SOURCE_FILE: None})
    assert read(folder, trusted=False).defaults.chat_template == TEMPLATE


@pytest.mark.parametrize(
    "files",
    [
        {TEMPLATE_FILE: fakes.TEMPLATE},
        {TOKENIZER_FILE: {"chat_template": fakes.TEMPLATE}},
        sidecar(chat_template=fakes.TEMPLATE) | {SOURCE_FILE: {}},
    ],
)
def test_the_bases_own_template_is_fine_from_anybody(folder: Path, files: dict[str, Any]) -> None:
    """Trainers copy the base's tokenizer beside every adapter."""
    put(folder, files)
    assert read(folder, trusted=False).defaults.chat_template == fakes.TEMPLATE


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for message in messages %}", "does not work: .*end of template"),
        ("{{ messages|nothing }}", "does not work: .*No filter named 'nothing'"),
        ("{{ messages[0].content.nothing() }}", "does not work: .*has no attribute 'nothing'"),
        ("{{ raise_exception('Only in verse.') }}", "does not work: .*Only in verse."),
        ("{{ raise_exception('\\ud800\\n\\x1b[31m') }}", r"does not work: [ -~]*$"),
        ("{{ 1 / 0 }}", "does not work: .*division by zero"),
        ("{{ '%c' % 1114112 }}", "does not work: .*not in range"),
        ("{{ 1e400|int }}", "does not work"),
        ("{{ 'a' * 10000000000000000000000 }}", "does not work"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "does not work: .*recursion"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "does not work: .*nested"),
        ("{# nothing #}", "does not work: .*empty prompt"),
        ("{{ 9 ** 9 ** 9 }}", "write the number"),
    ],
)
async def test_a_template_that_does_not_work_is_refused_when_the_folder_is_read(
    folder: Path, template: str, words: str
) -> None:
    """What a template raised was let through unless it was of four kinds: one that divides by zero was a 500."""
    prompts = PromptRenderer(small_tokenizer())

    def judge(defaults: GenerationDefaults) -> None:
        if defaults.chat_template is not None:
            prompts.check_template(defaults.chat_template)

    reader = AdapterReader(BASE, LIMITS, check_defaults=judge)
    put(folder, {TEMPLATE_FILE: template})
    with pytest.raises(AdapterRejected, match=f"its chat template.*{words}"):
        await reader.manifest(folder, folder_state(folder), "good")
    put(folder, {TEMPLATE_FILE: TEMPLATE})
    assert (await reader.manifest(folder, folder_state(folder), "good")).defaults.chat_template == TEMPLATE
    reader.close()


def test_a_conversation_is_written_by_the_adapters_template() -> None:
    engine = FakeEngine()
    app = create_app(server_state(engine, adapter("poet", chat_template="{{ messages[0].content }}, in verse<|end|>")))
    assert ask(app, "POST", CHAT, json={"model": "poet", "messages": USER}).status_code == 200
    assert list(engine.submitted[0].prompt_ids) == encode("hello, in verse<|end|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if messages|length > 1 %}{{ raise_exception('One line each.') }}{% endif %}x", "One line each."),
        ("x{{ 1 / (2 - messages|length) }}", "division by zero"),
        ("{{ 'x' if messages|length == 1 }}", "empty prompt"),
    ],
)
def test_a_conversation_that_the_adapters_template_refuses_is_the_clients_to_mend(template: str, words: str) -> None:
    """A template that works for one message need not for two; nothing to continue was a failed assertion once."""
    state = server_state(FakeEngine(), adapter("poet", chat_template=template))
    app, two = create_app(state), [*USER, *USER]
    assert ask(app, "POST", CHAT, json={"model": "poet", "messages": USER}).status_code == 200
    response = ask(app, "POST", CHAT, json={"model": "poet", "messages": two})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert words in response.json()["error"]["message"]
    assert state.adapters.cache.num_leases("poet-weights") == 0


@pytest.mark.parametrize(("role", "shown"), [("user", True), ("system", False), ("developer", False)])
def test_the_system_prompt_leads_a_conversation_that_has_none(folder: Path, role: str, shown: bool) -> None:
    put(folder, sidecar(system_prompt="You rhyme."))
    engine = FakeEngine()
    app = create_app(server_state(engine, adapter_with("poet", read(folder).defaults)))
    messages = [{"role": role, "content": "Speak plainly."}, *USER]
    ask(app, "POST", CHAT, json={"model": "poet", "messages": messages})
    text = str(small_tokenizer().decode(list(engine.submitted[0].prompt_ids)))
    assert text.startswith("<|begin|><|system|>You rhyme.<|end|>") is shown
    assert ("You rhyme." in text) is shown
    assert text.count("Speak plainly.") == 1


FOUR = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125}
OTHERS = {"temperature": 1.5, "top_p": 0.75, "top_k": 11, "min_p": 0.375}
THIRD = {"temperature": 0.75, "top_p": 0.25, "top_k": 13, "min_p": 0.0625}
BASES = GenerationDefaults(temperature=1.25, top_p=0.875, top_k=17, min_p=0.03125)


@pytest.mark.parametrize("name", FOUR)
def test_the_request_goes_before_the_sidecar_the_sidecar_before_the_neighbour_and_all_before_the_base(
    folder: Path, name: str
) -> None:
    def chosen(**asked: Any) -> Any:
        defaults = overlay(read(folder).defaults, BASES)
        return getattr(sampling_params(request(**asked), defaults, index=0), name)

    assert chosen() == getattr(BASES, name)
    put(folder, {GENERATION_FILE: {"do_sample": True, name: THIRD[name]}})
    assert chosen() == THIRD[name]
    put(folder, sidecar(sampling={name: OTHERS[name]}))
    assert chosen() == OTHERS[name]
    assert chosen(**{name: FOUR[name]}) == FOUR[name]


def test_where_nobody_says_anything_the_whole_distribution_is_drawn_from() -> None:
    chosen = sampling_params(request(), overlay(GenerationDefaults(), GenerationDefaults()), index=0)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p) == (1.0, 1.0, 0, 0.0)


@pytest.mark.parametrize("asked", [{"temperature": 0}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}])
def test_a_request_for_zero_is_a_request(folder: Path, asked: dict[str, Any]) -> None:
    put(folder, sidecar(sampling=FOUR))
    (name,) = asked
    assert getattr(sampling_params(request(**asked), read(folder).defaults, index=0), name) == 0


def test_a_sidecar_that_wants_greedy_answers_gets_them(folder: Path) -> None:
    put(folder, sidecar(sampling={"temperature": 0}) | {GENERATION_FILE: {"do_sample": True} | THIRD})
    assert sampling_params(request(), read(folder).defaults, index=0).greedy


@pytest.mark.parametrize(
    "said", [{}, {"do_sample": False}, {"do_sample": None}, {"do_sample": 1}, {"do_sample": "yes"}]
)
def test_a_neighbours_sampling_counts_only_where_it_says_that_it_samples(folder: Path, said: dict[str, Any]) -> None:
    put(folder, {GENERATION_FILE: said | FOUR | {"max_new_tokens": 9}})
    assert read(folder).defaults == GenerationDefaults(max_tokens=9)


NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**400  # as a float it is an error, not infinity


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": -1, "top_p": 0, "top_k": 0, "min_p": -0.1, "max_new_tokens": 0},
        {"temperature": 2.5, "top_p": 1.5, "top_k": 2**31, "min_p": 2, "max_new_tokens": 2**31},
        {"temperature": "1", "top_p": [1], "top_k": {}, "min_p": "0", "max_new_tokens": "9"},
        {"temperature": True, "top_p": True, "top_k": True, "min_p": False, "max_new_tokens": True},
        {"temperature": NAN, "top_p": INFINITY, "top_k": 1.5, "min_p": -INFINITY, "max_new_tokens": 9.0},
        {"temperature": HUGE, "top_p": HUGE, "top_k": HUGE, "min_p": -HUGE, "max_new_tokens": HUGE},
        {"temperature": None, "top_p": None, "top_k": None, "min_p": None, "max_new_tokens": None},
    ],
)
def test_a_neighbours_numbers_out_of_range_are_no_advice(folder: Path, said: dict[str, Any]) -> None:
    """An integer too large for a float was an error that nobody caught."""
    put(folder, {GENERATION_FILE: {"do_sample": True} | said})
    assert read(folder).defaults == GenerationDefaults()


def test_the_longest_answer_is_the_requests_or_the_sidecars_or_the_neighbours_or_the_servers(folder: Path) -> None:
    engine = FakeEngine()

    def longest(**asked: int) -> int:
        app = create_app(server_state(engine, adapter_with("good", read(folder).defaults)))
        assert ask(app, "POST", CHAT, json={"model": "good", "messages": USER} | asked).status_code == 200
        return engine.submitted[-1].max_tokens

    assert longest() == 64
    put(folder, {GENERATION_FILE: {"max_new_tokens": 30}})
    assert longest() == 30
    put(folder, sidecar(sampling={"max_tokens": 20}))
    assert longest() == 20
    assert longest(max_tokens=40) == 40
    put(folder, sidecar(sampling={"max_tokens": 10**30}))
    assert longest() == 256 - len(engine.submitted[-1].prompt_ids)


def test_an_adapters_wish_is_cut_to_the_room_there_is() -> None:
    assert completion_length(90, asked=None, default=10**30, limit=100) == 10


def test_stop_strings_of_request_and_adapter_are_united_each_once(folder: Path) -> None:
    put(folder, sidecar(stop=["###", "END", "###"]))
    defaults = read(folder).defaults
    assert stop_strings(request(), defaults) == ("###", "END")
    assert stop_strings(request(stop=["END", "\n"]), defaults) == ("END", "\n", "###")


def test_a_clients_stop_string_does_not_take_away_the_adapters() -> None:
    app = create_app(server_state(FakeEngine([Script("the cat sat on the mat")]), adapter("poet", stop=(" sat",))))
    answer = ask(app, "POST", CHAT, json={"model": "poet", "messages": USER, "stop": " mat"}).json()
    assert answer["choices"][0]["message"]["content"] == "the cat"


TOOL, PAD = encode("<|tool|>")[0], encode("<|pad|>")[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({TOKENIZER_FILE: {"eos_token": "<|tool|>"}}, {TOOL}),
        ({TOKENIZER_FILE: {"eos_token": {"content": "<|tool|>", "lstrip": False}}}, {TOOL}),
        ({TOKENIZER_FILE: {"eos_token": "hello"}}, set()),
        ({TOKENIZER_FILE: {"eos_token": "<|ghost|>"}}, set()),
        ({TOKENIZER_FILE: {"eos_token": "\ud800"}}, set()),
        ({TOKENIZER_FILE: {"eos_token": {"content": 7}}}, set()),
        ({TOKENIZER_FILE: {"eos_token": ["<|tool|>"]}}, set()),
        ({TOKENIZER_FILE: {"eos_token": None}}, set()),
        ({GENERATION_FILE: {"eos_token_id": PAD}}, {PAD}),
        ({GENERATION_FILE: {"eos_token_id": [PAD, 40]}}, {PAD, 40}),
        ({GENERATION_FILE: {"eos_token_id": [10**6, HUGE, -1, True, 1.0, "2", None, [3]]}}, set()),
        ({GENERATION_FILE: {"eos_token_id": {"a": 1}}}, set()),
        ({TOKENIZER_FILE: {"eos_token": "<|tool|>"}, GENERATION_FILE: {"eos_token_id": PAD}}, {TOOL, PAD}),
        (sidecar(stop=["<|tool|>", "###"]), {TOOL}),
        (sidecar(stop=["a<|tool|>"]), set()),
    ],
)
def test_tokens_that_end_a_turn_are_added_to_the_bases(folder: Path, files: dict[str, Any], expected: set[int]) -> None:
    put(folder, files)
    assert ends(read(folder).defaults) == expected


def test_a_clients_stop_string_that_is_a_special_token_ends_the_answer() -> None:
    """A special token has no text in an answer, so that it would never be seen."""
    assert ends(GenerationDefaults(), "<|tool|>", "###") == {TOOL}
    assert ends(GenerationDefaults(stop=("<|pad|>",)), "<|tool|>") == {TOOL, PAD}
    engine = FakeEngine()
    app = create_app(server_state(engine, adapter("poet", eos=("<|pad|>", 10**6))))
    ask(app, "POST", CHAT, json={"model": "poet", "messages": USER, "stop": "<|tool|>"})
    assert engine.submitted[0].eos_ids == {EOS, TOOL, PAD}


def test_what_an_adapter_brings_to_end_a_turn_is_bounded(folder: Path) -> None:
    put(folder, {GENERATION_FILE: {"eos_token_id": list(range(100_000))}})
    assert len(read(folder).defaults.eos) <= 16


@pytest.mark.parametrize("name", [TOKENIZER_FILE, GENERATION_FILE, SIDECAR_FILE])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"3", b"\xff\xfe\x00{}", b"\x00" * 100, b"[" * 200_000, b'{"a":' * 200_000],
)
def test_a_neighbour_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    put(folder, {name: content})
    with pytest.raises(AdapterRejected, match=name):
        read(folder)


def test_a_template_that_is_no_text_is_named(folder: Path) -> None:
    put(folder, {TEMPLATE_FILE: b"\xff\xfe"})
    with pytest.raises(AdapterRejected, match=TEMPLATE_FILE):
        read(folder)


@pytest.mark.parametrize(
    "named",
    [
        [3, None, "text", []],
        [{"name": ["default"], "template": TEMPLATE}],
        [{"name": {"default": 1}, "template": TEMPLATE}],
        [{"name": "default"}],
        [{"name": "default", "template": 7}],
        [{"template": TEMPLATE}],
        7,
        True,
    ],
)
def test_a_list_of_templates_that_is_none_is_passed_over(folder: Path, named: Any) -> None:
    """A name that was no text ended in a TypeError that nobody caught."""
    put(folder, {TOKENIZER_FILE: {"chat_template": named}})
    assert read(folder).defaults == GenerationDefaults()


@pytest.mark.parametrize(
    "said",
    [
        {"system_prompt": ""},
        {"system_prompt": 3},
        {"system_prompt": "\ud800"},
        {"stop": ["\ud800"]},
        {"stop": [""]},
        {"stop": "###"},
        {"chat_template": ""},
        {"sampling": {"temperature": True}},
        {"sampling": {"temperature": NAN}},
        {"sampling": {"top_p": HUGE}},
        {"sampling": {"max_tokens": 1.5}},
        {"sampling": []},
    ],
)
def test_a_sidecar_that_says_it_wrong_is_refused(folder: Path, said: dict[str, Any]) -> None:
    (field,) = said
    put(folder, sidecar(**said))
    with pytest.raises(AdapterRejected, match=rf"quickchange\.json: {field}"):
        read(folder)


@pytest.mark.parametrize(
    "files",
    [
        *SOURCES,
        sidecar(),
        sidecar(stop=["END"]),
        sidecar(system_prompt="You rhyme."),
        sidecar(sampling={"temperature": 0.5}),
        {TOKENIZER_FILE: {"eos_token": "<|tool|>"}},
        {GENERATION_FILE: {"eos_token_id": 3}},
        {GENERATION_FILE: {"do_sample": True, "temperature": 0.5}},
        {GENERATION_FILE: {"max_new_tokens": 3}},
    ],
)
def test_other_manners_are_another_version_of_the_same_weights(folder: Path, files: dict[str, Any]) -> None:
    plain = read(folder)
    put(folder, files)
    changed = read(folder)
    assert changed.weights_digest == plain.weights_digest
    assert changed.version_digest != plain.version_digest
    put(folder, dict.fromkeys(files))
    assert read(folder).version_digest == plain.version_digest


def test_every_manner_has_a_version_of_its_own(folder: Path) -> None:
    """Texts that move from one file to another must not come to the same digest."""
    digests = [read(folder).version_digest]
    kinds: list[dict[str, Any]] = [
        {TEMPLATE_FILE: "{}"},
        {GENERATION_FILE: {}},
        {TOKENIZER_FILE: {"eos_token": "3"}},
        {GENERATION_FILE: {"eos_token_id": 3}},
        {TOKENIZER_FILE: {"chat_template": OTHER}},
        {TEMPLATE_FILE: TEMPLATE},
    ]
    for files in kinds:
        put(folder, files)
        digests.append(read(folder).version_digest)
        put(folder, dict.fromkeys(files))
    assert len(set(digests)) == len(digests)


def test_what_no_answer_depends_on_is_no_new_version(folder: Path) -> None:
    plain = read(folder)
    put(folder, {"README.md": "A card.", TOKENIZER_FILE: {"model_max_length": 3}})
    assert read(folder).version_digest == plain.version_digest
    write(folder, config=CONFIG | {"lora_alpha": 16})
    assert read(folder).weights_digest != plain.weights_digest
