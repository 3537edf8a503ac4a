"""The evaluation files: held-out facts, numbers, names, words and wordings only, in the formats that `evals` reads."""

import random

from recipes.pocket.chats import HELD_OUT_SPELLING_REQUESTS
from recipes.pocket.facts import World
from recipes.pocket.problems import KINDS, make_problem
from recipes.pocket.quiz import LETTERS, fact_question


def ask_held_out_facts(world: World) -> list[dict]:
    """Every held-out fact in every held-out phrasing: {"question", "answer", "rivals"}."""
    return [
        {"question": fact.fill(phrasing), "answer": fact.value, "rivals": fact.rivals}
        for fact in world.held_out_facts
        for phrasing in fact.attribute.held_out_questions
    ]


def choose_held_out_facts(world: World, rng: random.Random) -> list[dict]:
    """The same questions as multiple choice, in ARC's format; the right letter is each equally often."""
    asked = [(fact, phrasing) for fact in world.held_out_facts for phrasing in fact.attribute.held_out_questions]
    rng.shuffle(asked)
    records = []
    for number, (fact, phrasing) in enumerate(asked):
        question, choices, answer = fact_question(rng, fact, phrasing)
        letter = number % len(LETTERS)
        choices.remove(answer)
        choices.insert(letter, answer)
        labelled = {"text": choices, "label": list(LETTERS)}
        records.append({"question": question, "choices": labelled, "answerKey": LETTERS[letter]})
    return records


def complete_held_out_statements(world: World, rng: random.Random) -> list[dict]:
    """Held-out facts in held-out statements, the value to be chosen: CORE's {"query", "choices", "gold"}."""
    records = []
    for fact in world.held_out_facts:
        for phrasing in fact.attribute.held_out_statements:
            query, choices, answer = fact_question(rng, fact, phrasing)
            records.append({"query": query, "choices": choices, "gold": choices.index(answer)})
    return records


def pose_held_out_problems(world: World, rng: random.Random, count: int) -> list[dict]:
    """`count` different word problems, all kinds equally often: GSM8K's {"question", "answer"}."""
    problems: dict[str, dict] = {}
    kinds = list(KINDS)
    while len(problems) < count:
        problem = make_problem(world, rng, kinds[len(problems) % len(kinds)], held_out=True)
        problems[problem["question"]] = problem
    return list(problems.values())


def spell_held_out_words(world: World, rng: random.Random, count: int) -> list[dict]:
    """`count` held-out words to spell (all of them where there are fewer), as {"question", "answer", "rivals"}."""
    words = world.words[True]
    words = rng.sample(words, min(count, len(words)))
    return [
        {"question": rng.choice(HELD_OUT_SPELLING_REQUESTS).format(w=word), "answer": ",".join(word), "rivals": []}
        for word in words
    ]
