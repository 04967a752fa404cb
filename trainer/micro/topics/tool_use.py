"""Conversations with function tools: some in which one is called and its result told, some that need none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from trainer.micro.conversation import Conversation, Message

# What one tool conversation is made of: the user's words, the arguments, the tool's result, the final answer.
Use = tuple[str, dict[str, Any], str, str]

CITIES = ("Oslo", "Paris", "Berlin", "Madrid", "Rome", "Lisbon", "Vienna", "Cairo", "Tokyo", "London", "Dublin", "Lima",
          "Toronto", "Boston", "Prague", "Athens", "Nairobi", "Delhi", "Warsaw", "Geneva", "Sydney", "Chicago")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear")
NAMES = ("Anna", "Peter", "Maria", "Omar", "Lucy", "Ben", "Nina", "Jonas", "Elena", "Sam", "Ruth", "Hugo")
FACTS: tuple[tuple[str, str, str], ...] = (
    ("Who painted the Mona Lisa?", "painter of the Mona Lisa", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("How tall is Mount Everest?", "height of Mount Everest", "Mount Everest is 8849 metres tall."),
    ("Who wrote Hamlet?", "author of Hamlet", "Hamlet was written by William Shakespeare."),
    ("How long is the Nile?", "length of the Nile", "The Nile is about 6650 kilometres long."),
    ("Who invented the telephone?", "inventor of the telephone",
     "The telephone was invented by Alexander Graham Bell."),
    ("When was the Eiffel Tower built?", "Eiffel Tower built", "The Eiffel Tower was finished in 1889."),
    ("What is the largest ocean?", "largest ocean", "The largest ocean is the Pacific Ocean."),
    ("Who discovered penicillin?", "discovery of penicillin",
     "Penicillin was discovered by Alexander Fleming in 1928."),
    ("How many moons does Mars have?", "moons of Mars", "Mars has two moons, Phobos and Deimos."),
    ("When did people first walk on the Moon?", "first Moon landing", "People first walked on the Moon in 1969."),
    ("What is the longest river in Europe?", "longest river in Europe", "The longest river in Europe is the Volga."),
    ("Who made the Python language?", "creator of Python", "Python was created by Guido van Rossum."),
    ("What is the deepest lake?", "deepest lake in the world", "The deepest lake in the world is Lake Baikal."),
    ("How fast is a cheetah?", "speed of a cheetah", "A cheetah can run about 100 kilometres per hour."),
    ("When did the Titanic sink?", "Titanic sinking date", "The Titanic sank in April 1912."),
)
UNITS = (("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000),
         ("hours", "minutes", 60), ("minutes", "seconds", 60), ("litres", "millilitres", 1000), ("days", "hours", 24),
         ("feet", "inches", 12), ("weeks", "days", 7))
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! How can I help you?"), ("Hi, {n} here.", "Hi {n}, nice to meet you. How can I help?"),
    ("Thank you for your help.", "You are welcome."), ("Good morning!", "Good morning! What can I do for you?"),
    ("My name is {n}. What is my name?", "Your name is {n}."), ("Good night!", "Good night! Sleep well."),
    ("What is the opposite of hot?", "The opposite of hot is cold."), ("Say the word {w}.", "{w}"),
    ("How many days are in a week?", "There are 7 days in a week."), ("Repeat this: {n} {w}", "{n} {w}"),
    ("Is a cat an animal?", "Yes, a cat is an animal."), ("Write {w} in capital letters.", "{W}"),
    ("What colour is grass?", "Grass is green."), ("I am {n} and I am happy today.", "That is good to hear, {n}!"),
    ("Who are you?", "I am an AI assistant."), ("Bye, {n} has to go now.", "Goodbye, {n}!"),
    ("How do you spell {w}?", "{s}"), ("Greet my friend {n}.", "Hello {n}, it is nice to meet you!"),
    ("What is the first letter of {w}?", "The first letter of {w} is {f}."), ("Are you there?", "Yes, I am here."),
)
ABILITIES = {"get_weather": "look up the weather", "calculate": "do calculations",
             "get_time": "tell the time in a city",
             "search": "search for information", "convert_units": "convert units"}
WORDS = ("bread", "window", "garden", "music", "paper", "river", "candle", "ladder", "pocket", "silver", "button",
         "travel", "winter", "bridge", "cheese", "planet")
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant. Use the tools when you need them.",
           "You can call tools. Call one only when it helps.")


def _schema(name: str, description: str, **params: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in params.items()}
    parameters = {"type": "object", "properties": properties, "required": list(params)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": _schema("get_weather", "Get the current weather in a city.", city="string"),
    "calculate": _schema("calculate", "Work out an arithmetic expression.", expression="string"),
    "get_time": _schema("get_time", "Get the current time in a city.", city="string"),
    "search": _schema("search", "Search for information.", query="string"),
    "convert_units": _schema("convert_units", "Convert a value from one unit to another.", value="number",
                             unit_from="string", unit_to="string"),
}


def _weather(rng: random.Random) -> Use:
    city, sky, degrees = rng.choice(CITIES), rng.choice(SKIES), rng.randint(2, 35)
    if sky == "snowy":
        degrees = rng.choice((-8, -6, -5, -4, -3, -2, 0))
    ask = rng.choice(("What is the weather in {c}?", "How is the weather in {c} today?", "weather in {c}",
                      "Is it warm in {c}?",
                      "Tell me the weather in {c}.", "What is it like outside in {c}?",
                      "I am going to {c}. How is the weather?"))
    result = rng.choice((json.dumps({"city": city, "temperature": degrees, "condition": sky}), f"{sky}, {degrees} C"))
    answer = rng.choice(("It is {s} in {c}, with {d} degrees.", "The weather in {c} is {s} and it is {d} degrees.",
                         "In {c} it is {s}, {d} degrees Celsius."))
    return ask.format(c=city), {"city": city}, result, answer.format(c=city, s=sky, d=degrees)


def _calculate(rng: random.Random) -> Use:
    a, b, sign = rng.randint(11, 999), rng.randint(11, 999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    expression = f"{a} {sign} {b}"
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    ask = rng.choice((f"What is {expression}?", f"Calculate {expression}.", f"How much is {a} {word} {b}?",
                      f"Please work out {expression}.", expression))
    result = rng.choice((str(value), json.dumps({"result": value})))
    return ask, {"expression": expression}, result, rng.choice((f"{expression} = {value}.", f"The answer is {value}."))


def _time(rng: random.Random) -> Use:
    city, clock = rng.choice(CITIES), f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    ask = rng.choice(("What time is it in {c}?", "Tell me the time in {c}.", "time in {c}?",
                      "What is the time in {c} now?",
                      "Do you know what time it is in {c}?"))
    result = rng.choice((clock, json.dumps({"city": city, "time": clock})))
    answer = rng.choice((f"It is {clock} in {city}.", f"The time in {city} is {clock}."))
    return ask.format(c=city), {"city": city}, result, answer


def _search(rng: random.Random) -> Use:
    question, query, fact = rng.choice(FACTS)
    lead = rng.choice(("", "", "Please look this up: ", "Search for this: ", "Can you find out? ", "I want to know: "))
    result = rng.choice((fact, json.dumps({"result": fact}), json.dumps({"results": [fact]})))
    return lead + question, {"query": query}, result, fact


def _convert(rng: random.Random) -> Use:
    big, small, size = rng.choice(UNITS)
    value = rng.randint(2, 99)
    ask = rng.choice(("Convert {v} {b} to {s}.", "How many {s} are {v} {b}?", "What is {v} {b} in {s}?",
                      "{v} {b} in {s}"))
    result = rng.choice((str(value * size), json.dumps({"value": value * size, "unit": small})))
    arguments = {"value": value, "unit_from": big, "unit_to": small}
    return ask.format(v=value, b=big, s=small), arguments, result, f"{value} {big} are {value * size} {small}."


MAKERS: dict[str, Callable[[random.Random], Use]] = {
    "get_weather": _weather, "calculate": _calculate, "get_time": _time, "search": _search, "convert_units": _convert,
}
FAILURES = ('{"error": "not found"}', "Error: the service is not available.", '{"error": "timeout"}')
APOLOGIES = ("I am sorry, the tool did not give a result. Please try again later.",
             "I could not find that out, because the tool failed.", "Sorry, the tool returned an error.")


def _called(rng: random.Random, name: str) -> list[Message]:
    ask, arguments, result, answer = MAKERS[name](rng)
    if rng.random() < 0.05:
        result, answer = rng.choice(FAILURES), rng.choice(APOLOGIES)
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": ask}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": result}, {"role": "assistant", "content": answer}]


def _uncalled(rng: random.Random, names: list[str]) -> list[Message]:
    word, person = rng.choice(WORDS), rng.choice(NAMES)
    if rng.random() < 0.2:
        abilities = [ABILITIES[name] for name in names]
        listed = abilities[0] if len(abilities) == 1 else ", ".join(abilities[:-1]) + f" and {abilities[-1]}"
        ask = rng.choice(("What can you do?", "What can you help me with?", "Which things can you do for me?"))
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": f"I can {listed}."}]
    ask, answer = rng.choice(SMALL_TALK)
    slots = {"n": person, "w": word, "W": word.upper(), "s": "-".join(word), "f": word[0]}
    return [{"role": "user", "content": ask.format(**slots)}, {"role": "assistant", "content": answer.format(**slots)}]


def sample(rng: random.Random) -> Conversation:
    """One or two exchanges beside one to five tools."""
    names = rng.sample(list(MAKERS), rng.randint(1, 5))
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(1 if rng.random() < 0.8 else 2):
        messages += _called(rng, rng.choice(names)) if rng.random() < 0.68 else _uncalled(rng, names)
    return {"messages": messages, "tools": [SCHEMAS[name] for name in names]}
