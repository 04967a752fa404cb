"""Categories with their members, and everyday procedures step by step."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


# (plural, singular with which one member is named, members)
_CATEGORY_LINES: tuple[tuple[str, str, str], ...] = (
    ("fruits", "fruit",
     "apple, banana, pear, orange, plum, grape, cherry, peach, lemon, mango, strawberry, kiwi, pineapple, melon"),
    ("vegetables", "vegetable",
     "carrot, potato, onion, cabbage, spinach, broccoli, leek, celery, turnip, radish, beetroot"),
    ("animals that live in the sea", "sea animal",
     "shark, whale, dolphin, octopus, seal, crab, lobster, jellyfish, starfish, tuna, squid"),
    ("farm animals", "farm animal", "cow, pig, sheep, goat, hen, horse, duck, goose, donkey, turkey"),
    ("wild animals", "wild animal",
     "lion, tiger, wolf, bear, fox, elephant, zebra, giraffe, deer, leopard, rhino, hippo"),
    ("pets", "pet", "dog, cat, hamster, rabbit, parrot, goldfish, guinea pig, canary, turtle, mouse"),
    ("birds", "bird", "sparrow, eagle, owl, robin, crow, swan, duck, penguin, parrot, stork, pigeon, seagull, swallow"),
    ("insects", "insect",
     "ant, bee, fly, butterfly, beetle, wasp, mosquito, moth, grasshopper, ladybird, dragonfly, cricket"),
    ("colours", "colour",
     "red, blue, green, yellow, black, white, brown, purple, orange, pink, grey, violet, turquoise"),
    ("days of the week", "day of the week", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    ("months", "month",
     "January, February, March, April, May, June, July, August, September, October, November, December"),
    ("countries in Europe", "country in Europe",
     "France, Germany, Italy, Spain, Poland, Norway, Sweden, Greece, Portugal, Austria, Ireland"),
    ("countries in Asia", "country in Asia",
     "China, Japan, India, Thailand, Vietnam, Nepal, Mongolia, Iran, Iraq, Malaysia, Indonesia"),
    ("countries in Africa", "country in Africa",
     "Egypt, Kenya, Ghana, Nigeria, Morocco, Algeria, Tunisia, Senegal, Uganda, Ethiopia"),
    ("capital cities", "capital city",
     "Paris, Rome, Madrid, Berlin, London, Lisbon, Vienna, Oslo, Athens, Cairo, Tokyo, Ottawa, Lima"),
    ("tools", "tool", "hammer, saw, screwdriver, drill, spade, rake, axe, wrench, chisel, ladder, shovel"),
    ("pieces of furniture", "piece of furniture",
     "table, chair, bed, sofa, desk, shelf, wardrobe, bench, stool, cupboard, armchair"),
    ("things in a kitchen", "thing in a kitchen",
     "stove, pot, pan, spoon, fork, knife, plate, cup, bowl, kettle, fridge, oven"),
    ("things in a classroom", "thing in a classroom",
     "desk, blackboard, chalk, book, pencil, ruler, map, globe, chair, notebook"),
    ("clothes", "piece of clothing",
     "shirt, coat, hat, scarf, dress, skirt, jacket, sweater, sock, belt, glove, T-shirt"),
    ("parts of the body", "part of the body",
     "head, arm, leg, hand, foot, knee, elbow, shoulder, neck, nose, ear, eye, mouth, back"),
    ("musical instruments", "musical instrument",
     "piano, violin, guitar, drum, flute, trumpet, harp, cello, clarinet, accordion, organ"),
    ("sports", "sport",
     "football, tennis, swimming, running, basketball, hockey, rowing, skiing, cycling, boxing, golf, judo"),
    ("drinks", "drink", "water, tea, coffee, milk, juice, lemonade, cocoa, wine, beer, cider"),
    ("jobs", "job",
     "doctor, teacher, baker, farmer, pilot, nurse, cook, carpenter, painter, lawyer, driver, tailor, plumber"),
    ("flowers", "flower", "rose, tulip, daisy, lily, sunflower, violet, daffodil, poppy, orchid, snowdrop, carnation"),
    ("trees", "tree", "oak, birch, pine, beech, maple, willow, ash, elm, fir, poplar, chestnut"),
    ("metals", "metal", "iron, gold, silver, copper, tin, lead, zinc, aluminium, nickel, steel"),
    ("planets", "planet", "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"),
    ("shapes", "shape", "circle, square, triangle, rectangle, oval, star, cube, diamond, cone, sphere"),
    ("vehicles", "vehicle", "car, bus, train, bicycle, truck, tram, motorbike, van, tractor, taxi, scooter"),
    ("things that fly", "thing that flies",
     "plane, helicopter, bird, kite, balloon, rocket, bee, bat, butterfly, glider"),
    ("rooms of a house", "room of a house",
     "kitchen, bedroom, bathroom, living room, hall, cellar, attic, study, dining room, pantry"),
    ("buildings in a town", "building in a town",
     "school, church, library, museum, hospital, bank, station, theatre, hotel, town hall"),
    ("breakfast foods", "breakfast food",
     "bread, omelette, cereal, porridge, toast, honey, jam, yoghurt, pancake, cheese, muesli"),
    ("sweet things", "sweet thing", "cake, honey, chocolate, sugar, biscuit, ice cream, candy, jam, syrup, toffee"),
    ("things that are cold", "cold thing",
     "ice, snow, a snowman, ice cream, an iceberg, frost, winter wind, a fridge, hail, a frozen lake"),
    ("weather words", "weather word",
     "rain, snow, wind, sun, fog, storm, hail, cloud, thunder, frost, drizzle, lightning"),
    ("feelings", "feeling", "joy, anger, fear, love, hope, pride, shame, sadness, surprise, envy, calm"),
    ("family members", "family member",
     "mother, father, sister, brother, aunt, uncle, cousin, grandmother, grandfather, nephew, niece"),
    ("languages", "language",
     "English, French, German, Spanish, Italian, Russian, Chinese, Japanese, Arabic, Greek, Polish, Dutch"),
    ("school subjects", "school subject",
     "maths, history, geography, biology, music, art, physics, chemistry, English, sports"),
    ("things to take on a trip", "thing to take on a trip",
     "map, water, towel, passport, camera, jacket, book, umbrella, toothbrush, money"),
    ("board and card games", "game", "chess, checkers, dominoes, poker, bridge, backgammon, rummy, ludo, whist"),
    ("materials", "material", "wood, glass, paper, stone, wool, cotton, leather, plastic, clay, silk, rubber"),
    ("names for boys", "name for a boy", "Tom, Ben, Max, Leo, Sam, Paul, Jack, Henry, Peter, David, Oscar, Noah"),
    ("names for girls", "name for a girl", "Anna, Emma, Clara, Lucy, Maria, Nina, Rosa, Julia, Kate, Grace, Ida, Sara"),
)
CATEGORIES: tuple[tuple[str, str, tuple[str, ...]], ...] = tuple(
    (plural, single, _split(text)) for plural, single, text in _CATEGORY_LINES
)

# what is done as a verb phrase, and its steps
PROCEDURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("make tea", (
        "Boil some water.", "Put a tea bag into a cup.", "Pour the hot water over it.", "Wait for three minutes.",
        "Take the tea bag out and enjoy.",
    )),
    ("make coffee", (
        "Boil some water.", "Put ground coffee into a filter.", "Pour the water slowly over it.",
        "Pour the coffee into a cup.",
    )),
    ("make pancakes", (
        "Mix flour, eggs and milk.", "Add a little salt.", "Heat some butter in a pan.",
        "Pour in a ladle of the batter.", "Turn the pancake when it is brown.", "Serve it with sugar or jam.",
    )),
    ("boil an egg", (
        "Put water into a pot and let it boil.", "Lay the egg in the water with a spoon.", "Wait for six minutes.",
        "Take the egg out and cool it.",
    )),
    ("make a sandwich", (
        "Take two slices of bread.", "Spread butter on them.", "Add cheese and tomato.", "Put the slices together.",
    )),
    ("cook pasta", (
        "Boil a big pot of water.", "Add salt and the pasta.", "Cook it for about ten minutes.",
        "Pour off the water.", "Serve it with sauce.",
    )),
    ("make a salad", (
        "Wash the lettuce.", "Cut a tomato and a cucumber.", "Put everything into a bowl.",
        "Add oil, vinegar and salt.", "Mix it well.",
    )),
    ("make soup", (
        "Cut carrots, onions and potatoes.", "Fry the onions in a pot.", "Add the other vegetables and water.",
        "Cook them until they are soft.", "Add salt and serve.",
    )),
    ("make lemonade", (
        "Press two lemons.", "Put the juice into a jug.", "Add sugar and cold water.", "Stir it and add ice.",
    )),
    ("bake bread", (
        "Mix flour, water, salt and yeast.", "Knead the dough well.", "Let it rest for an hour.", "Form a loaf.",
        "Bake it in a hot oven until it is brown.",
    )),
    ("plant a seed", (
        "Fill a pot with soil.", "Make a small hole.", "Put the seed into it.", "Cover it with soil.",
        "Water it a little.", "Put the pot in a sunny place.",
    )),
    ("wash your hands", (
        "Wet your hands with water.", "Take some soap.", "Rub your hands for twenty seconds.", "Rinse them well.",
        "Dry them with a towel.",
    )),
    ("brush your teeth", (
        "Put toothpaste on the brush.", "Brush all your teeth for two minutes.", "Spit out the foam.",
        "Rinse your mouth with water.",
    )),
    ("make the bed", (
        "Shake out the pillow.", "Pull the sheet straight.", "Spread the blanket over the bed.",
        "Put the pillow on top.",
    )),
    ("build a snowman", (
        "Roll a big ball of snow.", "Roll a second, smaller one and put it on top.", "Add a small ball for the head.",
        "Use stones for the eyes and a carrot for the nose.", "Give it a hat.",
    )),
    ("write a letter", (
        "Take paper and a pen.", "Write the date and a greeting.", "Write what you want to say.", "Sign your name.",
        "Put it into an envelope with a stamp.",
    )),
    ("light a candle", (
        "Put the candle on a safe plate.", "Strike a match.", "Hold the flame to the wick.", "Blow out the match.",
    )),
    ("cross the street", (
        "Stop at the edge of the road.", "Look left, right and left again.", "Wait until no car is coming.",
        "Walk straight across.",
    )),
    ("borrow a book from a library", (
        "Go to the library.", "Choose a book.", "Show your library card.", "Take the book home.",
        "Bring it back in time.",
    )),
    ("wash the dishes", (
        "Fill the sink with warm water.", "Add a little soap.", "Wash the glasses first.",
        "Then wash the plates and pots.", "Dry everything with a towel.",
    )),
    ("wrap a gift", (
        "Lay the gift on the paper.", "Cut the paper to size.", "Fold it around the gift.", "Fix it with tape.",
        "Tie a ribbon around it.",
    )),
    ("fall asleep", (
        "Turn off all screens.", "Make the room dark and cool.", "Lie down and close your eyes.", "Breathe slowly.",
    )),
    ("learn a poem by heart", (
        "Read the whole poem aloud.", "Learn the first line.", "Add one line after the other.",
        "Say it without looking.", "Repeat it the next day.",
    )),
    ("water the flowers", (
        "Fill the watering can.", "Touch the soil to see if it is dry.", "Pour the water slowly on the soil.",
        "Stop before the water runs over.",
    )),
)
STEP_FRAMES: tuple[str, ...] = (
    "How do I {what}?", "How do you {what}?", "Tell me how to {what}.", "Give me the steps to {what}.",
    "Explain step by step how to {what}.",
    "How can I {what}?", "What do I have to do to {what}?", "Can you tell me how to {what}?",
    "I want to {what}. What are the steps?",
    "Please explain how to {what} in numbered steps.", "Write a short guide: how to {what}.", "how to {what}",
)
WORDS: tuple[str, ...] = _split(
    "apple, river, house, stone, cloud, green, table, music, paper, light, bread, winter, garden, "
    "happy, door, window, sugar, night, tiger, ocean, forest, pencil, yellow, market, island, bridge, "
    "candle, dream, eagle, flower, ghost, honey, juice, king, lemon, mouse, needle, orange, pepper, "
    "queen, rabbit, silver, tower, uncle, valley, water, zebra, basket, circle, dragon"
)
SENTENCES: tuple[str, ...] = (
    "The cat sleeps on the sofa", "My brother has a red bicycle", "We are going home", "The sun is shining today",
    "She reads a book every evening", "Birds sing in the old tree", "I like tea with milk", "The train is late again",
    "They live in a small house near the river", "He opened the door and smiled", "It rained all night", "Dogs bark",
    "My mother bakes the best cake in town", "The moon is bright", "Children play in the park after school",
    "Time flies",
)
