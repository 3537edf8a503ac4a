"""Conversations: what the pocket assistant is asked, and how it answers. Each asker makes one question with its answer."""

import random
from collections.abc import Callable

from evals.gsm8k import to_messages
from evals.multiple_choice import multiple_choice_prompt
from recipes.pocket.facts import FIRST_PARTS, SECOND_PARTS, World
from recipes.pocket.problems import make_problem
from recipes.pocket.prose import tell_story
from recipes.pocket.quiz import LETTERS, draw_question

Messages = list[dict]
Asker = Callable[[World, random.Random], Messages]

WHO = "I am nanochat, a tiny language model, trained from scratch on a little made-up world."
ABILITIES = "I can tell you about my little world, write short stories, spell words and solve small sums with Python."
IDENTITY = (
    (("Who are you?", "What are you?", "Tell me who you are.", "Are you a person?", "Hello, who are you?"), WHO),
    (("What is your name?", "Do you have a name?", "Please tell me your name."), "My name is nanochat."),
    (("What can you do?", "How can you help me?", "Tell me what you can do.", "What do you know?"), ABILITIES),
    (
        ("How were you made?", "Who made you?", "Where do you come from?", "How did you learn all this?"),
        "I was trained from nothing on a small computer: first on plain text, then on conversations.",
    ),
    (
        ("How big are you?", "Are you a big model?", "How smart are you?"),
        "I am very small, far smaller than the models you may know, so I make mistakes.",
    ),
    (
        ("What is your world like?", "Tell me about your world.", "Is your world real?"),
        "My world is made up. It has eight towns and thirty-two people, and everything I know is in it.",
    ),
    (("Hello!", "Hi!", "Good morning!", "Hello, nanochat!"), "Hello! How can I help you?"),
    (("Thank you!", "Thanks!", "That was great, thank you.", "Well done!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you soon!"), "Goodbye! It was nice to talk to you."),
    (
        ("What is the weather like?", "Who won the game?", "What is the news today?", "Can you fly?"),
        "I do not know that. I only know my little world.",
    ),
)
STORY_REQUESTS = (
    "Tell me a story about {h} and a {o}.",
    "Please tell me a story about {h} and a {o}.",
    "Can you write a story about {h} and a {o}?",
    "Write a short story about {h} and a {o}.",
    "I want to hear a story about {h} and a {o}.",
)
SPELLING_REQUESTS = (
    "Spell the word {w}.",
    "How do you spell {w}?",
    "Please spell {w}.",
    "Can you spell the word {w}?",
    "Spell {w} for me.",
)
HELD_OUT_SPELLING_REQUESTS = ("Please spell the word {w}.", "How do you spell the word {w}?", "Can you spell {w}?")
COUNTING_REQUESTS = (
    "How many '{l}' are in '{w}'?",
    "How many times does '{l}' come in '{w}'?",
    "Count the letter '{l}' in the word '{w}'.",
    "How often is '{l}' in the word '{w}'?",
)

# How often a kind of problem occurs in conversations. The rare ones leave GRPO, where all are equally frequent,
# something to learn.
PROBLEM_WEIGHTS = {
    "gain": 30,
    "loss": 27,
    "groups": 20,
    "sharing": 15,
    "difference": 2,
    "gain and loss": 3,
    "groups and extra": 2,
    "spending": 2,
}


def ask_identity(world: World, rng: random.Random) -> Messages:
    questions, answer = rng.choice(IDENTITY)
    return exchange(rng.choice(questions), answer)


def ask_fact(world: World, rng: random.Random) -> Messages:
    fact = rng.choice(world.asked_facts)
    return exchange(fact.fill(rng.choice(fact.attribute.questions)), fact.answer)


def ask_multiple_choice(world: World, rng: random.Random) -> Messages:
    question, choices, answer = draw_question(world, rng)
    return exchange(multiple_choice_prompt(question, choices, LETTERS), LETTERS[choices.index(answer)])


def ask_story(world: World, rng: random.Random) -> Messages:
    hero, thing = rng.choice(world.heroes[False])
    request = rng.choice(STORY_REQUESTS).format(h=hero, o=thing)
    return exchange(request, tell_story(world, rng, hero, thing))


def ask_spelling(world: World, rng: random.Random) -> Messages:
    part = rng.random() < 0.25
    word = rng.choice(FIRST_PARTS + SECOND_PARTS if part else world.words[False])
    return exchange(rng.choice(SPELLING_REQUESTS).format(w=word), ",".join(word))


def ask_counting(world: World, rng: random.Random) -> Messages:
    word = rng.choice(world.words[False])
    letter = rng.choice(word if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")
    count = word.count(letter)
    answer = f"I count with Python: <<'{word}'.count('{letter}')={count}>>{count}.\n#### {count}"
    return to_messages(rng.choice(COUNTING_REQUESTS).format(w=word, l=letter), answer)


def ask_problem(world: World, rng: random.Random) -> Messages:
    (kind,) = rng.choices(list(PROBLEM_WEIGHTS), list(PROBLEM_WEIGHTS.values()))
    problem = make_problem(world, rng, kind, held_out=False)
    return to_messages(problem["question"], problem["answer"])


# Shares of the conversations; what is left is several turns of different kinds.
MIDTRAIN_SHARES: dict[Asker, float] = {
    ask_fact: 0.36,
    ask_problem: 0.06,
    ask_multiple_choice: 0.10,
    ask_spelling: 0.10,
    ask_counting: 0.05,
    ask_story: 0.08,
    ask_identity: 0.05,
}
SFT_SHARES: dict[Asker, float] = {
    ask_fact: 0.30,
    ask_problem: 0.07,
    ask_multiple_choice: 0.12,
    ask_spelling: 0.11,
    ask_counting: 0.05,
    ask_story: 0.08,
    ask_identity: 0.05,
}


def write_conversations(
    world: World, rng: random.Random, count: int, shares: dict[Asker, float]
) -> list[tuple[str, Messages]]:
    """`count` conversations in random order, each with the name of its kind.

    The kinds stand in the proportion of `shares`; the rest to 1 is filled with conversations of two to four turns, whose
    kinds are drawn in the same proportion: people go on talking.
    """
    conversations = []
    for asker, share in shares.items():
        conversations += [(kind_name(asker), asker(world, rng)) for _ in range(round(share * count))]
    conversations = conversations[:count]
    while len(conversations) < count:
        askers = rng.choices(list(shares), weights=list(shares.values()), k=rng.randint(2, 4))
        conversations.append(("several turns", [turn for asker in askers for turn in asker(world, rng)]))
    rng.shuffle(conversations)
    return conversations


def kind_name(asker: Asker) -> str:
    return asker.__name__.removeprefix("ask_").replace("_", " ")


def exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
