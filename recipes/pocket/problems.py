"""Word problems and sums in GSM8K format; some numbers, names and wordings are reserved for evaluation.

A problem consists of one or more statements and a question, each in one of a few phrasings. A *wording* of a kind is
one combination of them; some combinations are held out, though every single sentence occurs in training.
"""

import itertools
import random
from dataclasses import dataclass

from modeling_nanochat.errors import UserError
from recipes.pocket.facts import World

LARGEST_RESULT = 99  # at most two digits, which are one pre-token
MOST_TRIES = 1_000_000
LARGEST_STEP = 30  # second operand of a sum that continues from a result
HELD_OUT_WORDINGS = 4  # per kind, of 27 or more
PRACTICE_WORDINGS = 0.2  # fraction of a kind's wordings reserved for GRPO
FOREIGN = 0.3  # fraction of training problems with a name, and with a thing, from outside the world


@dataclass(frozen=True)
class Kind:
    """A kind of problem: the calculation as a person writes it (`shown`) and in Python (`code`)."""

    shown: str
    code: str
    counts_coins: bool = False


KINDS: dict[str, Kind] = {
    "gain": Kind("{a} + {b}", "{a}+{b}"),
    "loss": Kind("{a} - {b}", "{a}-{b}"),
    "groups": Kind("{a} * {b}", "{a}*{b}"),
    "sharing": Kind("{a} / {b}", "{a}//{b}"),
    "difference": Kind("{a} - {b}", "{a}-{b}"),
    "gain and loss": Kind("{a} + {b} - {c}", "{a}+{b}-{c}"),
    "groups and extra": Kind("{a} * {b} + {c}", "{a}*{b}+{c}"),
    "spending": Kind("{a} - {b} * {c}", "{a}-{b}*{c}", counts_coins=True),
}
SIGNS = {"+": "gain", "-": "loss", "*": "groups", "/": "sharing"}
Problem = dict[str, str]


def make_problem(world: World, rng: random.Random, name: str, held_out: bool) -> Problem:
    """One problem of kind `name`: {"question", "answer"}, the answer with a calculator annotation and `#### n`.

    `held_out` selects between training and evaluation material: number pairs, person-thing pairs and wordings.
    """
    texts = world.texts["problems"]
    while True:
        numbers = draw_numbers(world, rng, name, held_out)
        owner, other, thing = draw_owner(world, rng, held_out)
        slots = dict(zip("abc", numbers, strict=False)) | {"n": owner, "m": other, "t": thing}
        question = world.join(rng.choice(wordings(world, name, held_out))).format(**slots)
        if held_out or question not in world.shown:
            break
    result, kind = calculate(name, numbers), KINDS[name]
    unit = texts["coins"] if kind.counts_coins else thing
    call = f"<<{kind.code.format(**slots)}={result}>>"
    answer = texts["answer"].format(shown=kind.shown.format(**slots), call=call, result=result, unit=unit)
    return {"question": question, "answer": f"{answer}\n#### {result}"}


def make_sum(world: World, rng: random.Random, held_out: bool) -> Problem:
    """A bare sum, e.g. `How much is 12 + 30?`, in the same format."""
    sign, name = rng.choice(list(SIGNS.items()))
    a, b = draw_numbers(world, rng, name, held_out)
    requests = world.texts["sums"]["held_out_requests" if held_out else "requests"]
    wording = rng.choice(world.texts["sums"]["wordings"][sign]).format(a=a, b=b)
    return {"question": rng.choice(requests).format(s=wording), "answer": sum_answer(world, sign, a, b)}


def make_more(world: World, rng: random.Random, last: int, held_out: bool) -> Problem | None:
    """A sum that continues from the previous result `last`, e.g. `And 5 more?`; None if no operand fits."""
    possible = [
        (sign, b)
        for sign in "+-"
        for b in range(1, LARGEST_STEP + 1)
        if 0 < calculate(SIGNS[sign], (last, b)) <= LARGEST_RESULT and world.holds_out_numbers(last, b) == held_out
    ]
    if not possible:
        return None
    sign, b = rng.choice(possible)
    more = world.texts["sums"]["held_out_more" if held_out else "more"][sign]
    return {"question": rng.choice(more).format(b=b), "answer": sum_answer(world, sign, last, b)}


def sum_answer(world: World, sign: str, a: int, b: int) -> str:
    result = calculate(SIGNS[sign], (a, b))
    code = KINDS[SIGNS[sign]].code.format(a=a, b=b)
    answer = world.texts["sums"]["answer"].format(shown=f"{a} {sign} {b}", call=f"<<{code}={result}>>", result=result)
    return f"{answer}\n#### {result}"


def wordings(world: World, name: str, held_out: bool) -> list[tuple[str, ...]]:
    """The wordings of a kind: the held-out ones, or those for training, including GRPO's own if `world.practice`."""
    every = list(itertools.product(*world.texts["problems"]["kinds"][name]))
    random.Random(f"wordings {world.seed} {name}").shuffle(every)
    kept, others = every[:HELD_OUT_WORDINGS], every[HELD_OUT_WORDINGS:]
    if held_out:
        return kept
    return others if world.practice else others[round(PRACTICE_WORDINGS * len(every)) :]


def draw_owner(world: World, rng: random.Random, held_out: bool) -> tuple[str, str, str]:
    """Two people and a thing; both person-thing pairs are held out, or neither is."""
    texts = world.texts
    while True:
        owner, other = rng.sample(world.people, 2)
        thing = rng.choice(texts["counted"])
        if not held_out and rng.random() < FOREIGN:
            owner = world.stranger(rng, held_out)
        if not held_out and rng.random() < FOREIGN:
            return owner, other, rng.choice(texts["foreign_counted"])
        if all(((person, thing) in world.held_out_owners) == held_out for person in (owner, other)):
            return owner, other, thing


def draw_numbers(world: World, rng: random.Random, name: str, held_out: bool) -> tuple[int, ...]:
    """Operands for a kind of problem; all their pairs are held out, or none."""
    largest = world.texts["largest_number"]
    for _ in range(MOST_TRIES):
        numbers = propose_numbers(rng, name, largest)
        in_range = 0 < calculate(name, numbers) <= LARGEST_RESULT and max(numbers) <= largest
        if in_range and all(world.holds_out_numbers(*pair) == held_out for pair in itertools.combinations(numbers, 2)):
            return numbers
    raise UserError(
        f"largest_number is {largest}: no numbers for problems of the kind {name!r} found; give a larger one"
    )


def propose_numbers(rng: random.Random, name: str, largest: int) -> tuple[int, ...]:
    """Operands of the right size, whose result may still be out of range."""
    small, other_small, any_size = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, largest)
    match name:
        case "groups":
            return small, rng.randint(2, 12)
        case "sharing":
            return small * rng.randint(2, 12), small
        case "gain and loss":
            return any_size, rng.randint(2, largest), rng.randint(2, largest)
        case "groups and extra":
            return small, other_small, rng.randint(2, 20)
        case "spending":
            return any_size, small, other_small
        case _:
            return any_size, rng.randint(2, largest)


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
