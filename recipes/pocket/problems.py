"""Word problems in GSM8K format, and which of their numbers, names and wordings only the evaluation uses.

A problem consists of one or more statements and a question; each is one of a few wordings. A *wording* of a kind is
the choice of all of them; some choices are held out, though every single sentence occurs in training.
"""

import itertools
import random
from dataclasses import dataclass

from recipes.pocket.facts import COUNTED_THINGS, LARGEST_NUMBER, PEOPLE, World

LARGEST_RESULT = 99  # keeps every result one token
HELD_OUT_WORDINGS = 4  # of the 12 or more of each kind

HAVING = ("{n} has {a} {t}.", "{n} starts the day with {a} {t}.", "There are {a} {t} in the bag of {n}.")
GETTING = ("{m} gives {n} {b} more.", "Then {n} finds {b} more {t}.", "{n} gets {b} more from {m}.")
LOSING = ("{n} gives {b} of them to {m}.", "Then {n} loses {b} {t}.", "{m} takes {b} of them away.")
NOW = ("How many {t} does {n} have now?", "How many {t} are there in the end?", "How many {t} is that now?")
LEFT = ("How many {t} does {n} have left?", "How many {t} are left?", "How many {t} does {n} still have?")


@dataclass(frozen=True)
class Kind:
    """A kind of problem. `shown` is the calculation as a person writes it, `code` the same in Python."""

    parts: tuple[tuple[str, ...], ...]
    shown: str
    code: str
    unit: str = "{t}"


KINDS: dict[str, Kind] = {
    "gain": Kind((HAVING, GETTING, NOW), "{a} + {b}", "{a}+{b}"),
    "loss": Kind((HAVING, LOSING, LEFT), "{a} - {b}", "{a}-{b}"),
    "groups": Kind(
        (
            ("{n} has {a} boxes.", "There are {a} boxes on the table of {n}.", "{n} fills {a} boxes."),
            ("Each box holds {b} {t}.", "There are {b} {t} in every box.", "{m} puts {b} {t} in each box."),
            ("How many {t} are in the boxes?", "How many {t} is that in all?", "How many {t} are there in all?"),
        ),
        "{a} * {b}",
        "{a}*{b}",
    ),
    "sharing": Kind(
        (
            HAVING,
            ("{n} shares them between {b} friends.", "{b} friends share them.", "{m} splits them between {b} friends."),
            ("How many {t} does each friend get?", "How many {t} are there for each?", "How many {t} for one friend?"),
        ),
        "{a} / {b}",
        "{a}//{b}",
    ),
    "difference": Kind(  # the larger number comes second as often as first
        (
            (
                "{n} has {a} {t} and {m} has {b}.",
                "{m} has {b} {t} and {n} has {a}.",
                "In the bag of {n} there are {a} {t}, and {m} has {b}.",
                "In the bag of {m} there are {b} {t}, and {n} has {a}.",
            ),
            (
                "How many more {t} does {n} have than {m}?",
                "How many fewer {t} does {m} have than {n}?",
                "How many {t} does {m} need to have as many as {n}?",
            ),
        ),
        "{a} - {b}",
        "{a}-{b}",
    ),
    "gain and loss": Kind(
        (HAVING, GETTING, tuple(text.replace("{b}", "{c}") for text in LOSING), LEFT),
        "{a} + {b} - {c}",
        "{a}+{b}-{c}",
    ),
    "groups and extra": Kind(
        (
            ("{n} has {a} boxes with {b} {t} each.", "{n} fills {a} boxes with {b} {t} each."),
            ("{m} brings {c} more {t}.", "{n} has {c} more {t} in a bag.", "There are {c} more {t} on the table."),
            ("How many {t} is that in all?", "How many {t} are there in all?", "How many {t} does {n} have in all?"),
        ),
        "{a} * {b} + {c}",
        "{a}*{b}+{c}",
    ),
    "spending": Kind(
        (
            ("{n} has {a} coins.", "There are {a} coins in the bag of {n}.", "{m} gives {n} {a} coins."),
            ("{n} buys {b} {t} for {c} coins each.", "Then {n} pays {c} coins each for {b} {t}."),
            ("How many coins does {n} have left?", "How many coins are left?", "How many coins does {n} still have?"),
        ),
        "{a} - {b} * {c}",
        "{a}-{b}*{c}",
        "coins",
    ),
}


def make_problem(world: World, rng: random.Random, name: str, held_out: bool) -> dict[str, str]:
    """One problem of the kind `name`: {"question", "answer"}, the answer with a calculator mark and `#### n`.

    `held_out` chooses between what training may see and what evaluation uses: number pairs, pairs of a person and a
    thing, and wordings.
    """
    kind = KINDS[name]
    numbers = draw_numbers(world, rng, name, held_out)
    owner, other, thing = draw_owner(world, rng, held_out)
    slots = dict(zip("abc", numbers, strict=False)) | {"n": owner, "m": other, "t": thing}
    question = " ".join(rng.choice(wordings(world, name, held_out))).format(**slots)
    code = kind.code.format(**slots)
    result = calculate(name, numbers)
    shown, unit = kind.shown.format(**slots), kind.unit.format(**slots)
    return {"question": question, "answer": f"{shown} = <<{code}={result}>>{result} {unit}.\n#### {result}"}


def wordings(world: World, name: str, held_out: bool) -> list[tuple[str, ...]]:
    """The choices of sentences for a kind: those of training, or the held-out ones."""
    every = list(itertools.product(*KINDS[name].parts))
    kept = random.Random(f"wordings {world.seed} {name}").sample(every, HELD_OUT_WORDINGS)
    return kept if held_out else [wording for wording in every if wording not in kept]


def draw_owner(world: World, rng: random.Random, held_out: bool) -> tuple[str, str, str]:
    """Two people and a thing; both pairs of a person and the thing are held out, or neither is."""
    while True:
        owner, other = rng.sample(PEOPLE, 2)
        thing = rng.choice(COUNTED_THINGS)
        if all(((person, thing) in world.held_out_owners) == held_out for person in (owner, other)):
            return owner, other, thing


def draw_numbers(world: World, rng: random.Random, name: str, held_out: bool) -> tuple[int, ...]:
    """Operands for a kind of problem; all pairs of them are held out, or none is."""
    while True:
        numbers = propose_numbers(rng, name)
        in_range = 0 < calculate(name, numbers) <= LARGEST_RESULT and max(numbers) <= LARGEST_NUMBER
        if in_range and all(world.holds_out_numbers(*pair) == held_out for pair in itertools.combinations(numbers, 2)):
            return numbers


def propose_numbers(rng: random.Random, name: str) -> tuple[int, ...]:
    """Operands of the right size, which may still make a result that is too small or too large."""
    small, other_small, any_size = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, LARGEST_NUMBER)
    match name:
        case "groups":
            return small, rng.randint(2, 12)
        case "sharing":
            return small * rng.randint(2, 12), small
        case "gain and loss":
            return any_size, rng.randint(2, LARGEST_NUMBER), rng.randint(2, LARGEST_NUMBER)
        case "groups and extra":
            return small, other_small, rng.randint(2, 20)
        case "spending":
            return any_size, small, other_small
        case _:
            return any_size, rng.randint(2, LARGEST_NUMBER)


def calculate(name: str, numbers: tuple[int, ...]) -> int:
    a, b, c = (*numbers, 0)[:3]
    match name:
        case "gain":
            return a + b
        case "loss" | "difference":
            return a - b
        case "groups":
            return a * b
        case "sharing":
            return a // b
        case "gain and loss":
            return a + b - c
        case "groups and extra":
            return a * b + c
        case _:
            return a - b * c
