"""Scenes to describe, sentence by sentence, and short letters and notes."""

from __future__ import annotations

SCENES: dict[str, tuple[str, ...]] = {
    "a winter evening": (
        "The snow lies deep on the roofs.", "It is dark early, and the windows shine yellow.",
        "Smoke rises from the chimneys.",
        "A dog barks somewhere far away.", "The air is cold and clear.", "Inside, a fire crackles and the tea is hot.",
        "One by one the stars come out.", "Footsteps crunch on the frozen path.",
    ),
    "a market": (
        "The stalls are full of fruit and flowers.", "People talk, laugh and call out prices.",
        "It smells of bread and cheese.",
        "A woman chooses red apples.", "Children run between the baskets.", "A man sells honey in small jars.",
        "Bright cloths move in the wind.", "At noon the bells ring, and the market slowly empties.",
    ),
    "the sea": (
        "The sea is wide and blue.", "Waves roll to the shore and run back again.", "The air tastes of salt.",
        "White gulls cry above the water.", "Far out, a small ship goes by.", "Shells and stones lie on the wet sand.",
        "In the evening the water turns gold.", "The sound of the waves never stops.",
    ),
    "a forest": (
        "The trees stand tall and close together.", "Sunlight falls through the leaves in small spots.",
        "It smells of moss and wet earth.", "A bird sings high up in a tree.", "Under the ferns, something rustles.",
        "A narrow path leads deeper into the shade.", "A stream runs over smooth stones.", "It is cool and quiet here.",
    ),
    "a spring morning": (
        "The sun comes up over the green fields.", "Small flowers open in the grass.",
        "The birds sing louder than on other days.",
        "The air is fresh after the rain.", "Lambs jump in the meadow.", "People open their windows wide.",
        "The first bees fly from flower to flower.",
    ),
    "a busy street": (
        "Cars and buses go by without end.", "People hurry along with bags in their hands.",
        "A man plays a guitar at the corner.",
        "The lights turn from red to green.", "It smells of coffee from a small shop.",
        "A child points at a big red bus.",
        "Bicycles ring their bells.", "In the evening the shop windows begin to shine.",
    ),
    "a kitchen": (
        "A pot of soup is cooking on the stove.", "The window is white with steam.",
        "It smells of onions and fresh bread.",
        "Cups hang in a row on the wall.", "A cat sleeps under the table.", "Someone is cutting carrots and singing.",
        "On the table stands a bowl of red apples.",
    ),
    "a storm": (
        "Black clouds cover the sky.", "The wind bends the trees.", "Rain beats against the windows.",
        "Lightning makes the night white.",
        "The thunder rolls over the hills.", "Leaves and branches fly through the air.",
        "Then, slowly, the rain grows softer.",
        "At last it is still, and the air is fresh.",
    ),
    "an old house": (
        "The old house stands at the end of the lane.", "Its walls are grey, and its roof is green with moss.",
        "The door creaks when it opens.", "Dust lies on the stairs.", "A clock on the wall stopped long ago.",
        "In the garden the roses grow as they like.", "At night the wind sings in the chimney.",
    ),
    "a garden in summer": (
        "Roses and lilies stand in full bloom.", "Bees hum in the warm air.", "The grass is soft and green.",
        "Red tomatoes hang on the plants.", "A cat lies in the shade of the apple tree.",
        "Somebody has left a book on the bench.",
        "In the evening it smells of flowers and wet earth.",
    ),
    "a harbour": (
        "Small boats rock on the water.", "The fishermen carry boxes of fish to the shore.",
        "Ropes and nets lie on the stones.",
        "Gulls wait for something to eat.", "It smells of salt and tar.", "A ship with white sails comes in.",
        "The lighthouse sends its light over the sea.",
    ),
    "an autumn day": (
        "The leaves are red, brown and gold.", "A cold wind blows them over the road.", "Fog lies on the fields.",
        "Apples and pears are ripe in the gardens.", "The birds gather to fly south.",
        "Children look for chestnuts under the trees.",
        "The days are getting shorter.",
    ),
    "a train station": (
        "People stand with their bags and wait.", "A train comes in with a long whistle.",
        "The doors open, and everybody moves at once.",
        "An old man waves with his hat.", "A girl runs into the arms of her mother.", "The big clock shows the time.",
        "Then the train is gone, and it is quiet again.",
    ),
    "a mountain": (
        "The top of the mountain is white with snow.", "A steep path winds up between the rocks.",
        "Far below lies a green valley.",
        "An eagle flies in wide circles.", "The air is thin and very clear.",
        "A cold stream jumps from stone to stone.",
        "From up here the houses look like toys.",
    ),
}
SCENE_FRAMES: tuple[str, ...] = (
    "Describe {scene}.", "Describe {scene} in {count} sentences.", "Write {count} sentences about {scene}.",
    "What does {scene} look like?",
    "Paint {scene} with words.", "Please describe {scene} in {count} sentences.",
    "Give me a short description of {scene}.",
    "Write a short description of {scene} in {count} sentences.", "Tell me about {scene} in {count} sentences.",
)
# what the letter is for, and its sentences in several wordings
LETTERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "to thank {name} for {gift}": (
        ("Thank you very much for {gift}.", "I want to thank you for {gift}.", "Many thanks for {gift}!"),
        ("It made me very happy.", "I like it a lot.", "It was just what I needed.", "You always know what I like."),
        ("I hope to see you soon.", "Please come and visit me.", "I will think of you often."),
    ),
    "to invite {name} to my party on {day}": (
        ("I am having a party on {day}.", "On {day} there will be a party at my house.",
         "Would you like to come to my party on {day}?"),
        ("There will be cake and music.", "We will eat, dance and play games.", "All our friends will be there."),
        ("I hope that you can come.", "Please tell me if you can come.", "It would not be the same without you."),
    ),
    "to say sorry to {name}": (
        ("I am very sorry about what I said.", "I want to say sorry for what happened.",
         "Please forgive me for being unkind."),
        ("I did not mean to hurt you.", "I was tired and angry, but that is no excuse.", "It was my mistake."),
        ("I hope that we can be friends again.", "Let us talk soon.", "You are important to me."),
    ),
    "to wish {name} a happy birthday": (
        ("Happy birthday!", "I wish you a very happy birthday!", "All the best on your birthday!"),
        ("I hope that your day is full of joy.", "May all your wishes come true.",
         "I hope you get a big cake and many gifts."),
        ("Let us celebrate together soon.", "I am glad to have a friend like you.", "Have a wonderful year!"),
    ),
    "to tell {name} that I am ill and cannot come on {day}": (
        ("I am sorry, but I cannot come on {day}.", "Sadly I have to stay at home on {day}."),
        ("I am ill and have to stay in bed.", "I have a bad cold and need some rest."),
        ("I hope to be well again soon.", "Let us meet when I am well again.", "I will call you next week."),
    ),
    "to remind {name} of our meeting on {day}": (
        ("Please do not forget our meeting on {day}.", "This is a small reminder: we meet on {day}."),
        ("We start at ten.", "I will bring the papers.", "Please bring your notes."),
        ("See you there!", "Let me know if you cannot come.", "I look forward to it."),
    ),
    "to wish {name} a good journey": (
        ("I wish you a good journey!", "Have a safe and happy trip!"),
        ("I hope that you see many beautiful places.", "Take good care of yourself.", "Do not forget your warm coat."),
        ("Write to me when you arrive.", "Come back soon and tell me everything.", "We will miss you here."),
    ),
    "to ask {name} for help on {day}": (
        ("I have to ask you for something.", "Could you help me with something?"),
        ("On {day} I am moving to a new house.", "I want to paint my room on {day}.",
         "The garden needs a lot of work on {day}."),
        ("Do you have time to help me?", "It would be very kind of you to help.",
         "There will be pizza for everyone who helps."),
    ),
}
GIFTS: tuple[str, ...] = (
    "the book", "the flowers", "the cake", "the warm socks", "the lovely card", "the chocolate", "the scarf",
    "the picture",
    "your help", "the wonderful evening", "the tea", "the little lamp",
)
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTER_FRAMES: tuple[str, ...] = (
    "Write a short letter {purpose}.", "Write a note {purpose}.", "Help me write a short letter {purpose}.",
    "I need a short message {purpose}.", "Please write a few lines {purpose}.", "Can you write a letter {purpose}?",
)
HELLOS: tuple[str, ...] = ("Dear {name},", "Hello {name},", "Dear {name},", "Hi {name},", "My dear {name},")
CLOSINGS: tuple[str, ...] = (
    "Yours", "Best wishes", "With love", "All the best", "Your friend", "Warm greetings", "See you soon",
)
