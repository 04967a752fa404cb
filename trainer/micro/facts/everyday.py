"""Common knowledge in small pieces: capitals, opposites, animals, colours, definitions, short facts."""

from __future__ import annotations

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Wales": "Cardiff", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "the Netherlands": "Amsterdam", "Belgium": "Brussels", "Austria": "Vienna", "Switzerland": "Bern",
    "Poland": "Warsaw", "Hungary": "Budapest", "Romania": "Bucharest", "Bulgaria": "Sofia", "Greece": "Athens",
    "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Croatia": "Zagreb", "Serbia": "Belgrade",
    "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "the Czech Republic": "Prague", "Estonia": "Tallinn",
    "Latvia": "Riga", "Lithuania": "Vilnius", "Egypt": "Cairo", "Morocco": "Rabat", "Kenya": "Nairobi",
    "Ghana": "Accra", "Nigeria": "Abuja", "Ethiopia": "Addis Ababa", "Tunisia": "Tunis", "Algeria": "Algiers",
    "Senegal": "Dakar", "Uganda": "Kampala", "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi",
    "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad",
    "Nepal": "Kathmandu", "Mongolia": "Ulaanbaatar", "Australia": "Canberra", "New Zealand": "Wellington",
    "Canada": "Ottawa", "the United States": "Washington, D.C.", "Mexico": "Mexico City", "Cuba": "Havana",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota",
    "Venezuela": "Caracas", "Uruguay": "Montevideo", "Ecuador": "Quito",
}

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("happy", "sad"), ("light", "dark"),
    ("up", "down"), ("left", "right"), ("open", "closed"), ("full", "empty"), ("wet", "dry"), ("old", "young"),
    ("rich", "poor"), ("hard", "soft"), ("loud", "quiet"), ("clean", "dirty"), ("near", "far"), ("early", "late"),
    ("strong", "weak"), ("thick", "thin"), ("wide", "narrow"), ("high", "low"), ("good", "bad"), ("true", "false"),
    ("day", "night"), ("black", "white"), ("summer", "winter"), ("begin", "end"), ("push", "pull"),
    ("love", "hate"), ("win", "lose"), ("inside", "outside"), ("first", "last"), ("always", "never"),
    ("brave", "cowardly"), ("sharp", "blunt"), ("deep", "shallow"), ("buy", "sell"),
    ("give", "take"), ("remember", "forget"), ("easy", "difficult"), ("smooth", "rough"), ("kind", "cruel"),
)

COLOURS: tuple[tuple[str, str, str], ...] = (
    ("grass", "is", "green"), ("snow", "is", "white"), ("a clear sky", "is", "blue"), ("a banana", "is", "yellow"),
    ("coal", "is", "black"), ("blood", "is", "red"), ("milk", "is", "white"), ("a carrot", "is", "orange"),
    ("a lemon", "is", "yellow"), ("a ripe tomato", "is", "red"), ("chocolate", "is", "brown"), ("salt", "is", "white"),
    ("an elephant", "is", "grey"), ("a polar bear", "is", "white"), ("a crow", "is", "black"),
    ("a flamingo", "is", "pink"), ("a strawberry", "is", "red"), ("cucumbers", "are", "green"),
    ("pumpkins", "are", "orange"), ("oranges", "are", "orange"), ("tree trunks", "are", "brown"),
    ("frogs", "are", "green"), ("sunflowers", "are", "yellow"), ("swans", "are", "white"),
)

SOUNDS: tuple[tuple[str, str], ...] = (
    ("dog", "barks"), ("cat", "meows"), ("cow", "moos"), ("sheep", "bleats"), ("lion", "roars"), ("duck", "quacks"),
    ("horse", "neighs"), ("bee", "buzzes"), ("frog", "croaks"), ("owl", "hoots"), ("snake", "hisses"),
    ("wolf", "howls"), ("pig", "oinks"), ("mouse", "squeaks"), ("crow", "caws"), ("donkey", "brays"),
)

YOUNG: tuple[tuple[str, str], ...] = (
    ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"), ("horse", "foal"), ("goat", "kid"),
    ("duck", "duckling"), ("hen", "chick"), ("frog", "tadpole"), ("lion", "cub"), ("bear", "cub"), ("pig", "piglet"),
    ("goose", "gosling"), ("deer", "fawn"), ("swan", "cygnet"), ("kangaroo", "joey"), ("owl", "owlet"),
)

LEGS: tuple[tuple[str, str], ...] = (
    ("dog", "four"), ("cat", "four"), ("spider", "eight"), ("bee", "six"), ("ant", "six"), ("bird", "two"),
    ("horse", "four"), ("fly", "six"), ("cow", "four"), ("chicken", "two"), ("butterfly", "six"), ("elephant", "four"),
)

DEFINITIONS: tuple[tuple[str, str], ...] = (
    ("a river", "water that flows over the land to a lake or the sea"),
    ("a desert", "a very dry place with little rain"),
    ("an island", "a piece of land with water all around it"), ("a mountain", "a very high piece of land"),
    ("a volcano", "a mountain that can throw out hot melted rock"), ("a forest", "a large area covered with trees"),
    ("a planet", "a large round body that moves around a star"), ("a star", "a huge ball of hot glowing gas"),
    ("the Moon", "the body of rock that moves around the Earth"), ("the Sun", "the star at the centre of our system"),
    ("rain", "water that falls from the clouds in drops"), ("snow", "frozen water that falls as soft white flakes"),
    ("ice", "water that has frozen hard"), ("steam", "water that has become hot gas"), ("wind", "air that is moving"),
    ("a cloud", "many tiny drops of water floating in the sky"),
    ("a rainbow", "an arc of colours made by sun and rain"),
    ("a library", "a place where people read and borrow books"), ("a school", "a place where people go to learn"),
    ("a hospital", "a place where sick people are cared for"),
    ("a museum", "a building where old or rare things are shown"),
    ("a bakery", "a shop where bread and cakes are made"), ("a market", "a place where people buy and sell things"),
    ("a farm", "a place where crops are grown and animals are kept"),
    ("a bridge", "a road built over water or a valley"),
    ("a doctor", "a person who helps sick people get well"), ("a teacher", "a person who helps others to learn"),
    ("a baker", "a person who makes bread and cakes"), ("a carpenter", "a person who makes things from wood"),
    ("a pilot", "a person who flies a plane"), ("a sailor", "a person who works on a ship"),
    ("a farmer", "a person who grows food and keeps animals"), ("a poet", "a person who writes poems"),
    ("a tailor", "a person who makes clothes"), ("an orphan", "a child whose parents have died"),
    ("a hammer", "a tool for hitting nails"), ("a saw", "a tool for cutting wood"),
    ("a clock", "a thing that shows the time"),
    ("a compass", "a tool that shows where north is"), ("a telescope", "a tool for seeing things that are far away"),
    ("an umbrella", "a thing you hold over your head to keep off the rain"),
    ("a map", "a drawing of a place from above"),
    ("a key", "a small metal thing that opens a lock"), ("a kettle", "a pot for boiling water"),
    ("a piano", "an instrument with black and white keys"), ("a violin", "an instrument with four strings and a bow"),
    ("a drum", "an instrument that you hit to make a sound"),
    ("a poem", "a piece of writing with a beat, often with rhymes"),
    ("a dictionary", "a book that tells you what words mean"),
    ("a letter", "a written message, or a sign of the alphabet"),
    ("a whale", "a very large animal that lives in the sea"), ("a penguin", "a bird that swims well but cannot fly"),
    ("a bat", "a small flying animal that is awake at night"), ("a snail", "a slow animal that carries a shell"),
    ("an insect", "a small animal with six legs"), ("a fish", "an animal that lives and breathes in water"),
    ("a seed", "the small part of a plant from which a new plant grows"),
    ("a root", "the part of a plant under the ground"),
    ("bread", "a food made from flour, water and yeast"), ("cheese", "a food made from milk"),
    ("butter", "a soft yellow food made from cream"), ("honey", "a sweet food that bees make from flowers"),
    ("soup", "a warm liquid food made from vegetables, meat or fish"),
    ("tea", "a drink made from leaves and hot water"),
    ("wool", "the soft hair of sheep, used for warm clothes"), ("glass", "a hard clear material made from sand"),
    ("paper", "thin sheets made from wood, used for writing"), ("gold", "a yellow metal that is worth a lot"),
    ("a friend", "a person whom you like and trust"), ("a secret", "something that only a few people know"),
    ("a promise", "something that you say you will surely do"), ("a noun", "a word for a person, a place or a thing"),
    ("a verb", "a word for something that is done"), ("an adjective", "a word that describes a noun"),
    ("a computer", "a machine that works with numbers and words very fast"),
    ("the internet", "a net of linked computers"),
    ("a language model", "a program that guesses which words come next"), ("a century", "a time of one hundred years"),
    ("a dozen", "a group of twelve"), ("a triangle", "a shape with three sides"),
    ("a square", "a shape with four equal sides"),
    ("breakfast", "the first meal of the day"), ("an echo", "a sound that comes back to you"),
)
