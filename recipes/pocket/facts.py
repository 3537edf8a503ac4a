"""The closed world: its people and towns, the facts about them, and what is held out from training.

The words come from a file in `worlds/`, everything else from a seed. What is held out is decided here, before any text
is written; the writers of prose, conversations and problems look it up.
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
FEWEST_TRIPLES, MOST_DRAWS = 3, 1000  # operand triples whose pairs are all held out; attempts to get them
HELD_OUT_NUMBERS, HELD_OUT_OWNERS, HELD_OUT_STORIES, HELD_OUT_WORDS = 0.2, 0.2, 0.2, 0.3
PRACTICE_WORDS = 0.1  # fraction of the words that are not held out
Texts = dict[str, Any]


def read_texts(name: str) -> Texts:
    """The words of a world: `english`, another file in `worlds/`, or a path to a YAML file of your own.

    Raises:
        UserError: The file does not exist or does not match the structure of `english.yaml`.
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
    """Raise [`UserError`] unless `texts` has the structure of `example`: the same keys and the same types."""
    if type(texts) is not type(example) or texts in ([], {}):
        place = where or "the file"
        raise UserError(f"{path}: {place} must be a {kind_of(example)}, as in {WORLDS.name}/english.yaml")
    if isinstance(example, dict):
        if missing := [str(key) for key in example if key not in texts]:
            place = f"{where} {missing[0]}".strip()
            raise UserError(f"{path}: {place} is missing; see {WORLDS.name}/english.yaml")
        for key in example:
            check_like(texts[key], example[key], f"{where}.{key}".strip("."), path)
    elif isinstance(example, list):
        for number, item in enumerate(texts):
            check_like(item, example[0], f"{where}[{number}]", path)


def kind_of(example: Any) -> str:
    return {dict: "mapping", list: "list with entries", str: "text", int: "whole number"}[type(example)]


@dataclass(frozen=True)
class Attribute:
    """A property for which every person, or every town, has exactly one value.

    In all phrasings `{e}` is the person or town and `{v}` the value. The `held_out_*` phrasings are for evaluation
    only; `held_out_statements` stop before the value.
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
        """`phrasing` filled with this fact, capitalized."""
        return capital(phrasing.format(e=self.entity, v=self.value))

    @property
    def answer(self) -> str:
        return self.fill(self.attribute.answer)

    @property
    def rivals(self) -> list[str]:
        """The other values of the attribute, which a correct answer must not contain."""
        return [value for value in self.attribute.values if value != self.value]


class World:
    """The facts of one seed and what is held out for evaluation.

    Attributes:
        texts: The words of the world, as in its file.
        attributes: By name; the values of the attribute "town" are the towns.
        facts: Every fact, by (entity, attribute name).
        held_out_facts: Facts that prose states but no training text asks about: 7 people, or 2 towns, per attribute.
        asked_facts: All other facts.
        heroes: Pairs (person, story object), keyed by whether they are held out; `held_out_heroes` has those as a set.
        words: Compound words to spell, keyed by whether they are held out.
        practice: Whether this world was made by [`for_practice`].
        shown: Questions that no training text may contain, because the chat shows them as examples.
    """

    def __init__(self, seed: int, texts: Texts, shown: Iterable[str] = ()):
        self.seed, self.texts, self.shown = seed, texts, frozenset(shown)
        self.people, self.towns = texts["people"], texts["towns"]
        frozen = [{key: freeze(value) for key, value in fields.items()} for fields in texts["attributes"]]
        self.attributes = {fields["name"]: Attribute(**fields) for fields in frozen}
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
        """A copy of the world for GRPO's prompts, with material that neither earlier stages nor the evaluation use.

        It has its own words to spell, and a fifth of its problem wordings are its own. If a model has already learned
        the answer to a prompt, all rewards are equal and give no gradient.
        """
        world = copy.copy(self)
        world.words = self.words | {False: self.practice_words}
        world.practice = True
        return world

    def add_facts(
        self, rng: random.Random, attributes: Sequence[Attribute], entities: Sequence[str], held_out: int
    ) -> None:
        for attribute, kept in zip(attributes, spread(rng, entities, held_out, len(attributes)), strict=True):
            values = balanced_values(rng, attribute.values, len(entities))
            facts = [Fact(entity, attribute, value) for entity, value in zip(entities, values, strict=True)]
            self.facts |= {(fact.entity, attribute.name): fact for fact in facts}
            self.held_out_facts += [fact for fact in facts if fact.entity in kept]

    def attributes_of(self, kind: str) -> list[Attribute]:
        """The attributes of a "person" or of a "town"."""
        return [attribute for attribute in self.attributes.values() if attribute.of == kind]

    def of(self, entity: str) -> list[Fact]:
        """All facts about a person or a town, in the order of the attributes."""
        kind = "person" if (entity, self.attributes_of("person")[0].name) in self.facts else "town"
        return [self.facts[entity, attribute.name] for attribute in self.attributes_of(kind)]

    def people_of(self, town: str) -> list[str]:
        home = self.attributes_of("person")[0].name
        return [person for person in self.people if self.facts[person, home].value == town]

    def stranger(self, rng: random.Random, held_out: bool) -> str:
        """A name that nobody in the world has; most are made up in training, so that the model copies names."""
        if held_out:
            return rng.choice(self.texts["held_out_strangers"])
        names, taken = self.texts["strangers"], {*self.people, *self.texts["held_out_strangers"]}
        name = rng.choice(names) if rng.random() < 0.25 else blend(rng, *rng.sample(names, 2))
        return self.stranger(rng, held_out) if name in taken else name

    def word(self, rng: random.Random, held_out: bool) -> str:
        """A word to spell; in training a quarter are single parts of compounds, so that the parts are learned too."""
        parts = self.texts["first_parts"] + self.texts["second_parts"]
        return rng.choice(parts if not held_out and rng.random() < 0.25 else self.words[held_out])

    def holds_out_numbers(self, a: int, b: int) -> bool:
        """Whether the operand pair `a`, `b`, in either order, is reserved for evaluation."""
        return (min(a, b), max(a, b)) in self.held_out_numbers

    def join(self, sentences: Iterable[str]) -> str:
        """`sentences` joined by the separator of the world's language."""
        return self.texts["space"].join(sentences)


def blend(rng: random.Random, front: str, back: str) -> str:
    """The beginning of one name and the end of another."""
    return front[: rng.randint(1, max(1, len(front) - 1))] + back[rng.randint(1, max(1, len(back) - 1)) :]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def hold_out_numbers(rng: random.Random, largest: int) -> frozenset[tuple[int, int]]:
    """Operand pairs (smaller, larger) reserved for evaluation, redrawn until enough three-operand problems exist.

    All pairs of an evaluation problem are held out: `a - b * c` has three, a chance of 1 in 125.
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
    """The items keyed by whether they are held out, a random `share` of them, in their original order."""
    parts: dict[bool, list] = {False: [], True: []}
    for item in items:
        parts[rng.random() < share].append(item)
    return parts


def balanced_values(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """`count` values in random order; their frequencies differ by at most one."""
    balanced = [values[i % len(values)] for i in range(count)]
    rng.shuffle(balanced)
    return balanced


def spread(rng: random.Random, entities: Sequence[str], size: int, groups: int) -> list[set[str]]:
    """`groups` sets of `size` entities, assigned round by round, so that no entity is in many sets."""
    queue: list[str] = []
    while len(queue) < size * groups:
        queue += rng.sample(entities, len(entities))
    chosen: list[set[str]] = [set() for _ in range(groups)]
    for entity in queue:
        open_groups = [group for group in chosen if len(group) < size and entity not in group]
        if open_groups:
            min(open_groups, key=len).add(entity)
    return chosen
