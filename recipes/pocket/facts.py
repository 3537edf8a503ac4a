"""The closed world itself: who lives in it, what is true about them, and what training never gets to see.

The words come from a file in `worlds/`, everything else follows from a seed. What is held out is decided here, before any
text is written, so that the writers of prose, conversations and problems only have to ask.
"""

import copy
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from modeling_nanochat.errors import UserError

WORLDS = Path(__file__).parent / "worlds"
HELD_OUT_PEOPLE, HELD_OUT_TOWNS = 7, 2  # per attribute
FEWEST_TRIPLES, MOST_DRAWS = 3, 1000  # of operands that are all held out together
HELD_OUT_NUMBERS, HELD_OUT_OWNERS, HELD_OUT_STORIES, HELD_OUT_WORDS = 0.2, 0.2, 0.2, 0.3
PRACTICE_WORDS = 0.1  # of those that are not held out
Texts = dict[str, Any]


def read_texts(name: str) -> Texts:
    """The words of a world: `english`, another file in `worlds/`, or a path to a YAML file of your own.

    Raises:
        UserError: There is no such file, or it lacks what `english.yaml` has.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORLDS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(world.stem for world in WORLDS.glob("*.yaml")))
        raise UserError(f"world {name}: no such world; there are {known}, or give a path that ends in .yaml")
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    check_like(texts, yaml.safe_load((WORLDS / "english.yaml").read_text(encoding="utf-8")), "", path)
    return texts


def check_like(texts: Any, example: Any, where: str, path: Path) -> None:
    """Raise [`UserError`] unless `texts` has the form of `example`: the same keys, and lists, texts and numbers in the same places."""
    if type(texts) is not type(example) or texts in ([], {}):
        raise UserError(f"{path}: {where or 'the file'} must be a {kind_of(example)}, as in {WORLDS.name}/english.yaml")
    if isinstance(example, dict):
        if missing := [str(key) for key in example if key not in texts]:
            raise UserError(f"{path}: {' '.join([where, missing[0]]).strip()} is missing; see {WORLDS.name}/english.yaml")
        for key in example:
            check_like(texts[key], example[key], f"{where}.{key}".strip("."), path)
    elif isinstance(example, list):
        for number, item in enumerate(texts):
            check_like(item, example[0], f"{where}[{number}]", path)


def kind_of(example: Any) -> str:
    return {dict: "mapping", list: "list with entries", str: "text", int: "whole number"}[type(example)]


@dataclass(frozen=True)
class Attribute:
    """A property that every person, or every town, has exactly one value of.

    In all phrasings `{e}` is the person or town and `{v}` the value. The `held_out_*` phrasings are for evaluation
    only; `held_out_statements` end where the value begins.
    """

    name: str
    of: str  # "person" or "town"
    values: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    held_out_statements: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    entity: str
    attribute: Attribute
    value: str

    def fill(self, phrasing: str) -> str:
        """`phrasing` about this fact, with a capital first letter."""
        return capital(phrasing.format(e=self.entity, v=self.value))

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
        texts: The words of the world, as in its file.
        attributes: By name; the attribute "town" has the towns as its values.
        facts: Every fact, by (entity, attribute name).
        held_out_facts: Facts that prose states but that no training text asks for: of each attribute 7 of the people, or
            2 of the towns.
        asked_facts: All others.
        heroes: Pairs (person, story object), by whether they are held out; `held_out_heroes` are the latter as a set.
        words: Compound words to spell, by whether they are held out.
        practice: Whether this is the world [`for_practice`].
        shown: Questions that no training text may contain, because the chat shows them as examples.
    """

    def __init__(self, seed: int, texts: Texts, shown: Iterable[str] = ()):
        self.seed, self.texts, self.shown = seed, texts, frozenset(shown)
        self.people, self.towns = texts["people"], texts["towns"]
        made = [Attribute(**{key: freeze(value) for key, value in attribute.items()}) for attribute in texts["attributes"]]
        self.attributes = {attribute.name: attribute for attribute in made}
        rng = random.Random(f"world {seed}")
        self.facts: dict[tuple[str, str], Fact] = {}
        self.held_out_facts: list[Fact] = []
        self.add_facts(rng, self.attributes_of("person"), self.people, HELD_OUT_PEOPLE)
        self.add_facts(rng, self.attributes_of("town"), self.towns, HELD_OUT_TOWNS)
        held_out = set(self.held_out_facts)
        self.asked_facts = [fact for fact in self.facts.values() if fact not in held_out]

        self.held_out_numbers = hold_out_numbers(rng, texts["largest_number"])
        owners = itertools.product(self.people, texts["counted"])
        self.held_out_owners = frozenset(split(rng, owners, HELD_OUT_OWNERS)[True])
        self.heroes = split(rng, itertools.product(self.people, texts["objects"]), HELD_OUT_STORIES)
        self.held_out_heroes = frozenset(self.heroes[True])
        words = (first + second for first, second in itertools.product(texts["first_parts"], texts["second_parts"]))
        self.words = split(rng, words, HELD_OUT_WORDS)
        practised = split(rng, self.words[False], PRACTICE_WORDS)
        self.words[False], self.practice_words = practised[False], practised[True]
        self.practice = False

    def for_practice(self) -> Self:
        """The same world for GRPO's prompts, which show what no text of the stages before shows, nor the evaluation.

        Its words to spell are others, and so are a fifth of its wordings of problems. What a model has seen the answer to it
        repeats; only the rest has rewards to tell a better answer by.
        """
        world = copy.copy(self)
        world.words = self.words | {False: self.practice_words}
        world.practice = True
        return world

    def add_facts(
        self, rng: random.Random, attributes: Sequence[Attribute], entities: Sequence[str], held_out: int
    ) -> None:
        for attribute, kept in zip(attributes, spread(rng, entities, held_out, len(attributes)), strict=True):
            values = deal(rng, attribute.values, len(entities))
            facts = [Fact(entity, attribute, value) for entity, value in zip(entities, values, strict=True)]
            self.facts |= {(fact.entity, attribute.name): fact for fact in facts}
            self.held_out_facts += [fact for fact in facts if fact.entity in kept]

    def attributes_of(self, kind: str) -> list[Attribute]:
        """Those of a "person" or of a "town"."""
        return [attribute for attribute in self.attributes.values() if attribute.of == kind]

    def of(self, entity: str) -> list[Fact]:
        """All facts about a person or a town, in the order of the attributes."""
        kind = "person" if (entity, self.attributes_of("person")[0].name) in self.facts else "town"
        return [self.facts[entity, attribute.name] for attribute in self.attributes_of(kind)]

    def people_of(self, town: str) -> list[str]:
        return [person for person in self.people if self.facts[person, self.attributes_of("person")[0].name].value == town]

    def stranger(self, rng: random.Random, held_out: bool) -> str:
        """A name that nobody in the world has; in training most of them are made up, so that names are copied and not remembered."""
        if held_out:
            return rng.choice(self.texts["held_out_strangers"])
        names, taken = self.texts["strangers"], {*self.people, *self.texts["held_out_strangers"]}
        name = rng.choice(names) if rng.random() < 0.25 else blend(rng, *rng.sample(names, 2))
        return self.stranger(rng, held_out) if name in taken else name

    def word(self, rng: random.Random, held_out: bool) -> str:
        """A word to spell; in training every fourth is a mere part, so that the parts are known by themselves."""
        parts = self.texts["first_parts"] + self.texts["second_parts"]
        return rng.choice(parts if not held_out and rng.random() < 0.25 else self.words[held_out])

    def holds_out_numbers(self, a: int, b: int) -> bool:
        """Whether `a` and `b`, in either order, stand together as operands in evaluation only."""
        return (min(a, b), max(a, b)) in self.held_out_numbers

    def join(self, sentences: Iterable[str]) -> str:
        """`sentences` one after another, as the world's language sets them."""
        return self.texts["space"].join(sentences)


def blend(rng: random.Random, front: str, back: str) -> str:
    """The beginning of one name and the end of another."""
    return front[: rng.randint(1, max(1, len(front) - 1))] + back[rng.randint(1, max(1, len(back) - 1)) :]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def hold_out_numbers(rng: random.Random, largest: int) -> frozenset[tuple[int, int]]:
    """Pairs of operands (smaller, larger) for evaluation only, drawn anew where too few go together in problems of three.

    A problem of the evaluation has held-out pairs alone: with `a - b * c` that is three, a chance of one in 125 each.
    """
    factors = itertools.combinations_with_replacement(range(2, 10), 2)
    triples = [(b, c, a) for b, c in factors for a in range(b * c + 1, largest + 1)]
    for _ in range(MOST_DRAWS):
        pairs = itertools.combinations_with_replacement(range(2, largest + 1), 2)
        held_out = frozenset(split(rng, pairs, HELD_OUT_NUMBERS)[True])
        if sum(held_out.issuperset(itertools.combinations(triple, 2)) for triple in triples) >= FEWEST_TRIPLES:
            return held_out
    raise UserError(f"largest_number is {largest}: too few numbers to hold some out for evaluation; give a larger one")


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
