"""Lists asked for with a count and a form, steps of everyday procedures, and small tasks on given words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from trainer.micro.conversation import Conversation, turns
from trainer.micro.facts.list_items import CATEGORIES, PROCEDURES, SENTENCES, STEP_FRAMES, WORDS
from trainer.micro.facts.wording import capitalised, joined, with_article

Exchange = tuple[str, str]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {capitalised(item)}" for item in items)


def _numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{number}. {capitalised(item)}" for number, item in enumerate(items, 1))


def _commas(items: Sequence[str]) -> str:
    return ", ".join(items)


def _lines(items: Sequence[str]) -> str:
    return "\n".join(items)


def _sentence(items: Sequence[str]) -> str:
    return f"{capitalised(joined(items))}."


# a form, and the words by which it is asked for
FORMS: tuple[tuple[Callable[[Sequence[str]], str], tuple[str, ...]], ...] = (
    (
        _bullets, (
            " as bullet points", " as a bulleted list", " with a dash before each", " in a list with bullet points",
        ),
    ),
    (_numbered, (" as a numbered list", " and number them", " with numbers", " in a numbered list")),
    (_commas, (" separated by commas", " with commas between them", " on one line, separated by commas")),
    (_lines, (", one per line", ", each on its own line", " and put each one on a new line")),
    (_sentence, ("",)),
    (_sentence, ("",)),
)
LIST_FRAMES = (
    "List {count} {plural}{form}.", "Name {count} {plural}{form}.", "Give me {count} {plural}{form}.",
    "Tell me {count} {plural}{form}.",
    "Can you name {count} {plural}{form}?", "I need {count} {plural}{form}.", "Write down {count} {plural}{form}.",
    "Please list {count} {plural}{form}.", "Could you give me {count} {plural}{form}?", "Write {count} {plural}{form}.",
    "What are {count} {plural}? Write them{form}.", "Show me {count} {plural}{form}.", "name {count} {plural}{form}",
)


def _count(number: int, rng: random.Random) -> str:
    return rng.choice((NUMBERS[number], NUMBERS[number], str(number)))


def _listed(rng: random.Random, items: Sequence[str], plural: str, number: int) -> Exchange:
    """So many of the items, in one of the forms."""
    shape, forms = rng.choice(FORMS)
    form, frame = rng.choice(forms), rng.choice(LIST_FRAMES)
    if not form:
        frame = frame.replace("? Write them{form}.", "?")
    asked = frame.format(count=_count(number, rng), plural=plural, form=form)
    if shape is _sentence and rng.random() < 0.3:
        return asked, f"{capitalised(NUMBERS[number])} {plural} are {joined(items)}."
    return asked, shape(items)


def plain_list(rng: random.Random) -> Conversation:
    """Some members of a category; sometimes more of them afterwards."""
    plural, _, members = rng.choice(CATEGORIES)
    number = rng.randint(2, min(6, len(members) - 2))
    items = rng.sample(members, number)
    asked, answer = _listed(rng, items, plural, number)
    if rng.random() > 0.25:
        return turns(asked, answer)
    left = [member for member in members if member not in items]
    more = rng.randint(1, min(3, len(left)))
    again = rng.choice((
        "{} more, please.", "Give me {} more.", "Now name {} more.", "And {} more?",
    )).format(NUMBERS[more])
    return turns(asked, answer, capitalised(again), _sentence(rng.sample(left, more)))


def one_member(rng: random.Random) -> Conversation:
    """One member of a category, sometimes with its first letter given."""
    _, single, members = rng.choice(CATEGORIES)
    item = rng.choice(members)
    one, letter = with_article(single), item[0].upper()
    asked = rng.choice((
        f"Name {one}.", f"Give me {one}.", f"Tell me the name of {one}.", f"Name {one} that begins with {letter}.",
        f"Think of {one}.",
        f"I need {one} starting with the letter {letter}.", f"Can you name {one} that starts with {letter}?",
    ))
    return turns(asked, f"{capitalised(item)}.")


def steps(rng: random.Random) -> Conversation:
    """A procedure in numbered steps, sometimes with a question about one of them."""
    what, parts = rng.choice(PROCEDURES)
    start = rng.choice(("", "", "", f"Here is how to {what}:\n", "Follow these steps:\n", f"To {what}, do this:\n"))
    said = [rng.choice(STEP_FRAMES).format(what=what), start + _numbered(parts)]
    if rng.random() < 0.3:
        place = rng.randrange(len(parts))
        said += rng.choice((
            (f"What is the {ORDINALS[place]} step?", parts[place]), (f"What is step {place + 1}?", parts[place]),
            ("How many steps are there?", f"There are {NUMBERS[len(parts)]} steps."),
            ("What is the last step?", parts[-1]),
        ))
    return turns(*said)


def in_order(rng: random.Random) -> Exchange:
    """Words sorted."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    text = _commas(items)
    if rng.random() < 0.75:
        asked = rng.choice((
            f"Sort these words: {text}", f"Put these words in alphabetical order: {text}",
            f"Sort alphabetically: {text}",
            f"Sort these words from A to Z: {text}", f"Please order these words by the alphabet: {text}.",
        ))
        return asked, _commas(sorted(items))
    asked = rng.choice((f"Sort these words from Z to A: {text}", f"Sort in reverse alphabetical order: {text}"))
    return asked, _commas(sorted(items, reverse=True))


def reverse(rng: random.Random) -> Exchange:
    """A list turned around."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    text = _commas(items)
    asked = rng.choice((
        f"Reverse the order of this list: {text}", f"Write this list backwards: {text}",
        f"Turn this list around: {text}",
        f"Put these words in the opposite order: {text}", f"Reverse this list: {text}.",
    ))
    return asked, _commas(items[::-1])


def odd_one(rng: random.Random) -> Exchange:
    """Which of some words is of a category."""
    plural, single, members = rng.choice(CATEGORIES)
    others = [
        word for name, _, some in CATEGORIES if name != plural for word in some if _unrelated(
            plural, name, word, members,
        )
    ]
    right = rng.choice(members)
    items = [right, *rng.sample(sorted(set(others)), rng.choice((2, 3)))]
    rng.shuffle(items)
    text, one = joined(items, "or"), with_article(single)
    asked = rng.choice((
        f"Which of these is {one}: {text}?", f"Which one is {one}: {text}?", f"Which word means {one}: {text}?",
        f"Find {one}: {_commas(items)}", f"Pick {one} from this list: {_commas(items)}",
    ))
    return asked, rng.choice((f"{capitalised(right)}.", f"{capitalised(right)} is {one}.", f"It is {right}."))


# categories between which a word could pass for a member of both
NEAR = (
    ("fruits", "vegetables", "sweet things", "breakfast foods", "colours", "drinks", "trees"),
    ("animals", "animal", "pets", "birds", "insects", "things that fly", "wild", "farm"),
    ("countries", "capital", "languages"), ("boy", "girl", "months", "flowers", "days", "planets", "family", "jobs"),
    ("kitchen", "classroom", "furniture", "tools", "trip", "rooms", "clothes", "vehicles", "buildings"),
    ("flowers", "trees", "colours", "materials"), ("metals", "materials", "colours", "things that are cold", "planets"),
    ("sports", "games", "school", "musical"), ("weather", "things that are cold"), ("school", "languages"),
    ("breakfast foods", "sweet things", "drinks", "things that are cold", "trip"),
    ("shapes", "planets", "weather", "sweet"), ("body", "musical"), ("games", "buildings"),
    ("shapes", "materials", "metals"),
    ("trip", "classroom", "clothes", "drinks", "things that fly", "vehicles"),
    ("trip", "kitchen", "materials", "metals"),
)


def _unrelated(plural: str, other: str, word: str, members: Sequence[str]) -> bool:
    """Whether a word of another category is surely none of this one."""
    close = any(any(key in plural for key in group) and any(key in other for key in group) for group in NEAR)
    return not close and word not in members


def counted(rng: random.Random) -> Exchange:
    """The words of a sentence or of a list counted."""
    if rng.random() < 0.5:
        text = rng.choice(SENTENCES)
        number = len(text.split())
        asked = rng.choice((
            f"Count the words in: {text}.", f"How many words are in this sentence: {text}.",
            f'How many words has "{text}"?',
        ))
    else:
        items = rng.sample(WORDS, rng.randint(2, 8))
        number = len(items)
        asked = rng.choice((
            f"Count the words in: {' '.join(items)}", f"How many words are here: {_commas(items)}",
            f"How many things are in this list: {_commas(items)}?",
        ))
    return asked, rng.choice((f"{capitalised(NUMBERS[number])}.", f"There are {NUMBERS[number]}.", str(number)))


def picked(rng: random.Random) -> Exchange:
    """The first, last, longest or some other one of given words."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    text = _commas(items)
    place = rng.randrange(len(items))
    longest = [item for item in items if len(item) == max(map(len, items))]
    choices = [
        (f"What is the {ORDINALS[place]} word of this list: {text}?", items[place]),
        (f"Which word comes last: {text}?", items[-1]),
        (f"Give me the {ORDINALS[place]} item: {text}", items[place]),
        (f"What is the last word here: {text}?", items[-1]),
        (f"Remove the first word from this list: {text}", _commas(items[1:])),
        (f"Leave out {items[place]} from this list: {text}", _commas([item for item in items if item != items[place]])),
        (f"Write this list in capital letters: {text}", text.upper()),
        (f"Put {items[0]} at the end: {text}", _commas([*items[1:], items[0]])),
    ]
    if len(longest) == 1:
        choices.append((f"Which is the longest word: {text}?", longest[0]))
    return rng.choice(choices)


def reshaped(rng: random.Random) -> Exchange:
    """A given list in another form."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    shape, forms = rng.choice([form for form in FORMS if form[0] is not _sentence])
    form = rng.choice(forms)
    asked = rng.choice((f"Write this list{form}: {_commas(items)}", f"Rewrite these words{form}: {' '.join(items)}"))
    return asked, shape(items)


def added(rng: random.Random) -> Exchange:
    """A word put before or after those of a list."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    word, rest = items[0], items[1:]
    return rng.choice((
        (f"Add {word} to the end of this list: {_commas(rest)}", _commas([*rest, word])),
        (f"Put {word} at the start of this list: {_commas(rest)}", _commas(items)),
        (f"Add {word} to this list: {_commas(rest)}", _commas([*rest, word])),
    ))


TASKS: tuple[Callable[[random.Random], Exchange], ...] = (
    in_order, reverse, odd_one, odd_one, counted, picked, reshaped, added,
)


def task(rng: random.Random) -> Conversation:
    """A task on words that the user gives, sometimes followed by a second one."""
    first = rng.choice(TASKS)(rng)
    return turns(*first, *rng.choice(TASKS)(rng)) if rng.random() < 0.15 else turns(*first)


def sample(rng: random.Random) -> Conversation:
    """A list, some steps, or a task on given words."""
    return rng.choices((plain_list, one_member, steps, task), weights=(40, 8, 17, 35))[0](rng)
