"""Questions of common knowledge drawn and worded, each with a short and a full answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from trainer.micro.facts.everyday import CAPITALS, COLOURS, DEFINITIONS, LEGS, OPPOSITES, SOUNDS, YOUNG
from trainer.micro.facts.short_facts import FACTS, YES_NO
from trainer.micro.facts.wording import capitalised, uncapitalised, with_article


class Asked(NamedTuple):
    """A question, its answer in a word or two, its answer in a sentence, and what it is about."""

    question: str
    short: str
    full: str
    topic: str


def capital(rng: random.Random) -> Asked:
    """The capital of a country."""
    country, city = rng.choice(list(CAPITALS.items()))
    question = rng.choice((
        f"What is the capital of {country}?", f"What is the capital city of {country}?",
        f"Which city is the capital of {country}?", f"Name the capital of {country}.",
        f"Tell me the capital of {country}.", f"What's the capital of {country}?",
        f"Do you know the capital of {country}?",
    ))
    end = "" if city.endswith(".") else "."
    full = rng.choice((
        f"The capital of {country} is {city}{end}", f"{city} is the capital of {country}.",
    ))
    return Asked(question, city, full, "geography")


def opposite(rng: random.Random) -> Asked:
    """The opposite of a word."""
    word, other = rng.sample(rng.choice(OPPOSITES), 2)
    question = rng.choice((
        f"What is the opposite of {word}?", f"Tell me the opposite of {word}.", f"What's the opposite of {word}?",
        f'What is the opposite of "{word}"?', f"Which word is the opposite of {word}?",
        f"Which word means the opposite of {word}?",
    ))
    return Asked(question, other, f"The opposite of {word} is {other}.", "words")


def colour(rng: random.Random) -> Asked:
    """The colour of a thing."""
    thing, verb, name = rng.choice(COLOURS)
    question = rng.choice((
        f"What colour {verb} {thing}?", f"Which colour {verb} {thing}?", f"What color {verb} {thing}?",
        f"Tell me what colour {thing} {verb}.", f"Do you know what colour {thing} {verb}?",
    ))
    return Asked(question, name, f"{capitalised(thing)} {verb} {name}.", "colours")


def animal(rng: random.Random) -> Asked:
    """The sound, the young or the legs of an animal."""
    kind = rng.randrange(3)
    if kind == 0:
        name, sound = rng.choice(SOUNDS)
        one = with_article(name)
        question = rng.choice((
            f"What sound does {one} make?", f"What noise does {one} make?", f"Which sound is made by {one}?",
        ))
        return Asked(question, sound, f"{capitalised(one)} {sound}.", "animals")
    if kind == 1:
        name, young = rng.choice(YOUNG)
        question = rng.choice((
            f"What is a young {name} called?", f"What do you call a baby {name}?",
            f"What is the name for a baby {name}?",
        ))
        return Asked(question, young, f"A young {name} is called {with_article(young)}.", "animals")
    name, legs = rng.choice(LEGS)
    one = with_article(name)
    question = rng.choice((f"How many legs does {one} have?", f"How many legs has {one} got?"))
    return Asked(question, legs, f"{capitalised(one)} has {legs} legs.", "animals")


def fact(rng: random.Random) -> Asked:
    """A short fact."""
    topic, question, short, full = rng.choice(FACTS)
    return Asked(question, short, full, topic)


def definition(rng: random.Random) -> Asked:
    """What a thing is; its short answer is its long one without the thing."""
    thing, text = rng.choice(DEFINITIONS)
    bare = thing.split(" ", 1)[1] if thing.startswith(("a ", "an ")) else thing
    question = rng.choice((
        f"What is {thing}?", f"What's {thing}?", f"Tell me what {thing} is.", f"Can you explain what {thing} is?",
        f"Do you know what {thing} is?", f'What does the word "{bare}" mean?', f"Explain what {thing} is.",
        f"In simple words, what is {thing}?", f"I do not know what {thing} is. Can you tell me?",
    ))
    return Asked(question, text, f"{capitalised(thing)} is {text}.", "meanings")


SHORT_FAMILIES: tuple[Callable[[random.Random], Asked], ...] = (capital, opposite, colour, animal, fact, fact, fact)


def short_question(rng: random.Random) -> Asked:
    """A question with an answer of a word or two."""
    return rng.choice(SHORT_FAMILIES)(rng)


def yes_no_question(rng: random.Random) -> Asked:
    """A question answered by yes or no."""
    topic, question, yes, truth = rng.choice(YES_NO)
    word = "Yes" if yes else "No"
    return Asked(question, word, f"{word}, {truth}.", topic)


def any_question(rng: random.Random) -> Asked:
    """A question of any of these kinds."""
    return rng.choice((short_question, short_question, definition, yes_no_question))(rng)


def worded(question: str, rng: random.Random) -> str:
    """The question with or without words around it."""
    lowered = uncapitalised(question)
    return rng.choice((
        question, question, question, question, lowered, lowered.rstrip("?."), f"Quick question: {lowered}",
        f"I have a question. {question}", f"Please tell me: {lowered}", f"Hey Micro, {lowered}",
        f"{question} I forgot.",
        f"A child asked me this: {lowered}", f"Here is an easy one. {question}", f"So, {lowered}",
        f"{question} Thanks!",
        f"Can you help me? {question}", f"Micro, {lowered}", f"{question} Please answer.",
    ))
