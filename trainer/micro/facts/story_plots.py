"""The plots of the stories: for each its sentences in order, each in several wordings, and its morals.

``OWNED_PLOTS`` need the hero to have the thing before they begin; in ``FOUND_PLOTS`` it comes in on the way.
"""

from __future__ import annotations

Slot = tuple[str, ...]
Plot = tuple[Slot, ...]

LOST: Plot = (
    (
        "{day} the {thing} was gone.",
        "{day} {name} could not find the {thing} anywhere.",
        "{day} {name} woke up and the {thing} was not there.",
    ),
    (
        "{name} looked under the bed, behind the door and in the garden.",
        "{He} looked high and low, but it was not there.",
        "{He} searched all day long.",
        "{He} asked everyone, but no one had seen it.",
    ),
    (
        "{He} sat down and began to cry.",
        "{His} eyes filled with tears.",
        "{name} felt very sad.",
        '"What shall I do now?" {he} said.',
    ),
    ("Then the {friend} came by.", "Just then {he} met the {friend}.", "The {friend} heard {him} and came closer."),
    (
        '"Where did you have it last?" asked the {friend}.',
        '"Let us look together," said the {friend}.',
        '"Think back, step by step," said the {friend}.',
    ),
    (
        "{name} thought hard, and they walked back along the path.",
        "So they went back the way {name} had come.",
        "{name} remembered the big tree, and they hurried there.",
    ),
    (
        "And there, under a leaf, was the {thing}!",
        "There it was, lying in the grass!",
        "Behind a stone they found the {thing}.",
    ),
    ('"Thank you!" cried {name}.', "{name} jumped for joy.", "{name} thanked the {friend} with all {his} heart."),
    ("Two pairs of eyes see more than one.", "It is good to ask for help.", "A friend in need is a friend indeed."),
)
SHARING: Plot = (
    (
        "{day} the {friend} asked to play with the {thing}.",
        '{day} the {friend} came and said, "May I hold your {thing}?"',
        "{day} the {friend} wanted to see the {thing}.",
    ),
    ('"No, it is mine!" said {name}.', "But {name} shook {his} head.", '"No," said {name}, "only I may touch it."'),
    (
        "The {friend} went away without a word.",
        "The {friend} looked sad and left.",
        "So the {friend} turned and went home.",
    ),
    (
        "{name} played alone, but it was no fun.",
        "Now {name} was alone, and everything was very quiet.",
        "{name} sat there with the {thing} and felt lonely.",
    ),
    (
        '"What good is it if nobody plays with me?" {he} thought.',
        "{He} thought about it for a long time.",
        "After a while {he} was sorry for what {he} had said.",
    ),
    (
        '{He} ran after the {friend} and called, "Please wait!"',
        "So {he} took the {thing} and went to look for the {friend}.",
    ),
    ('"I am sorry," said {name}. "Let us play together."', '"Here, you may have it first," {he} said.'),
    (
        "They played until the sun went down.",
        "They laughed and played all day.",
        "The {friend} smiled, and soon both were laughing.",
    ),
    ("A joy that is shared is twice as big.", "Sharing made both of them happy.", "{name} had learned to share."),
)
STORM: Plot = (
    (
        "{day} dark clouds came up, and a storm began.",
        "{day} a strong wind began to blow.",
        "{day} the sky turned black, and it thundered.",
    ),
    (
        "The wind took the {thing} and carried it high into a tree.",
        "The wind pulled the {thing} away and threw it into a tall tree.",
    ),
    (
        "{name} tried to climb up, but the branches were wet.",
        "{name} jumped and jumped, but the tree was too tall.",
        "{name} shook the tree, but nothing fell down.",
    ),
    (
        "Then {he} heard a soft voice. It was the {friend}, cold and wet.",
        "Under the tree sat the {friend}, shaking with cold.",
    ),
    (
        '{name} forgot about the {thing} and said, "Come home with me."',
        '"You must get warm," said {name}, and {he} took the {friend} home.',
    ),
    (
        "They sat by the fire and drank hot milk.",
        "{name} made a fire and some soup.",
        "Soon the {friend} was warm and dry again.",
    ),
    ("In the morning the storm was over.", "The next day the sun was shining again.", "At last the wind grew still."),
    (
        "The {friend} climbed up the tree and brought back the {thing}.",
        "The {friend} knew a way up and soon came back with the {thing}.",
    ),
    (
        "One good deed brings another.",
        "Kindness comes back to those who give it.",
        "Friends are worth more than things.",
    ),
)
BROKEN: Plot = (
    (
        "{day} {he} let the {thing} fall, and it broke.",
        "{day} {name} ran too fast, fell down, and broke the {thing}.",
        "{day} there was a loud crack, and the {thing} was broken.",
    ),
    (
        "{name} hid the pieces under the bed.",
        "{name} did not know what to do.",
        "{name} looked at the pieces and felt sick.",
    ),
    (
        '"What will Grandfather say?" {he} thought.',
        '"If I say nothing, nobody will know," {he} thought.',
        "{He} wanted to blame the wind.",
    ),
    (
        "But the lie lay on {his} heart like a stone.",
        "But {he} could not eat, and {he} could not sleep.",
        "But all day long {he} felt bad.",
    ),
    ("At last {he} went to the {friend} and told the truth.", "In the end {he} told the {friend} everything."),
    (
        '"It was brave of you to tell me," said the {friend}.',
        '"Thank you for being honest," said the {friend}. "Things can be mended."',
    ),
    (
        "They took some glue and some string and set to work.",
        "Together they put the pieces in place, one by one.",
        "They worked with care until it was dark.",
    ),
    (
        "Soon the {thing} was almost as good as new.",
        "When they were done, the {thing} was whole again.",
        "The {thing} had a small mark, but it was whole.",
    ),
    (
        "The truth makes the heart light.",
        "It is better to tell the truth.",
        "{name} had learned that honest words mend many things.",
    ),
)
TRADE: Plot = (
    (
        "{day} a stranger came with a big shiny stone.",
        "{day} a trader came along the road with a cart full of bright things.",
    ),
    (
        '"Give me your {thing}, and you shall have this," said the stranger.',
        '"I will trade this shining stone for your {thing}," said the man.',
    ),
    (
        "{name} looked at the bright stone and said yes.",
        "The stone shone so brightly that {name} agreed.",
        "{name} did not think long and took the stone.",
    ),
    (
        "But the stone was cold, and it could do nothing at all.",
        "But soon the stone was dull, for it was only painted.",
        "But when it rained, the colour ran off the stone.",
    ),
    ("{name} missed the {thing}.", "{name} was sorry for the trade.", '"How foolish I was!" cried {name}.'),
    (
        "The {friend} had seen it all and knew the road of the stranger.",
        "{He} told the {friend}, who knew a short way through the fields.",
    ),
    ("They ran and ran until they saw the cart.", "They walked all night and found the cart by the road."),
    (
        "The stranger laughed and gave the {thing} back for a loaf of bread.",
        '"Take it," said the stranger. "Nobody wants to buy it."',
    ),
    (
        "Not all that shines is gold.",
        "What we have is often better than what we want.",
        "{name} never traded the {thing} again.",
    ),
)
DARK: Plot = (
    (
        "{name} had one secret: {he} was afraid of the dark.",
        "But when night came, {name} was afraid.",
        "There was one thing {name} did not like, and that was the night.",
    ),
    ("{day} {he} was far from home, and the sun went down.", "{day} {he} stayed out too long, and soon it was dark."),
    (
        "The trees looked like giants, and something rustled.",
        "Everything was black, and there were strange sounds.",
        "{He} heard a crack, and then a whisper.",
    ),
    ("{name} held the {thing} tightly and closed {his} eyes.", "{He} held on to the {thing} and did not dare to move."),
    ('"Who is there?" {he} asked in a small voice.', '"Is anybody there?" {he} whispered.'),
    ("It was only the {friend}, who was on the way home.", '"It is only me," said the {friend}.'),
    (
        '"Look up," said the {friend}, and {name} saw a thousand stars.',
        "The {friend} showed {him} the moon and the bright stars.",
        '"The night is only the day with its eyes closed," said the {friend}.',
    ),
    (
        "Step by step they walked home, and {name} counted the stars.",
        "They walked side by side, and the dark was not so dark anymore.",
    ),
    (
        "What we know does not scare us.",
        "With a friend the dark is only half as dark.",
        "After that {name} was no longer afraid.",
    ),
)
FELL_IN: Plot = (
    (
        "{day} the {thing} fell into deep water.",
        "{day} {name} slipped, and the {thing} rolled into a deep hole full of water.",
    ),
    (
        "{name} could see it, but {he} could not reach it.",
        "It lay there, just too far away.",
        "{He} stretched out {his} arm, but it was too short.",
    ),
    ("{He} tried with a stick, but the stick broke.", "{He} threw a rope, but it did not help."),
    (
        "The {friend} tried too, but it was no use.",
        "The {friend} came to help, but even together they could not reach it.",
    ),
    ('"We need more friends," said the {friend}.', '"Let us call the others," said {name}.'),
    ("So they called the mouse, the hen and the old goat.", "Soon the cow, the dog and the little hen were there."),
    ("They held on to each other in one long line.", "Each one held the next, and they made a long chain."),
    (
        '"One, two, three, pull!" they cried, and out came the {thing}.',
        "They pulled and pulled, and at last {name} had the {thing} again.",
    ),
    (
        "Together we can do what no one can do alone.",
        "Many hands make light work.",
        "Even the smallest one had helped.",
    ),
)
FOUND: Plot = (
    (
        "{day} {name} found {a_thing} on the path.",
        "{day} {name} saw {a_thing} lying in the grass.",
        "{day} {name} stumbled over {a_thing}.",
    ),
    ("It was so fine that {name} could not stop looking at it.", "It was the finest thing {he} had ever seen."),
    (
        '"Nobody is here," {he} thought. "I could keep it."',
        "{He} wanted very much to keep it.",
        '"Now it is mine!" {he} said.',
    ),
    ("But then {he} thought of the one who had lost it.", "But something in {his} heart said no."),
    ('So {he} went from door to door and asked, "Is this yours?"', "{He} asked everyone {he} met."),
    (
        "At last {he} came to the {friend}, who was looking for something.",
        "Then {he} saw the {friend}, who was sad and looked on the ground.",
    ),
    (
        '"My {thing}!" cried the {friend}. "I thought it was lost for ever."',
        '"Oh, my {thing}! Thank you, thank you!" cried the {friend}.',
    ),
    ("The {friend} gave {name} a big cake as a thank-you.", "The {friend} was so happy that they danced together."),
    (
        "Honesty is worth more than treasure.",
        "It feels good to do the right thing.",
        "{name} had lost a thing and won a friend.",
    ),
)
GIFT: Plot = (
    (
        "{day} {name} heard that it was the birthday of the {friend}.",
        "{day} the {friend} had a birthday, and {name} had no gift.",
    ),
    (
        "{He} had no money, only two old coins.",
        '"What can I give?" {he} thought.',
        "{name} counted {his} coins, but there were only three.",
    ),
    (
        "In the shop window {he} saw {a_thing}, but it cost too much.",
        "At the market there was {a_thing}, but it was too dear.",
    ),
    ("So {he} asked the shopkeeper for some work.", '"May I work for it?" {he} asked.'),
    (
        "{He} swept the floor and carried boxes until evening.",
        "{He} washed the windows and fed the horses.",
        "All day long {he} worked hard.",
    ),
    (
        '"You have earned it," said the shopkeeper and gave {him} the {thing}.',
        "At the end of the day {he} could take the {thing} home.",
    ),
    ("{name} ran all the way to the {friend}.", "{He} put it in paper with a ribbon and ran to the party."),
    (
        "When the {friend} saw the {thing}, there were tears of joy.",
        '"The {thing}! How did you know?" cried the {friend}.',
    ),
    (
        "The best gifts are those we work for.",
        "Giving is sweeter than getting.",
        "The gift was small, but the love in it was big.",
    ),
)
RACE: Plot = (
    (
        "{day} there was a great race, and the prize was {a_thing}.",
        "{day} everyone came to run a race. The winner would get {a_thing}.",
    ),
    (
        "{name} had trained for weeks.",
        "{name} wanted to win more than anything.",
        "{name} was not the fastest, but {he} wanted to try.",
    ),
    ('"Ready, steady, go!" called the old mayor.', "A bell rang, and off they went."),
    (
        "{name} ran as fast as the wind.",
        "{name} ran and ran, and soon {he} was in front.",
        "One by one, {name} passed the others.",
    ),
    ("But then the {friend} fell and hurt a foot.", "Then {he} heard a cry. The {friend} had fallen."),
    ("{name} looked at the finish, and {he} looked back.", "{name} stopped, though the finish was near."),
    ("{He} turned around and helped the {friend} up.", '"Lean on me," {he} said, and they walked on together.'),
    (
        "They came in last, but everyone cheered, and both were given the {thing} to share.",
        'They were the last, but the mayor gave them the {thing}. "You have won more than a race," he said.',
    ),
    (
        "To help is better than to win.",
        "There are better things than being first.",
        "A kind heart is the greatest prize.",
    ),
)
NEWCOMER: Plot = (
    ("{day} a stranger moved into the empty house. It was the {friend}.", "{day} the {friend} came to live next door."),
    (
        "Nobody knew the {friend}, and nobody said hello.",
        "The others only looked and whispered.",
        "The {friend} was shy and stayed inside.",
    ),
    ('"It must be hard to be new," thought {name}.', "{name} remembered how it feels to be alone."),
    (
        "{He} wanted to bring a gift, but {he} had only {a_thing}.",
        "{He} looked for a gift and found {a_thing} in a drawer.",
    ),
    ("{He} took the {thing} and knocked at the door.", "With the {thing} in {his} hands, {he} went over and knocked."),
    ('The door opened a little. "Is that for me?" asked the {friend}.', '"Welcome!" said {name}. "This is for you."'),
    ("The {friend} smiled for the first time and made some tea.", "The {friend} asked {him} in, and they ate cake."),
    (
        "Soon the others came too, and the house was full of laughter.",
        "The next day everyone wanted to meet the {friend}.",
    ),
    (
        "One kind word can open a door.",
        "A stranger is a friend we do not know yet.",
        "It takes only one to make a start.",
    ),
)
WISH: Plot = (
    (
        "{day} {name} helped an old woman to carry her wood.",
        "{day} {name} gave {his} last piece of bread to an old woman.",
    ),
    ('"Take this," she said and gave {him} {a_thing}.', "She thanked {him} and gave {him} {a_thing}."),
    ('"It will grant you one wish, and only one."', '"It is magic," she said. "You have one wish."'),
    ("{name} thought of gold, of cakes and of a fine house.", "{name} lay awake all night. What should {he} wish for?"),
    (
        "In the morning {he} heard that the {friend} was ill.",
        "But then {he} saw the {friend}, who was very weak and could not get up.",
    ),
    ("{name} did not have to think any longer.", "Now {he} knew what to do."),
    (
        '{He} held the {thing} and said, "I wish my friend to be well."',
        '"Make my friend well again," {he} said to the {thing}.',
    ),
    (
        "There was a soft light, and the {friend} got up and laughed.",
        "At once the {friend} opened both eyes and smiled.",
    ),
    (
        "The best wish is the one we make for others.",
        "{name} had no gold, but {he} was rich.",
        "Love is stronger than gold.",
    ),
)
MAKING: Plot = (
    (
        "{day} {name} decided to make {a_thing} all by {himself}.",
        '{day} {name} said, "I will make {a_thing} with my own hands."',
    ),
    ("{He} worked all morning, but it fell apart.", "The first one was crooked and broke at once."),
    ('"I will never learn it!" {he} cried.', "{name} was angry and threw everything into a corner."),
    ("The {friend} laughed, but not in a bad way.", "The {friend} had watched from the window and came in."),
    ('"My first one was bad too," said the {friend}.', '"Nobody can do it the first time," said the {friend}.'),
    ("So {name} tried again, and then again.", "{name} took a deep breath and started once more."),
    (
        "Each time it was a little better.",
        "It took a day, and a week, and one more week.",
        "Slowly {his} hands learned what to do.",
    ),
    (
        "And one morning the {thing} was done, and it was beautiful.",
        "At last the {thing} stood on the table, and everyone admired it.",
    ),
    ("Nobody is born a master.", "Patience makes the master.", "Those who try again will get there in the end."),
)
LOST_WAY: Plot = (
    (
        "{day} {name} followed a butterfly and lost {his} way.",
        "{day} {name} went for a walk and did not look where {he} was going.",
    ),
    (
        "Soon {he} did not know the trees anymore.",
        "All paths looked the same.",
        "{He} turned left and right, but nothing looked like home.",
    ),
    (
        "On the ground lay {a_thing}.",
        "Then {he} saw {a_thing} hanging on a branch.",
        "Beside a stone {he} found {a_thing}.",
    ),
    ("{name} picked it up and looked at it with care.", '"Somebody must live near here," thought {name}.'),
    (
        '"That is mine," said a voice. It was the {friend}.',
        'Then the {friend} came out from behind a bush. "You have found my {thing}!"',
    ),
    (
        "{name} gave it back and asked for the way home.",
        '"Here you are," said {name}. "But can you help me? I am lost."',
    ),
    (
        '"I know every path here," said the {friend}. "Follow me."',
        '"You helped me, so I will help you," said the {friend}.',
    ),
    (
        "They crossed a stream and a field, and there was the house!",
        "Before the moon rose, {name} was home, and the {thing} was safe too.",
    ),
    (
        "Those who help will be helped.",
        "After that {name} always looked at the path.",
        "It is never wrong to ask the way.",
    ),
)

OWNED_PLOTS: tuple[Plot, ...] = (LOST, SHARING, STORM, BROKEN, TRADE, DARK, FELL_IN)
FOUND_PLOTS: tuple[Plot, ...] = (FOUND, GIFT, RACE, NEWCOMER, WISH, MAKING, LOST_WAY)
