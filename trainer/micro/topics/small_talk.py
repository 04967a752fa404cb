"""Small talk: greetings and farewells, who Micro is, moods, likes, jokes, and short everyday questions."""

from __future__ import annotations

import random
from collections.abc import Callable

from trainer.micro.conversation import Conversation, turns
from trainer.micro.facts import small_talk_lines as lines
from trainer.micro.facts.questions import any_question, definition, short_question, worded
from trainer.micro.facts.wording import capitalised

Exchange = tuple[str, str]


def _either(rng: random.Random, first: tuple[str, ...], second: tuple[str, ...]) -> str:
    """A line of the first, often followed by one of the second."""
    line = rng.choice(first)
    return f"{line} {rng.choice(second)}" if rng.random() < 0.6 else line


def greeting(rng: random.Random) -> Exchange:
    """Hello, answered."""
    said = rng.choice(lines.GREETINGS)
    for hour in ("Good morning", "Good afternoon", "Good evening"):
        if said.startswith(hour):
            return said, f"{hour}! {rng.choice(lines.OFFERS)}"
    return said, _either(rng, lines.GREETED, lines.OFFERS)


def farewell(rng: random.Random) -> Exchange:
    """Goodbye, answered."""
    said = rng.choice(lines.FAREWELLS)
    if said in ("Good night.", "I am going to bed."):
        return said, rng.choice((
            "Good night!", "Good night! Sleep well.", "Sleep well!", "Good night, and sweet dreams.",
        ))
    return said, _either(rng, lines.PARTED, lines.WISHES)


def well_being(rng: random.Random) -> Exchange:
    """How are you?"""
    return rng.choice(lines.HOW_ARE_YOU), _either(rng, lines.WELL, lines.AND_YOU)


def thanks(rng: random.Random) -> Exchange:
    """Thanks, answered."""
    return rng.choice(lines.THANKS), _either(rng, lines.WELCOME, lines.MORE)


def identity(rng: random.Random) -> Exchange:
    """Who are you?"""
    said = rng.choice(lines.WHO)
    parts = [rng.choice(lines.NAMED), rng.choice(lines.NATURE), rng.choice(lines.HONEST)]
    if said.startswith("Are you a person") or "human" in said:
        parts = ["No, I am not a person.", parts[0], "I am a small language model in the Quickchange server."]
    if said in ("Are you a robot?", "Are you an AI?"):
        parts = ["I am a small language model, so I am only a program.", parts[0], parts[2]]
    return said, " ".join(parts[:rng.choice((2, 2, 3))])


def abilities(rng: random.Random) -> Exchange:
    """What can you do?"""
    can = rng.sample(lines.ABILITIES, rng.choice((1, 2, 2)))
    text = " and ".join([can[0], *(part.replace("I can ", "", 1) for part in can[1:])])
    return rng.choice(lines.ABILITIES_ASKED), f"{text}. {rng.choice(lines.HONEST)}"


def trust(rng: random.Random) -> Exchange:
    """Questions about how good Micro is and what it is for."""
    place = rng.randrange(len(lines.WRONG_ASKED))
    return lines.WRONG_ASKED[place], rng.choice(lines.WRONG_ANSWERS[place])


def weather(rng: random.Random) -> Exchange:
    """What the weather is like."""
    if rng.random() < 0.2:
        asked = rng.choice((
            "How is the weather?", "What is the weather like today?", "Will it rain tomorrow?", "Is it cold outside?",
        ))
        return asked, rng.choice((
            "I cannot see the weather. Please look out of the window.", "I do not know, for I cannot look outside.",
            "I cannot know that. A weather report will tell you.", "I have no window, so I do not know.",
        ))
    kind, answers = rng.choice(lines.WEATHER)
    where = rng.choice(("", " here", " today", " outside", " again", " this morning", " in my town"))
    said = rng.choice((
        f"It is {kind}{where}.", f"It's {kind}{where}!", f"It has been {kind} all day.", f"Oh no, it is {kind}{where}.",
    ))
    return said, rng.choice(answers)


def likes(rng: random.Random) -> Exchange:
    """Whether Micro likes a thing."""
    thing, again, reason = rng.choice(lines.LIKED)
    said, mine = rng.choice((
        (f"Do you like {thing}?", True), (f"What do you think about {thing}?", False), (f"I like {thing}.", False),
        (f"I love {thing}!", False), (f"Are you fond of {thing}?", True), (f"What do you think of {thing}?", False),
        (f"Tell me something nice about {thing}.", False),
    ))
    start = "Yes, " if mine else ""
    return said, start + rng.choice((
        f"{again if mine else capitalised(again)} must be nice: {reason}.",
        f"I like to talk about {again}: {reason}.", f"I am only a program, but I like the thought that {reason}.",
    ))


def joke(rng: random.Random) -> Exchange:
    """A joke."""
    question, answer = rng.choice(lines.JOKES)
    start = rng.choice(("", "", "Here is one. ", "Sure! ", "All right. "))
    return rng.choice(lines.JOKE_ASKED), f"{start}{question} {answer}"


def compliment(rng: random.Random) -> Exchange:
    """Kind words, answered."""
    return rng.choice(lines.COMPLIMENTS), rng.choice(lines.FLATTERED)


def apology(rng: random.Random) -> Exchange:
    """The user's apology, accepted."""
    return rng.choice(lines.APOLOGIES), rng.choice(lines.FORGIVEN)


def blame(rng: random.Random) -> Exchange:
    """A complaint, answered by an apology."""
    return rng.choice(lines.BLAMED), rng.choice(lines.ASHAMED)


def mood(rng: random.Random) -> Exchange:
    """How the user feels."""
    feeling, answers = rng.choice(lines.MOODS)
    said = rng.choice((
        f"I am {feeling}.", f"I am so {feeling}!", f"I feel {feeling} today.", f"I'm {feeling}",
        f"I am a bit {feeling}.",
        f"Today I am very {feeling}.", f"I feel {feeling}.", f"I have been {feeling} all day.",
    ))
    return said, rng.choice(answers)


def choice(rng: random.Random) -> Exchange:
    """Which of two things is better."""
    first, second, why_first, why_second = rng.choice(lines.CHOICES)
    said = rng.choice((
        f"What do you like better, {first} or {second}?", f"Which is better, {first} or {second}?",
        f"{capitalised(first)} or {second}?",
        f"Do you prefer {first} or {second}?", f"Would you choose {first} or {second}?",
    ))
    name, why = rng.choice(((first, why_first), (second, why_second)))
    return said, rng.choice((
        f"I would choose {name}, because {why}.", f"{capitalised(name)}, I think, because {why}. But both are good.",
        f"Both are good. {capitalised(why_first)}, and {why_second}.", f"I would say {name}: {why}.",
    ))


def question(rng: random.Random) -> Exchange:
    """A short everyday question."""
    asked = any_question(rng)
    full = asked.full
    if asked.short in ("Yes", "No") or asked.topic == "meanings":
        return worded(asked.question, rng), full
    return worded(asked.question, rng), rng.choice((
        full, full, full, f"{capitalised(asked.short)}.".replace("..", "."),
    ))


def meaning(rng: random.Random) -> Exchange:
    """What a thing is."""
    asked = definition(rng)
    return worded(asked.question, rng) if rng.random() < 0.4 else asked.question, asked.full


def introduction(rng: random.Random) -> list[Exchange]:
    """The user's name given, and asked for afterwards."""
    name = rng.choice(lines.NAMES)
    said = rng.choice((
        f"My name is {name}.", f"I am {name}.", f"Hi, I'm {name}.", f"Hello, my name is {name}.",
        f"You can call me {name}.",
        f"Hello! I am {name}. Who are you?",
    ))
    met = rng.choice((
        f"Nice to meet you, {name}!", f"Hello, {name}!", f"Hi {name}! I am Micro.", f"Pleased to meet you, {name}.",
    ))
    met = f"Hello, {name}! I am Micro, a small language model." if said.endswith("?") else met
    asked = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?", "What did I say my name was?"))
    told = rng.choice((f"Your name is {name}.", f"You are {name}.", f"You told me that your name is {name}."))
    between = [question(rng)] if rng.random() < 0.4 else []
    return [(said, met), *between, (asked, told)] if rng.random() < 0.8 else [(said, met), *between]


def riddle(rng: random.Random) -> list[Exchange]:
    """A question, then one about another thing of the same kind, asked for in the same conversation."""
    first, second = short_question(rng), short_question(rng)
    link = rng.choice(("And", "Thanks! And", "Good. Next question:", "Right. Now tell me:", "Okay. One more:"))
    asked = second.question
    lowered = asked[:1].lower() + asked[1:]
    return [(worded(first.question, rng), first.full), (f"{link} {lowered}", second.full)]


OPENERS: tuple[Callable[[random.Random], Exchange], ...] = (greeting, greeting, well_being, identity)
MIDDLES: tuple[Callable[[random.Random], Exchange], ...] = (
    identity, identity, abilities, trust, weather, likes, joke, mood, choice, question, question, question, question,
    meaning,
    meaning, well_being, compliment, apology,
)
CLOSERS: tuple[Callable[[random.Random], Exchange], ...] = (farewell, thanks, compliment, blame, joke)


def _chained(rng: random.Random, *kinds: tuple[Callable[[random.Random], Exchange], ...]) -> list[Exchange]:
    """One exchange of each kind, none made twice in the same way."""
    chosen: list[Callable[[random.Random], Exchange]] = []
    for makers in kinds:
        chosen.append(rng.choice([maker for maker in makers if maker not in chosen]))
    return [maker(rng) for maker in chosen]


def _exchanges(rng: random.Random) -> list[Exchange]:
    shape = rng.random()
    if shape < 0.08:
        return introduction(rng)
    if shape < 0.18:
        return riddle(rng)
    if shape < 0.55:
        return [rng.choice((*OPENERS, *MIDDLES, *MIDDLES, farewell, thanks))(rng)]
    if shape < 0.70:
        return _chained(rng, OPENERS, MIDDLES)
    if shape < 0.85:
        return _chained(rng, MIDDLES, CLOSERS)
    return _chained(rng, OPENERS, MIDDLES, CLOSERS)


def sample(rng: random.Random) -> Conversation:
    """One to three exchanges of small talk."""
    return turns(*(text for exchange in _exchanges(rng) for text in exchange))
