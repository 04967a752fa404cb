"""An adapter's own added tokens: prompts and answers are what its own tokenizer makes, or the folder is refused."""

from __future__ import annotations

import copy
import json
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken as HfToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.adapters.content.added_tokens import listed_in_head
from server.adapters.content.diagnostics import diagnose
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Manifest, list_folder, read_manifest
from server.adapters.content.signature import BaseSignature, embedding, linear
from server.api.app import create_app
from server.api.generation import end_ids
from server.errors import AdapterRejected
from server.model.base_tokenizer import tokenizer_signature
from server.text import prompt as prompt_module
from server.text.prompt import PromptRenderer
from tests.adapter_folders import BASE, CONFIG, FINGERPRINT, LIMITS, make, tensors, write
from tests.fakes import (
    EOS,
    TEMPLATE,
    FakeEngine,
    Script,
    adapter,
    ask,
    encode,
    events,
    server_state,
    small_tokenizer,
)

NUM_IDS, NUM_ROWS = 330, 334
CALL, TOOL, DEEP = NUM_IDS, NUM_IDS + 1, NUM_IDS + 2
TOKENS, CONFIG_OF_TOKENS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
MESSAGES = [{"role": "user", "content": "hello <tool> there <call>"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OWN_TEMPLATE = "{{ messages[0].content }}<call>"
NEW = (HfToken("<call>", special=True, normalized=False), HfToken("<tool>", special=False, normalized=False))


def base_of(tokenizer: PreTrainedTokenizerFast) -> BaseSignature:
    """A base of two linears and a padded embedding, with this tokenizer."""
    modules = {**BASE.modules, "model.embed": embedding(NUM_ROWS, 6), "lm_head": linear(6, NUM_ROWS)}
    return BaseSignature(
        "base",
        FINGERPRINT,
        modules,
        chat_template=TEMPLATE,
        vocab_size=NUM_ROWS,
        tied={"lm_head": "model.embed"},
        tokenizer=tokenizer_signature(tokenizer),
    )


PADDED = base_of(small_tokenizer())


def trained(*tokens: HfToken) -> PreTrainedTokenizerFast:
    """The base's tokenizer with these tokens added by a trainer's user."""
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter whose trainer saved its tokenizer, with two new tokens, beside it."""
    path = make(tmp_path, "good")
    trained(*NEW).save_pretrained(path)
    return path


def read(path: Path, base: BaseSignature = PADDED) -> Manifest:
    manifest = read_manifest(path, base, LIMITS)
    assert list_folder(path, base, LIMITS).defaults == manifest.defaults
    return manifest


def refusal(path: Path, base: BaseSignature = PADDED) -> str:
    with pytest.raises(AdapterRejected) as caught:
        read_manifest(path, base, LIMITS)
    return caught.value.reason


def trained_rows(num_tokens: int) -> dict[str, torch.Tensor]:
    return {"base_model.model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(num_tokens, 6)}


def renderer() -> PromptRenderer:
    return PromptRenderer(small_tokenizer(), vocab_size=NUM_ROWS)


def edit(path: Path, change: Callable[[dict[str, Any]], None], name: str = TOKENS) -> None:
    """Change the JSON of a file."""
    found = json.loads((path / name).read_text())
    change(found)
    (path / name).write_text(json.dumps(found))


def state_with(engine: FakeEngine, *adapters: Any) -> Any:
    return create_app(replace(server_state(engine, *adapters), prompts=renderer()))


def test_prompts_are_what_the_adapters_own_tokenizer_makes(folder: Path) -> None:
    """The prompt's ``<call>`` became four ids, and the id that was trained for it was never used."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = renderer().for_adapter(read(folder).defaults)
    text = "hello<call> there <tool>, how"
    assert CALL in theirs(text)["input_ids"]
    assert ours.completion(text) == theirs(text)["input_ids"]
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    assert ours.chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, **how)
    assert {CALL, TOOL} <= set(ours.chat(MESSAGES))


def test_a_template_of_its_own_writes_its_special_tokens_and_messages_do_not(folder: Path) -> None:
    """A trainer that adds the tokens of a chat format to a base must not let messages write turns."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = renderer().for_adapter(replace(read(folder).defaults, chat_template=OWN_TEMPLATE))
    how: dict[str, Any] = {"chat_template": OWN_TEMPLATE, "return_dict": False, "sanitize_control_tokens": True}
    ids = ours.chat(MESSAGES, template=OWN_TEMPLATE)
    assert ids == theirs.apply_chat_template(MESSAGES, **how)
    assert (ids[-1], ids.count(CALL), ids.count(TOOL)) == (CALL, 1, 1)
    assert ours.decode([CALL, TOOL]) == "<tool>"


def test_answers_are_what_the_adapters_own_tokenizer_decodes(folder: Path) -> None:
    """The ids decoded to nothing, whether special or not."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = renderer().for_adapter(read(folder).defaults)
    ids = [*encode("hello "), CALL, TOOL, *encode("there"), TOOL]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "hello <tool>there<tool>"


def test_the_base_and_other_adapters_keep_the_bases_tokens(folder: Path) -> None:
    prompts = renderer()
    prompts.for_adapter(read(folder).defaults)
    assert prompts.completion("a <tool>") == encode("a <tool>")
    assert max(prompts.chat(MESSAGES)) < NUM_IDS
    assert prompts.for_adapter(GenerationDefaults()) is prompts


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_shows_tokens_that_are_not_special_and_no_others(folder: Path, streaming: bool) -> None:
    tokens = read(folder).defaults.added_tokens
    engine = FakeEngine([Script(ids=[*encode("hello"), CALL, TOOL, *encode(" there")])])
    app = state_with(engine, adapter("poet", added_tokens=tokens))
    body = {"model": "poet", "messages": MESSAGES, "stream": streaming}
    response = ask(app, "POST", CHAT, json=body)
    if streaming:
        chunks = [event["choices"][0]["delta"].get("content") for event in events(response)[:-1] if event["choices"]]
        text = "".join(chunk or "" for chunk in chunks)
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert text == "hello<tool> there"
    assert TOOL in engine.submitted[0].prompt_ids


@pytest.mark.parametrize(
    ("stop", "text", "ends"), [("<call>", "hello", True), ("<tool>", "hello", False), ("<tool> th", "hello", False)]
)
def test_a_new_token_is_a_stop_string(folder: Path, stop: str, text: str, ends: bool) -> None:
    """A special one ends the answer as a token, because it has no text; another as text."""
    tokens = read(folder).defaults.added_tokens
    engine = FakeEngine([Script(ids=[*encode("hello"), TOOL, *encode(" there")])])
    app = state_with(engine, adapter("poet", added_tokens=tokens))
    body = {"model": "poet", "prompt": "x<call>", "stop": [stop]}
    answer = ask(app, "POST", COMPLETIONS, json=body).json()
    assert engine.submitted[0].prompt_ids[-1] == CALL
    assert (CALL in engine.submitted[0].eos_ids) == ends
    if not ends:
        assert answer["choices"][0]["text"] == text


def test_a_new_token_may_end_every_answer(folder: Path) -> None:
    edit(folder, lambda said: said.update(eos_token="<call>"), CONFIG_OF_TOKENS)
    defaults = read(folder).defaults
    engine = FakeEngine()
    app = state_with(engine, adapter("poet", **vars(defaults)))
    ask(app, "POST", CHAT, json={"model": "poet", "messages": MESSAGES})
    assert engine.submitted[0].eos_ids == {EOS, CALL}


def test_an_end_token_that_is_not_marked_special_ends_every_answer() -> None:
    """A base's added token with ``special: false``, named as ``eos_token`` by an adapter, never ended an answer."""
    base = trained(HfToken("<tool>", special=False, normalized=False))
    prompts = PromptRenderer(base, vocab_size=NUM_ROWS)
    assert end_ids(GenerationDefaults(eos=("<tool>", "<ghost>")), (), prompts) == {base.convert_tokens_to_ids("<tool>")}
    assert end_ids(GenerationDefaults(), ("<tool>",), prompts) == set(), "as a stop string it is seen in the text"


@pytest.mark.parametrize(
    "named", [{"eos_token": "<tool>"}, {"pad_token": "<tool>"}, {"extra_special_tokens": {"tool_token": "<tool>"}}]
)
def test_an_added_token_with_a_name_is_special_as_in_transformers(folder: Path, named: dict[str, Any]) -> None:
    """It was shown in answers where its list said ``special: false``."""
    edit(folder, lambda said: said.update(named), CONFIG_OF_TOKENS)
    defaults = read(folder).defaults
    ours = renderer().for_adapter(defaults)
    ids = [*encode("hello"), TOOL, *encode(" there")]
    assert ours.decode(ids) == AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == "hello there"
    assert (TOOL in end_ids(defaults, (), ours)) == ("eos_token" in named)


@pytest.mark.parametrize("source", [CONFIG_OF_TOKENS, ADDED])
def test_tokens_come_from_the_other_files_where_there_is_no_fast_tokenizer(folder: Path, source: str) -> None:
    expected = read(folder).defaults.added_tokens
    (folder / TOKENS).unlink()
    if source == ADDED:
        (folder / ADDED).write_text(json.dumps({"<call>": CALL, "<tool>": TOOL}))
        edit(folder, lambda said: said.update(additional_special_tokens=["<call>"]), CONFIG_OF_TOKENS)
    else:
        decoder = {str(token.id): {**vars(token), "id": None} for token in expected}
        edit(folder, lambda said: said.update(added_tokens_decoder=decoder), CONFIG_OF_TOKENS)
    assert read(folder).defaults.added_tokens == expected


def test_rows_trained_for_new_tokens_are_served_with_their_text(folder: Path) -> None:
    rows = trained_rows(2)
    write(folder, config=CONFIG | {"trainable_token_indices": [CALL, TOOL]}, weights={**tensors(), **rows})
    manifest = read(folder)
    assert manifest.plan.parts["lm_head"].tokens is not None
    assert {token.content for token in manifest.defaults.added_tokens} >= {"<call>", "<tool>"}
    for name in (TOKENS, CONFIG_OF_TOKENS):
        (folder / name).unlink()
    assert f"names token {CALL}, which the base's tokenizer does not have: put the tokenizer" in refusal(folder)


@pytest.mark.parametrize(("content", "words"), [(b"", "tokenizer.json is empty"), (b'{"ver', "is not valid JSON")])
def test_rows_trained_for_new_tokens_beside_a_damaged_tokenizer_are_refused_with_what_it_is(
    folder: Path, content: bytes, words: str
) -> None:
    """One was told to put the tokenizer into the folder, where it was, empty."""
    rows = trained_rows(2)
    write(folder, config=CONFIG | {"trainable_token_indices": [CALL, TOOL]}, weights={**tensors(), **rows})
    (folder / TOKENS).write_bytes(content)
    (folder / CONFIG_OF_TOKENS).unlink()
    assert words in refusal(folder)


def test_new_tokens_without_rows_of_their_own_have_the_bases_as_in_training(folder: Path) -> None:
    assert read(folder).defaults.added_tokens


def padding_side(path: Path) -> None:
    edit(path, lambda said: said.update(padding_side="left", model_max_length=77, add_eos_token=True), CONFIG_OF_TOKENS)


def truncation(path: Path) -> None:
    blocks = {
        "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": "BatchLongest", "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": None,
    }
    edit(path, lambda said: said.update(blocks))


def other_release(path: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        said["model"]["merges"] = [" ".join(pair) for pair in said["model"]["merges"]]
        for name in ("byte_fallback", "ignore_merges", "dropout"):
            del said["model"][name]
        del said["pre_tokenizer"]["use_regex"]
        said["pre_tokenizer"]["trim_offsets"] = not said["pre_tokenizer"]["trim_offsets"]

    edit(path, change)


def special_flags(path: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        said["added_tokens"] = [{**token, "special": False} for token in said["added_tokens"]]

    edit(path, change)


def padding_beyond(path: Path) -> None:
    said = {"id": NUM_ROWS, "content": "[PAD]"}
    edit(path, lambda found: found["added_tokens"].append(said))
    edit(path, lambda found: found.update(pad_token="[PAD]"), CONFIG_OF_TOKENS)


@pytest.mark.parametrize(
    "change", [lambda path: None, padding_side, truncation, other_release, special_flags, padding_beyond]
)
def test_what_trainers_always_save_beside_an_adapter_changes_nothing(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = make(tmp_path, "good")
    version = read(path).version_digest
    small_tokenizer().save_pretrained(path)
    change(path)
    manifest = read(path)
    assert manifest.defaults.added_tokens == ()
    assert TOKENS not in manifest.files.by_name(), "a tokenizer is kept only where it is needed"
    (path / "chat_template.jinja").unlink()
    edit(path, lambda said: said.pop("eos_token"), CONFIG_OF_TOKENS)
    assert read(path).version_digest == version


def test_what_the_base_calls_special_stays_special(folder: Path) -> None:
    """A folder cannot make it possible that a message writes the base's control tokens."""
    special_flags(folder)
    edit(folder, lambda said: said["added_tokens"].remove(said["added_tokens"][EOS]))
    ours = renderer().for_adapter(read(folder).defaults)
    assert ours.chat([{"role": "user", "content": "a<|end|>"}]).count(EOS) == 1
    assert ours.decode([EOS, CALL]) == "<call>"


def test_a_flag_of_a_token_of_the_base_is_the_adapters(folder: Path) -> None:
    """Some releases of a model's tokenizer take the white space behind a token away, others do not."""
    edit(folder, lambda said: said["added_tokens"][2].update(rstrip=True))
    ours = renderer().for_adapter(read(folder).defaults)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.completion("<|end|>  a") == theirs("<|end|>  a")["input_ids"] == encode("<|end|>a")


def test_a_version_is_of_its_tokens_and_keeps_its_tokenizer(folder: Path) -> None:
    before = read(folder)
    assert before.files.by_name()[TOKENS] == (folder / TOKENS).read_bytes()
    edit(folder, lambda said: said["added_tokens"][-1].update(content="<other>"))
    after = read(folder)
    assert (after.weights_digest == before.weights_digest, after.version_digest == before.version_digest) == (
        True,
        False,
    )


@pytest.mark.parametrize("ids", [{"<call>": CALL}, {"<far>": NUM_ROWS}])
def test_a_kept_version_is_the_version_where_another_file_lists_other_tokens(ids: object, folder: Path) -> None:
    """The tokenizer that decided was not kept, so the kept folder had the tokens of the file that had not decided."""
    small_tokenizer().save_pretrained(folder)
    (folder / ADDED).write_text(json.dumps(ids))
    before = read(folder)
    assert before.defaults.added_tokens == ()
    kept = make(folder.parent, "kept")
    for name, data in before.files.by_name().items():
        (kept / name).write_bytes(data)
    assert read(kept).version_digest == before.version_digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["model"]["vocab"].update(hello=7), "the vocabulary or merges in tokenizer.json differs"),
        (lambda said: said["model"]["merges"].pop(), "the vocabulary or merges in tokenizer.json differs"),
        (lambda said: said.update(normalizer={"type": "Lowercase"}), "the normalizer in tokenizer.json differs"),
        (lambda said: said["pre_tokenizer"].update(add_prefix_space=True), "the pre-tokenizer in tokenizer.json"),
        (lambda said: said.pop("model"), "the vocabulary or merges in tokenizer.json differs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [NEW, ()])
def test_a_tokenizer_that_is_another_elsewhere_is_refused(
    tmp_path: Path, tokens: tuple[HfToken, ...], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = make(tmp_path, "good")
    trained(*tokens).save_pretrained(path)
    edit(path, change)
    said = refusal(path)
    assert words in said
    assert "remove tokenizer.json from the folder to use the base's" in said


def test_a_model_written_as_the_bases_is_not_parsed(folder: Path) -> None:
    """Parsing a vocabulary of 150,000 tokens takes seconds, in which nobody else is answered."""
    assert PADDED.tokenizer is not None
    data = (folder / TOKENS).read_bytes()
    assert PADDED.tokenizer.difference(data, lambda: pytest.fail("parsed")) is None
    lowercase = data.replace(b'"normalizer": null', b'"normalizer": {"type": "Lowercase"}')
    assert PADDED.tokenizer.difference(lowercase, lambda: pytest.fail("parsed")) == "normalizer"


@pytest.mark.parametrize("hostile", [b'{"added_tokens": [], "model": [%s0]}', b'{"model": [%s0], "added_tokens": []}'])
def test_a_tokenizer_of_more_parts_than_the_bases_is_not_parsed(hostile: bytes, folder: Path) -> None:
    """48 MB of empty lists took 50 seconds and 2.5 GB, wherever they stood."""
    (folder / TOKENS).write_bytes(hostile % (b"[]," * 1_000_000))
    tracemalloc.start()
    try:
        assert "the vocabulary or merges in tokenizer.json differs" in refusal(folder)
        [problem] = diagnose(folder, PADDED, LIMITS).problems
        assert "the vocabulary or merges in tokenizer.json differs" in problem
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: b'{"model": {}, ' + data[1:],
        lambda data: b'{"outer": ' + data + b"}",
        lambda data: data + b" ",
        lambda data: data[:-1] + b', "model": {}}',
    ],
)
def test_a_model_that_only_looks_as_the_bases_is_parsed(folder: Path, wrap: Callable[[bytes], bytes]) -> None:
    assert PADDED.tokenizer is not None
    data = wrap((folder / TOKENS).read_bytes())
    expected = json.loads(data).get("model", {}) == json.loads((folder / TOKENS).read_bytes())["model"]
    assert (PADDED.tokenizer.difference(data, lambda: json.loads(data)) is None) == expected


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"id": NUM_ROWS, "content": "<far>"}, "its token '<far>' has the id 334, and the base's embedding has 334"),
        ({"id": CALL, "content": "<other>"}, "two of its added tokens have the same id"),
        ({"id": DEEP, "content": "<call>"}, "two of its added tokens have the same content"),
        ({"id": -1, "content": "<x>"}, "is no added token with an id, a text and flags"),
        ({"id": True, "content": "<x>"}, "is no added token"),
        ({"id": DEEP, "content": ""}, "is no added token"),
        ({"id": DEEP, "content": "x" * 600}, "is no added token"),
        ({"id": DEEP, "content": "<x>", "lstrip": 1}, "is no added token"),
        ("<x>", "is no added token"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_served_are_refused_by_name(folder: Path, added: Any, words: str) -> None:
    edit(folder, lambda said: said["added_tokens"].append(added))
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda listed: listed[-1].update(id=DEEP), f"gives the token '<tool>' the id {DEEP}, which it cannot have"),
        (lambda listed: listed[-1].update(content="e"), "gives the token 'e' the id 331, which it cannot have"),
    ],
)
def test_tokens_whose_ids_no_tokenizer_would_give_are_refused(
    folder: Path, change: Callable[[list[dict[str, Any]]], object], words: str
) -> None:
    edit(folder, lambda said: (change(said["added_tokens"]), None)[1])
    defaults = read(folder).defaults
    with pytest.raises(ValueError, match=words):
        renderer().check_defaults(defaults)


def test_a_template_is_tried_with_the_adapters_tokens(folder: Path) -> None:
    tokens = read(folder).defaults.added_tokens
    renderer().check_defaults(
        GenerationDefaults(chat_template=OWN_TEMPLATE, added_tokens=tokens, end_tokens=("<call>",))
    )
    with pytest.raises(ValueError, match="end_tokens"):
        renderer().check_defaults(GenerationDefaults(end_tokens=("<call>",)))


def test_adapters_with_different_tokens_are_not_added_up(folder: Path) -> None:
    one = read(folder).defaults.added_tokens
    other = tuple(token for token in one if token.id != TOOL)
    names = {"a": one, "b": other, "c": (), "d": one}
    engine = FakeEngine()
    app = state_with(engine, *(adapter(name, added_tokens=tokens) for name, tokens in names.items()))
    refused = ask(app, "POST", CHAT, json={"model": "a:0.5+b:0.5", "messages": MESSAGES})
    assert refused.status_code == 400
    assert "their tokenizers have different added tokens" in refused.json()["error"]["message"]
    for model in ("c:0.5+a:0.5", "a:0.5+d:0.5"):
        assert ask(app, "POST", CHAT, json={"model": model, "messages": MESSAGES}).status_code == 200
        assert TOOL in engine.submitted[-1].prompt_ids


def test_only_the_last_few_tokenizers_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_module, "MAX_TOKENIZERS", 2)
    tokens = read(folder).defaults.added_tokens
    prompts = renderer()
    sets = [GenerationDefaults(added_tokens=some) for some in (tokens, tokens[:-1], tokens[:-2])]
    first = [prompts.for_adapter(defaults) for defaults in sets]
    assert prompts.for_adapter(sets[2]) is first[2]
    assert prompts.for_adapter(sets[0]) is not first[0]


def test_a_tokenizer_that_is_being_made_delays_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one was made, which takes seconds, the event loop waited for those that were there."""
    tokens, prompts = read(folder).defaults.added_tokens, renderer()
    there, new = GenerationDefaults(added_tokens=tokens), GenerationDefaults(added_tokens=tokens[:-1])
    first = prompts.for_adapter(there)
    begun, go_on = threading.Event(), threading.Event()
    make_tokenizer = prompt_module._with_added_tokens

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return make_tokenizer(*arguments)

    monkeypatch.setattr(prompt_module, "_with_added_tokens", slowly)
    with ThreadPoolExecutor(3) as threads:
        making = [threads.submit(prompts.for_adapter, new) for _ in range(2)]
        assert begun.wait(10)
        assert threads.submit(prompts.for_adapter, there).result(timeout=10) is first
        go_on.set()
        assert making[0].result(timeout=10) is making[1].result(timeout=10)


def test_a_base_without_a_fast_tokenizer_takes_adapters_as_before(folder: Path) -> None:
    assert read(folder, replace(PADDED, tokenizer=None)).defaults.added_tokens == ()


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ('{"version": "1.0", "added_tokens": [1, 2], "model": {"vo', [1, 2]),
        (' { "a" : {"added_tokens": [3]} ,\n"added_tokens": [4]', [4]),
        ('{"added_tokens": [1, 2', None),
        ('{"added_tokens": {}}', None),
        ('{"model": {}}', None),
        ("", None),
        ("[]", None),
        ('{"a": ' + "[" * 100_000, None),
    ],
)
def test_the_list_of_added_tokens_is_read_from_the_beginning_of_the_file(text: str, listed: Any) -> None:
    assert listed_in_head(text.encode()) == listed


def test_a_pointer_in_place_of_the_tokenizer_is_told_and_refuses_nothing(folder: Path) -> None:
    (folder / TOKENS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    manifest = read(folder)
    assert manifest.defaults.added_tokens == ()
    assert "git-lfs pointer" in manifest.unread[TOKENS]
    write(folder, config=CONFIG | {"trainable_token_indices": [CALL]}, weights={**tensors(), **trained_rows(1)})
    assert f"names token {CALL}" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"added_tokens": 7}', "[" * 100_000])
def test_a_tokenizer_that_is_none_is_refused_in_a_line(folder: Path, content: str) -> None:
    (folder / TOKENS).write_text(content)
    said = refusal(folder)
    assert TOKENS in said and said.isprintable() and len(said) < 500
