"""Who and what the stories are about, how they open, and how they are asked for."""

from __future__ import annotations

# (kind, whether it is a person)
MALE, FEMALE = "he", "she"
PERSONS: tuple[tuple[str, str], ...] = (
    ("boy", MALE), ("girl", FEMALE), ("king", MALE), ("queen", FEMALE), ("prince", MALE), ("princess", FEMALE),
    ("farmer", MALE), ("baker", FEMALE), ("sailor", MALE), ("gardener", FEMALE), ("shepherd", MALE),
    ("painter", FEMALE),
    ("tailor", MALE), ("fisherman", MALE), ("grandmother", FEMALE), ("miller", MALE), ("wizard", MALE),
    ("witch", FEMALE),
)
ANIMALS: tuple[str, ...] = (
    "fox", "rabbit", "bear", "mouse", "cat", "dog", "duck", "frog", "hedgehog", "squirrel", "owl", "goat", "pony",
    "lamb",
    "turtle", "elephant", "lion", "monkey", "penguin", "badger", "otter", "wolf", "donkey", "kitten", "puppy", "dragon",
    "robot",
)
NAMES: dict[str, tuple[str, ...]] = {
    MALE: (
        "Tom", "Ben", "Max", "Leo", "Sam", "Pip", "Oscar", "Felix", "Hugo", "Bruno", "Jack", "Otto", "Tim", "Finn",
        "Toby",
    ),
    FEMALE: (
        "Lily", "Mia", "Anna", "Rosie", "Bella", "Ida", "Lucy", "Nora", "Ella", "Daisy", "Molly", "Clara", "Zoe",
        "Ruby",
    ),
}
PRONOUNS: dict[str, dict[str, str]] = {
    MALE: {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His", "himself": "himself"},
    FEMALE: {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her", "himself": "herself"},
}
TRAITS: tuple[str, ...] = (
    "little", "young", "kind", "brave", "shy", "clever", "curious", "cheerful", "quiet", "gentle", "busy", "honest",
    "funny", "eager",
)
THINGS: tuple[str, ...] = (
    "red ball", "blue kite", "silver bell", "golden key", "wooden box", "green umbrella", "small drum", "old map",
    "woolly hat",
    "toy boat", "red scarf", "yellow lantern", "music box", "picture book", "shiny whistle", "wooden horse",
    "warm blanket",
    "blue cup", "orange basket", "little flute", "straw hat", "purple mitten", "glass marble", "tin soldier",
    "old watch",
)
FRIENDS: tuple[str, ...] = (
    "old owl", "grey mouse", "brown hare", "young beaver", "black crow", "fat toad", "white goose", "old tortoise",
    "red robin",
    "tall stork", "small hedgehog", "old mole", "friendly otter", "wise badger", "merry sparrow",
)
# (where it is, the place)
PLACES: tuple[tuple[str, str], ...] = (
    ("in", "forest"), ("near", "sea"), ("on", "farm"), ("in", "village"), ("by", "river"), ("on", "hill"),
    ("in", "valley"),
    ("near", "lake"), ("in", "mountains"), ("in", "meadow"), ("by", "old mill"), ("near", "castle"), ("on", "island"),
    ("in", "town"), ("near", "bridge"), ("by", "pond"), ("in", "green woods"), ("near", "harbour"),
)
OPENINGS: tuple[str, ...] = (
    "Once upon a time, {a_trait} {kind} named {name} lived {at}.",
    "There was once {a_trait} {kind} named {name}, who lived {at}.",
    "Long ago, {at}, there lived {a_trait} {kind}. {His} name was {name}.",
    "{name} was {a_trait} {kind} who lived {at}.",
    "{A_trait} {kind} called {name} lived {at}.", "In a small house {at} lived {a_trait} {kind} named {name}.",
    "Many years ago, {a_trait} {kind} called {name} had a home {at}.",
    "Not so long ago, {name}, {a_trait} {kind}, lived {at}.",
)
OWNED: tuple[str, ...] = (
    "The thing {he} loved most was {a_thing}.", "{He} had {a_thing}, and {he} took it everywhere.",
    "On {his} birthday {he} had been given {a_thing}.", "{His} greatest treasure was {a_thing}.",
    "Every day {he} played with {a_thing} that {his} grandfather had made.",
    "Nothing made {him} happier than {his} {thing}.",
)
MOODS: tuple[str, ...] = (
    "Everyone there knew {him} well.", "{He} liked to get up early and listen to the birds.",
    "{He} was poor, but {he} was happy.",
    "{He} liked long walks and warm bread.", "Every morning {he} sang a little song.",
    "The days were calm and the nights were full of stars.",
    "{He} was small, but {his} heart was big.", "{He} often dreamed of great adventures.",
)
WEATHERS: tuple[str, ...] = (
    "One sunny morning,", "One cold day,", "One windy afternoon,", "One day in spring,", "One evening in autumn,",
    "One day,",
    "Early one morning,", "On a warm summer day,", "One rainy day,", "One winter morning,",
)
ENDINGS: tuple[str, ...] = (
    "That night {name} slept very well.", "From that day on, {name} and the {friend} were the best of friends.",
    "And {name} never forgot that day.", "Then they went home together, singing all the way.",
    "And they all lived happily ever after.",
    "That evening they had hot soup and laughed a lot.", "The stars came out, and all was well.",
    "People still tell this story today.", "{name} smiled and went home for supper.",
)
ASKED_FRAMES: tuple[str, ...] = (
    "Tell me a story about {about}.", "Write a short story about {about}.", "Can you tell me a story about {about}?",
    "Can you tell me a bedtime story about {about}?", "I would like a story about {about}.",
    "Please write a story about {about}.",
    "Make up a story about {about}.", "Write a little tale about {about}.", "Tell my children a story about {about}.",
    "Story about {about}, please.", "Could you write a very short story about {about}?",
    "Invent a short tale about {about}.",
    "I want to hear a story about {about}.", "Give me a short story about {about}.", "write a story about {about}",
    "Tell me a tale about {about}, please.", "Do you know a story about {about}?",
)
ASKED_PLAIN: tuple[str, ...] = (
    "Tell me a story.", "Can you tell me a bedtime story?", "Write a short story.", "Please tell me a story.",
    "I cannot sleep. Tell me a story.",
    "Do you know a story?", "Make up a story for me.", "Tell me a short tale.", "I want to hear a story.",
    "Write a little story for a child.",
)
CONTINUE_FRAMES: tuple[str, ...] = (
    "Continue this story: {first}", "Go on with this story: {first}", "Finish the story: {first}",
    "What happens next? {first}",
    "Here is how a story begins: {first} Please go on.", "Write the rest of this story. {first}", 'Continue: "{first}"',
    "A story starts like this: {first} Tell me the rest.",
)
TOLD_FRAMES: tuple[str, ...] = ("", "", "", "", "", "", "Here is a story. ", "Of course! ", "Sure! ", "Gladly. ")
