"""Generates the evaluation files, from held-out facts, numbers, names, words and wordings only, in `evals` formats."""

import itertools
import random
from collections.abc import Callable

from recipes.pocket import chats
from recipes.pocket.chats import Dialogue, Exchange
from recipes.pocket.facts import Fact, World
from recipes.pocket.problems import KINDS, make_problem

SHOWN = 100  # questions of each kind of which the chat shows examples


def record(exchange: Exchange, history: Dialogue = ()) -> dict:
    """One question: GSM8K's fields, or {"question", "answer", "rivals"} if the answer is graded by its words."""
    before = {"history": chats.flat(history)} if history else {}
    if not exchange.keys:
        return before | {"question": exchange.question, "answer": exchange.answer}
    answer = exchange.keys[0] if len(exchange.keys) == 1 else list(exchange.keys)
    return before | {"question": exchange.question, "answer": answer, "rivals": list(exchange.rivals)}


def evaluation_records(world: World, count: int, unknown: int) -> dict[str, list[dict]]:
    """The records of every file by name, with up to `count` questions of each kind."""

    def rng(name: str) -> random.Random:
        return random.Random(f"eval/{name} {world.seed}")

    def drawn(name: str, size: int, make: Callable[[random.Random], dict]) -> list[dict]:
        return distinct(rng(name), size, make)

    return {
        "eval/cloze.jsonl": complete_held_out_statements(world, rng("cloze")),
        "eval/facts.jsonl": ask_held_out_facts(world, rng("facts"))[:count],
        "eval/spelling.jsonl": spell_held_out_words(world, rng("spelling"))[:count],
        "eval/problems.jsonl": pose_held_out_problems(world, rng("problems"), count),
        "eval/stories.jsonl": drawn("stories", count, lambda draw: record(chats.ask_story(world, draw, True))),
        "eval/dialogue_sums.jsonl": drawn("dialogue_sums", count, lambda draw: later(world, draw, (chats.ask_sum,))),
        "eval/dialogue_words.jsonl": drawn(
            "dialogue_words", count, lambda draw: later(world, draw, (chats.ask_fact, chats.ask_spelling))
        ),
        **references(world, rng("references"), count),
        "eval/unknown.jsonl": drawn("unknown", unknown, lambda draw: record(chats.ask_unknown(world, draw, True))),
        "eval/shown/identity.jsonl": [
            record(chats.ask_identity(world, draw, True)) for draw in [rng("shown/identity")] for _ in range(SHOWN)
        ],
        "eval/shown/stories.jsonl": drawn(
            "shown/stories", SHOWN, lambda draw: record(chats.ask_story(world, draw, True))
        ),
        "eval/shown/problems.jsonl": pose_held_out_problems(world, rng("shown/problems"), SHOWN),
    }


def distinct(rng: random.Random, size: int, make: Callable[[random.Random], dict]) -> list[dict]:
    """`size` distinct records, or fewer if a long search finds no more."""
    found: dict[str, dict] = {}
    for _ in range(20 * size):
        if len(found) == size:
            break
        made = make(rng)
        found[str((made.get("history"), made["question"]))] = made
    return list(found.values())


def later(world: World, rng: random.Random, askers: tuple[chats.Asker, ...]) -> dict:
    """A question by one of `askers` as the second or third turn."""
    *history, question = chats.later(world, rng, True, askers)
    return record(question, history)


def references(world: World, rng: random.Random, count: int) -> dict[str, list[dict]]:
    """Third turns that refer to the first: answers graded by their words, and sums that continue."""
    words, sums = [], []
    while len(words) + len(sums) < count:
        *history, question = chats.refer(world, rng, True, between=1)
        (words if question.keys else sums).append(record(question, history))
    return {"eval/references.jsonl": words, "eval/reference_sums.jsonl": sums}


def ask_held_out_facts(world: World, rng: random.Random) -> list[dict]:
    """Every held-out fact in every held-out phrasing, shuffled."""
    asked = [
        record(chats.fact_exchange(fact, wording))
        for fact in world.held_out_facts
        for wording in fact.attribute.held_out_questions
    ]
    rng.shuffle(asked)
    return asked


def spell_held_out_words(world: World, rng: random.Random) -> list[dict]:
    """Every held-out word in every held-out request, shuffled."""
    requests = world.texts["spelling"]["held_out_requests"]
    pairs = itertools.product(world.words[True], requests)
    asked = [record(chats.spelling_exchange(world, word, wording)) for word, wording in pairs]
    rng.shuffle(asked)
    return asked


def complete_held_out_statements(world: World, rng: random.Random) -> list[dict]:
    """Held-out facts in held-out statements with the value to choose: CORE's {"query", "choices", "gold"}."""
    delimiter = {"continuation_delimiter": world.texts["space"]}
    return [
        choose(rng, fact, phrasing) | delimiter
        for fact in world.held_out_facts
        for phrasing in fact.attribute.held_out_statements
    ]


def choose(rng: random.Random, fact: Fact, phrasing: str) -> dict:
    choices = [fact.value, *rng.sample(fact.rivals, 3)]
    rng.shuffle(choices)
    return {"query": fact.fill(phrasing), "choices": choices, "gold": choices.index(fact.value)}


def pose_held_out_problems(world: World, rng: random.Random, count: int) -> list[dict]:
    """`count` distinct word problems, all kinds equally often: GSM8K's {"question", "answer"}."""
    problems: dict[str, dict] = {}
    kinds = list(KINDS)
    while len(problems) < count:
        problem = make_problem(world, rng, kinds[len(problems) % len(kinds)], held_out=True)
        problems[problem["question"]] = problem
    return list(problems.values())
