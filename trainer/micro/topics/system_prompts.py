"""System prompts whose rule can be seen in every answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from trainer.micro.conversation import Conversation, turns
from trainer.micro.facts.everyday import CAPITALS
from trainer.micro.facts.questions import Asked, any_question, short_question, worded, yes_no_question
from trainer.micro.facts.small_talk_lines import NAMES
from trainer.micro.facts.wording import capitalised, uncapitalised

Answer = Callable[[Asked], str]
Draw = Callable[[random.Random], Asked]
Rule = tuple[str, Draw, Answer]

END_WORDS = (
    "over", "amen", "done", "friend", "banana", "meow", "sir", "okay", "thanks", "indeed", "stop", "cheers", "captain",
)
STARTS = (
    "Well,", "As far as I know,", "Good question!", "My answer is:", "Listen:", "Dear friend,", "Thank you for asking.",
    "Sure!",
    "Here is the answer:", "To be honest,", "Let me think.", "Ahem!", "Of course!", "In short:",
)
BOT_NAMES = (
    "Robin", "Nova", "Pixel", "Echo", "Luna", "Otto", "Max", "Iris", "Dot", "Bolt", "Sunny", "Ada", "Rex", "Pip",
    "Juno",
)
JOBS = (
    "a helpful assistant", "a librarian", "a cook", "a gardener", "a teacher", "a guide in a museum", "a robot",
    "a shop assistant",
    "a friendly helper", "a sailor",
)
WRAPS = (
    ("double quotes", '"', '"'), ("square brackets", "[", "]"), ("round brackets", "(", ")"), ("stars", "*", "*"),
    ("angle brackets", "<", ">"), ("single quotes", "'", "'"),
)
UNKNOWN = (
    "What did I eat yesterday?", "What is my neighbour's name?", "Who will win the next match?",
    "What am I thinking of?",
    "How many coins are in my pocket?", "What is my password?", "What will the weather be next week?",
    "Where did I put my keys?",
    "What time is it now?", "Who is at my door?", "What is my dog called?", "How old is my teacher?",
    "What is in my bag?",
    "What did my sister say to me?", "Which book is on my table?", "What will I dream of tonight?",
    "What is the name of my street?",
)
DONT_KNOW = (
    "I do not know.", "Sorry, I cannot say.", "Please ask a person.", "That is beyond me.", "No answer found.",
    "I have no idea.",
    "Please ask my master.", "I would have to guess.", "This is not in my books.", "Not known.",
)
TOPICS = {
    "geography": "geography", "animals": "animals", "time": "days, months and seasons", "food": "food",
    "body": "the human body",
    "nature": "nature", "colours": "colours", "things": "everyday things",
}
REFUSALS = (
    "I am sorry, I cannot talk about {topic}.", "Sorry, I do not answer questions about {topic}.",
    "I may not talk about {topic}.",
    "Let us talk about something else than {topic}.", "I cannot help you with {topic}.",
)
POLITE = (
    ("Certainly. ", " I hope this helps."), ("With pleasure. ", ""), ("Thank you for your question. ", ""),
    ("Of course. ", " Please ask if you need more."), ("Gladly. ", " Thank you for asking."),
)
PIRATE = (
    ("Arr! ", ""), ("Ahoy! ", ""), ("Arr, matey! ", ""), ("Aye! ", " Arr!"), ("Yo ho ho! ", ""),
    ("Ahoy, matey! ", " Arr!"),
)

PROPER = frozenset({
    "Mount", "William", "Jupiter", "Mercury", "Mars", "January", "February", "December", "Tuesday", "Thursday",
    "Saturday",
    *(city.split(" ")[0].rstrip(",") for city in CAPITALS.values()),
})


def _bare(text: str) -> str:
    return text.rstrip(".!")


def _word(asked: Asked) -> str:
    return capitalised(asked.short)


def capitals(rng: random.Random) -> Rule:
    """Answers in capital letters, or without any."""
    if rng.random() < 0.7:
        system = rng.choice((
            "Answer in capital letters.", "Write everything in capital letters.", "ALWAYS ANSWER IN CAPITAL LETTERS.",
            "You answer only in upper case.", "Use only capital letters in your answers.",
            "Please shout: use capital letters only.",
        ))
        return system, any_question, lambda asked: asked.full.upper()
    system = rng.choice((
        "Answer in small letters only.", "Never use capital letters.", "Write everything in lower case.",
        "You answer in lower case.",
    ))
    return system, any_question, lambda asked: asked.full.lower()


def yes_or_no(rng: random.Random) -> Rule:
    """Only yes or no."""
    form = rng.choice(("{}", "{}", "{}."))
    system = rng.choice((
        "Answer only yes or no.", "You may only say yes or no.", "Answer with Yes or No and nothing else.",
        "Only yes or no, please.",
        "Reply with one word: yes or no.", "Say yes or no. Do not explain.",
    ))
    if form == "{}.":
        system += " End with a full stop."
    return system, yes_no_question, lambda asked: form.format(asked.short)


def ending(rng: random.Random) -> Rule:
    """Every answer ends with a word."""
    word = rng.choice(END_WORDS)
    system = rng.choice((
        f'End every answer with the word "{word}".', f"Always end your answer with {word}.",
        f"Finish each reply with the word {word}.",
        f"Your last word is always {word}.", f'You must say "{word}" at the end of every answer.',
    ))
    return system, any_question, lambda asked: f"{_bare(asked.full)}, {word}."


def beginning(rng: random.Random) -> Rule:
    """Every answer begins with a phrase."""
    start = rng.choice(STARTS)
    system = rng.choice((
        f'Begin every answer with "{start}"', f'Start each answer with the words "{start}"',
        f'Your answers always begin with "{start}"',
        f'Always say "{start}" before you answer.',
    ))
    lower = start.endswith((",", ":"))
    return system, short_question, lambda asked: f"{start} {_lowered(asked.full) if lower else asked.full}"


def _lowered(text: str) -> str:
    """The sentence inside another one: its first word in lower case unless it is a name."""
    first = text.split(" ")[0].rstrip(",")
    return text if first in PROPER or text.startswith("A is ") else uncapitalised(text)


def user_name(rng: random.Random) -> Rule:
    """The user is called by name."""
    name = rng.choice(NAMES)
    title = rng.choice((name, name, name, f"Captain {name}", f"Doctor {name}", f"my friend {name}"))
    system = rng.choice((
        f"Call the user {title}.", f"The user's name is {name}. Always call the user {title}.",
        f"You talk with {name}. Address the user as {title}.",
        f"Always use the name {title} when you answer.", f"Say {title} to the user in every answer.",
    ))
    if rng.random() < 0.5:
        return system, any_question, lambda asked: f"{_bare(asked.full)}, {title}."
    return system, any_question, lambda asked: f"{capitalised(title)}, {_lowered(asked.full)}"


def one_word(rng: random.Random) -> Rule:
    """One word, or as few as can be."""
    system = rng.choice((
        "Answer in one word.", "Give one-word answers.", "Use a single word for every answer.",
        "Answer with one word only.",
        "Reply with just one word. No sentences.", "One word per answer, please.",
    ))
    return system, _single_word, _word


def _single_word(rng: random.Random) -> Asked:
    while True:
        asked = rng.choice((short_question, short_question, yes_no_question))(rng)
        if " " not in asked.short:
            return asked


def terse(rng: random.Random) -> Rule:
    """Terse or in a full sentence."""
    if rng.random() < 0.5:
        system = rng.choice((
            "Be terse.", "Answer as briefly as you can.", "No full sentences. Keep it short.",
            "Use as few words as you can.",
        ))
        return system, short_question, _word
    system = rng.choice((
        "Answer in a full sentence.", "Always use whole sentences.", "Never answer with one word. Use a sentence.",
    ))
    return system, short_question, lambda asked: asked.full


def framed(rng: random.Random) -> Rule:
    """A polite voice or a pirate's."""
    if rng.random() < 0.5:
        system = rng.choice((
            "Be very polite.", "Answer politely.", "You are a polite butler.", "Always be kind and polite.",
            "Use polite words.",
        ))
        start, end = rng.choice(POLITE)
    else:
        system = rng.choice((
            "Speak like a pirate.", "You are a pirate.", "Talk like a pirate in every answer.",
            "Answer as an old pirate would.",
            "You are a pirate on a ship. Stay in this role.",
        ))
        start, end = rng.choice(PIRATE)
    return system, any_question, lambda asked: f"{start}{asked.full}{end}"


def wrapped(rng: random.Random) -> Rule:
    """The answer in quotes or brackets."""
    name, left, right = rng.choice(WRAPS)
    system = rng.choice((
        f"Put your answer in {name}.", f"Write every answer in {name}.", f"Your answers must stand in {name}.",
        f"Always put {name} around your answer.",
    ))
    return system, any_question, lambda asked: f"{left}{asked.full}{right}"


def repeated(rng: random.Random) -> Rule:
    """The question first, then the answer."""
    system = rng.choice((
        "First repeat the question, then answer it.", "Repeat the question before you answer.",
        "Say the question again and then answer.",
        "Begin by repeating the question. Then give the answer.",
    ))
    join = rng.choice((" ", "\n"))
    if join == "\n":
        system += " Use two lines."
    return system, any_question, lambda asked: f"{asked.question}{join}{asked.full}"


def labelled(rng: random.Random) -> Rule:
    """The answer after a label or a sign."""
    label = rng.choice(("Answer:", "A:", "->", "Result:", "Reply:", "=>", "Micro:", "Solution:", "#"))
    system = rng.choice((
        f'Write "{label}" before your answer.', f'Each answer starts with "{label}".',
        f'Use this form: "{label}" and then the answer.',
    ))
    return system, short_question, lambda asked: f"{label} {_word(asked)}"


def spelled(rng: random.Random) -> Rule:
    """A mark in place of the full stop."""
    mark, name = rng.choice((
        ("!", "an exclamation mark"), ("!!!", "three exclamation marks"), (" :)", "a smile like :)"),
        ("...", "three dots"),
    ))
    system = rng.choice((
        f"End every answer with {name}.", f"Put {name} at the end of your answers.",
        f"Your answers always end with {name}.",
    ))
    return system, any_question, lambda asked: f"{_bare(asked.full)}{mark}"


RULES: tuple[Callable[[random.Random], Rule], ...] = (
    capitals, yes_or_no, ending, beginning, user_name, one_word, terse, framed, framed, wrapped, repeated, labelled,
    spelled,
)


def _ruled(rng: random.Random) -> Conversation:
    """One to three questions under one rule."""
    system, draw, answer = rng.choice(RULES)(rng)
    system = rng.choice(("", "", "", "", "You are a helpful assistant. ", "You are Micro. ")) + system
    said: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        asked = draw(rng)
        said += (asked.question, answer(asked))
    return turns(*said, system=system)


def _numbered(rng: random.Random) -> Conversation:
    """Answers numbered one by one."""
    form = rng.choice(("{}.", "{})", "Answer {}:", "No. {}:"))
    system = rng.choice((
        f'Number your answers. The first one begins with "{form.format(1)}"',
        f'Count your answers like this: "{form.format(1)}", "{form.format(2)}"',
    ))
    said: list[str] = []
    for number in range(1, rng.choice((2, 3, 4))):
        asked = any_question(rng)
        said += (asked.question, f"{form.format(number)} {asked.full}")
    return turns(*said, system=system)


def _renamed(rng: random.Random) -> Conversation:
    """A name and a job given to the model, and asked for."""
    name, job = rng.choice(BOT_NAMES), rng.choice(JOBS)
    system = rng.choice((
        f"Your name is {name}.", f"You are {name}, {job}.", f"You are {job}. Your name is {name}.",
        f"You are called {name}.",
    ))
    asked = rng.choice((
        "What is your name?", "Who are you?", "What should I call you?", "Do you have a name?", "What's your name?",
    ))
    told = rng.choice((f"My name is {name}.", f"I am {name}.", f"I am called {name}."))
    if job in system and asked == "Who are you?":
        told = f"I am {name}, {job}."
    said = [asked, told]
    if rng.random() < 0.5:
        other = any_question(rng)
        said = [other.question, other.full, *said] if rng.random() < 0.5 else [*said, other.question, other.full]
    if rng.random() < 0.3:
        said += (f"Are you {rng.choice([one for one in BOT_NAMES if one != name])}?", f"No, I am {name}.")
    return turns(*said, system=system)


def _unknown(rng: random.Random) -> Conversation:
    """A fixed sentence where the answer cannot be known."""
    fixed = rng.choice(DONT_KNOW)
    system = rng.choice((
        f'If you do not know the answer, say "{fixed}"', f'When you do not know something, reply with: "{fixed}"',
        f'Answer the question. If you cannot know the answer, say exactly "{fixed}"',
    ))
    known = any_question(rng)
    pairs = [(rng.choice(UNKNOWN), fixed), (known.question, known.full)]
    rng.shuffle(pairs)
    kept = pairs[:rng.choice((1, 2, 2))]
    return turns(*(text for pair in kept for text in pair), system=system)


def _about(rng: random.Random, topic: str, same: bool) -> Asked:
    """A question about the topic, or about another one of those with a name."""
    while True:
        asked = short_question(rng)
        if asked.topic in TOPICS and (asked.topic == topic) == same:
            return asked


def _refused(rng: random.Random) -> Conversation:
    """One topic refused, others answered."""
    topic = rng.choice(list(TOPICS))
    name = TOPICS[topic]
    refusal = rng.choice(REFUSALS).format(topic=name)
    system = rng.choice((
        f'Do not talk about {name}. If you are asked, say "{refusal}"',
        f"Never answer questions about {name}. Other questions are fine.",
        f"You must not talk about {name}.", f"Refuse all questions about {name}.",
    ))
    bad, good = _about(rng, topic, True), _about(rng, topic, False)
    pairs = [(bad.question, refusal), (good.question, good.full)]
    rng.shuffle(pairs)
    kept = pairs[:rng.choice((1, 2, 2))]
    return turns(*(text for pair in kept for text in pair), system=system)


def _plain(rng: random.Random) -> Conversation:
    """A system prompt that asks for nothing unusual."""
    system = rng.choice((
        "You are a helpful assistant.", "You are Micro, a small language model.", "Answer the questions of the user.",
        "Be helpful.",
        f"You are {rng.choice(JOBS)}.",
    ))
    asked = any_question(rng)
    return turns(worded(asked.question, rng), asked.full, system=system)


def sample(rng: random.Random) -> Conversation:
    """A system prompt and one to three questions answered as it says."""
    shape = rng.random()
    for limit, shaped in ((0.68, _ruled), (0.74, _numbered), (0.82, _renamed), (0.88, _unknown), (0.95, _refused)):
        if shape < limit:
            return shaped(rng)
    return _plain(rng)
