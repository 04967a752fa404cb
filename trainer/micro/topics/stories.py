"""Very short stories, told and continued; descriptions of scenes; letters and notes."""

from __future__ import annotations

import random
from typing import NamedTuple

from trainer.micro.conversation import Conversation, turns
from trainer.micro.facts import scenes
from trainer.micro.facts import story_people as people
from trainer.micro.facts.small_talk_lines import NAMES
from trainer.micro.facts.story_plots import FOUND_PLOTS, OWNED_PLOTS
from trainer.micro.facts.wording import capitalised, with_article

COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Story(NamedTuple):
    """A story: its first sentence, the rest of it, and the words it is made of."""

    first: str
    rest: str
    words: dict[str, str]


def _words(rng: random.Random) -> dict[str, str]:
    """Everything that a sentence of a story may name."""
    kind, gender = rng.choice((
        *people.PERSONS, *((one, rng.choice((people.MALE, people.FEMALE))) for one in people.ANIMALS)
    ))
    trait, thing = rng.choice(people.TRAITS), rng.choice(people.THINGS)
    friend = rng.choice([one for one in people.FRIENDS if not one.endswith(kind)])
    near, place = rng.choice(people.PLACES)
    a_trait = with_article(trait)
    return {
        **people.PRONOUNS[gender], "kind": kind, "a_kind": with_article(kind), "name": rng.choice(people.NAMES[gender]),
        "a_trait": a_trait, "A_trait": capitalised(a_trait), "thing": thing, "a_thing": with_article(thing),
        "friend": friend,
        "at": f"{near} the {place}", "place": f"the {place}", "day": rng.choice(people.WEATHERS),
    }


def _story(rng: random.Random) -> Story:
    """A story by one of the plots."""
    words = _words(rng)
    owned = rng.random() < 0.5
    plot = rng.choice(OWNED_PLOTS if owned else FOUND_PLOTS)
    slots = [people.MOODS] if not owned or rng.random() < 0.4 else []
    slots += [people.OWNED] if owned else []
    sentences = [rng.choice(slot).format(**words) for slot in (*slots, *plot[:-1])]
    ending = rng.choice(people.ENDINGS).format(**words)
    moral = rng.choice(plot[-1]).format(**words)
    shape = rng.random()
    last = [ending, moral] if shape < 0.4 else [moral] if shape < 0.7 else [ending]
    return Story(rng.choice(people.OPENINGS).format(**words), _paragraphs(rng, [*sentences, *last]), words)


def _paragraphs(rng: random.Random, sentences: list[str]) -> str:
    """The sentences as one paragraph, or as two."""
    if rng.random() < 0.6:
        return " ".join(sentences)
    middle = rng.randint(2, len(sentences) - 3)
    return " ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:])


def _about(rng: random.Random, words: dict[str, str]) -> str:
    """What of the story is asked for."""
    return rng.choice((
        words["a_kind"], words["a_kind"], f"{words['a_kind']} named {words['name']}",
        f"{words['a_kind']} and {words['a_thing']}",
        f"{words['a_kind']} and the {words['friend']}", words["a_thing"], f"{words['a_kind']} who lives {words['at']}",
        f"{words['name']} and the {words['thing']}", f"{words['a_kind']} called {words['name']} and {words['a_thing']}",
    ))


def told(rng: random.Random) -> Conversation:
    """A story asked for and told, sometimes with a question about it."""
    story = _story(rng)
    frame = rng.choice(people.ASKED_FRAMES) if rng.random() < 0.85 else rng.choice(people.ASKED_PLAIN)
    said = [frame.format(about=_about(rng, story.words)), f"{rng.choice(people.TOLD_FRAMES)}{story.first} {story.rest}"]
    if rng.random() < 0.25:
        said += _afterwards(rng, story)
    return turns(*said)


def _afterwards(rng: random.Random, story: Story) -> tuple[str, str]:
    """A question about the story, or thanks for it."""
    words = story.words
    return rng.choice((
        (f"What was the name of the {words['kind']}?", f"The name of the {words['kind']} was {words['name']}."),
        (f"Where did {words['name']} live?", f"{words['name']} lived {words['at']}."),
        (f"Who was {words['name']}?", f"{words['name']} was {words['a_trait']} {words['kind']}."),
        ("Who else was in the story?", f"The {words['friend']} was in it too."),
        ("That was nice. Thank you!", "You are welcome! I am glad that you liked it."),
        ("What a lovely story!", "Thank you! Ask me for another one whenever you like."),
    ))


def continued(rng: random.Random) -> Conversation:
    """A story whose first sentence is the user's."""
    story = _story(rng)
    return turns(rng.choice(people.CONTINUE_FRAMES).format(first=story.first), story.rest)


def described(rng: random.Random) -> Conversation:
    """A scene in two to five sentences, as many as were asked for."""
    scene, sentences = rng.choice(list(scenes.SCENES.items()))
    count = rng.randint(2, 5)
    chosen = sorted(rng.sample(range(len(sentences)), count))
    asked = rng.choice(
        scenes.SCENE_FRAMES,
    ).format(scene=scene, count=rng.choice((COUNT_WORDS[count], COUNT_WORDS[count], str(count))))
    return turns(asked, " ".join(sentences[place] for place in chosen))


def letter(rng: random.Random) -> Conversation:
    """A short letter or note."""
    purpose, slots = rng.choice(list(scenes.LETTERS.items()))
    name, sender = rng.sample(NAMES, 2)
    words = {"name": name, "gift": rng.choice(scenes.GIFTS), "day": rng.choice(scenes.DAYS)}
    asked = rng.choice(scenes.LETTER_FRAMES).format(purpose=purpose.format(**words))
    if not asked.endswith("?") or rng.random() < 0.5:
        asked += f" My name is {sender}."
    else:
        sender = "[your name]"
    body = " ".join(rng.choice(slot).format(**words) for slot in slots)
    return turns(
        asked, f"{rng.choice(scenes.HELLOS).format(**words)}\n\n{body}\n\n{rng.choice(scenes.CLOSINGS)},\n{sender}",
    )


def sample(rng: random.Random) -> Conversation:
    """A story in most cases; else a continuation, a scene or a letter."""
    return rng.choices((told, continued, described, letter), weights=(60, 18, 11, 11))[0](rng)
