"""Layouts for the copying topic: a question quoted before its answer, and lines that open or close an answer."""

from __future__ import annotations

import random

from trainer.micro import copy_sources as source
from trainer.micro.conversation import Conversation, turns
from trainer.micro.topics.python_facts import facts

Pair = tuple[str, str]

ASKED = ("Question", "Q", "You asked", "Your question", "Asked", "The question", "Query", "Request", "Topic", "In",
         "User",
         "QUESTION", "Problem", "Task", "They ask", "Reader", "Input", "What you want to know", "question", "Prompt")
REPLIED = ("Answer", "A", "My answer", "Reply", "Response", "Solution", "Result", "The answer", "Out", "Bot", "ANSWER",
           "Short answer",
           "Output", "I say", "answer", "Here you go", "What I know", "In short")
# How the label and the text of a part stand together.
SHAPES = ("{l}: {t}", "{l}: {t}", "### {l}\n{t}", "## {l}\n\n{t}", "# {l}\n{t}", "**{l}:** {t}", "[{l}] {t}",
          "{l} - {t}", "{l}:\n{t}",
          "<{l}>{t}</{l}>", "{l} >> {t}", "* {l}: {t}", "== {l} ==\n{t}", "({l}) {t}", "{l} | {t}", "{l} = {t}",
          "**{l}**\n{t}")
JOINS = ("\n", "\n\n", "\n", "\n---\n")
# Layouts without labels on both parts: how to ask for them, how they look.
QUOTED: tuple[Pair, ...] = (
    ("Quote the question and then answer it.", '"{q}"\n{a}'),
    ("First quote the question, then answer.", '"{q}"\n\n{a}'),
    ("Repeat the question before you answer.", "{q}\n{a}"),
    ("Start by repeating my question, then answer.", "{q}\n\n{a}"),
    ("Put the question after a > sign, then answer.", "> {q}\n\n{a}"),
    ("Begin with the question as a Markdown quote.", "> {q}\n\n{a}"),
    ('Begin with: You asked: and the question. Then answer.', "You asked: {q}\n{a}"),
    ("Make the question bold, then answer.", "**{q}**\n{a}"),
    ("Make the question a heading and answer below it.", "# {q}\n\n{a}"),
    ("Put the question in brackets, then answer.", "[{q}]\n{a}"),
    ('Begin with: You want to know: and the question in quotes.', 'You want to know: "{q}"\n{a}'),
    ("Answer first, then repeat the question in brackets.", "{a}\n({q})"),
    ("Write the question, an arrow and the answer.", "{q} -> {a}"),
    ("Say what I asked and then answer.", 'You asked "{q}"\n{a}'),
    ("Answer, and then write the question in quotes.", '{a}\n"{q}"'),
)
CLOSINGS = ("DONE", "Hope that helps", "That is all.", "Have a nice day!", "END", "Thanks for asking.",
            "Over and out.", "Good luck!",
            "Ask me again any time.", "-- your helper", "I hope this is useful.", "See you soon.", "Happy coding!",
            "***", "[end of answer]",
            "Anything else?", "Cheers!", "Kind regards", "This was my answer.", "Stay curious.", "Bye for now.",
            "finished", "OK?")
OPENINGS = ("Sure.", "Of course!", "Here is the answer.", "Hello, friend.", "Let me see.", "Right away.", "Good day.",
            "Well,", "START",
            "Thank you for asking.", "A fine question!", "Easy:", "Listen:", "Answer below.", "Let us look at that.",
            "Aha!", "Yes, captain.",
            "That is an interesting one.", "Dear user,", "Glad you asked.", "[answer]")
CLOSE_ASKS = ("End with the line: {c}", "Finish with: {c}", "Close every answer with this line: {c}",
              "The last line must be: {c}",
              'After the answer write "{c}"', "Always end your answer with: {c}", "Add this at the end: {c}",
              "Sign off with: {c}")
OPEN_ASKS = ("Begin with the line: {c}", "Start with: {c}", "Open every answer with this line: {c}",
             "The first line must be: {c}",
             'Before the answer write "{c}"', "Always start your answer with: {c}", "First write: {c}")
GENERAL: tuple[Pair, ...] = (
    ("What is the capital of France?", "Paris."), ("How many days are in a week?", "7 days."),
    ("What colour is grass?", "Green."),
    ("What is the opposite of big?", "Small."), ("How many legs does a spider have?", "8 legs."),
    ("What is frozen water?", "Ice."),
    ("What is the capital of Italy?", "Rome."), ("Which animal says meow?", "A cat."),
    ("What comes after Monday?", "Tuesday."),
    ("What do bees make?", "Honey."), ("What is the plural of mouse?", "Mice."), ("Where do fish live?", "In water."),
    ("What is the first letter of the alphabet?", "A."), ("Which month comes after May?", "June."),
    ("Is the sun hot?", "Yes, very hot."),
)


def _question(rng: random.Random) -> Pair:
    """A question and its true, short answer."""
    if rng.random() < 0.5:
        fact = rng.choice(facts())
        return fact.question(rng), fact.answer
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(source.PYTHON)
    if roll < 0.6:
        return rng.choice(GENERAL)
    if roll < 0.8:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return rng.choice((f"What is {a} + {b}?", f"How much is {a} plus {b}?")), f"{a + b}."
    name, thing = rng.choice(source.NAMES), rng.choice(source.NOUNS)
    place = rng.choice(source.PLACES)
    return rng.choice((
        (f"{name} left the {thing} {place}. Where is the {thing}?", f"The {thing} is {place}."),
        (f"My name is {name}. What is my name?", f"Your name is {name}."),
        (f"How do you spell {thing}?", "-".join(thing) + "."),
        (f"What is the first letter of {thing}?", f"{thing[0].upper()}."),
    ))


def _unsure(rng: random.Random) -> Pair:
    """A random question about code and an answer that names its task but promises nothing."""
    question, task = source.combo(rng)
    return question, rng.choice((
        f"The Python documentation shows how to {task}.", f"To {task}, look at the Python documentation.",
        f"I am not sure how to {task}.", f"There are several ways to {task}.",
    ))


def _any_question(rng: random.Random) -> Pair:
    return _unsure(rng) if rng.random() < 0.3 else _question(rng)


def _labelled(rng: random.Random) -> Pair:
    """A way to ask for a labelled layout, and the layout."""
    asked, replied = rng.choice(ASKED), rng.choice(REPLIED)
    if rng.random() < 0.2:
        asked, replied = source.invented(rng).capitalize(), source.invented(rng).capitalize()
    shape, joint = rng.choice(SHAPES), rng.choice(JOINS)
    first = shape.replace("{l}", asked).replace("{t}", "{q}")
    second = shape.replace("{l}", replied).replace("{t}", "{a}")
    layout = first + joint + second
    hole_q, hole_a = rng.choice((("...", "..."), ("<question>", "<answer>"), ("(the question)", "(the answer)"),
                                 ("___", "___")))
    form = layout.replace("{q}", hole_q).replace("{a}", hole_a)
    if shape == "{l}: {t}" and joint == "\n" and rng.random() < 0.5:
        return rng.choice((f"First write '{asked}:' and the question, then '{replied}:' and the answer.",
                           f"Write '{asked}:' with the question, then '{replied}:' with the answer below it.")), layout
    if shape == "### {l}\n{t}" and joint == "\n\n" and rng.random() < 0.5:
        return f"Use two headings: '### {asked}' with the question and '### {replied}' with the answer.", layout
    ask = rng.choice(("Answer in this form:\n{f}", "Use this layout:\n{f}", "Always reply like this:\n{f}",
                      "Format:\n{f}",
                      "Your answer must look like this:\n{f}", "Follow this pattern, with the question copied:\n{f}"))
    return ask.replace("{f}", form), layout


def _ends(rng: random.Random) -> Pair:
    """A way to ask for an opening or a closing line, and the layout."""
    own = rng.random() < 0.45
    line = (source.sentence(rng) if rng.random() < 0.6 else source.noise(rng)) if own else ""
    joint = rng.choice(("\n", "\n\n"))
    if rng.random() < 0.6:
        line = line or rng.choice(CLOSINGS)
        return rng.choice(CLOSE_ASKS).replace("{c}", line), "{a}" + joint + line
    line = line or rng.choice(OPENINGS)
    return rng.choice(OPEN_ASKS).replace("{c}", line), line + joint + "{a}"


def _rule(rng: random.Random) -> Pair:
    """An instruction and the layout that it asks for, at times a layout with a closing line too."""
    ask, layout = _labelled(rng) if rng.random() < 0.6 else rng.choice(QUOTED)
    if rng.random() < 0.25:
        line = source.sentence(rng) if rng.random() < 0.4 else rng.choice(CLOSINGS)
        return f"{ask}\n{rng.choice(CLOSE_ASKS).replace('{c}', line)}", f"{layout}\n{line}"
    return ask, layout


def _fill(layout: str, pair: Pair) -> str:
    """The layout with the question and the answer, which may hold braces themselves."""
    return "".join(pair[0] if part == "{q}" else pair[1] if part == "{a}" else part
                   for part in layout.replace("{q}", "\0{q}\0").replace("{a}", "\0{a}\0").split("\0"))


def _converse(rng: random.Random, ask: str, layout: str) -> Conversation:
    """The rule in the system prompt, in the user's turn, or shown by an example."""
    pairs = [_any_question(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    roll = rng.random()
    exchanges = [text for pair in pairs for text in (pair[0], _fill(layout, pair))]
    if roll < 0.4:
        return turns(*exchanges, system=ask)
    if roll < 0.5:
        example = _question(rng)
        lead = rng.choice(("Answer like this example.", "Here is an example. Do the same.", "Follow the example."))
        return turns(*exchanges, system=f"{lead}\n\n{example[0]}\n=>\n{_fill(layout, example)}")
    question = pairs[0][0]
    exchanges[0] = rng.choice((f"{ask}\n{question}", f"{question}\n{ask}", f"{ask}\n\nMy question: {question}",
                               f"{question}\n\n{ask}"))
    return turns(*exchanges)


def laid_out(rng: random.Random) -> Conversation:
    """A question copied into a layout with its answer."""
    return _converse(rng, *_rule(rng))


def answered(rng: random.Random) -> Conversation:
    """An answer with an opening or closing line that the request gives."""
    return _converse(rng, *_ends(rng))
