"""Conversations with the pocket assistant. Each asker generates one question with its answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evals.tasks.gsm8k import extract_answer, to_messages
from recipes.pocket.facts import Fact, World, capital
from recipes.pocket.problems import KINDS, Problem, make_more, make_problem, make_sum
from recipes.pocket.stories import draw_hero, tell_story

# Weights of the problem kinds in conversations. The rare kinds are left to GRPO.
COMMON_KINDS = {"gain": 19, "loss": 18, "groups": 13, "sharing": 13, "difference": 24, "gain and loss": 10}
RARE_KINDS = {"groups and extra": 1.5, "spending": 1.5}
# All kinds occur: GRPO on the rare kinds alone would degrade similar ones.
GRPO_KINDS = dict.fromkeys(KINDS, 1) | dict.fromkeys(("difference", *RARE_KINDS), 3)
Messages = list[dict]


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. Correct answers contain all `keys` and none of the `rivals`.

    Without keys the answer is in GSM8K format and graded by its final number.
    """

    question: str
    answer: str
    keys: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    @property
    def messages(self) -> Messages:
        if extract_answer(self.answer) is not None:
            return to_messages(self.question, self.answer)
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


Asker = Callable[[World, random.Random, bool], Exchange]
Dialogue = list[Exchange]


def ask_identity(world: World, rng: random.Random, held_out: bool) -> Exchange:
    topic = rng.choice(world.texts["identity"])
    question = rng.choice(topic["held_out" if held_out else "questions"])
    return Exchange(question, topic["answer"], (topic["contains"],))


def ask_fact(world: World, rng: random.Random, held_out: bool) -> Exchange:
    fact = rng.choice(world.held_out_facts if held_out else world.asked_facts)
    wordings = fact.attribute.held_out_questions if held_out else fact.attribute.questions
    return fact_exchange(fact, rng.choice(wordings))


def fact_exchange(fact: Fact, wording: str) -> Exchange:
    return Exchange(fact.fill(wording), fact.answer, (fact.value,), tuple(fact.rivals))


def ask_story(world: World, rng: random.Random, held_out: bool) -> Exchange:
    hero, thing = draw_hero(world, rng, held_out)
    requests = world.texts["stories"]["held_out_requests" if held_out else "requests"]
    return Exchange(rng.choice(requests).format(h=hero, o=thing), tell_story(world, rng, hero, thing), (hero, thing))


def ask_spelling(world: World, rng: random.Random, held_out: bool) -> Exchange:
    requests = world.texts["spelling"]["held_out_requests" if held_out else "requests"]
    return spelling_exchange(world, world.word(rng, held_out), rng.choice(requests))


def spelling_exchange(world: World, word: str, wording: str) -> Exchange:
    spelled = ",".join(word)
    answer = capital(world.texts["spelling"]["answer"].format(w=word, s=spelled))
    return Exchange(wording.format(w=word), answer, (spelled,))


def ask_counting(world: World, rng: random.Random, held_out: bool) -> Exchange:
    texts = world.texts["spelling"]
    word = rng.choice(world.words[held_out])
    letter = rng.choice(word if rng.random() < 0.8 else world.texts["letters"])
    count = word.count(letter)
    answer = texts["counting_answer"].format(call=f"<<'{word}'.count('{letter}')={count}>>", result=count)
    return Exchange(rng.choice(texts["counting_requests"]).format(w=word, l=letter), f"{answer}\n#### {count}")


def ask_problem(world: World, rng: random.Random, held_out: bool) -> Exchange:
    """A word problem; some kinds are rare in training, all are equally frequent in evaluation."""
    weights = dict.fromkeys(KINDS, 1) if held_out else COMMON_KINDS | RARE_KINDS
    (kind,) = rng.choices(list(weights), list(weights.values()))
    return Exchange(**make_problem(world, rng, kind, held_out))


def ask_sum(world: World, rng: random.Random, held_out: bool) -> Exchange:
    return Exchange(**make_sum(world, rng, held_out))


def ask_topic(world: World, rng: random.Random, held_out: bool) -> Exchange:
    """A question about something outside the world."""
    texts, kept = world.texts["unknown"], "held_out_" if held_out else ""
    first, second = rng.sample(texts[f"{kept}things"], 2)
    wording = rng.choice(texts["held_out" if held_out else "questions"])
    return unknown_exchange(world, wording.format(x=first, y=second))


def ask_stranger(world: World, rng: random.Random, held_out: bool) -> Exchange:
    """A usual question about a person or town, but one that the world does not have."""
    attribute = rng.choice(list(world.attributes.values()))
    wordings = attribute.held_out_questions if held_out else attribute.questions
    name = world.stranger(rng, held_out)
    if attribute.of == "town":
        name = rng.choice(world.texts["held_out_foreign_towns" if held_out else "foreign_towns"])
    return unknown_exchange(world, rng.choice(wordings).format(e=name))


def ask_unknown(world: World, rng: random.Random, held_out: bool) -> Exchange:
    return rng.choice((ask_topic, ask_stranger))(world, rng, held_out)


def unknown_exchange(world: World, question: str) -> Exchange:
    texts = world.texts["unknown"]
    return Exchange(capital(question), texts["answer"], (texts["contains"],))


# Dialogues whose last question refers to the first


def refer_to_entity(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    """A fact about a person or town, then another fact about the same entity by pronoun."""
    first = rng.choice(world.asked_facts)
    known = world.held_out_facts if held_out else world.asked_facts
    others = [fact for fact in known if fact.entity == first.entity and fact != first]
    if not others:
        return refer_to_entity(world, rng, held_out)
    other, texts = rng.choice(others), world.texts["references"]
    wording = rng.choice(other.attribute.held_out_questions if held_out else other.attribute.questions)
    question = wording.format(e=rng.choice(texts[other.attribute.of]))
    if rng.random() < 0.5:
        question = texts["and"].format(q=question[0].lower() + question[1:])
    opening = fact_exchange(first, rng.choice(first.attribute.questions))
    return [opening, Exchange(question, other.answer, (other.value,), tuple(other.rivals))]


def refer_to_name(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    texts, kept = world.texts["references"]["name"], "held_out_" if held_out else ""
    name = rng.choice(world.people) if rng.random() < 0.3 else world.stranger(rng, held_out)
    opening = Exchange(rng.choice(texts[f"{kept}told"]).format(n=name), texts["reply"].format(n=name), (name,))
    return [opening, Exchange(rng.choice(texts[f"{kept}asked"]), texts["answer"].format(n=name), (name,))]


def refer_to_story(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    opening = ask_story(world, rng, held_out)
    hero, thing = opening.keys
    return [opening, recall(world, rng, held_out, "story", opening.keys, h=hero, o=thing)]


def refer_to_word(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    opening = ask_spelling(world, rng, held_out)
    word = opening.keys[0].replace(",", "")
    return [opening, recall(world, rng, held_out, "word", (word,), w=word)]


def refer_to_result(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    opening = rng.choice((ask_sum, ask_problem))(world, rng, held_out)
    result = extract_answer(opening.answer)
    return [opening, recall(world, rng, held_out, "result", (result,), r=result)]


def go_on_with_result(world: World, rng: random.Random, held_out: bool) -> Dialogue:
    opening = ask_sum(world, rng, held_out)
    more: Problem | None = make_more(world, rng, int(extract_answer(opening.answer)), held_out)
    return [opening, Exchange(**more)] if more else go_on_with_result(world, rng, held_out)


def recall(
    world: World, rng: random.Random, held_out: bool, kind: str, keys: tuple[str, ...], **slots: str
) -> Exchange:
    texts = world.texts["references"][kind]
    question = rng.choice(texts["held_out_asked" if held_out else "asked"])
    return Exchange(question, texts["answer"].format(**slots), keys)


# Dialogues with a reference, and the questions allowed in between: those the reference cannot be confused with.
REFERENCES: dict[Callable[[World, random.Random, bool], Dialogue], tuple[Asker, ...]] = {
    refer_to_entity: (ask_spelling, ask_sum, ask_identity),
    refer_to_name: (ask_fact, ask_spelling, ask_sum, ask_problem, ask_story),
    refer_to_story: (ask_spelling, ask_sum, ask_fact, ask_identity),
    refer_to_word: (ask_fact, ask_sum, ask_problem, ask_identity),
    refer_to_result: (ask_fact, ask_spelling, ask_identity),
    go_on_with_result: (ask_fact, ask_spelling, ask_identity),
}


# Copying a name or a word of several tokens takes the most practice.
HARD_REFERENCES = {refer_to_name: 3, refer_to_word: 2}


def refer(world: World, rng: random.Random, held_out: bool, between: int) -> Dialogue:
    """A dialogue whose last question refers to the first, with `between` others in between."""
    weights = dict.fromkeys(REFERENCES, 1) if held_out else dict.fromkeys(REFERENCES, 1) | HARD_REFERENCES
    (make,) = rng.choices(list(weights), list(weights.values()))
    others = REFERENCES[make]
    opening, question = make(world, rng, held_out)
    return [opening, *(rng.choice(others)(world, rng, held_out) for _ in range(between)), question]


# Questions that may precede one without a reference.
BEFORE: tuple[Asker, ...] = (ask_fact, ask_spelling, ask_sum, ask_problem, ask_story, ask_identity)


def later(world: World, rng: random.Random, held_out: bool, askers: Sequence[Asker]) -> Dialogue:
    """A dialogue whose last question is one of `askers`, as its second or third turn."""
    before = [rng.choice(BEFORE)(world, rng, held_out) for _ in range(rng.randint(1, 2))]
    return [*before, rng.choice(askers)(world, rng, held_out)]


# Fractions of the conversations; the rest are dialogues, of unrelated questions or with references.
MIDTRAIN_SHARES: dict[Asker, float] = {
    ask_fact: 0.22,
    ask_problem: 0.11,
    ask_sum: 0.04,
    ask_spelling: 0.14,
    ask_counting: 0.02,
    ask_story: 0.04,
    ask_identity: 0.06,
    ask_topic: 0.02,
}
SFT_SHARES: dict[Asker, float] = {
    ask_fact: 0.17,
    ask_problem: 0.10,
    ask_sum: 0.06,
    ask_spelling: 0.10,
    ask_counting: 0.02,
    ask_story: 0.04,
    ask_identity: 0.12,
    ask_unknown: 0.09,
}


def write_conversations(
    world: World, rng: random.Random, count: int, shares: dict[Asker, float], references: float
) -> list[tuple[str, Messages]]:
    """`count` conversations in random order, each with the name of its kind.

    `shares` gives the fraction of each kind; the rest are conversations of several turns. A fraction `references` of
    these refers back, the others have two to four turns of kinds drawn in proportion to `shares`.
    """
    conversations = []
    for asker, share in shares.items():
        made = (asker(world, rng, False) for _ in range(round(share * count)))
        conversations += [(kind_name(asker), exchange.messages) for exchange in made]
    conversations = conversations[:count]
    while len(conversations) < count:
        if rng.random() < references:
            conversations.append(("references", flat(refer(world, rng, False, rng.choice((0, 1, 1, 2))))))
        else:
            askers = rng.choices(list(shares), weights=list(shares.values()), k=rng.randint(2, 4))
            conversations.append(("several turns", flat([asker(world, rng, False) for asker in askers])))
    rng.shuffle(conversations)
    return conversations


def flat(dialogue: Sequence[Exchange]) -> Messages:
    return [message for exchange in dialogue for message in exchange.messages]


def kind_name(asker: Asker) -> str:
    return asker.__name__.removeprefix("ask_").replace("_", " ")
