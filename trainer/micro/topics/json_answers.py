"""Conversations in which the answer is one valid JSON value built from facts in the request."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from trainer.micro.conversation import Conversation, turns

Ask = tuple[str, Any]

NAMES = ("Anna", "Peter", "Maria", "Omar", "Lucy", "Ben", "Nina", "Karim", "Elena", "Jonas", "Sofia", "Ivan", "Ruth",
         "David", "Mei", "Carlos", "Fatima", "Oscar", "Priya", "Hugo", "Clara", "Tariq", "Emma", "Noah", "Leila")
CITIES = ("Oslo", "Paris", "Berlin", "Madrid", "Rome", "Lisbon", "Vienna", "Cairo", "Tokyo", "London", "Dublin", "Lima",
          "Toronto", "Boston", "Prague", "Athens", "Nairobi", "Delhi", "Warsaw", "Geneva")
JOBS = ("teacher", "doctor", "baker", "driver", "farmer", "nurse", "painter", "cook", "pilot", "lawyer", "gardener",
        "singer", "writer", "plumber", "dentist")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "grey", "pink")
ANIMALS = ("cat", "dog", "horse", "rabbit", "parrot", "cow", "sheep", "goat", "duck", "hamster")
FRUITS = ("apple", "banana", "pear", "plum", "cherry", "grape", "lemon", "mango", "peach", "melon")
PRODUCTS = ("lamp", "chair", "table", "phone", "bag", "book", "jacket", "watch", "kettle", "mirror", "pillow", "radio",
            "camera", "desk", "bottle", "scarf")
TITLES = ("The Silent River", "Blue Morning", "A Long Way Home", "The Last Garden", "Winter Birds", "Red Lanterns",
          "The Clockmaker", "Salt and Stone", "Paper Boats", "The Quiet Street")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EVENTS = ("meeting", "party", "concert", "lesson", "dinner", "workshop", "match", "visit")
SPORTS = ("football", "tennis", "chess", "swimming", "hockey", "cycling", "rowing", "boxing")
GROUPS = {"colours": COLOURS, "animals": ANIMALS, "fruits": FRUITS, "days of the week": DAYS, "sports": SPORTS,
          "jobs": JOBS, "cities": CITIES, "names": NAMES}
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
SYSTEMS = ("Answer only with JSON.", "You are a JSON API. Reply with valid JSON and nothing else.",
           "Always answer with a single JSON object.", "You extract data. Output JSON only.",
           "Reply in JSON. Do not add any other text.")
OBJECT_ASKS = ("Give me a JSON object with {p}.", "Write a JSON object with {p}.", "Make a JSON object with {p}.",
               "Return a JSON object with {p}.", "Create JSON with {p}.", "I need a JSON object with {p}.",
               "Answer only with a JSON object with {p}.", "Please write {p} as a JSON object.",
               "Turn this into JSON: {p}.", "JSON object with {p}, please.")
EXTRACT_ASKS = ("Extract the {k} as JSON: {t}", "Extract {k} from this text as JSON. {t}",
                "{t}\nExtract the {k} as JSON.",
                "{t} Give me the {k} as a JSON object.", "Read the text and return JSON with the keys {k}.\nText: {t}",
                "Answer only with JSON with the keys {k}: {t}", "Return JSON with the keys {k}.\n\n{t}")
EMAILS = ("mail.com", "example.com", "post.org", "home.net")


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}"


def _field(rng: random.Random, key: str) -> Any:
    """A made-up value for one key."""
    pools: dict[str, tuple[str, ...]] = {
        "name": NAMES, "city": CITIES, "job": JOBS, "colour": COLOURS, "pet": ANIMALS, "title": TITLES, "day": DAYS,
        "product": PRODUCTS, "fruit": FRUITS, "sport": SPORTS, "event": EVENTS, "status": ("open", "closed", "pending"),
        "size": ("small", "medium", "large"), "author": NAMES, "email": EMAILS,
    }
    if key == "email":
        return f"{rng.choice(NAMES).lower()}@{rng.choice(EMAILS)}"
    if key in pools:
        return rng.choice(pools[key])
    if key in ("active", "done", "in_stock"):
        return rng.random() < 0.5
    limits = {"age": (5, 90), "price": (1, 200), "id": (1, 9999), "count": (0, 50), "year": (1950, 2025),
              "pages": (40, 600), "score": (0, 100), "quantity": (2, 20), "x": (0, 99), "y": (0, 99)}
    return rng.randint(*limits[key])


KEY_SETS = (
    ("name", "age"), ("name", "city"), ("name", "age", "city"), ("name", "job"), ("name", "job", "city"),
    ("product", "price"), ("product", "price", "in_stock"), ("product", "quantity", "price"),
    ("title", "author", "year"),
    ("title", "pages"), ("id", "name"), ("id", "status"), ("event", "day"), ("event", "day", "city"), ("x", "y"),
    ("name", "email"), ("name", "score"), ("id", "name", "active"), ("name", "pet"), ("product", "colour", "size"),
    ("name", "sport"), ("fruit", "count"), ("title", "done"), ("id", "title", "done"), ("name", "age", "pet", "city"),
)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _facts(rng: random.Random, data: dict[str, Any]) -> str:
    form = rng.choice(("{k} {v}", "{k} {v}", "{k} = {v}", "{k}: {v}", "the {k} {v}"))
    parts = [form.format(k=key, v=_shown(value)) for key, value in data.items()]
    return ", ".join(parts) if "=" in form or ":" in form else _joined(parts)


def _object(rng: random.Random) -> Ask:
    data = {key: _field(rng, key) for key in rng.choice(KEY_SETS)}
    return rng.choice(OBJECT_ASKS).format(p=_facts(rng, data)), data


def _template(rng: random.Random) -> Ask:
    data = {key: _field(rng, key) for key in rng.choice(KEY_SETS)}
    form = "{" + ", ".join(f'"{key}": ...' for key in data) + "}"
    lead = rng.choice(("Answer only with JSON: ", "Fill in this JSON: ", "Reply with JSON in this form: ",
                       "Use this form: "))
    return f"{lead}{form}\n{_facts(rng, data)}", data


def _person(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, city, job, age = (_field(rng, key) for key in ("name", "city", "job", "age"))
    pet, sport = _field(rng, "pet"), _field(rng, "sport")
    return rng.choice((
        (f"{name} lives in {city}.", {"name": name, "city": city}),
        (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
        (f"{name} is {age} years old.", {"name": name, "age": age}),
        (f"{name} works as {_article(job)} in {city}.", {"name": name, "job": job, "city": city}),
        (f"My name is {name} and I am {_article(job)}.", {"name": name, "job": job}),
        (f"Hello, I am {name}, {age}, from {city}.", {"name": name, "age": age, "city": city}),
        (f"{name} has {_article(pet)} at home in {city}.", {"name": name, "pet": pet, "city": city}),
        (f"{name} from {city} likes {sport}.", {"name": name, "city": city, "sport": sport}),
    ))


def _thing(rng: random.Random) -> tuple[str, dict[str, Any]]:
    product, price, colour, count = (_field(rng, key) for key in ("product", "price", "colour", "quantity"))
    event, day, city, title = (_field(rng, key) for key in ("event", "day", "city", "title"))
    author, year, number, name = (_field(rng, key) for key in ("author", "year", "id", "name"))
    return rng.choice((
        (f"The {product} costs {price} euros.", {"product": product, "price": price}),
        (f"I would like to buy {_article(colour)} {product} for {price} dollars.",
         {"product": product, "colour": colour, "price": price}),
        (f"The {event} is on {day} in {city}.", {"event": event, "day": day, "city": city}),
        (f"{author} wrote {title} in {year}.", {"author": author, "title": title, "year": year}),
        (f"Order {number} was placed by {name} on {day}.", {"order": number, "name": name, "day": day}),
        (f"Please send {count} pieces of the {colour} {product} to {name} in {city}.",
         {"quantity": count, "product": product, "colour": colour, "name": name, "city": city}),
        (f"Invoice {number} is for {price} euros.", {"invoice": number, "amount": price}),
        (f"Our {event} with {name} moved to {day}.", {"event": event, "name": name, "day": day}),
    ))


def _extract(rng: random.Random) -> Ask:
    text, data = (_person if rng.random() < 0.5 else _thing)(rng)
    keys = list(data)
    if len(keys) > 2 and rng.random() < 0.35:
        kept = sorted(rng.sample(keys, 2), key=keys.index)
        data, keys = {key: data[key] for key in kept}, kept
    ask = rng.choice(EXTRACT_ASKS)
    listed = _joined(keys if "keys" in ask else [keys[0], *(f"the {key}" for key in keys[1:])])
    if ask.startswith("Extract {k}"):
        listed = _joined([f"the {key}" for key in keys])
    return ask.format(k=listed, t=text), data


def _array(rng: random.Random) -> Ask:
    group = rng.choice(list(GROUPS))
    items = rng.sample(GROUPS[group], rng.randint(2, 5))
    count = COUNTS[len(items)]
    if rng.random() < 0.3:
        ask = rng.choice(("List {n} {g} as a JSON array.", "Give me {n} {g} as a JSON array.",
                          "JSON array of {n} {g}, please.",
                          "Write a JSON array with {n} {g}."))
        return ask.format(n=count, g=group), items
    ask = rng.choice(("Write these {g} as a JSON array: {i}.", "Turn this list into a JSON array: {i}.",
                      "Make a JSON array of {i}.", "Put {i} in a JSON array.", "Return {i} as a JSON array."))
    return ask.format(g=group, i=_joined(items)), items


def _numbers(rng: random.Random) -> Ask:
    if rng.random() < 0.3:
        start = rng.randint(1, 30)
        stop = start + rng.randint(2, 6)
        return f"Give me the numbers from {start} to {stop} as a JSON array.", list(range(start, stop + 1))
    numbers = rng.choices(range(100), k=rng.randint(2, 6))
    ask = rng.choice(("Write these numbers as a JSON array: {n}.", "Make a JSON array with {n}.",
                      "Find all numbers and return them as a JSON array: {n}."))
    return ask.format(n=_joined([str(number) for number in numbers])), numbers


def _nested(rng: random.Random) -> Ask:
    name, city, product = _field(rng, "name"), _field(rng, "city"), _field(rng, "product")
    count, price, pet = rng.randint(1, 9), _field(rng, "price"), _field(rng, "pet")
    pets = rng.sample(ANIMALS, 2)
    street = f"{rng.choice(('Oak', 'Mill', 'Park', 'River', 'Church', 'Hill'))} Street {rng.randint(1, 99)}"
    return rng.choice((
        (f"Write JSON for a person named {name} with an address that has the street {street} and the city {city}.",
         {"name": name, "address": {"street": street, "city": city}}),
        (f"Make a JSON object with name {name} and pets {pets[0]} and {pets[1]}.", {"name": name, "pets": pets}),
        (f"Write JSON for an order by {name}: item {product}, quantity {count}, price {price}.",
         {"name": name, "item": {"name": product, "quantity": count, "price": price}}),
        (f"Give me a JSON object with the key user. The user has the name {name} and the city {city}.",
         {"user": {"name": name, "city": city}}),
        (f"Make JSON with owner {name} and a pet object with the kind {pet} and the age {count}.",
         {"owner": name, "pet": {"kind": pet, "age": count}}),
    ))


def _records(rng: random.Random) -> Ask:
    keys = rng.choice((("name", "age"), ("name", "city"), ("product", "price"), ("name", "score"), ("fruit", "count")))
    rows = [{key: _field(rng, key) for key in keys} for _ in range(rng.randint(2, 3))]
    text = "; ".join(", ".join(str(value) for value in row.values()) for row in rows)
    return f"Make a JSON array of objects with the keys {keys[0]} and {keys[1]}: {text}.", rows


def _label(rng: random.Random) -> Ask:
    """A yes-or-no fact about a sentence, as a small object."""
    text, _ = (_person if rng.random() < 0.5 else _thing)(rng)
    if rng.random() < 0.5:
        words = len(text.split())
        return f'Count the words and answer with JSON like {{"words": 0}}: {text}', {"words": words}
    found = bool(re.search(r"\d", text))
    return f'Does this text have a number in it? Answer with JSON like {{"has_number": true}}. Text: {text}', {
        "has_number": found}


def _dump(rng: random.Random, value: Any) -> str:
    indent = 2 if rng.random() < 0.12 and isinstance(value, dict) else None
    return json.dumps(value, indent=indent)


KINDS: tuple[tuple[Callable[[random.Random], Ask], int], ...] = (
    (_object, 26), (_template, 10), (_extract, 30), (_array, 12), (_numbers, 6), (_nested, 10), (_records, 6),
    (_label, 4),
)


def sample(rng: random.Random) -> Conversation:
    """One or two requests for JSON, each answered by one JSON value alone."""
    makers, weights = zip(*KINDS, strict=True)
    if rng.random() < 0.25:
        text, data = (_person if rng.random() < 0.5 else _thing)(rng)
        system = f"{rng.choice(SYSTEMS)} Use the keys {_joined(list(data))}."
        return turns(text, _dump(rng, data), system=system)
    parts: list[str] = []
    for maker in rng.choices(makers, weights, k=1 if rng.random() < 0.88 else 2):
        question, value = maker(rng)
        parts += [question, _dump(rng, value)]
    return turns(*parts, system=rng.choice(SYSTEMS) if rng.random() < 0.12 else None)
