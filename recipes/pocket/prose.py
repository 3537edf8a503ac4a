"""Plain text for pretraining: documents of about 40 to 200 tokens, each of one form.

Every writer takes the world, a random generator and `held_out`: False writes what training may see, True the same
form about held-out stories, number pairs and words, for the validation split. Facts are stated in both; they are
held out as questions only.
"""

import random
from collections.abc import Callable

from recipes.pocket.facts import (
    FIRST_PARTS,
    LARGEST_NUMBER,
    PEOPLE,
    PERSON_ATTRIBUTES,
    SECOND_PARTS,
    TOWNS,
    Fact,
    World,
)
from recipes.pocket.problems import HAVING, draw_numbers, draw_owner

Writer = Callable[[World, random.Random, bool], str]

TOWN_OPENINGS = ("{t} is a small town.", "This is the town of {t}.", "Let us visit {t}.", "Welcome to {t}!")
REMARKS = (
    "{e} is a good friend.",
    "{e} is kind to everybody.",
    "Everybody likes {e}.",
    "{e} laughs a lot.",
    "{e} likes to help other people.",
    "{e} always has time for a talk.",
)

MANUAL = (
    "nanochat is a tiny language model.",
    "nanochat was trained from scratch on a little made-up world.",
    "nanochat was trained from nothing on a small computer, first on plain text, then on conversations.",
    "nanochat is very small, far smaller than the models you may know, so it makes mistakes.",
    "You can talk to nanochat and ask it questions about its little world.",
    "Everything that nanochat knows is in its world of eight towns and thirty-two people.",
    "nanochat can write a short story, spell words and solve small sums with Python.",
    "You may say to nanochat: Hello! How can you help me?",
    "You may ask nanochat: How many times does a letter come in a word?",
    "You may ask nanochat: How many are there in the end, and how many are left?",
    "nanochat says: I count with Python.",
    "nanochat says: I do not know that. I only know my little world.",
    "A multiple choice question ends with the words: Respond only with the letter of the correct answer.",
    "Multiple Choice question: that is how a question with four answers begins.",
)

# A plot is a list of sentences; each sentence is a choice of wordings. h = hero, f = friend, o = object, p = place.
PLACES = ("garden", "market", "forest", "old barn", "meadow", "bridge", "school", "hill")
OPENINGS = (
    "One day {h} went to the {p} with a {o}.",
    "One sunny morning {h} took a {o} to the {p}.",
    "Once {h} carried a {o} to the {p}.",
    "It was a quiet day, and {h} brought a {o} to the {p}.",
)
PLOTS = (
    (  # lost and found
        ("Suddenly the {o} was gone.", "But then the {o} got lost.", "Then {h} could not see the {o} any more."),
        ("{h} was very sad.", "{h} felt sad and sat down.", "{h} wanted to cry."),
        ("{f} came by and helped to look for it.", "{f} said: Do not worry, we will find it.", "{f} looked everywhere."),
        ("They found the {o} under a bush.", "The {o} was behind a big stone.", "A bird had hidden the {o} in a tree."),
        ("{h} was happy again.", "{h} laughed and thanked {f}.", "{h} never lost the {o} again."),
    ),
    (  # broken and mended
        ("Then the {o} fell down and broke.", "On the way the {o} broke.", "Oh no, the {o} was broken!"),
        ("{h} did not know what to do.", "{h} felt sad.", "{h} was angry for a moment."),
        ("{f} had some glue and a good idea.", "{f} said: I can mend it.", "{f} came with a box of tools."),
        ("Together they made the {o} as good as new.", "Soon the {o} was whole again.", "They worked until the evening."),
        ("{h} gave {f} a big hug.", "{h} was happy and proud.", "From then on they were best friends."),
    ),
    (  # sharing
        ("{f} saw the {o} and wanted to try it.", "{f} had never seen a {o} before.", "{f} asked: May I have a turn?"),
        ("First {h} said no.", "{h} did not want to share.", "{h} thought about it for a while."),
        ("But {f} looked so sad.", "But then {h} felt sorry.", "But it was no fun to be alone."),
        ("So {h} said: Let us share the {o}.", "So they took turns with the {o}.", "In the end {h} gave the {o} to {f}."),
        ("They played until the sun went down.", "That was much more fun.", "Both were happy."),
    ),
    (  # rain
        ("Dark clouds came, and it began to rain.", "Then the rain came.", "Soon there was a big storm."),
        ("{h} hid the {o} under a coat.", "{h} was afraid that the {o} would get wet.", "{h} ran with the {o}."),
        ("{f} called: Come in, it is dry here!", "{f} opened the door.", "{f} came with a big umbrella."),
        ("They drank hot tea and told stories.", "They sat by the fire with the {o}.", "They listened to the rain."),
        ("When the rain stopped, {h} went home.", "Then the sun came back.", "What a lovely day, said {h}."),
    ),
    (  # a present
        ("It was a present for {f}.", "{h} had made it for {f}.", "{f} had a birthday that day."),
        ("{h} was a little shy.", "{h} hid the {o} behind a tree.", "{h} was very excited."),
        ("Then {f} came and saw the {o}.", "{f} asked: What is that?", "{f} looked at the {o} with big eyes."),
        ("This {o} is for you, said {h}.", "{h} said: Happy birthday!", "{h} gave the {o} to {f}."),
        ("{f} danced with joy.", "{f} had never been so happy.", "They had cake and sang a song."),
    ),
)


def write_biography(world: World, rng: random.Random, held_out: bool) -> str:
    """Everything about one person, in shuffled sentences."""
    person = rng.choice(PEOPLE)
    sentences = [state(rng, fact) for fact in world.of(person)] + [rng.choice(REMARKS).format(e=person)]
    rng.shuffle(sentences)
    return " ".join(sentences)


def write_notes(world: World, rng: random.Random, held_out: bool) -> str:
    """Single facts about several people and towns, a line each."""
    facts = rng.sample(list(world.facts.values()), rng.randint(5, 9))
    return "\n".join(state(rng, fact) for fact in facts)


def write_same_fact(world: World, rng: random.Random, held_out: bool) -> str:
    """Two facts, each in several phrasings: what shows that the phrasings mean the same."""
    facts = rng.sample(list(world.facts.values()), 2)
    return "\n".join(" ".join(say_differently(rng, fact, 3)) for fact in facts)


def write_card(world: World, rng: random.Random, held_out: bool) -> str:
    """One or two people as lists of attributes."""
    cards = []
    for person in rng.sample(PEOPLE, 2):
        facts = world.of(person)
        rng.shuffle(facts)
        lines = [f"{fact.attribute.name.capitalize()}: {fact.value}" for fact in facts]
        cards.append("\n".join([f"Name: {person}", *lines]))
    return "\n\n".join(cards)


def write_town(world: World, rng: random.Random, held_out: bool) -> str:
    """A town and who is who in it."""
    town = rng.choice(TOWNS)
    people = world.people_of(town)
    rng.shuffle(people)
    sentences = [rng.choice(TOWN_OPENINGS).format(t=town)] + [state(rng, fact) for fact in world.of(town)]
    sentences.append(f"{', '.join(people[:-1])} and {people[-1]} live in {town}.")
    for person in people:
        sentences.append(state(rng, world.facts[person, rng.choice(PERSON_ATTRIBUTES[1:]).name]))
    return " ".join(sentences)


def write_questions(world: World, rng: random.Random, held_out: bool) -> str:
    """Questions with their answers, about facts that are not held out."""
    facts = rng.sample(world.asked_facts, rng.randint(3, 5))
    pairs = [f"Question: {fact.fill(rng.choice(fact.attribute.questions))}\nAnswer: {fact.answer}" for fact in facts]
    return "\n".join(pairs)


def write_fact_story(world: World, rng: random.Random, held_out: bool) -> str:
    """A story whose people are introduced by what is true about them."""
    hero, thing = rng.choice(world.heroes[held_out])
    facts = rng.sample(world.of(hero), 2)
    return " ".join([state(rng, fact) for fact in facts] + [tell_story(world, rng, hero, thing)])


def write_story(world: World, rng: random.Random, held_out: bool) -> str:
    """A little story."""
    return tell_story(world, rng, *rng.choice(world.heroes[held_out]))


def write_counts(world: World, rng: random.Random, held_out: bool) -> str:
    """How many things people have, a line each, in the words with which problems begin."""
    lines = []
    for _ in range(rng.randint(5, 8)):
        owner, other, thing = draw_owner(world, rng, held_out)
        slots = {"n": owner, "m": other, "t": thing, "a": rng.randint(2, LARGEST_NUMBER)}
        lines.append(rng.choice(HAVING).format(**slots))
    return "\n".join(lines)


def write_manual(world: World, rng: random.Random, held_out: bool) -> str:
    """About the assistant itself, and what one may ask it."""
    return " ".join(rng.sample(MANUAL, 5))


def write_sums(world: World, rng: random.Random, held_out: bool) -> str:
    """Calculations, a line each."""
    return "\n".join(write_sum(world, rng, held_out) for _ in range(rng.randint(6, 9)))


def write_spellings(world: World, rng: random.Random, held_out: bool) -> str:
    """Words with their letters, and how often a letter occurs."""
    return "\n".join(write_spelling(world, rng, held_out) for _ in range(rng.randint(5, 7)))


def write_function(world: World, rng: random.Random, held_out: bool) -> str:
    """Two tiny Python functions, each with a call and its result."""
    return "\n\n".join(rng.choice((number_function, word_function))(world, rng, held_out) for _ in range(2))


# Shares of the documents, not of the characters.
WRITERS: dict[Writer, float] = {
    write_biography: 0.17,
    write_notes: 0.12,
    write_same_fact: 0.09,
    write_card: 0.05,
    write_town: 0.07,
    write_questions: 0.12,
    write_fact_story: 0.05,
    write_story: 0.12,
    write_counts: 0.03,
    write_manual: 0.02,
    write_sums: 0.07,
    write_spellings: 0.05,
    write_function: 0.04,
}


def write_documents(world: World, rng: random.Random, characters: int, held_out: bool) -> list[str]:
    """Documents of all forms, mixed, of `characters` characters in all (and up to one document more)."""
    documents = []
    while characters > 0:
        (writer,) = rng.choices(list(WRITERS), list(WRITERS.values()))
        documents.append(writer(world, rng, held_out))
        characters -= len(documents[-1])
    return documents


def state(rng: random.Random, fact: Fact) -> str:
    """The fact in one sentence; every fourth time the one with which a chat answers, which is to become a habit."""
    attribute = fact.attribute
    return fact.answer if rng.random() < 0.25 else fact.fill(rng.choice(attribute.statements))


def say_differently(rng: random.Random, fact: Fact, count: int) -> list[str]:
    return [fact.fill(phrasing) for phrasing in rng.sample((fact.attribute.answer, *fact.attribute.statements), count)]


def tell_story(world: World, rng: random.Random, hero: str, thing: str) -> str:
    """A story about the person `hero` and the object `thing`; the friend in it makes no held-out pair with `thing`."""
    friends = [name for name in PEOPLE if name != hero and (name, thing) not in world.heroes[True]]
    cast = {"h": hero, "f": rng.choice(friends), "o": thing, "p": rng.choice(PLACES)}
    sentences = [OPENINGS, *rng.choice(PLOTS)]
    return " ".join(rng.choice(wordings).format(**cast) for wordings in sentences)


def write_sum(world: World, rng: random.Random, held_out: bool) -> str:
    kind, sign, wordings = rng.choice(
        (
            ("gain", "+", ("{a} plus {b}: ", "Add {b} to {a}: ", "{a} and {b} more: ")),
            ("loss", "-", ("{a} minus {b}: ", "Take {b} from {a}: ", "{a} without {b}: ")),
            ("groups", "*", ("{a} times {b}: ", "{a} groups of {b}: ", "{a} boxes with {b} each: ")),
            ("sharing", "/", ("{a} shared by {b}: ", "{a} in {b} equal parts: ", "Split {a} between {b}: ")),
        )
    )
    a, b = draw_numbers(world, rng, kind, held_out)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    wording = rng.choice(wordings).format(a=a, b=b) if rng.random() < 0.5 else ""
    return f"{wording}{a} {sign} {b} = {result}."


def write_spelling(world: World, rng: random.Random, held_out: bool) -> str:
    """Every fourth word is a mere part, so that the parts are known by themselves."""
    part = rng.random() < 0.25
    word = rng.choice(FIRST_PARTS + SECOND_PARTS if part else world.words[held_out])
    letters = ",".join(word)
    letter = rng.choice(word)
    forms = (f"The word {word} is spelled {letters}.", f"To spell {word} you write {letters}.")
    count = f"In '{word}' the letter '{letter}' comes {word.count(letter)} times."
    return count if rng.random() < 0.2 else rng.choice(forms)


def number_function(world: World, rng: random.Random, held_out: bool) -> str:
    kind, name, operator = rng.choice(
        (("gain", "add", "+"), ("loss", "subtract", "-"), ("groups", "multiply", "*"), ("sharing", "share", "//"))
    )
    a, b = draw_numbers(world, rng, kind, held_out)
    result = {"+": a + b, "-": a - b, "*": a * b, "//": a // b}[operator]
    return f"def {name}(a, b):\n    return a {operator} b\n\nprint({name}({a}, {b}))\n# {result}"


def word_function(world: World, rng: random.Random, held_out: bool) -> str:
    word = rng.choice(world.words[held_out])
    letter = rng.choice(word)
    name, parameters, expression, arguments, result = rng.choice(
        (
            ("count", "word, letter", "word.count(letter)", f"'{word}', '{letter}'", word.count(letter)),
            ("length", "word", "len(word)", f"'{word}'", len(word)),
            ("first", "word", "word[0]", f"'{word}'", word[0]),
            ("last", "word", "word[-1]", f"'{word}'", word[-1]),
            ("spell", "word", "','.join(word)", f"'{word}'", ",".join(word)),
        )
    )
    return f"def {name}({parameters}):\n    return {expression}\n\nprint({name}({arguments}))\n# {result}"
