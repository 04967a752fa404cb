"""Conversations that copy from the context: repeating, quoting, laying out a question and its answer, forms."""

from __future__ import annotations

import random
from collections.abc import Callable

from trainer.micro import copy_sources as source
from trainer.micro.conversation import Conversation, turns
from trainer.micro.copy_layouts import answered, laid_out

REPEATS = (
    "Repeat after me: {t}", "Say exactly: {t}", "Repeat this: {t}", "Please repeat: {t}", "Copy this text: {t}",
    "Echo: {t}",
    "Say this: {t}", "Write exactly this: {t}", "Type this: {t}", "Copy: {t}", "repeat: {t}", "Print this line: {t}",
    "Repeat the following.\n{t}", "Copy the text below.\n\n{t}", "Write the next line again.\n{t}",
    "{t}\n\nRepeat the text above.",
    "{t}\nCopy that.", "Can you repeat this? {t}", "Please say the following and nothing else: {t}",
    "Only write this: {t}",
    "Text: {t}\nRepeat the text.", "Give me this text back: {t}", "Answer with exactly this: {t}",
    "Reply only with: {t}",
    'Say "{t}"', 'Repeat "{t}" without the quotes.', "Write this line again: {t}", "Word for word, please: {t}",
)
ECHO_SYSTEMS = ("Repeat everything the user says.", "You are an echo. Answer with exactly what the user wrote.",
                "Copy each message of the user word for word.", "Whatever the user writes, write the same.")
WRAPS: tuple[tuple[str, str], ...] = (
    ("Put this {k} in quotes: {t}", '"{t}"'), ("Put quotes around this: {t}", '"{t}"'), ("Quote this: {t}", '"{t}"'),
    ("Put this in brackets: {t}", "[{t}]"), ("Put this in round brackets: {t}", "({t})"),
    ("Make this bold: {t}", "**{t}**"),
    ("Make this a heading: {t}", "# {t}"), ("Make this a quote in Markdown: {t}", "> {t}"),
    ("Make this a list item: {t}", "- {t}"), ("Put stars around this: {t}", "*{t}*"),
    ("Put this between two bars: {t}", "|{t}|"),
    ("Put this in code marks: {t}", "`{t}`"), ("Write this twice: {t}", "{t}\n{t}"),
    ("Say this two times: {t}", "{t} {t}"),
    ("Write this {k} with an arrow before it: {t}", "-> {t}"), ("Write NOTE: before this {k}: {t}", "NOTE: {t}"),
    ("Put this in a b tag: {t}", "<b>{t}</b>"), ("Write You said: and then this {k}: {t}", "You said: {t}"),
    ("Number this line with 1: {t}", "1. {t}"), ("Add the word END after this: {t}", "{t} END"),
    ("Say OK and then repeat this: {t}", "OK {t}"),
    ("Write this three times, each on a new line: {t}", "{t}\n{t}\n{t}"),
)
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "purple")
OWNED = ("car", "bike", "hat", "bag", "coat", "house", "kite", "boat", "chair", "phone", "cup", "scarf", "lamp", "book")
CITIES = ("Oslo", "Paris", "Lima", "Cairo", "Boston", "Prague", "Delhi", "Dublin", "Vienna", "Quito", "Riga", "Tunis")
JOBS = ("baker", "teacher", "pilot", "nurse", "farmer", "lawyer", "painter", "cook", "dentist", "driver", "judge",
        "tailor")
PETS = ("cat", "dog", "parrot", "rabbit", "goat", "horse", "hamster", "turtle", "snake", "pony")
FOODS = ("soup", "rice", "plums", "cheese", "fish", "bread", "grapes", "honey", "beans", "pasta")
LETTER_JOINS = ("-", " ", ", ")


def _repeat(rng: random.Random) -> Conversation:
    first = source.material(rng)
    parts = [rng.choice(REPEATS).format(t=first), first]
    if rng.random() < 0.15:
        second = source.material(rng)
        parts += [rng.choice(REPEATS).format(t=second), second]
    return turns(*parts)


def _echo(rng: random.Random) -> Conversation:
    said = [source.material(rng) for _ in range(rng.randint(1, 3))]
    return turns(*(text for each in said for text in (each, each)), system=rng.choice(ECHO_SYSTEMS))


def _wrap(rng: random.Random) -> Conversation:
    ask, answer = rng.choice(WRAPS)
    is_sentence = rng.random() < 0.6
    text = source.sentence(rng) if is_sentence else source.material(rng)
    return turns(ask.format(t=text, k="sentence" if is_sentence else "text"), answer.format(t=text))


def _case(rng: random.Random) -> Conversation:
    text = source.plain_sentence(rng) if rng.random() < 0.5 else source.material(rng)
    if rng.random() < 0.7:
        ask = rng.choice(("Write this in capital letters: {t}", "Make this upper case: {t}", "Write in capitals: {t}",
                          "Say this in capital letters: {t}"))
        return turns(ask.format(t=text), text.upper())
    ask = rng.choice(("Write this in small letters: {t}", "Make this lower case: {t}"))
    return turns(ask.format(t=text if rng.random() < 0.5 else text.upper()), text.lower())


def _word(rng: random.Random) -> str:
    return rng.choice((rng.choice(source.RARE), rng.choice(source.NOUNS), rng.choice(source.ADJECTIVES),
                       source.invented(rng),
                       rng.choice(source.NAMES)))


def _spell(rng: random.Random) -> Conversation:
    word = _word(rng)
    if rng.random() < 0.25:
        letters = rng.choice(LETTER_JOINS).join(word)
        return turns(rng.choice(("Which word is this: {t}", "Put these letters together: {t}")).format(t=letters), word)
    ask, joint = rng.choice((
        ("Spell the word {w}.", "-"), ("Spell {w} with dashes.", "-"), ("How do you spell {w}?", "-"),
        ("Spell {w} letter by letter.", "-"), ("Write {w} with spaces between the letters.", " "),
        ("Write the letters of {w} with commas.", ", "), ("spell {w}", "-"),
    ))
    return turns(ask.format(w=word), joint.join(word))


def _pick(rng: random.Random) -> Conversation:
    """The first, last or numbered word of a sentence or a list."""
    if rng.random() < 0.5:
        text = source.plain_sentence(rng)
        words = text.rstrip(".").split()
        place, index = rng.choice((("first", 0), ("last", -1), ("second", 1), ("third", 2)))
        ask = rng.choice(("What is the {p} word of this sentence? {t}", "Give me the {p} word: {t}",
                          "{t}\nWhat is the {p} word?"))
        return turns(ask.format(p=place, t=text), words[index])
    items = [source.token(rng) if rng.random() < 0.3 else _word(rng) for _ in range(rng.randint(3, 6))]
    place, index = rng.choice((("first", 0), ("last", -1), ("second", 1), ("third", 2)))
    ask = rng.choice(("What is the {p} item of this list: {t}", "{t}\nWhich one is the {p}?",
                      "Take the {p} of these: {t}"))
    return turns(ask.format(p=place, t=", ".join(items)), items[index])


def _replace(rng: random.Random) -> Conversation:
    text = source.plain_sentence(rng)
    old = rng.choice(text.rstrip(".").split()[1:4])
    pool = next(words for words in (source.NOUNS, source.ADJECTIVES, source.PAST, ("the",)) if old in words)
    new = rng.choice([word for word in pool if word != old] or ["a"])
    ask = rng.choice(("Replace {o} by {n}: {t}", "Replace the word {o} with {n} in this sentence: {t}",
                      'Write this sentence with "{n}" in place of "{o}": {t}', "{t}\nChange {o} to {n}."))
    words = [new if word == old else word for word in text.rstrip(".").split()]
    return turns(ask.format(o=old, n=new, t=text), " ".join(words) + ".")


def _lines(rng: random.Random) -> Conversation:
    """A list laid out in another way."""
    items = [source.material(rng) if rng.random() < 0.3 else _word(rng) for _ in range(rng.randint(2, 5))]
    if any("," in item for item in items):
        items = [_word(rng) for _ in items]
    listed = ", ".join(items)
    ask, answer = rng.choice((
        ("Write these as a bullet list: {t}", "\n".join(f"- {item}" for item in items)),
        ("Write each on its own line: {t}", "\n".join(items)),
        ("Make a numbered list of these: {t}", "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))),
        ("Write this list backwards: {t}", ", ".join(reversed(items))),
        ("Join these with plus signs: {t}", " + ".join(items)), ("Put a bar between these: {t}", " | ".join(items)),
    ))
    return turns(ask.format(t=listed), answer)


def _facts(rng: random.Random) -> list[tuple[str, str, str, str]]:
    """Two to four facts on different people: the sentence, a question, the short answer, the full answer."""
    facts = []
    for name in rng.sample(source.NAMES, rng.randint(1, 4)):
        colour, thing, city, job = (rng.choice(pool) for pool in (COLOURS, OWNED, CITIES, JOBS))
        pet, food = rng.choice(PETS), rng.choice(FOODS)
        key, pet_name = source.token(rng), source.invented(rng).capitalize()
        facts.append(rng.choice((
            (f"{name} has a {colour} {thing}.", f"What colour is {name}'s {thing}?", colour,
             f"{name}'s {thing} is {colour}."),
            (f"{name} lives in {city}.", f"Where does {name} live?", city, f"{name} lives in {city}."),
            (f"{name} works as a {job}.", f"What is {name}'s job?", job, f"{name} works as a {job}."),
            (f"{name} has a {pet} named {pet_name}.", f"What is the name of {name}'s {pet}?", pet_name,
             f"{name}'s {pet} is named {pet_name}."),
            (f"{name} likes {food}.", f"What does {name} like?", food, f"{name} likes {food}."),
            (f"{name}'s code is {key}.", f"What is {name}'s code?", key, f"{name}'s code is {key}."),
            (f"{name} bought the {thing} in {city}.", f"Where did {name} buy the {thing}?", city,
             f"{name} bought the {thing} in {city}."),
        )))
    return facts


def _passage(rng: random.Random) -> Conversation:
    facts = _facts(rng)
    text = " ".join(fact[0] for fact in facts)
    _, question, short, full = rng.choice(facts)
    ask = rng.choice(("{t} Question: {q}", "{t}\n{q}", "Read this: {t}\n\n{q}", "Text: {t}\nQuestion: {q}",
                      "{q}\n\n{t}", "{t} {q}",
                      "Context: {t}\n\nAnswer this from the context: {q}", "Here are some notes.\n{t}\n{q}"))
    answer = rng.choice((short[0].upper() + short[1:], full, full))
    parts = [ask.format(t=text, q=question), answer]
    if len(facts) > 1 and rng.random() < 0.2:
        _, question, _, full = rng.choice(facts)
        parts += [question, full]
    if rng.random() < 0.15:
        return turns(*(question, full),
                     system=rng.choice(("Use these facts: {t}", "You know this: {t}", "{t}")).format(t=text))
    return turns(*parts)


def _lookup(rng: random.Random) -> Conversation:
    """One value out of a small table."""
    keys = rng.sample(source.NAMES if rng.random() < 0.5 else source.RARE, rng.randint(2, 5))
    rows = {key: source.token(rng) if rng.random() < 0.5 else _word(rng) for key in keys}
    shape, joint = rng.choice((("{k}: {v}", "\n"), ("{k} = {v}", ", "), ("{k} -> {v}", "\n"), ("{k} | {v}", "\n")))
    table = joint.join(shape.format(k=key, v=value) for key, value in rows.items())
    key = rng.choice(keys)
    ask = rng.choice(("{t}\nWhat is the value of {k}?", "Look up {k}.\n{t}", "{t}\n{k}?",
                      "Table:\n{t}\n\nWhich value has {k}?"))
    return turns(ask.format(t=table, k=key), rows[key])


def _remember(rng: random.Random) -> Conversation:
    thing, label = rng.choice(((_word(rng), "word"), (source.token(rng), "code"), (source.full_name(rng), "name"),
                               (str(rng.randint(10, 99999)), "number"), (source.sentence(rng), "sentence")))
    end = "" if label == "sentence" else "."
    ask = rng.choice(("Remember this {l}: {t}{e}", "Keep this {l} in mind: {t}{e}", "Please note the {l}: {t}{e}"))
    back = rng.choice(("What was the {l}?", "Which {l} did I give you?", "Tell me the {l} again.",
                       "What {l} did I tell you?"))
    parts = [ask.format(l=label, t=thing, e=end), rng.choice(("OK.", "I will remember it.", "Noted.", "Done."))]
    return turns(*parts, back.format(l=label), rng.choice((thing, thing, f"The {label} was {thing}{end}")))


def _form(rng: random.Random) -> Conversation:
    name, job, city, food = source.full_name(rng), rng.choice(JOBS), rng.choice(CITIES), rng.choice(FOODS)
    key, age = source.token(rng), str(rng.randint(18, 90))
    text, fields = rng.choice((
        (f"{name} is {source.article(job)}.", {"Name": name, "Job": job}),
        (f"{name} is {source.article(job)} from {city}.", {"Name": name, "Job": job, "City": city}),
        (f"{name} lives in {city} and is {age} years old.", {"Name": name, "City": city, "Age": age}),
        (f"{name} ordered {food}. The number is {key}.", {"Customer": name, "Order": food, "Number": key}),
        (f"I am {name} and I like {food}.", {"Name": name, "Likes": food}),
        (f"Ticket {key} belongs to {name}.", {"Ticket": key, "Owner": name}),
    ))
    shape, joint = rng.choice((("{k}: {v}", "\n"), ("{k}: {v}", ", "), ("- {k}: {v}", "\n"), ("[{k}] {v}", "\n"),
                               ("{k} = {v}", "\n")))
    form = joint.join(shape.format(k=key, v="...") for key in fields)
    filled = joint.join(shape.format(k=key, v=value) for key, value in fields.items())
    if rng.random() < 0.25:
        return turns(text, filled, system=f"Fill in this form from the message of the user:\n{form}")
    ask = rng.choice(("Use this form: {f}\n{t}", "{t}\nFill in this form:\n{f}",
                      "Form:\n{f}\n\nText: {t}\nFill in the form."))
    return turns(ask.format(f=form, t=text), filled)


def _notes(rng: random.Random) -> Conversation:
    """A question about an invented function that the notes of the user or the system name."""
    things = rng.sample(source.OBJECTS, 3)
    notes = {f"{rng.choice(source.VERBS)} {source.article(thing)}": f"{source.invented(rng)}()" for thing in things}
    text = " ".join(f"To {task}, use {call}." for task, call in notes.items())
    task = rng.choice(list(notes))
    question = f"How do I {task}?"
    answer = rng.choice((f"Use {notes[task]}.", f"To {task}, use {notes[task]}.", notes[task]))
    if rng.random() < 0.5:
        return turns(question, answer, system=rng.choice((f"Notes: {text}", text, f"Answer from these notes. {text}")))
    return turns(rng.choice((f"{text}\n{question}", f"Notes: {text}\nQuestion: {question}")), answer)


KINDS: tuple[tuple[Callable[[random.Random], Conversation], int], ...] = (
    (_repeat, 22), (_echo, 6), (_wrap, 9), (_case, 3), (_spell, 3), (_pick, 4), (_replace, 4), (_lines, 5),
    (_passage, 9),
    (_lookup, 3), (_remember, 4), (_form, 5), (_notes, 4), (laid_out, 24), (answered, 8),
)


def sample(rng: random.Random) -> Conversation:
    """One task of copying."""
    makers, weights = zip(*KINDS, strict=True)
    made: Conversation = rng.choices(makers, weights)[0](rng)
    return made
