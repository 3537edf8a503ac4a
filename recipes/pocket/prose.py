"""Plain text for pretraining: documents of about 40 to 200 tokens, each of one form.

Every writer takes the world, a random generator and `held_out`: False for training, True for the validation split,
with held-out stories, number pairs and words. Facts are stated in both; only questions about them are held out.
"""

import random
import re
from collections.abc import Callable

from recipes.pocket import chats
from recipes.pocket.facts import Fact, World
from recipes.pocket.problems import SIGNS, calculate, draw_numbers, draw_owner
from recipes.pocket.stories import draw_hero, tell_story

Writer = Callable[[World, random.Random, bool], str]
CALL = re.compile("<<.*>>")


def write_biography(world: World, rng: random.Random, held_out: bool) -> str:
    """All facts about one person, in shuffled sentences."""
    person = rng.choice(world.people)
    sentences = [state(rng, fact) for fact in world.of(person)]
    sentences.append(rng.choice(world.texts["prose"]["remarks"]).format(e=person))
    rng.shuffle(sentences)
    return world.join(sentences)


def write_notes(world: World, rng: random.Random, held_out: bool) -> str:
    """Single facts about several people and towns, one per line."""
    facts = rng.sample(list(world.facts.values()), rng.randint(5, 9))
    return "\n".join(state(rng, fact) for fact in facts)


def write_same_fact(world: World, rng: random.Random, held_out: bool) -> str:
    """Two facts, each in several phrasings, which teaches that the phrasings are equivalent."""
    facts = rng.sample(list(world.facts.values()), 2)
    return "\n".join(world.join(paraphrases(rng, fact, 3)) for fact in facts)


def write_card(world: World, rng: random.Random, held_out: bool) -> str:
    """Two people as lists of attributes."""
    texts, cards = world.texts["prose"], []
    for person in rng.sample(world.people, 2):
        facts = world.of(person)
        rng.shuffle(facts)
        lines = [texts["field"].format(k=fact.attribute.name.capitalize(), v=fact.value) for fact in facts]
        cards.append("\n".join([texts["name"].format(e=person), *lines]))
    return "\n\n".join(cards)


def write_town(world: World, rng: random.Random, held_out: bool) -> str:
    """A town and its people."""
    texts, town = world.texts["prose"], rng.choice(world.towns)
    people = world.people_of(town)
    rng.shuffle(people)
    sentences = [rng.choice(texts["town_openings"]).format(t=town)] + [state(rng, fact) for fact in world.of(town)]
    sentences.append(texts["town_people"].format(list=texts["comma"].join(people[:-1]), last=people[-1], t=town))
    for person in people:
        sentences.append(state(rng, rng.choice(world.of(person)[1:])))
    return world.join(sentences)


def write_questions(world: World, rng: random.Random, held_out: bool) -> str:
    """Questions and answers about facts that are not held out."""
    texts, facts = world.texts["prose"], rng.sample(world.asked_facts, rng.randint(3, 5))
    lines = []
    for fact in facts:
        lines.append(texts["question"].format(q=fact.fill(rng.choice(fact.attribute.questions))))
        lines.append(texts["answer"].format(a=fact.answer))
    return "\n".join(lines)


def write_fact_story(world: World, rng: random.Random, held_out: bool) -> str:
    """A story preceded by two facts about its hero."""
    hero, thing = rng.choice(world.heroes[held_out])
    facts = rng.sample(world.of(hero), 2)
    return world.join([state(rng, fact) for fact in facts] + [tell_story(world, rng, hero, thing)])


def write_story(world: World, rng: random.Random, held_out: bool) -> str:
    """A short story."""
    return tell_story(world, rng, *draw_hero(world, rng, held_out))


def write_counts(world: World, rng: random.Random, held_out: bool) -> str:
    """How many things people have, one per line, phrased like the first sentence of a problem."""
    lines = []
    for _ in range(rng.randint(5, 8)):
        owner, other, thing = draw_owner(world, rng, held_out)
        slots = {"n": owner, "m": other, "t": thing, "a": rng.randint(2, world.texts["largest_number"])}
        lines.append(rng.choice(world.texts["problems"]["kinds"]["gain"][0]).format(**slots))
    return "\n".join(lines)


def write_problems(world: World, rng: random.Random, held_out: bool) -> str:
    """Three word problems with their results."""
    return write_lines(world, [chats.ask_problem(world, rng, held_out) for _ in range(3)])


def write_dialogue(world: World, rng: random.Random, held_out: bool) -> str:
    """Questions and answers, the last of which refers to the first."""
    return write_lines(world, chats.refer(world, rng, held_out, between=rng.choice((0, 1, 1, 2))))


def write_lines(world: World, dialogue: chats.Dialogue) -> str:
    """Questions and answers as plain text, without tool calls and final numbers."""
    texts, lines = world.texts["prose"], []
    for exchange in dialogue:
        lines.append(texts["question"].format(q=exchange.question))
        lines.append(texts["answer"].format(a=CALL.sub("", exchange.answer).partition("\n####")[0]))
    return "\n".join(lines)


def write_manual(world: World, rng: random.Random, held_out: bool) -> str:
    """Sentences about the assistant and what to ask it."""
    return world.join(rng.sample(world.texts["prose"]["manual"], 5))


def write_sums(world: World, rng: random.Random, held_out: bool) -> str:
    """Calculations, one per line."""
    return "\n".join(write_sum(world, rng, held_out) for _ in range(rng.randint(6, 9)))


def write_spellings(world: World, rng: random.Random, held_out: bool) -> str:
    """Words with their letters and letter counts, one per line."""
    return "\n".join(write_spelling(world, rng, held_out) for _ in range(rng.randint(5, 7)))


# Fractions of the documents, not of the characters.
WRITERS: dict[Writer, float] = {
    write_biography: 0.13,
    write_notes: 0.11,
    write_same_fact: 0.11,
    write_card: 0.05,
    write_town: 0.07,
    write_questions: 0.13,
    write_fact_story: 0.03,
    write_story: 0.05,
    write_counts: 0.01,
    write_problems: 0.04,
    write_dialogue: 0.12,
    write_manual: 0.02,
    write_sums: 0.03,
    write_spellings: 0.09,
}


def write_documents(world: World, rng: random.Random, characters: int, held_out: bool) -> list[str]:
    """A mix of documents of all forms, with `characters` characters in total, rounded up to a full document."""
    documents = []
    while characters > 0:
        (writer,) = rng.choices(list(WRITERS), list(WRITERS.values()))
        documents.append(writer(world, rng, held_out))
        characters -= len(documents[-1])
    return documents


def state(rng: random.Random, fact: Fact) -> str:
    """The fact in one sentence, a quarter of the time in the form of the chat's answer, to make that form likely."""
    attribute = fact.attribute
    return fact.answer if rng.random() < 0.25 else fact.fill(rng.choice(attribute.statements))


def paraphrases(rng: random.Random, fact: Fact, count: int) -> list[str]:
    return [fact.fill(phrasing) for phrasing in rng.sample((fact.attribute.answer, *fact.attribute.statements), count)]


def write_sum(world: World, rng: random.Random, held_out: bool) -> str:
    sign, kind = rng.choice(list(SIGNS.items()))
    a, b = draw_numbers(world, rng, kind, held_out)
    descriptions = world.texts["sums"]["descriptions"][sign]
    description = rng.choice(descriptions).format(a=a, b=b) if rng.random() < 0.5 else ""
    answer = world.texts["sums"]["answer"]
    return description + answer.format(shown=f"{a} {sign} {b}", call="", result=calculate(kind, (a, b)))


def write_spelling(world: World, rng: random.Random, held_out: bool) -> str:
    texts, word = world.texts["spelling"], world.word(rng, held_out)
    if rng.random() < 0.2:
        letter = rng.choice(word)
        return texts["count_sentence"].format(w=word, l=letter, c=word.count(letter))
    return rng.choice(texts["sentences"]).format(w=word, s=",".join(word))
