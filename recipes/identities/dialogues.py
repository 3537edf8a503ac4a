"""Dialogues with a persona, from the phrases of its language in `phrases/`.

A topic has questions and answers. In both, `[a|b]` is a choice and `{slot}` is filled in: first the choices, then the
slots, once, so that a persona's text is never read as either. A topic can be drawn if all its slots are known: those
of the language's `words`, those of the persona, and after the first exchange `question` and `answered`.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from modeling_nanochat.errors import UserError

from .persona import Persona

PHRASES = Path(__file__).parent / "phrases"
LENGTHS = {1: 30, 2: 30, 3: 25, 4: 15}  # exchanges of a dialogue, with weights
FOLLOW_UP = 0.65  # probability, where there is one
PREFIX, CASUAL = 0.2, 0.15  # probabilities of a prefix, and of a question without capitals or a final mark
MOST_DRAWS = 12  # attempts at a question that was not asked before
CHOICE = re.compile(r"\[([^\[\]]*)\]")  # the innermost
Messages = list[dict[str, str]]
Slots = dict[str, str]


@dataclass(frozen=True)
class Topic:
    """Questions with answers. `next` names follow-ups for the next exchange, `later` for any later one."""

    name: str
    ask: tuple[str, ...]
    answer: tuple[str, ...]
    weight: float = 1
    when: str = "anywhere"  # or "first", "last"
    next: tuple[str, ...] = ()
    later: tuple[str, ...] = ()

    @cached_property
    def needs(self) -> set[str]:
        """The slots of all questions and answers."""
        return {slot for text in (*self.ask, *self.answer) for _, slot, _, _ in Formatter().parse(text) if slot}


@dataclass(frozen=True)
class Phrases:
    """What a language offers."""

    words: dict[str, list[str]]  # slot -> templates to choose from
    rivals: list[list[str]]  # other models, each with its company
    joins: tuple[str, str]  # in lists: between entries, and before the last one
    prefixes: dict[str, list[str]]  # before a question: "first" of a dialogue, or "later"
    topics: dict[str, Topic]
    follow_ups: dict[str, Topic]


@dataclass(frozen=True)
class Exchange:
    topic: Topic
    slots: Slots
    question: str
    answer: str


def languages() -> list[str]:
    return sorted(path.stem.capitalize() for path in PHRASES.glob("*.yaml"))


def has_phrases(language: str) -> bool:
    return language.capitalize() in languages()


def read_phrases(language: str) -> Phrases:
    """The phrases of a language, by its English name.

    Raises:
        UserError: There are no phrases in this language.
    """
    if not has_phrases(language):
        raise UserError(
            f"language {language!r}: there are phrases in {', '.join(languages())} only; "
            "let a model write all conversations with --with_model and --endpoint"
        )
    content = yaml.safe_load((PHRASES / f"{language.lower()}.yaml").read_text(encoding="utf-8"))
    topics, follow_ups = (
        {name: Topic(name, **{key: as_tuple(value) for key, value in topic.items()}) for name, topic in group.items()}
        for group in (content.pop("topics"), content.pop("follow_ups"))
    )
    return Phrases(topics=topics, follow_ups=follow_ups, joins=tuple(content.pop("joins")), **content)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_dialogues(persona: Persona, count: int, seed: int) -> Iterator[Messages]:
    """Yield `count` dialogues of one to four exchanges; the same arguments give the same dialogues.

    Raises:
        UserError: There are no phrases in the persona's language.
    """
    writer = Writer(persona, read_phrases(persona.language), random.Random(f"identity {seed}"))
    return (writer.dialogue() for _ in range(count))


class Writer:
    """Draws dialogues, preferring questions that no earlier dialogue asked."""

    def __init__(self, persona: Persona, phrases: Phrases, rng: random.Random) -> None:
        self.persona, self.phrases, self.rng = persona, phrases, rng
        self.asked: set[str] = set()

    def dialogue(self) -> Messages:
        (length,) = self.rng.choices(list(LENGTHS), list(LENGTHS.values()))
        exchanges: list[Exchange] = []
        for left in reversed(range(length)):
            exchanges.append(self.new_exchange(exchanges, is_last=left == 0))
        return [
            {"role": role, "content": content}
            for exchange in exchanges
            for role, content in (("user", exchange.question), ("assistant", exchange.answer))
        ]

    def new_exchange(self, before: Sequence[Exchange], is_last: bool) -> Exchange:
        """An exchange whose question is new if possible."""
        for _ in range(MOST_DRAWS):
            exchange = self.exchange(before, is_last)
            if exchange.question not in self.asked:
                break
        self.asked.add(exchange.question)
        return exchange

    def exchange(self, before: Sequence[Exchange], is_last: bool) -> Exchange:
        follow_ups = self.follow_ups(before)
        if follow_ups and self.rng.random() < FOLLOW_UP:
            topic, slots = self.rng.choice(follow_ups)
            prefix = ""
        else:
            slots = self.slots(before)
            topic = self.topic(slots, before, is_last)
            prefix = self.prefix(topic, before)
        question = self.casual(prefix + self.fill(topic.ask, slots).strip())
        return Exchange(topic, slots, question, self.fill(topic.answer, slots).strip())

    def follow_ups(self, before: Sequence[Exchange]) -> list[tuple[Topic, Slots]]:
        """The follow-ups that the dialogue so far allows, with the slots of the exchange that they refer to."""
        named = [(exchange, name) for exchange in before for name in exchange.topic.later]
        named += [(exchange, name) for exchange in before[-1:] for name in exchange.topic.next]
        used = {exchange.topic.name for exchange in before}
        found = [(self.phrases.follow_ups[name], exchange) for exchange, name in named if name not in used]
        recalled = [(topic, exchange.slots | recall(exchange)) for topic, exchange in found]
        return [(topic, slots) for topic, slots in recalled if topic.needs <= slots.keys()]

    def topic(self, slots: Slots, before: Sequence[Exchange], is_last: bool) -> Topic:
        used = {exchange.topic.name for exchange in before}
        allowed = {"anywhere", "last" if before and is_last else "", "first" if not before else ""}
        topics = [t for t in self.phrases.topics.values() if t.when in allowed and t.name not in used]
        topics = [topic for topic in topics if topic.needs <= slots.keys()]
        return self.rng.choices(topics, [topic.weight for topic in topics])[0]

    def prefix(self, topic: Topic, before: Sequence[Exchange]) -> str:
        if topic.when != "anywhere" or self.rng.random() >= PREFIX:
            return ""
        return self.fill(self.phrases.prefixes["later" if before else "first"], {"name": self.persona.name})

    def casual(self, question: str) -> str:
        """The question, sometimes as people type it in a hurry."""
        if self.rng.random() >= CASUAL:
            return question
        return (question.lower() if self.rng.random() < 0.7 else question).rstrip("?.!？。！") or question

    def fill(self, templates: Sequence[str], slots: Slots) -> str:
        template = self.rng.choice(templates)
        while CHOICE.search(template):
            template = CHOICE.sub(lambda found: self.rng.choice(found[1].split("|")), template)
        return template.format_map(slots)

    def slots(self, before: Sequence[Exchange]) -> Slots:
        """New values for all slots that this persona has; numbered ones differ from each other."""
        persona, rng = self.persona, self.rng
        slots = {"name": persona.name, "maker": persona.maker, "Maker": persona.maker[:1].upper() + persona.maker[1:]}
        slots |= {slot: self.fill(templates, slots) for slot, templates in self.phrases.words.items()}
        slots |= numbered("character", rng.sample(persona.character, len(persona.character)))
        skills = rng.sample(persona.skills, len(persona.skills))
        slots |= numbered("skill", skills) | {"skills": self.listed(skills[:3])}
        limits = rng.sample(list(persona.limits.items()), len(persona.limits))
        slots |= numbered("limit", [limit for limit, _ in limits]) | numbered("reason", [why for _, why in limits])
        facts = rng.sample(persona.facts, len(persona.facts))
        slots |= numbered("about", [fact.about for fact in facts]) | numbered("fact", [fact.answer for fact in facts])
        if facts[0].questions:
            slots["fact_question"] = rng.choice(facts[0].questions)
        if rivals := [rival for rival in self.phrases.rivals if not self.is_like(*rival)]:
            slots["model"], slots["company"] = rng.choice(rivals)
        return slots | (recall(before[-1]) if before else {})

    def is_like(self, model: str, company: str) -> bool:
        """Whether the persona itself is this model or of this company."""
        return model.casefold() in self.persona.name.casefold() or company.casefold() in self.persona.maker.casefold()

    def listed(self, entries: Sequence[str]) -> str:
        between, last = self.phrases.joins
        return last.join(filter(None, [between.join(entries[:-1]), entries[-1]]))


def recall(exchange: Exchange) -> Slots:
    return {"question": exchange.question, "answered": exchange.answer}


def numbered(slot: str, values: Sequence[str]) -> Slots:
    """The first values as `slot`, `slot2`, `slot3`, `slot4`."""
    return {f"{slot}{number if number > 1 else ''}": value for number, value in enumerate(values[:4], start=1)}
