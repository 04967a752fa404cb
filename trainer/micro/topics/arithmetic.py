"""Conversations about easy arithmetic: sums, tables, comparisons, counting and short word problems."""

from __future__ import annotations

import random
from collections.abc import Callable

from trainer.micro.conversation import Conversation, turns

Pair = tuple[str, str]

ADD_ASKS = (
    "What is {a} + {b}?", "{a}+{b}", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}=?", "How much is {a} plus {b}?",
    "Add {a} and {b}.", "What is {a} plus {b}?", "what's {a} + {b}", "Calculate {a} + {b}.", "Can you add {a} and {b}?",
    "What is the sum of {a} and {b}?", "What do you get if you add {b} to {a}?", "Please work out {a} + {b}.",
)
SUB_ASKS = (
    "What is {a} - {b}?", "{a}-{b}", "{a} - {b}", "{a} - {b} = ?", "How much is {a} minus {b}?", "Calculate {a} - {b}.",
    "Subtract {b} from {a}.", "What is {a} minus {b}?", "Take {b} away from {a}.", "what's {a} - {b}",
    "What is the difference between {a} and {b}?", "What is left if you take {b} from {a}?",
)
MUL_ASKS = (
    "What is {a} x {b}?", "What is {a} * {b}?", "{a}*{b}", "{a} x {b}", "{a} * {b} = ?", "How much is {a} times {b}?",
    "Multiply {a} by {b}.", "What is {a} times {b}?", "what's {a} times {b}", "Calculate {a} * {b}.",
    "What is the product of {a} and {b}?", "Multiply {a} and {b}.",
)
DIV_ASKS = (
    "What is {a} / {b}?", "{a}/{b}", "{a} / {b}", "{a} / {b} = ?", "How much is {a} divided by {b}?",
    "Divide {a} by {b}.", "What is {a} divided by {b}?", "How many times does {b} go into {a}?", "Calculate {a} / {b}.",
)
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Maria", "Omar", "Nina", "Jack", "Ella", "Leo", "Mia", "Peter", "Sara",
         "Ali", "Kate", "Max", "Ruth", "Paul", "Ines")
THINGS = ("apples", "books", "pencils", "marbles", "coins", "stickers", "cards", "sweets", "oranges", "balloons",
          "stamps", "shells", "cakes", "eggs", "toys", "flowers", "buttons", "cups", "stones", "tickets")
BOXES = ("boxes", "bags", "baskets", "packets", "jars")
GAINS = ("gets", "finds", "buys", "is given")
LOSSES = ("gives away", "loses", "sells")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
                "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")
SYSTEMS = ("You are a helpful assistant.", "You are a maths tutor. Keep answers short.", "Answer briefly.",
           "You are a friendly assistant who is good with numbers.")
NUMBER_ONLY = ("Answer with the number only.", "Reply with only the number.", "Give only the number.",
               "Just the number, please.", "Number only.")


def _number(rng: random.Random) -> int:
    roll = rng.random()
    if roll < 0.55:
        return rng.randint(0, 12)
    if roll < 0.85:
        return rng.randint(2, 50)
    return rng.randint(10, 99) if roll < 0.95 else rng.randint(10, 90) * 10


def _answers(a: int, sign: str, b: int, c: int) -> tuple[str, ...]:
    return (f"{a} {sign} {b} = {c}.", f"{a} {sign} {b} = {c}.", f"{c}", f"{c}.", f"It is {c}.", f"The answer is {c}.",
            f"{a} {WORDS[sign]} {b} is {c}.")


def _operands(rng: random.Random) -> tuple[int, str, int, int, str]:
    """Two numbers, the sign between them, the result and a way of asking for it."""
    sign = rng.choice("++--**/")
    if sign == "+":
        a, b = _number(rng), _number(rng)
        return a, sign, b, a + b, rng.choice(ADD_ASKS)
    if sign == "-":
        b, a = sorted((_number(rng), _number(rng)))
        return a, sign, b, a - b, rng.choice(SUB_ASKS)
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    if sign == "*":
        return a, sign, b, a * b, rng.choice(MUL_ASKS)
    return a * b, sign, b, a, rng.choice(DIV_ASKS)


def _basic(rng: random.Random) -> Pair:
    a, sign, b, c, ask = _operands(rng)
    question = ask.format(a=a, b=b)
    if rng.random() < 0.12 and question[-1] in ".?":
        return f"{question} {rng.choice(NUMBER_ONLY)}", f"{c}"
    return question, rng.choice(_answers(a, sign, b, c))


def _remainder(rng: random.Random) -> Pair:
    b = rng.randint(2, 10)
    quotient, rest = rng.randint(1, 10), rng.randint(1, b - 1)
    a = b * quotient + rest
    ask = rng.choice(("What is the remainder of {a} divided by {b}?", "Divide {a} by {b} and give the remainder.",
                      "What is {a} / {b} with remainder?"))
    return ask.format(a=a, b=b), f"{a} / {b} = {quotient}, remainder {rest}."


def _double(rng: random.Random) -> Pair:
    n = rng.randint(1, 50)
    if rng.random() < 0.5:
        ask = rng.choice(("What is double {n}?", "Double {n}.", "What is twice {n}?",
                          "What do you get if you double {n}?"))
        return ask.format(n=n), rng.choice((f"Double {n} is {2 * n}.", f"{2 * n}", f"It is {2 * n}."))
    ask = rng.choice(("What is half of {n}?", "Halve {n}.", "How much is half of {n}?"))
    return ask.format(n=2 * n), rng.choice((f"Half of {2 * n} is {n}.", f"{n}", f"It is {n}."))


def _compare(rng: random.Random) -> Pair:
    a, b = rng.sample(range(101), 2)
    low, high = sorted((a, b))
    kind = rng.randrange(4)
    if kind == 0:
        ask = rng.choice(("Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?",
                          "Is {a} or {b} greater?"))
        return ask.format(a=a, b=b), rng.choice((f"{high} is bigger than {low}.", f"{high}", f"{high} is bigger."))
    if kind == 1:
        ask = rng.choice(("Which is smaller, {a} or {b}?", "Which number is smaller: {a} or {b}?"))
        return ask.format(a=a, b=b), rng.choice((f"{low} is smaller than {high}.", f"{low}", f"{low} is smaller."))
    if kind == 2:
        yes = "Yes" if a > b else "No"
        ask = rng.choice(("Is {a} greater than {b}?", "Is {a} more than {b}?", "Is {a} bigger than {b}?"))
        return ask.format(a=a, b=b), f"{yes}, {a} is {'greater' if a > b else 'less'} than {b}."
    numbers = rng.sample(range(61), rng.randint(3, 4))
    listed = ", ".join(map(str, numbers))
    largest = rng.random() < 0.5
    answer = max(numbers) if largest else min(numbers)
    word = "largest" if largest else "smallest"
    return f"Which of these numbers is the {word}: {listed}?", rng.choice((f"{answer}",
                                                                           f"The {word} number is {answer}."))


def _counting(rng: random.Random) -> Pair:
    n = rng.randint(1, 100)
    if rng.random() < 0.4:
        ask = rng.choice(("What comes after {n}?", "Which number comes after {n}?",
                          "What is the next number after {n}?",
                          "What number follows {n}?"))
        return ask.format(n=n), rng.choice((f"{n + 1}", f"{n + 1} comes after {n}.", f"After {n} comes {n + 1}."))
    if rng.random() < 0.4:
        ask = rng.choice(("What comes before {n}?", "Which number comes before {n}?",
                          "What number is just before {n}?"))
        return ask.format(n=n), rng.choice((f"{n - 1}", f"{n - 1} comes before {n}."))
    return _series(rng)


def _series(rng: random.Random) -> Pair:
    step, start, count = rng.choice((1, 1, 2, 2, 3, 5, 10)), rng.randint(1, 20), rng.randint(3, 5)
    if rng.random() < 0.5:
        shown = ", ".join(str(start + step * i) for i in range(4))
        nxt = start + 4 * step
        ask = rng.choice(("What comes next: {s}?", "Continue: {s}, ...", "What is the next number? {s}"))
        return ask.format(s=shown), rng.choice((f"{nxt}", f"The next number is {nxt}.", f"{nxt} comes next."))
    if rng.random() < 0.3:
        return f"Count down from {count + 5} to 1.", ", ".join(str(i) for i in range(count + 5, 0, -1))
    listed = ", ".join(str(start + i) for i in range(count + 1))
    return f"Count from {start} to {start + count}.", rng.choice((listed, f"{listed}."))


def _parity(rng: random.Random) -> Pair:
    n = rng.randint(1, 100)
    word = "odd" if n % 2 else "even"
    if rng.random() < 0.5:
        return f"Is {n} even or odd?", rng.choice((f"{n} is {word}.", word.capitalize() + "."))
    asked = rng.choice(("even", "odd"))
    return f"Is {n} an {asked} number?", f"{'Yes' if asked == word else 'No'}, {n} is {word}."


def _in_words(rng: random.Random) -> Pair:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    wa, wb = NUMBER_WORDS[a], NUMBER_WORDS[b]
    kind = rng.randrange(4)
    if kind == 0:
        return f"What is {wa} plus {wb}?", rng.choice((f"{wa} plus {wb} is {NUMBER_WORDS[a + b]}.".capitalize(),
                                                       f"{a + b}"))
    if kind == 1:
        low, high = sorted((a, b))
        words = f"{NUMBER_WORDS[high]} minus {NUMBER_WORDS[low]}"
        return f"What is {words}?", f"{words} is {NUMBER_WORDS[high - low]}.".capitalize()
    n = rng.randint(0, 20)
    if kind == 2:
        return rng.choice((f"Write {n} in words.",
                           f"How do you write {n} as a word?")), f"{NUMBER_WORDS[n]}".capitalize()
    return f"Write the number {NUMBER_WORDS[n]} in digits.", f"{n}"


def _story_change(rng: random.Random) -> Pair:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 20), rng.randint(2, 15)
    if rng.random() < 0.5:
        how = rng.choice(GAINS)
        ask = rng.choice(("How many {t} does {n} have now?", "How many {t} are there in all?"))
        answer = rng.choice((f"{name} has {a + b} {thing} now.",
                             f"{a} + {b} = {a + b}, so {name} has {a + b} {thing}."))
        return f"{name} has {a} {thing} and {how} {b} more. {ask.format(t=thing, n=name)}", answer
    a, left = a + b, a
    ask = rng.choice(("How many {t} are left?", "How many {t} does {n} have left?"))
    answer = rng.choice((f"{name} has {left} {thing} left.", f"{a} - {b} = {left}, so {left} {thing} are left."))
    return f"{name} has {a} {thing} and {rng.choice(LOSSES)} {b}. {ask.format(t=thing, n=name)}", answer


def _story_other(rng: random.Random) -> Pair:
    (one, two), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    kind = rng.randrange(4)
    if kind == 0:
        boxes = rng.choice(BOXES)
        return (f"There are {a} {boxes} with {b} {thing} in each. How many {thing} are there?",
                rng.choice((f"There are {a * b} {thing}.", f"{a} * {b} = {a * b}, so there are {a * b} {thing}.")))
    if kind == 1:
        return (f"{one} shares {a * b} {thing} equally among {b} friends. How many does each friend get?",
                rng.choice((f"Each friend gets {a} {thing}.", f"{a * b} / {b} = {a}, so each friend gets {a}.")))
    if kind == 2:
        return (f"{one} has {a} {thing} and {two} has {b}. How many do they have together?",
                rng.choice((f"Together they have {a + b} {thing}.",
                            f"{a} + {b} = {a + b}, so they have {a + b} {thing}.")))
    return (f"One ticket costs {a} euros. How much do {b} tickets cost?",
            rng.choice((f"{b} tickets cost {a * b} euros.", f"{b} * {a} = {a * b}, so they cost {a * b} euros.")))


def _check(rng: random.Random) -> Pair:
    a, sign, b, c, _ = _operands(rng)
    claimed = c if rng.random() < 0.5 else c + rng.choice((1, 2, 10))
    ask = rng.choice(("Is {e} equal to {c}?", "Is it true that {e} = {c}?", "I think {e} = {c}. Is that right?"))
    question = ask.format(e=f"{a} {sign} {b}", c=claimed)
    return question, f"Yes, {a} {sign} {b} = {c}." if claimed == c else f"No, {a} {sign} {b} = {c}."


KINDS: tuple[tuple[Callable[[random.Random], Pair], int], ...] = (
    (_basic, 50), (_double, 5), (_compare, 8), (_counting, 10), (_parity, 4), (_in_words, 4), (_story_change, 8),
    (_story_other, 8), (_check, 5), (_remainder, 2),
)


def sample(rng: random.Random) -> Conversation:
    """One to three exchanges about numbers."""
    makers, weights = zip(*KINDS, strict=True)
    count = rng.choices((1, 2, 3), (80, 15, 5))[0]
    parts: list[str] = []
    for maker in rng.choices(makers, weights, k=count):
        question, answer = maker(rng)
        follow = f"And {question[0].lower()}{question[1:]}" if parts and question.startswith("What is") else question
        parts += [follow, answer]
    return turns(*parts, system=rng.choice(SYSTEMS) if rng.random() < 0.15 else None)
