"""Text to copy: sentences of a random grammar, questions about Python, code, rare words, random sequences."""

from __future__ import annotations

import random
import re

PYTHON: tuple[tuple[str, str], ...] = (
    ("How do I reverse a list?", "Use `items.reverse()` or `items[::-1]`."),
    ("Which module reads zip files?", "The `zipfile` module."),
    ("How do I sort a list?", "Use `sorted(items)` or `items.sort()`."),
    ("How do I read a text file?", "Use `open(path)` and call `read()`."),
    ("How do I split a string at commas?", "Use `text.split(\",\")`."),
    ("How do I join strings with a space?", "Use `\" \".join(words)`."),
    ("Which module parses JSON?", "The `json` module."),
    ("How do I get the length of a string?", "Use `len(text)`."),
    ("How do I make a string upper case?", "Use `text.upper()`."),
    ("How do I make text lower case?", "Use `text.lower()`."),
    ("How do I remove spaces around a string?", "Use `text.strip()`."),
    ("Which module works with dates?", "The `datetime` module."),
    ("How do I add an item to a list?", "Use `items.append(item)`."),
    ("How do I remove the last item of a list?", "Use `items.pop()`."),
    ("How can I find the largest number in a list?", "Use `max(numbers)`."),
    ("How can I find the smallest number in a list?", "Use `min(numbers)`."),
    ("How do I add up a list of numbers?", "Use `sum(numbers)`."),
    ("How do I round a number?", "Use `round(number)`."),
    ("How do I turn a string into an integer?", "Use `int(text)`."),
    ("How do I turn a number into a string?", "Use `str(number)`."),
    ("Which module makes random numbers?", "The `random` module."),
    ("Which module reads CSV files?", "The `csv` module."),
    ("How do I get the keys of a dictionary?", "Use `data.keys()`."),
    ("How do I get the values of a dictionary?", "Use `data.values()`."),
    ("How do I check if a key is in a dictionary?", "Use `key in data`."),
    ("How do I delete a key from a dictionary?", "Use `del data[key]`."),
    ("How do I loop over a list?", "Use `for item in items:`."),
    ("How do I loop with an index?", "Use `enumerate(items)`."),
    ("How do I loop over two lists at once?", "Use `zip(first, second)`."),
    ("How do I define a function?", "Use the keyword `def`."),
    ("How do I define a class?", "Use the keyword `class`."),
    ("How do I write a comment?", "Start the line with `#`."),
    ("How do I catch an exception?", "Use `try` and `except`."),
    ("How do I raise an error?", "Use the keyword `raise`."),
    ("Which module has the square root?", "The `math` module."),
    ("How do I list the files in a folder?", "Use `os.listdir(path)`."),
    ("How do I check if a file exists?", "Use `Path(path).exists()`."),
    ("How do I make a new folder?", "Use `os.mkdir(path)`."),
    ("How do I delete a file?", "Use `os.remove(path)`."),
    ("Which module copies files?", "The `shutil` module."),
    ("How do I read the arguments of a script?", "Use `sys.argv` or `argparse`."),
    ("Which module handles regular expressions?", "The `re` module."),
    ("How do I wait for two seconds?", "Use `time.sleep(2)`."),
    ("How do I run another program?", "Use `subprocess.run(command)`."),
    ("How do I count the items in a list?", "Use `len(items)`."),
    ("Which class counts things?", "`collections.Counter`."),
    ("How do I remove duplicates from a list?", "Use `set(items)`."),
    ("How do I make a set?", "Use `set()`."),
    ("How do I make an empty dictionary?", "Use `{}`."),
    ("How do I replace a word in a string?", "Use `text.replace(old, new)`."),
    ("How do I find a word in a string?", "Use `text.find(word)`."),
    ("How do I check the type of a value?", "Use `type(value)`."),
    ("How do I print without a new line?", "Use `print(text, end=\"\")`."),
    ("How do I ask the user for input?", "Use `input()`."),
    ("How do I stop a loop?", "Use the keyword `break`."),
    ("How do I skip to the next step of a loop?", "Use the keyword `continue`."),
    ("How do I import a module?", "Use the keyword `import`."),
    ("Which module opens web pages?", "The `urllib.request` module."),
    ("Which module works with SQLite?", "The `sqlite3` module."),
    ("How do I get the absolute value of a number?", "Use `abs(number)`."),
    ("Which module compresses data with gzip?", "The `gzip` module."),
    ("How do I copy a list?", "Use `items.copy()`."),
    ("Which module writes log messages?", "The `logging` module."),
    ("How do I get the current time?", "Use `datetime.now()`."),
)
VERBS = ("open", "read", "write", "copy", "rename", "delete", "sort", "filter", "parse", "merge", "split", "reverse",
         "print",
         "compare", "convert", "download", "compress", "encode", "decode", "count", "search", "clean", "validate",
         "load",
         "save", "shuffle", "iterate over", "flatten", "group", "append to", "test", "import", "cache", "format",
         "check")
OBJECTS = ("list", "string", "dictionary", "tuple", "set", "text file", "folder", "CSV file", "JSON file", "zip file",
           "nested list", "list of numbers", "list of strings", "date", "path", "log file", "web page",
           "database table",
           "function", "class", "module", "generator", "queue", "matrix", "config file", "byte string", "data frame",
           "decorator", "array", "image", "object", "integer", "environment variable", "XML document", "iterator")
ASKS = ("How do I {v} {o} in Python?", "How can I {v} {o}?", "What is the best way to {v} {o}?", "How do you {v} {o}?",
        "Which function can {v} {o}?", "Is there a quick way to {v} {o}?", "Why can I not {v} {o}?",
        "Can Python {v} {o}?",
        "What is a simple way to {v} {o} in Python?", "Which module helps me to {v} {o}?",
        "Can you show me how to {v} {o}?")
NAMES = ("Anna", "Peter", "Maria", "Omar", "Lucy", "Ben", "Nina", "Karim", "Elena", "Jonas", "Sofia", "Ivan", "Ruth",
         "David",
         "Mei", "Carlos", "Fatima", "Oscar", "Priya", "Hugo", "Clara", "Tariq", "Emma", "Noah", "Leila", "Igor",
         "Wanda",
         "Quentin", "Zoe", "Xavier", "Yusuf", "Thandi", "Bjorn", "Ines", "Kofi", "Dmitri", "Aiko", "Rosalind", "Mateus")
SURNAMES = ("Hill", "Marsh", "Novak", "Okafor", "Lindqvist", "Brandt", "Castillo", "Moreau", "Tanaka", "Whitlock",
            "Abebe",
            "Petrov", "Rossi", "Haddad", "Kowalski", "Byrne", "Falk", "Ortega", "Singh", "Vance", "Yilmaz", "Zimmer")
ADJECTIVES = ("old", "small", "green", "quiet", "heavy", "bright", "broken", "empty", "tall", "soft", "round", "cheap",
              "cold",
              "wooden", "yellow", "strange", "clean", "dusty", "narrow", "golden", "tiny", "angry", "clever", "pale",
              "rusty")
NOUNS = ("dog", "teacher", "boat", "letter", "garden", "window", "king", "farmer", "candle", "bridge", "apple", "clock",
         "river", "soldier", "basket", "horse", "violin", "engine", "tower", "kitten", "ladder", "mountain", "nurse",
         "mirror",
         "umbrella", "pocket", "parrot", "island", "lamp", "wizard", "carpet", "neighbour", "tractor", "blanket", "owl")
PAST = ("saw", "found", "carried", "painted", "forgot", "bought", "lost", "watched", "followed", "hid", "cleaned",
        "kept",
        "dropped", "drew", "heard", "touched", "liked", "sold", "pulled", "moved", "remembered", "photographed")
PLACES = ("near the river", "in the kitchen", "behind the house", "on the hill", "under the bridge", "at the station",
          "in the old town", "by the sea", "on the roof", "next to the school", "in the forest", "at the market")
TIMES = ("yesterday", "in the morning", "last week", "before lunch", "at night", "on Monday", "in winter", "every day",
         "again",
         "after the storm", "at noon", "two years ago")
SINGLES = ("The weather is nice today.", "I like tea with milk.", "Please close the door.", "We will meet at six.",
           "Nothing is lost.", "Good things take time.", "My keys are in the bag.", "The shop is closed on Sundays.",
           "It is never too late to learn.", "Thank you for coming.", "The test is on Friday.", "She sells sea shells.",
           "All birds can sing.", "Two heads are better than one.", "Today is a good day.", "I will be back soon!")
RARE = ("quixotic", "zephyr", "obelisk", "marzipan", "cobalt", "isthmus", "quagmire", "sphinx", "gargoyle", "lexicon",
        "nimbus",
        "oblong", "palimpsest", "rhubarb", "sycamore", "tungsten", "umbra", "vortex", "walrus", "xylophone", "yodel",
        "zinc",
        "alabaster", "bassoon", "catapult", "dirigible", "ephemeral", "filigree", "gossamer", "halcyon", "ibex",
        "jubilee",
        "kumquat", "labyrinth", "mnemonic", "nectarine", "ocelot", "pumice", "quartz", "ravioli", "sextant", "thistle",
        "ukulele", "vermilion", "wombat", "yttrium", "zucchini", "axolotl", "bergamot", "chrysalis", "dulcimer",
        "epsilon")
SYLLABLES = ("ba", "ko", "ri", "zu", "fen", "tal", "mor", "vi", "qua", "lo", "ste", "bri", "dax", "wug", "nel", "pim",
             "sha",
             "gor", "thi", "ulm", "yex", "zan", "ple", "cru", "dow", "hib", "jas", "ket", "lum", "nop", "ost", "rif",
             "tov")
CODE = ('{v}.split(",")', "len({v})", "print({v})", "for {w} in {v}:", "{v} = [{n}, {m}]", "import {mod}",
        "{v}.append({w})",
        "{v}[{n}:{m}]", "def {f}({v}):", "return {v} + {n}", "if {v} == {n}:", 'open("{v}.txt")', "{v} += {n}",
        "while {v} < {m}:",
        "from {mod} import {f}", "sorted({v}, reverse=True)", "{f}({v}, {n})", "{v}.{f}()", 'print(f"{w}")',
        "{v} = {f}({w})",
        '{v}.replace("{w}", "-")', "assert {v} is not None", "[{w} for {w} in {v}]", "{v}, {w} = {n}, {m}",
        "range({n}, {m})")
VARS = ("text", "items", "data", "x", "total", "names", "line", "row", "word", "result", "count", "path", "value",
        "key", "i")
FUNCS = ("load", "parse", "add", "clean", "main", "run", "make_list", "read_all", "to_text", "find_best", "update",
         "close")
MODULES = ("os", "re", "json", "math", "random", "csv", "time", "sys", "itertools", "zipfile", "pathlib", "collections")


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    vowel = re.match(r"[aeioAEIO]|u[mnp]|XML|SQL", words)
    return f"{'an' if vowel else 'a'} {words}"


def sentence(rng: random.Random) -> str:
    """A grammatical sentence, most often made of random parts."""
    if rng.random() < 0.06:
        return rng.choice(SINGLES)
    noun = rng.choice(NOUNS) if rng.random() < 0.5 else f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    subject = rng.choice((f"The {noun}", article(noun).capitalize(), rng.choice(NAMES), f"My {noun}",
                          f"{rng.choice(NAMES)}'s {noun}"))
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    start = f"{subject} {rng.choice(PAST)}"
    number = rng.randint(2, 99)
    return rng.choice((
        f"{start} the {thing} {rng.choice(PLACES)}.", f"{start} {article(thing)} {rng.choice(TIMES)}.",
        f"{start} {rng.choice(NAMES)} {rng.choice(PLACES)}.", f"{subject} is {rng.choice(ADJECTIVES)}.",
        f"{subject} is {rng.choice(ADJECTIVES)}, but the {thing} is {rng.choice(ADJECTIVES)}!",
        f"There are {number} {rng.choice(ADJECTIVES)} boxes {rng.choice(PLACES)}.",
        f"{rng.choice(NAMES)} {rng.choice(SURNAMES)} and {rng.choice(NAMES)} {rng.choice(PAST)} the {thing}.",
        f"Did {rng.choice(NAMES)} see the {thing} {rng.choice(PLACES)}?", f"Where is the {thing}?",
        f"{start} the {rng.choice(NOUNS)}, the {rng.choice(NOUNS)} and the {rng.choice(NOUNS)}.",
    ))


def plain_sentence(rng: random.Random) -> str:
    """A sentence of plain words and a full stop: no comma, quote or question mark."""
    start = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(PAST)} the {rng.choice(NOUNS)}"
    return f"{start} {rng.choice(PLACES)}." if rng.random() < 0.5 else f"{start}."


def combo(rng: random.Random) -> tuple[str, str]:
    """A question of a random verb and a random object, and the task it asks about."""
    verb, thing = rng.choice(VERBS), article(rng.choice(OBJECTS))
    return rng.choice(ASKS).format(v=verb, o=thing), f"{verb} {thing}"


def python_question(rng: random.Random) -> str:
    """A question about programming."""
    return rng.choice(PYTHON)[0] if rng.random() < 0.35 else combo(rng)[0]


def code(rng: random.Random) -> str:
    """A short piece of Python."""
    var, other = rng.sample(VARS, 2)
    return rng.choice(CODE).format(v=var, w=other, f=rng.choice(FUNCS), mod=rng.choice(MODULES), n=rng.randint(0, 9),
                                   m=rng.randint(10, 99))


def invented(rng: random.Random) -> str:
    """A word that does not exist."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def token(rng: random.Random) -> str:
    """A code such as a ticket or a product has."""
    letters, digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    short = "".join(rng.choices(letters, k=rng.randint(1, 3)))
    return rng.choice((f"{short}-{rng.randint(1, 9999)}", "".join(rng.choices(letters + digits, k=rng.randint(4, 7))),
                       f"{short}{rng.randint(10, 999)}", "".join(rng.choices("0123456789abcdef", k=rng.randint(5, 8)))))


def noise(rng: random.Random) -> str:
    """Rare words, made-up words, or random words, letters and numbers."""
    pool = RARE + NOUNS + ADJECTIVES
    count = rng.randint(1, 6)
    return rng.choice((
        lambda: " ".join(rng.choices(RARE, k=count)), lambda: " ".join(rng.choices(pool, k=count + 1)),
        lambda: " ".join(invented(rng) for _ in range(count)), lambda: token(rng),
        lambda: " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count + 2)),
        lambda: " ".join(str(rng.randint(0, 999)) for _ in range(count)), lambda: str(rng.randint(100, 99999999)),
        lambda: ", ".join(rng.choices(pool, k=count + 1)), lambda: f"{invented(rng)} {rng.choice(pool)} {token(rng)}",
    ))()


def full_name(rng: random.Random) -> str:
    """A first name and a surname."""
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def material(rng: random.Random) -> str:
    """Anything worth copying."""
    makers = (sentence, python_question, noise, code, full_name)
    return rng.choices(makers, (32, 24, 30, 9, 5))[0](rng)
