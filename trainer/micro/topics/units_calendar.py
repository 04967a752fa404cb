"""Conversations about units of measure, days, months, seasons and the clock."""

from __future__ import annotations

import random
from collections.abc import Callable

from trainer.micro.conversation import Conversation, turns

Pair = tuple[str, str]

# A unit in the singular and the plural, how many of a smaller unit it holds, and that unit in the plural.
UNITS: tuple[tuple[str, str, int, str], ...] = (
    ("kilometre", "kilometres", 1000, "metres"), ("metre", "metres", 100, "centimetres"),
    ("centimetre", "centimetres", 10, "millimetres"), ("kilogram", "kilograms", 1000, "grams"),
    ("tonne", "tonnes", 1000, "kilograms"), ("litre", "litres", 1000, "millilitres"),
    ("minute", "minutes", 60, "seconds"),
    ("hour", "hours", 60, "minutes"), ("day", "days", 24, "hours"), ("week", "weeks", 7, "days"),
    ("year", "years", 12, "months"), ("century", "centuries", 100, "years"), ("decade", "decades", 10, "years"),
    ("foot", "feet", 12, "inches"), ("yard", "yards", 3, "feet"), ("pound", "pounds", 16, "ounces"),
    ("byte", "bytes", 8, "bits"), ("kilobyte", "kilobytes", 1000, "bytes"),
    ("megabyte", "megabytes", 1000, "kilobytes"),
    ("gigabyte", "gigabytes", 1000, "megabytes"), ("dozen", "dozen", 12, "items"), ("euro", "euros", 100, "cents"),
    ("dollar", "dollars", 100, "cents"), ("metre", "metres", 1000, "millimetres"),
)
SHORT = {"kilometre": "km", "metre": "m", "centimetre": "cm", "metres": "m", "centimetres": "cm", "millimetres": "mm",
         "kilogram": "kg", "grams": "g", "litre": "l", "millilitres": "ml", "kilometres": "km", "kilograms": "kg",
         "litres": "l"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
            "twelfth")
SEASONS = ("spring", "summer", "autumn", "winter")
SEASON_MONTHS = {"spring": "March, April and May", "summer": "June, July and August",
                 "autumn": "September, October and November", "winter": "December, January and February"}
FIXED: tuple[Pair, ...] = (
    ("How many days are in a week?", "There are 7 days in a week."),
    ("How many months are in a year?", "There are 12 months in a year."),
    ("How many days are in a year?", "A year has 365 days, and a leap year has 366."),
    ("How many days are in a leap year?", "A leap year has 366 days."),
    ("How many weeks are in a year?", "A year has about 52 weeks."),
    ("What is a leap year?", "A leap year has 366 days. It has an extra day, February 29."),
    ("How often is there a leap year?", "There is a leap year about every four years."),
    ("Which month is the shortest?", "February is the shortest month. It has 28 or 29 days."),
    ("What is the first month of the year?", "The first month of the year is January."),
    ("What is the last month of the year?", "The last month of the year is December."),
    ("What are the days of the weekend?", "The weekend is Saturday and Sunday."),
    ("Name the days of the week.", ", ".join(DAYS[:6]) + " and Sunday."),
    ("List the months of the year.", ", ".join(MONTHS[:11]) + " and December."),
    ("What are the four seasons?", "The four seasons are spring, summer, autumn and winter."),
    ("How many seasons are there?", "There are four seasons: spring, summer, autumn and winter."),
    ("Which season is the coldest?", "Winter is the coldest season."),
    ("Which season is the warmest?", "Summer is the warmest season."),
    ("What is longer, a mile or a kilometre?", "A mile is longer. It is about 1.6 kilometres."),
    ("How long is a mile?", "A mile is about 1.6 kilometres."),
    ("How many centimetres are in an inch?", "An inch is 2.54 centimetres."),
    ("How many hours are in half a day?", "Half a day has 12 hours."),
    ("How many minutes are in a quarter of an hour?", "A quarter of an hour is 15 minutes."),
    ("How many minutes are in half an hour?", "Half an hour is 30 minutes."),
    ("How many seconds are in an hour?", "There are 3600 seconds in an hour."),
    ("What does km mean?", "km means kilometre."), ("What does kg mean?", "kg means kilogram."),
    ("What does ml mean?", "ml means millilitre."), ("What does cm mean?", "cm means centimetre."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("What time is noon?", "Noon is 12 o'clock in the middle of the day."),
    ("What time is midnight?", "Midnight is 12 o'clock at night."),
    ("How many years are in a millennium?", "A millennium is 1000 years."),
)
SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are a helpful assistant. Keep answers short.")


def _a(word: str) -> str:
    return f"{'an' if word == 'hour' or (word[0] in 'aio') else 'a'} {word}"


def _fixed(rng: random.Random) -> Pair:
    return rng.choice(FIXED)


def _fact(rng: random.Random) -> Pair:
    one, _, size, small = rng.choice(UNITS)
    ask = rng.choice(("How many {s} are in {a}?", "How many {s} are there in {a}?", "How many {s} does {a} have?",
                      "how many {s} in {a}", "How many {s} make {a}?"))
    holder = _a(one)
    answer = rng.choice((f"There are {size} {small} in {holder}.", f"{size}",
                         f"{holder.capitalize()} has {size} {small}.",
                         f"{size} {small}."))
    return ask.format(s=small, a=holder), answer


def _convert(rng: random.Random) -> Pair:
    one, many, size, small = rng.choice(UNITS)
    n = rng.randint(2, 12) if rng.random() < 0.8 else rng.randint(13, 50)
    verb = "are" if rng.random() < 0.5 else "make"
    if rng.random() < 0.3:
        return (rng.choice((f"How many {many} {verb} {n * size} {small}?" if verb == "are" else
                            f"How many {many} is {n * size} {small}?", f"Convert {n * size} {small} to {many}.")),
                f"{n * size} {small} = {n} {many}.")
    if one in SHORT and small in SHORT and rng.random() < 0.4:
        ask = rng.choice(("Convert {n} {b} to {s}.", "{n} {b} in {s}?", "How many {s} is {n} {b}?", "{n} {b} = ? {s}"))
        return ask.format(n=n, b=SHORT[one], s=SHORT[small]), f"{n} {SHORT[one]} = {n * size} {SHORT[small]}."
    ask = rng.choice(("How many {s} are in {n} {b}?", "Convert {n} {b} to {s}.", "What is {n} {b} in {s}?",
                      "How many {s} are there in {n} {b}?"))
    answer = rng.choice(("{n} {b} = {r} {s}.", "There are {r} {s} in {n} {b}.", "{r} {s}.", "{r}"))
    return ask.format(n=n, b=many, s=small), answer.format(n=n, b=many, s=small, r=n * size)


def _day(rng: random.Random) -> Pair:
    i = rng.randrange(7)
    today, after, before = DAYS[i], DAYS[(i + 1) % 7], DAYS[i - 1]
    if rng.random() < 0.35:
        ask = rng.choice(("What day comes after {d}?", "Which day comes after {d}?", "What is the day after {d}?",
                          "Today is {d}. What day is tomorrow?", "If today is {d}, what is tomorrow?"))
        tail = f"Tomorrow is {after}." if "omorrow" in ask else f"{after} comes after {today}."
        return ask.format(d=today), rng.choice((tail, after, f"{after}."))
    if rng.random() < 0.4:
        ask = rng.choice(("What day comes before {d}?", "Which day is before {d}?",
                          "Today is {d}. What day was yesterday?"))
        tail = f"Yesterday was {before}." if "yesterday" in ask else f"{before} comes before {today}."
        return ask.format(d=today), rng.choice((tail, before, f"{before}."))
    if rng.random() < 0.4:
        off = i >= 5
        ask = rng.choice(("Is {d} a weekday or part of the weekend?", "Is {d} part of the weekend?"))
        lead = "" if " or " in ask else ("Yes, " if off else "No, ")
        return ask.format(d=today), f"{lead}{today} is {'part of the weekend' if off else 'a weekday'}."
    n = rng.randint(2, 10)
    ask = rng.choice(("Today is {d}. What day is it in {n} days?", "What day is {n} days after {d}?"))
    then = DAYS[(i + n) % 7]
    return ask.format(d=today, n=n), rng.choice((then, f"It is {then}.", f"{n} days after {today} is {then}."))


def _month(rng: random.Random) -> Pair:
    i = rng.randrange(12)
    month, after, before, rank = MONTHS[i], MONTHS[(i + 1) % 12], MONTHS[i - 1], ORDINALS[i]
    kind = rng.randrange(5)
    if kind == 0:
        ask = rng.choice(("What month comes after {m}?", "Which month comes after {m}?", "Which month follows {m}?"))
        return ask.format(m=month), rng.choice((f"{after} comes after {month}.", after, f"{after}."))
    if kind == 1:
        ask = rng.choice(("What month comes before {m}?", "Which month is before {m}?"))
        return ask.format(m=month), rng.choice((f"{before} comes before {month}.", before, f"{before}."))
    if kind == 2:
        ask = rng.choice(("Which month is the {o}?", "What is the {o} month of the year?", "Which is the {o} month?",
                          "Name the {o} month."))
        return ask.format(o=rank), rng.choice((f"The {rank} month is {month}.", month, f"{month} is the {rank} month."))
    if kind == 3:
        ask = rng.choice(("Which number is the month {m}?", "What number month is {m}?", "Is {m} month number {n}?"))
        lead = "Yes, " if "{n}" in ask else ""
        return ask.format(m=month, n=i + 1), f"{lead}{month} is month number {i + 1}."
    return _month_length(rng, i)


def _month_length(rng: random.Random, i: int) -> Pair:
    month, length = MONTHS[i], LENGTHS[i]
    ask = rng.choice(("How many days are in {m}?", "How many days does {m} have?", "how many days in {m}",
                      "How long is {m}?"))
    if i == 1:
        return ask.format(m=month), "February has 28 days, and 29 days in a leap year."
    return ask.format(m=month), rng.choice((f"{month} has {length} days.", f"{length} days.", f"{length}"))


def _season(rng: random.Random) -> Pair:
    i = rng.randrange(4)
    season, after, before = SEASONS[i], SEASONS[(i + 1) % 4], SEASONS[i - 1]
    kind = rng.randrange(4)
    if kind == 0:
        ask = rng.choice(("What season comes after {s}?", "Which season follows {s}?"))
        return ask.format(s=season), f"{after.capitalize()} comes after {season}."
    if kind == 1:
        return f"What season comes before {season}?", f"{before.capitalize()} comes before {season}."
    if kind == 2:
        ask = rng.choice(("Which months are in {s}?", "What are the {s} months?"))
        return ask.format(s=season), f"In the north, the {season} months are {SEASON_MONTHS[season]}."
    month = rng.choice(MONTHS)
    found = next(name for name, months in SEASON_MONTHS.items() if month in months)
    return f"In which season is {month}?", f"In the north, {month} is in {found}."


def _leap(rng: random.Random) -> Pair:
    year = rng.randint(1990, 2040)
    leap = year % 4 == 0
    ask = rng.choice(("Is {y} a leap year?", "Was {y} a leap year?" if year < 2024 else "Is {y} a leap year?"))
    if rng.random() < 0.3:
        return f"How many days does the year {year} have?", f"The year {year} has {366 if leap else 365} days."
    verb = "was" if ask.startswith("Was") else "is"
    return ask.format(y=year), f"{'Yes' if leap else 'No'}, {year} {verb} {'' if leap else 'not '}a leap year."


def _clock(rng: random.Random) -> Pair:
    hour, minute, add = rng.randint(1, 12), rng.choice((0, 0, 15, 30, 45)), rng.randint(1, 5)
    now = f"{hour}:{minute:02d}"
    kind = rng.randrange(5)
    if kind == 0:
        later = f"{(hour + add - 1) % 12 + 1}:{minute:02d}"
        hours = "1 hour" if add == 1 else f"{add} hours"
        return f"It is {now}. What time is it in {hours}?", rng.choice((f"It will be {later}.", later))
    if kind == 1:
        half = minute + 30
        later = f"{(hour - 1 + half // 60) % 12 + 1}:{half % 60:02d}"
        return f"What time is it 30 minutes after {now}?", rng.choice((f"It is {later}.", later))
    if kind == 2:
        start, length = rng.randint(1, 8), rng.randint(1, 4)
        event = rng.choice(("film", "meeting", "lesson", "concert", "game", "party", "class"))
        hours = "1 hour" if length == 1 else f"{length} hours"
        question = f"The {event} starts at {start}:00 and takes {hours}. When does it end?"
        return question, f"It ends at {start + length}:00."
    if kind == 3:
        start, end = sorted(rng.sample(range(1, 13), 2))
        count = "1 hour" if end - start == 1 else f"{end - start} hours"
        return f"How many hours are there from {start}:00 to {end}:00?", rng.choice((f"{count}.".capitalize(), count))
    pm = rng.randint(13, 23)
    return rng.choice((f"What is {pm}:00 in 12-hour time?",
                       f"What is {pm}:00 on a 12-hour clock?")), f"It is {pm - 12}:00 pm."


def _bigger(rng: random.Random) -> Pair:
    one, _, _, small = rng.choice([unit for unit in UNITS if unit[0] not in ("dozen", "euro", "dollar", "foot",
                                                                             "yard")])
    little = small.removesuffix("s")
    word = "shorter" if one in ("minute", "hour", "day", "week", "year", "century", "decade") else "smaller"
    up = {"shorter": "longer", "smaller": "bigger"}[word]
    pair = (_a(one), _a(little))
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    if rng.random() < 0.5:
        return f"Which is {up}, {first} or {second}?", f"{pair[0].capitalize()} is {up} than {pair[1]}."
    return f"Which is {word}, {first} or {second}?", f"{pair[1].capitalize()} is {word} than {pair[0]}."


KINDS: tuple[tuple[Callable[[random.Random], Pair], int], ...] = (
    (_fact, 12), (_convert, 20), (_day, 14), (_month, 16), (_season, 5), (_leap, 6), (_clock, 14), (_bigger, 5),
    (_fixed, 12),
)


def sample(rng: random.Random) -> Conversation:
    """One to three exchanges about units and dates."""
    makers, weights = zip(*KINDS, strict=True)
    count = rng.choices((1, 2, 3), (75, 19, 6))[0]
    parts = [part for maker in rng.choices(makers, weights, k=count) for part in maker(rng)]
    return turns(*parts, system=rng.choice(SYSTEMS) if rng.random() < 0.15 else None)
