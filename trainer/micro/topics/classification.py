"""Conversations that classify a short text: sentiment, topic, support category, language, form, urgency."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from trainer.micro.conversation import Conversation, turns
from trainer.micro.messages import FORMS, REVIEWS, SLOTS, SUPPORT, TOPICS, URGENCY


class Task(NamedTuple):
    """One kind of label: what it is called, what a text of it is called, and templates by label."""

    kind: str
    text: str
    labels: dict[str, tuple[str, ...]]
    weight: int


TASKS = (
    Task("sentiment", "review", REVIEWS, 30), Task("category", "message", SUPPORT, 32),
    Task("topic", "sentence", TOPICS, 20),
    Task("urgency", "message", URGENCY, 9), Task("type", "sentence", FORMS, 9),
)
WITH_LABELS = (
    "Classify the {k} of this {t} as {o}: {m}", "Is the {k} of this {t} {o}? {m}",
    "What is the {k} of this {t}? Choose {o}.\n{m}",
    "Classify this {t}. The labels are {a}.\n\n{m}", "{m}\n\nWhich {k} fits this {t}: {o}?",
    "Choose one {k} ({c}) for: {m}",
    "Which {k} is this: {o}?\n{T}: {m}", "Label the {t} with one of: {c}.\n{T}: {m}", "Labels: {c}\n{T}: {m}\nLabel:",
    "Pick the right {k} for this {t} from {a}. {m}", 'Put the {t} "{m}" into one of these groups: {c}.',
    "Here is a {t}: {m}\nIs it {o}?", "{T}: {m}\nPossible labels: {c}\nWhich one is right?", "{T}: {m}\n{K} ({c}):",
    "Tell me the {k} of the {t} \"{m}\". Use {o}.", "Read the {t} and answer with {o}.\n{m}",
)
WITHOUT_LABELS = (
    "What is the {k} of this {t}? {m}", "Classify the {k}: {m}", "{m}\nWhat is the {k}?",
    "Give the {k} of this {t}: {m}",
    "{T}: {m}\n{K}:", 'What {k} does the {t} "{m}" have?', "Name the {k} of this {t}. {m}",
)
ONE_WORD = (" Answer with one word.", " Reply with the label only.", " Give only the label.", " One word, please.")
SYSTEMS = (
    "Classify each {t} as {o}. Answer with the label only.",
    "You label each {t}. The labels are {a}. Reply with one word.",
    "You are a classifier. For every {t} answer with one of these labels: {c}.",
    "Give the {k} of each {t}: {o}. One word only.",
    "Decide the {k} of the {t} the user sends. Possible values: {c}. Output nothing else.",
)
LANGUAGE_ASKS = ("What language is this? {m}", "Which language is this text in? {m}",
                 "In which language is this written: {m}",
                 "{m}\nWhat language is that?", "Name the language: {m}", "Is this English, French or German? {m}")
LANGUAGE_ANSWERS = ("English", "English.", "This is English.", "The text is in English.", "It is written in English.")
WORD_ASKS = ("Is this word positive or negative: {w}?", "Does {w} sound positive or negative?",
             "{w}: positive or negative?")
POSITIVE = ("wonderful", "happy", "great", "lovely", "excellent", "kind", "beautiful", "friendly", "perfect",
            "brilliant")
NEGATIVE = ("terrible", "sad", "awful", "ugly", "horrible", "rude", "boring", "nasty", "broken", "dreadful")


def fill(rng: random.Random, template: str) -> str:
    """The template with a random filler in each slot."""
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), template)
    return re.sub(r"\b([Aa])( (?:old|order|item|essay|egg|album|orange)\b)", r"\1n\2", text)


def _text(rng: random.Random, task: Task, label: str) -> str:
    """One sentence, at times two of the same label."""
    chance = {"sentiment": 0.5, "category": 0.45, "topic": 0.2}.get(task.kind, 0.0)
    count = 2 if rng.random() < chance else 1
    first, *more = (fill(rng, template) for template in rng.sample(task.labels[label], count))
    text = first + "".join(f" {sentence}" for sentence in more)
    if task.kind == "category" and rng.random() < 0.25:
        text = rng.choice(("Hello, ", "Hi, ", "Good morning, ", "Hello there, ")) + _lowered(text)
    if task.kind in ("category", "urgency") and rng.random() < 0.15:
        text += rng.choice((" Thank you.", " Thanks!", " Best wishes, " + rng.choice(SLOTS["name"])))
    return text


def _lowered(text: str) -> str:
    """The text with a small first letter, unless its first word is "I" or a name."""
    word = re.split(r"[ ,]", text)[0]
    return text if word == "I" or word in SLOTS["name"] or word in SLOTS["month"] else text[0].lower() + text[1:]


def _slots(rng: random.Random, task: Task, text: str) -> dict[str, str]:
    labels = list(task.labels)
    rng.shuffle(labels)
    head = ", ".join(labels[:-1])
    return {"k": task.kind, "K": task.kind.capitalize(), "t": task.text, "T": task.text.capitalize(), "m": text,
            "o": f"{head} or {labels[-1]}", "a": f"{head} and {labels[-1]}", "c": ", ".join(labels)}


def _answer(rng: random.Random, task: Task, label: str) -> str:
    named = f"{task.kind.capitalize()}: {label}"
    sentence = {
        "sentiment": f"The sentiment of this review is {label}.",
        "category": f"The category of this message is {label}.",
        "topic": f"The topic of this sentence is {label}.", "urgency": f"The urgency of this message is {label}.",
        "type": f"This sentence is a {label}.",
    }[task.kind]
    return rng.choice((label, label, label.capitalize(), f"{label.capitalize()}.", named, sentence,
                       f"The {task.kind} is {label}."))


def _classified(rng: random.Random, task: Task) -> list[str]:
    label = rng.choice(list(task.labels))
    slots = _slots(rng, task, _text(rng, task, label))
    bare = task.kind in ("category", "topic", "type") or rng.random() < 0.7
    question = rng.choice(WITH_LABELS if bare else WITHOUT_LABELS).format(**slots)
    if rng.random() < 0.2 and not question.endswith((slots["m"], ":")):
        return [question + rng.choice(ONE_WORD), label]
    return [question, _answer(rng, task, label)]


def _by_system(rng: random.Random, task: Task) -> Conversation:
    """The labels are in the system prompt; each user turn is a bare text."""
    parts: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        label = rng.choice(list(task.labels))
        parts += [_text(rng, task, label), label]
    return turns(*parts, system=rng.choice(SYSTEMS).format(**_slots(rng, task, "")))


def _language(rng: random.Random) -> list[str]:
    text = fill(rng, rng.choice(rng.choice(list(TOPICS.values()))))
    return [rng.choice(LANGUAGE_ASKS).format(m=text), rng.choice(LANGUAGE_ANSWERS)]


def _word(rng: random.Random) -> list[str]:
    good = rng.random() < 0.5
    word, label = rng.choice(POSITIVE if good else NEGATIVE), "positive" if good else "negative"
    question = rng.choice(WORD_ASKS).format(w=word)
    return [question[0].upper() + question[1:],
            rng.choice((label, f"{word.capitalize()} is {label}.", f"{label.capitalize()}."))]


def _yes_no(rng: random.Random, task: Task) -> list[str]:
    """A yes-or-no question about one label."""
    label = rng.choice(list(task.labels))
    asked = label if rng.random() < 0.5 else rng.choice(list(task.labels))
    text = _text(rng, task, label)
    question = f"Is the {task.kind} of this {task.text} {asked}? {text}"
    return [question, f"Yes, the {task.kind} is {asked}." if asked == label else f"No, the {task.kind} is {label}."]


def sample(rng: random.Random) -> Conversation:
    """One or two texts, each answered with its label."""
    task = rng.choices(TASKS, [each.weight for each in TASKS])[0]
    roll = rng.random()
    if roll < 0.2:
        return _by_system(rng, task)
    if roll < 0.24:
        return turns(*_language(rng))
    if roll < 0.26:
        return turns(*_word(rng))
    if roll < 0.32:
        return turns(*_yes_no(rng, task))
    parts = _classified(rng, task)
    if rng.random() < 0.1:
        parts += _classified(rng, task)
    return turns(*parts)
