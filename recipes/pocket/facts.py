"""The closed world itself: who lives in it, what is true about them, and what training never gets to see.

Everything follows from a seed. What is held out is decided here, before any text is written, so that the writers of
prose, conversations and problems only have to ask.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PEOPLE = (
    "Anna", "Ben", "Clara", "Dora", "Emil", "Felix", "Finn", "Greta", "Hugo", "Ida", "Ivy", "Jon", "Kora", "Lena",
    "Leo", "Max", "Mira", "Nina", "Noah", "Oscar", "Otto", "Paul", "Pia", "Rosa", "Ruby", "Sam", "Tess", "Tom", "Uma",
    "Vic", "Wanda", "Zoe",
)
TOWNS = (
    "Oakby", "Fernhill", "Millbrook", "Saltmere", "Windon", "Rosefield", "Stonely", "Larkham",
)
# Each thing of a story, and each thing that is counted in a problem, occurs in no other kind of text.
STORY_OBJECTS = (
    "kite", "drum", "lantern", "whistle", "wagon", "map", "rope", "violin", "blanket", "mirror", "candle",
    "telescope", "puppet", "flute",
)
COUNTED_THINGS = (
    "apples", "pears", "shells", "buttons", "marbles", "stamps", "nuts", "eggs", "cards", "beads", "pencils",
    "stones", "tickets", "buns",
)
# Words to spell are compounds of these, so that a held-out word consists of parts that were spelled in other words.
FIRST_PARTS = (
    "sun", "moon", "rain", "snow", "star", "wind", "fire", "sand", "leaf", "milk", "corn", "gold", "salt", "sea",
    "frog", "bird", "wolf", "duck", "wood", "book",
)
SECOND_PARTS = (
    "hat", "boat", "bell", "cup", "pot", "ship", "song", "fish", "coat", "boot", "ring", "door", "nest", "box", "cap",
    "jar", "bag", "cake", "tree", "gate",
)

LARGEST_NUMBER = 60  # of the operands; the smallest is 2
HELD_OUT_PEOPLE, HELD_OUT_TOWNS = 7, 2  # per attribute
HELD_OUT_NUMBERS, HELD_OUT_OWNERS, HELD_OUT_STORIES, HELD_OUT_WORDS = 0.2, 0.2, 0.12, 0.3


@dataclass(frozen=True)
class Attribute:
    """A property that every person, or every town, has exactly one value of.

    In all phrasings `{e}` is the person or town and `{v}` the value. The `held_out_*` phrasings are for evaluation
    only; `held_out_statements` end where the value begins.
    """

    name: str
    values: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    held_out_statements: tuple[str, ...]


TOWN = Attribute(
    name="town",
    values=TOWNS,
    answer="{e} lives in {v}.",
    statements=(
        "{e} comes from {v}.",
        "{e} has a small house in {v}.",
        "{e} calls {v} home.",
        "The home town of {e} is {v}.",
        "The house of {e} stands in {v}.",
        "The town where {e} lives is {v}.",
        "{e} was born in {v} and still lives there.",
        "Every evening {e} walks home to {v}.",
        "{v} is the home of {e}.",
        "In {v} you can meet {e}.",
        "If you look for {e}, go to {v}.",
    ),
    questions=(
        "Where does {e} live?",
        "Which town does {e} live in?",
        "What is the home town of {e}?",
        "Do you know where {e} lives?",
        "Tell me where {e} lives.",
        "Where is the house of {e}?",
        "Where is {e}'s home?",
        "In which town can I find {e}?",
        "What town is {e} from?",
        "Please tell me the home town of {e}.",
    ),
    held_out_questions=(
        "In which town does {e} live?",
        "Can you tell me where {e} lives?",
        "Do you know the home town of {e}?",
        "Which town is the home of {e}?",
    ),
    held_out_statements=(
        "{e} lives in the town of",
        "The home of {e} is in",
        "You can find {e} in",
        "{e} has a house in",
    ),
)
JOB = Attribute(
    name="job",
    values=("baker", "farmer", "teacher", "tailor", "painter", "sailor", "doctor", "gardener"),
    answer="{e} works as a {v}.",
    statements=(
        "{e} is a {v}.",
        "The job of {e} is {v}.",
        "{e} is a good {v}.",
        "{e} has been a {v} for many years.",
        "By day {e} is a busy {v}.",
        "People know {e} as the {v}.",
        "{e} learned to be a {v} at school.",
        "{e} earns money as a {v}.",
        "{e} is proud to be a {v}.",
        "If you need a {v}, ask {e}.",
        "The work of a {v} is what {e} does.",
    ),
    questions=(
        "What is the job of {e}?",
        "What does {e} do for work?",
        "What work does {e} do?",
        "Which job does {e} have?",
        "Tell me the job of {e}.",
        "Do you know what {e} works as?",
        "What does {e} work as?",
        "What is {e}'s job?",
        "How does {e} earn money?",
        "Please tell me what {e} does for work.",
    ),
    held_out_questions=(
        "Can you tell me the job of {e}?",
        "Do you know {e}'s job?",
        "What job does {e} have?",
        "Tell me what {e} works as.",
    ),
    held_out_statements=(
        "{e} works as a busy",
        "For many years {e} has been a",
        "{e} has work as a",
        "At work {e} is a",
    ),
)
PET = Attribute(
    name="pet",
    values=("cat", "dog", "goat", "rabbit", "parrot", "pony", "turtle", "hen"),
    answer="{e} has a pet {v}.",
    statements=(
        "The pet of {e} is a {v}.",
        "{e} keeps a {v} at home.",
        "{e} looks after a {v}.",
        "{e} has a little {v}.",
        "Every morning {e} feeds a {v}.",
        "{e} takes good care of a {v}.",
        "{e} plays with a {v} every day.",
        "{e} shares the house with a {v}.",
        "At home {e} has a {v}.",
        "A {v} lives with {e}.",
        "A {v} is the pet of {e}.",
    ),
    questions=(
        "What pet does {e} have?",
        "Which animal lives with {e}?",
        "What is the pet of {e}?",
        "What kind of pet does {e} have?",
        "Tell me about the pet of {e}.",
        "Do you know which pet {e} has?",
        "What animal does {e} have?",
        "What is {e}'s pet?",
        "Which animal does {e} look after?",
        "Please tell me which pet {e} has.",
    ),
    held_out_questions=(
        "Can you tell me which pet {e} has?",
        "Which pet does {e} have?",
        "Do you know the pet of {e}?",
        "What animal lives with {e}?",
    ),
    held_out_statements=(
        "{e} lives with a",
        "Every day {e} plays with a",
        "At home {e} looks after a",
        "The animal that lives with {e} is a",
    ),
)
COLOUR = Attribute(
    name="colour",
    values=("red", "blue", "green", "yellow", "purple", "pink", "white", "brown"),
    answer="{e} likes the colour {v}.",
    statements=(
        "The favourite colour of {e} is {v}.",
        "{e} loves the colour {v}.",
        "{e} always wears {v}.",
        "{e} paints everything {v}.",
        "The door of {e} is {v}.",
        "{e} likes {v} more than all other colours.",
        "The colour that {e} likes best is {v}.",
        "For {e} the best colour is {v}.",
        "{e} has a {v} coat.",
        "Of all colours {e} likes {v} best.",
        "{v} is the favourite colour of {e}.",
    ),
    questions=(
        "What is the favourite colour of {e}?",
        "Which colour does {e} like?",
        "What colour does {e} love?",
        "Do you know which colour {e} likes?",
        "Tell me the favourite colour of {e}.",
        "What is {e}'s favourite colour?",
        "Which colour does {e} like best?",
        "What colour does {e} always wear?",
        "Which colour is the best for {e}?",
        "Please tell me which colour {e} likes.",
    ),
    held_out_questions=(
        "Can you tell me the favourite colour of {e}?",
        "What colour does {e} like best?",
        "Do you know {e}'s favourite colour?",
        "Which colour does {e} love?",
    ),
    held_out_statements=(
        "The colour that {e} loves is",
        "{e} likes to wear",
        "Of all colours {e} loves",
        "The best colour for {e} is",
    ),
)
FOOD = Attribute(
    name="food",
    values=("soup", "bread", "rice", "cheese", "noodles", "honey", "plums", "salad"),
    answer="{e} likes to eat {v}.",
    statements=(
        "The favourite food of {e} is {v}.",
        "{e} loves {v}.",
        "{e} eats {v} every day.",
        "For dinner {e} has {v}.",
        "{e} is always happy about {v}.",
        "The food that {e} likes best is {v}.",
        "{e} never says no to {v}.",
        "{e} brings {v} to every party.",
        "{e} could eat {v} all day long.",
        "When {e} is hungry, only {v} helps.",
        "There must be {v} when {e} comes for dinner.",
    ),
    questions=(
        "What is the favourite food of {e}?",
        "What does {e} like to eat?",
        "Which food does {e} like best?",
        "What food does {e} love?",
        "Tell me the favourite food of {e}.",
        "Do you know what {e} likes to eat?",
        "What is {e}'s favourite food?",
        "What does {e} eat every day?",
        "What does {e} have for dinner?",
        "Please tell me what {e} likes to eat.",
    ),
    held_out_questions=(
        "Can you tell me what {e} likes to eat?",
        "Which food does {e} love?",
        "Do you know the favourite food of {e}?",
        "What food does {e} like best?",
    ),
    held_out_statements=(
        "The food that {e} loves is",
        "Every day {e} likes to eat",
        "When {e} is hungry, {e} eats",
        "At every party {e} eats",
    ),
)
RIVER = Attribute(
    name="river",
    values=("Lune", "Brill", "Tarn", "Wend"),
    answer="{e} lies on the river {v}.",
    statements=(
        "The river of {e} is the {v}.",
        "The river {v} flows through {e}.",
        "The water in {e} comes from the {v}.",
        "{e} was built by the river {v}.",
        "In {e} there is a bridge over the {v}.",
        "The children of {e} swim in the {v}.",
        "The mill of {e} stands on the {v}.",
        "From {e} you can see the {v}.",
        "{e} is a town on the {v}.",
        "On the {v} lies {e}.",
    ),
    questions=(
        "Which river flows through {e}?",
        "What is the river of {e}?",
        "On which river does {e} lie?",
        "Tell me the river of {e}.",
        "Do you know which river flows through {e}?",
        "Which river can you see from {e}?",
        "What river is {e} on?",
        "Please tell me which river {e} lies on.",
    ),
    held_out_questions=(
        "Can you tell me the river of {e}?",
        "What river flows through {e}?",
        "Which river is {e} on?",
        "Do you know the river of {e}?",
    ),
    held_out_statements=(
        "The river in {e} is the",
        "{e} is a town on the river",
        "The people of {e} swim in the",
        "In {e} you can see the river",
    ),
)
FAME = Attribute(
    name="fame",
    values=("bells", "roses", "clocks", "boats"),
    answer="{e} is known for its {v}.",
    statements=(
        "{e} is famous for its {v}.",
        "People love {e} for its {v}.",
        "{e} is proud of its {v}.",
        "The {v} of {e} are famous.",
        "Everybody knows the {v} of {e}.",
        "People come to {e} to see the {v}.",
        "There are many {v} in {e}.",
        "Nobody makes better {v} than {e}.",
        "The best {v} come from {e}.",
        "When you think of {e}, you think of {v}.",
    ),
    questions=(
        "What is {e} known for?",
        "What is {e} famous for?",
        "Tell me what {e} is known for.",
        "Do you know what {e} is famous for?",
        "Why do people come to {e}?",
        "What can you see in {e}?",
        "What do people love {e} for?",
        "Please tell me what {e} is known for.",
    ),
    held_out_questions=(
        "Can you tell me what {e} is known for?",
        "Do you know what {e} is known for?",
        "Tell me what {e} is famous for.",
        "What is the town of {e} known for?",
    ),
    held_out_statements=(
        "The town of {e} is famous for its",
        "People know {e} for its",
        "{e} has the best",
        "In {e} everybody loves the",
    ),
)
PERSON_ATTRIBUTES = (TOWN, JOB, PET, COLOUR, FOOD)
TOWN_ATTRIBUTES = (RIVER, FAME)
ATTRIBUTES = PERSON_ATTRIBUTES + TOWN_ATTRIBUTES


@dataclass(frozen=True)
class Fact:
    entity: str
    attribute: Attribute
    value: str

    def fill(self, phrasing: str) -> str:
        """`phrasing` about this fact, with a capital first letter."""
        text = phrasing.format(e=self.entity, v=self.value)
        return text[0].upper() + text[1:]

    @property
    def answer(self) -> str:
        return self.fill(self.attribute.answer)

    @property
    def rivals(self) -> list[str]:
        """The other values of the attribute, which a right answer does not name."""
        return [value for value in self.attribute.values if value != self.value]


class World:
    """The facts that hold for one seed, and which things of it are kept for evaluation.

    Attributes:
        facts: Every fact, by (entity, attribute name).
        held_out_facts: Facts that prose states but that no training text asks for: of each attribute 7 of the 32
            people, or 2 of the 8 towns.
        asked_facts: All others.
        heroes: Pairs (person, story object), by whether they are held out.
        words: Compound words to spell, by whether they are held out.
    """

    def __init__(self, seed: int):
        self.seed = seed
        rng = random.Random(f"world {seed}")
        self.facts: dict[tuple[str, str], Fact] = {}
        self.held_out_facts: list[Fact] = []
        self.add_facts(rng, PERSON_ATTRIBUTES, PEOPLE, HELD_OUT_PEOPLE)
        self.add_facts(rng, TOWN_ATTRIBUTES, TOWNS, HELD_OUT_TOWNS)
        held_out = set(self.held_out_facts)
        self.asked_facts = [fact for fact in self.facts.values() if fact not in held_out]

        numbers = itertools.combinations_with_replacement(range(2, LARGEST_NUMBER + 1), 2)
        self.held_out_numbers = frozenset(split(rng, numbers, HELD_OUT_NUMBERS)[True])
        owners = itertools.product(PEOPLE, COUNTED_THINGS)
        self.held_out_owners = frozenset(split(rng, owners, HELD_OUT_OWNERS)[True])
        self.heroes = split(rng, itertools.product(PEOPLE, STORY_OBJECTS), HELD_OUT_STORIES)
        words = (first + second for first, second in itertools.product(FIRST_PARTS, SECOND_PARTS))
        self.words = split(rng, words, HELD_OUT_WORDS)

    def add_facts(
        self, rng: random.Random, attributes: Sequence[Attribute], entities: Sequence[str], held_out: int
    ) -> None:
        for attribute, kept in zip(attributes, spread(rng, entities, held_out, len(attributes)), strict=True):
            values = deal(rng, attribute.values, len(entities))
            facts = [Fact(entity, attribute, value) for entity, value in zip(entities, values, strict=True)]
            self.facts |= {(fact.entity, attribute.name): fact for fact in facts}
            self.held_out_facts += [fact for fact in facts if fact.entity in kept]

    def of(self, entity: str) -> list[Fact]:
        """All facts about a person or a town, in the order of the attributes."""
        return [fact for (owner, _), fact in self.facts.items() if owner == entity]

    def people_of(self, town: str) -> list[str]:
        return [person for person in PEOPLE if self.facts[person, "town"].value == town]

    def holds_out_numbers(self, a: int, b: int) -> bool:
        """Whether `a` and `b`, in either order, stand together as operands in evaluation only."""
        return (min(a, b), max(a, b)) in self.held_out_numbers


def split(rng: random.Random, items: Iterable, share: float) -> dict[bool, list]:
    """The items, in their order, by whether they are in a random `share` that is held out."""
    parts: dict[bool, list] = {False: [], True: []}
    for item in items:
        parts[rng.random() < share].append(item)
    return parts


def deal(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """`count` values in random order, each as often as any other (up to one)."""
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def spread(rng: random.Random, entities: Sequence[str], size: int, groups: int) -> list[set[str]]:
    """`groups` sets of `size` entities, dealt round after round, so that no entity is in many of them."""
    cards: list[str] = []
    while len(cards) < size * groups:
        cards += rng.sample(entities, len(entities))
    chosen: list[set[str]] = [set() for _ in range(groups)]
    for card in cards:
        open_groups = [group for group in chosen if len(group) < size and card not in group]
        if open_groups:
            min(open_groups, key=len).add(card)
    return chosen
