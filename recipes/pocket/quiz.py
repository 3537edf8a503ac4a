"""Questions with four choices: about a fact, about a category of words, or merely for a word."""

import random

from recipes.pocket.facts import PERSON_ATTRIBUTES, Fact, World

LETTERS = "ABCD"
CATEGORY_QUESTIONS = ("Which of these is a {c}?", "Which word is a {c}?")
WORD_QUESTIONS = ("Which of these is {v}?", "Which word is {v}?")

Question = tuple[str, list[str], str]  # question, choices, right choice


def draw_question(world: World, rng: random.Random) -> Question:
    """One that training may see. Two of three are lighter than a fact, and so teach what the letters stand for."""
    form = rng.randrange(3)
    if form == 0:
        return word_question(rng)
    if form == 1:
        return category_question(rng)
    fact = rng.choice(world.asked_facts)
    return fact_question(rng, fact, rng.choice(fact.attribute.questions))


def fact_question(rng: random.Random, fact: Fact, phrasing: str) -> Question:
    choices = [fact.value, *rng.sample(fact.rivals, len(LETTERS) - 1)]
    rng.shuffle(choices)
    return fact.fill(phrasing), choices, fact.value


def category_question(rng: random.Random) -> Question:
    """Which of four values, each of another attribute, belongs to a given attribute."""
    attributes = rng.sample(PERSON_ATTRIBUTES, len(LETTERS))
    choices = [rng.choice(attribute.values) for attribute in attributes]
    wanted = rng.randrange(len(LETTERS))
    return rng.choice(CATEGORY_QUESTIONS).format(c=attributes[wanted].name), choices, choices[wanted]


def word_question(rng: random.Random) -> Question:
    """Which of four values of one attribute is a given one."""
    choices = rng.sample(rng.choice(PERSON_ATTRIBUTES).values, len(LETTERS))
    wanted = rng.choice(choices)
    return rng.choice(WORD_QUESTIONS).format(v=wanted), choices, wanted
