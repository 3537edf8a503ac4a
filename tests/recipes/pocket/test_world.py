"""The pocket recipe's world: reproducible, well-formed, right, and without a trace of what the evaluation asks."""

import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from evals.tasks.gsm8k import extract_answer
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages
from recipes.pocket import chats, facts, problems, world
from recipes.pocket.problems import KINDS
from recipes.pocket.world import WorldArguments, write_world

SIZES = {
    "pretrain_characters": 300_000,
    "validation_fraction": 0.2,
    "midtrain_conversations": 2500,
    "sft_conversations": 800,
    "grpo_problems": 800,
    "eval_questions": 240,
}
EXAMPLES = ["Mira has 12 pears. Then Mira finds 7 more pears. How many pears does Mira have now?", "Who are you?"]
CALCULATION = re.compile(r"(\d+) ?(?:[-+*/]|//) ?(\d+)(?: ?[-+*/] ?(\d+))?")
CALL = re.compile(r"\((\d+), (\d+)\)")


def generate(folder: Path, **changes) -> Path:
    write_world(WorldArguments(output_dir=str(folder), **({"examples": EXAMPLES} | SIZES | changes)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def closed_world() -> facts.World:
    return facts.World(0, facts.read_texts("english"))


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def documents(path: Path) -> list[str]:
    return pyarrow.parquet.read_table(path)["text"].to_pylist()


def conversations(data: Path) -> list[list[dict]]:
    return [row["messages"] for name in ("conversations", "sft") for row in jsonl(data / name / "train.jsonl")]


@pytest.fixture(scope="module")
def training_texts(data) -> list[str]:
    """Everything that training sees; a conversation is one text, its tool calls included."""
    texts = documents(data / "pretrain" / "train.parquet")
    for messages in conversations(data):
        calls = [call["function"]["arguments"]["code"] for m in messages for call in m.get("tool_calls", [])]
        texts.append("\n".join([m["content"] for m in messages] + calls))
    return texts + [row["question"] + "\n" + row["answer"] for row in jsonl(data / "problems" / "train.jsonl")]


@pytest.fixture(scope="module")
def training_text(training_texts) -> str:
    return "\n\n".join(training_texts)


def evaluation(data: Path, name: str) -> list[dict]:
    return jsonl(data / "eval" / f"{name}.jsonl")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def number_pairs(text: str) -> set[tuple[int, int]]:
    """All pairs of operands in calculations and calls."""
    found = [tuple(int(n) for n in groups if n) for pattern in (CALCULATION, CALL) for groups in pattern.findall(text)]
    return {tuple(sorted(pair)) for numbers in found for pair in itertools.combinations(numbers, 2)}


# Files


def test_same_seed_same_bytes_and_another_seed_another_world(tmp_path):
    small = {
        "pretrain_characters": 30_000,
        "midtrain_conversations": 100,
        "sft_conversations": 50,
        "grpo_problems": 50,
    }
    first, second = (digests(generate(tmp_path / name, **small)) for name in "ab")
    other = digests(generate(tmp_path / "c", seed=1, **small))
    assert first == second
    assert len(first) == 20
    assert all(first[name] != other[name] for name in first)


def test_sizes_are_those_asked_for(data):
    summary = json.loads((data / "world.json").read_text())
    assert len(jsonl(data / "conversations" / "train.jsonl")) == SIZES["midtrain_conversations"]
    assert len(jsonl(data / "sft" / "train.jsonl")) == SIZES["sft_conversations"]
    assert len(jsonl(data / "problems" / "train.jsonl")) == SIZES["grpo_problems"]
    assert 300_000 <= sum(map(len, documents(data / "pretrain" / "train.parquet"))) < 301_000
    assert summary["rows"]["pretrain/train.parquet"] == len(documents(data / "pretrain" / "train.parquet"))
    assert summary["rows"]["eval/problems.jsonl"] == SIZES["eval_questions"]
    assert sum(summary["kinds"]["sft/train.jsonl"].values()) == SIZES["sft_conversations"]
    assert "synthetic" in summary["description"]


def test_evaluation_is_large_enough_to_measure(data):
    assert [len(evaluation(data, name)) for name in ("facts", "cloze")] == [156] * 2
    for name in ("problems", "spelling", "stories", "dialogue_sums", "dialogue_words"):
        assert len({str(row) for row in evaluation(data, name)}) == 240
    assert len(evaluation(data, "references")) + len(evaluation(data, "reference_sums")) == 240
    assert len({row["question"] for row in evaluation(data, "unknown")}) == 200
    assert [len(evaluation(data, f"shown/{name}")) for name in ("identity", "problems", "stories")] == [100] * 3


@pytest.mark.parametrize("seed", range(5))
def test_every_seed_gives_a_world_with_enough_held_out(seed):
    made = facts.World(seed, facts.read_texts("english"))
    assert len(made.facts) == 24 * 5 + 6 * 2
    assert len(made.held_out_facts) == 5 * 7 + 2 * 2
    for town in made.towns:
        assert len(made.people_of(town)) == 4
    for person in made.people:  # nobody is known by prose alone
        assert sum(fact.entity == person for fact in made.held_out_facts) <= 2
    for held_out in (False, True):
        assert len(made.words[held_out]) > 90
        for kind in problems.KINDS:
            problems.make_problem(made, world.draws(made, kind), kind, held_out)


def test_everything_is_ascii(data):
    for path in data.rglob("*.json*"):
        assert path.read_text(encoding="utf-8").isascii()
    assert all(
        text.isascii() for name in ("train", "val") for text in documents(data / "pretrain" / f"{name}.parquet")
    )


# Conversations and problems


def test_conversations_are_well_formed(data):
    kinds = set()
    for number, messages in enumerate(conversations(data)):
        check_messages(messages, f"conversation {number}")
        kinds |= {message["role"] for message in messages}
    assert kinds == {"user", "assistant", "tool"}


def test_tool_results_are_what_the_code_gives(data):
    calls = 0
    for messages in conversations(data):
        for call, result in itertools.pairwise(messages):
            for tool_call in call.get("tool_calls", []):
                assert str(eval(tool_call["function"]["arguments"]["code"])) == result["content"]
                calls += 1
    assert calls > 500


def test_every_seed_has_numbers_for_every_kind_of_problem():
    """Of seed 15 no three operands of `a - b * c` were held out together, and the generator searched for ever."""
    texts = facts.read_texts("english")
    for seed in (0, 15, 38):
        made = facts.World(seed, texts)
        for kind in KINDS:
            numbers = problems.draw_numbers(made, random.Random(0), kind, held_out=True)
            assert all(made.holds_out_numbers(*pair) for pair in itertools.combinations(numbers, 2))


def test_too_few_numbers_are_one_line(monkeypatch):
    texts = facts.read_texts("english") | {"largest_number": 6}
    with pytest.raises(UserError, match="largest_number is 6: too few numbers"):
        facts.World(0, texts)
    monkeypatch.setattr(problems, "MOST_TRIES", 0)
    with pytest.raises(UserError, match="no numbers for problems of the kind 'gain' found"):
        problems.draw_numbers(facts.World(0, facts.read_texts("english")), random.Random(0), "gain", held_out=False)


SHAPES = {
    "gain": "n+n", "loss": "n-n", "groups": "n*n", "sharing": "n//n", "difference": "n-n",
    "gain and loss": "n+n-n", "groups and extra": "n*n+n", "spending": "n-n*n",
}  # fmt: skip


def test_problems_are_right_and_of_all_kinds(data):
    for_rl = checked_shapes(jsonl(data / "problems" / "train.jsonl"))
    evaluated = checked_shapes(evaluation(data, "problems"))
    assert evaluated == {shape: evaluated.total() * n // 8 for shape, n in Counter(SHAPES.values()).items()}
    weights = Counter()
    for kind, weight in chats.GRPO_KINDS.items():
        weights[SHAPES[kind]] += weight
    assert for_rl.keys() == weights.keys()
    for shape, weight in weights.items():
        expected = for_rl.total() * weight / weights.total()
        assert abs(for_rl[shape] - expected) < 4 * expected**0.5
    rare, common = (SHAPES[kind] for kind in ("spending", "sharing"))
    assert for_rl[rare] > 2 * for_rl[common]


def checked_shapes(rows):
    """How often each kind of calculation occurs in problems that are right."""
    codes = [re.search(r"<<(.+)=(\d+)>>", row["answer"]).groups() for row in rows]
    for row, (code, result) in zip(rows, codes, strict=True):
        assert str(eval(code)) == result == extract_answer(row["answer"])
        assert sorted(re.findall(r"\d+", row["question"])) == sorted(re.findall(r"\d+", code))
    return Counter(re.sub(r"\d+", "n", code) for code, _ in codes)


def test_reinforcement_learning_gets_new_problems(data):
    said = {message["content"] for messages in conversations(data) for message in messages}
    questions = [row["question"] for row in jsonl(data / "problems" / "train.jsonl")]
    assert len(set(questions)) == len(questions)
    assert not said & set(questions)


def test_references_agree_with_the_world(data, closed_world):
    value_of = {(fact.entity, fact.attribute.name): fact.value for fact in closed_world.facts.values()}
    summary = json.loads((data / "world.json").read_text())
    assert all(value_of[entity, name] == value for entity, name, value in summary["held_out_facts"])
    assert {row["answer"] for row in evaluation(data, "facts")} <= set(value_of.values())


# Dialogues


def test_later_questions_are_second_or_third_turns(data):
    for name in ("dialogue_sums", "dialogue_words"):
        turns = [sum(m["role"] == "user" for m in row["history"]) for row in evaluation(data, name)]
        assert set(turns) == {1, 2}
    for row in evaluation(data, "references") + evaluation(data, "reference_sums"):
        assert [m["role"] for m in row["history"] if m["role"] != "tool"].count("user") == 2
        check_messages(row["history"], "history")


def test_what_a_third_turn_refers_to_is_known_from_the_first_turn(data, closed_world):
    values = {fact.value for fact in closed_world.facts.values()}
    seen = 0
    for row in evaluation(data, "references"):
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        first = "\n".join(m["content"] for m in row["history"][: 1 + first_reply(row["history"])])
        if not set(answers) & values:  # a fact about whom the first turn was about
            assert all(answer in first or ",".join(answer) in first for answer in answers)
            seen += 1
    assert seen > 80
    for row in evaluation(data, "reference_sums"):
        first = row["history"][: 1 + first_reply(row["history"])]
        assert row["answer"].split()[0] == extract_answer(first[-1]["content"])


def first_reply(history: list[dict]) -> int:
    """Index of the last message before the second question."""
    return [number for number, message in enumerate(history) if message["role"] == "user"][1] - 1


def test_what_the_world_does_not_hold_is_refused_and_nothing_else_is(data, closed_world):
    refusal = closed_world.texts["unknown"]["answer"]
    known = {*closed_world.people, *closed_world.towns}
    questions = [m[0]["content"] for m in conversations(data) if m[1]["content"] == refusal]
    assert len(set(questions)) > 80
    assert not any(words(question) & known for question in questions)
    new = {row["question"] for row in evaluation(data, "unknown")}
    assert not new & set(questions)
    assert not any(words(question) & known for question in new)


# Held out by construction


def test_no_evaluation_question_or_statement_is_in_any_training_text(data, training_text):
    for name in (
        "facts", "problems", "spelling", "stories", "dialogue_sums", "dialogue_words", "references", "reference_sums",
        "unknown", "shown/problems", "shown/stories",
    ):  # fmt: skip
        for row in evaluation(data, name):
            assert row["question"] not in training_text
    asked = {m["content"] for messages in conversations(data) for m in messages if m["role"] == "user"}
    assert not asked & {row["question"] for row in evaluation(data, "shown/identity")}  # "Hi" is part of others
    for row in evaluation(data, "cloze"):
        assert row["query"] not in training_text


def test_questions_shown_in_the_chat_are_in_no_training_text(tmp_path, training_text):
    shown = yaml.safe_load((Path(world.__file__).with_name("run.yaml")).read_text())["examples"]
    assert len(shown) == 3
    for question in shown + EXAMPLES:
        assert question not in training_text
    problem = jsonl(generate(tmp_path / "data", examples=[]) / "problems" / "train.jsonl")[0]["question"]
    again = generate(tmp_path / "again", examples=[problem])
    assert problem not in (again / "problems" / "train.jsonl").read_text()


def test_evaluation_phrasings_are_used_for_no_other_fact_either(closed_world, training_text):
    for attribute in closed_world.attributes.values():
        entities = closed_world.people if attribute.of == "person" else closed_world.towns
        for phrasing, entity in itertools.product(attribute.held_out_questions, entities):
            assert phrasing.format(e=entity) not in training_text
        values = itertools.product(attribute.held_out_statements, entities, attribute.values)
        for phrasing, entity, value in values:
            assert f"{phrasing.format(e=entity)} {value}" not in training_text


def test_held_out_facts_are_stated_in_prose_but_never_asked_for(data, closed_world, training_texts):
    asked = re.compile(r"^Question: (.+)$", re.MULTILINE)
    questions = set(asked.findall("\n".join(training_texts)))
    questions |= {message["content"] for messages in conversations(data) for message in messages}
    prose = "\n".join(documents(data / "pretrain" / "train.parquet"))
    for fact in closed_world.held_out_facts:
        assert not questions & {fact.fill(phrasing) for phrasing in fact.attribute.questions}
        assert fact.answer not in "\n".join(questions)
        stated = sum(prose.count(fact.fill(phrasing)) for phrasing in fact.attribute.statements)
        assert stated + prose.count(fact.answer) >= 5
    for fact in closed_world.asked_facts[:20]:  # the scan does find what is asked
        assert questions & {fact.fill(phrasing) for phrasing in fact.attribute.questions}


def test_conversations_do_not_give_held_out_facts_away(data, closed_world):
    said = "\n".join(message["content"] for messages in conversations(data) for message in messages)
    for fact in closed_world.held_out_facts:
        for phrasing in (fact.attribute.answer, *fact.attribute.statements):
            assert fact.fill(phrasing) not in said


def test_evaluation_asks_in_words_that_training_uses(data, training_text):
    known = words(training_text)
    for name, key in (("facts", "question"), ("cloze", "query"), ("problems", "question")):
        assert set().union(*(words(row[key]) for row in evaluation(data, name))) <= known


def test_number_pairs_of_the_evaluation_are_in_no_training_text(data, closed_world, training_texts):
    trained = set().union(*map(number_pairs, training_texts))
    assert len(trained) > 800
    assert not trained & closed_world.held_out_numbers
    for row in evaluation(data, "problems"):
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        assert {tuple(sorted(pair)) for pair in itertools.combinations(numbers, 2)} <= closed_world.held_out_numbers


def test_people_and_counted_things_of_the_evaluation_never_meet_in_training(data, closed_world, training_texts):
    def pairs(text: str) -> set[tuple[str, str]]:
        return set(
            itertools.product(words(text) & set(closed_world.people), words(text) & set(closed_world.texts["counted"]))
        )

    # by message and by line: a longer text may speak of one person after another
    trained = [m["content"] for messages in conversations(data) for m in messages]
    trained += [row["question"] for row in jsonl(data / "problems" / "train.jsonl")]
    trained += [line for text in documents(data / "pretrain" / "train.parquet") for line in text.splitlines()]
    assert any(map(pairs, trained))
    assert not set().union(*map(pairs, trained)) & closed_world.held_out_owners
    for row in evaluation(data, "problems"):
        assert pairs(row["question"]) <= closed_world.held_out_owners


def test_words_of_the_spelling_evaluation_are_new_but_their_parts_are_not(data, closed_world, training_text):
    for row in evaluation(data, "spelling"):
        word = row["answer"].replace(",", "")
        assert word in closed_world.words[True]
        assert word in row["question"]
        assert word not in training_text and row["answer"] not in training_text
    for first in closed_world.texts["first_parts"]:
        assert sum(word.startswith(first) for word in closed_world.words[False]) >= 5


def test_validation_stories_have_heroes_and_objects_that_training_keeps_apart(data, closed_world, training_texts):
    kept = set(closed_world.heroes[True])

    def pairs(text: str) -> set[tuple[str, str]]:
        return set(
            itertools.product(words(text) & set(closed_world.people), words(text) & set(closed_world.texts["objects"]))
        )

    single = [line for text in documents(data / "pretrain" / "train.parquet") for line in text.splitlines()]
    single += [m["content"] for messages in conversations(data) for m in messages]
    trained = set().union(*map(pairs, single))
    assert len(trained) > 250
    assert not trained & kept
    stories = [
        line for text in documents(data / "pretrain" / "val.parquet") for line in text.splitlines() if pairs(line)
    ]
    assert len(stories) > 20
    assert all(pairs(story) & kept for story in stories)


def test_validation_documents_are_not_in_training(data):
    validation = set(documents(data / "pretrain" / "val.parquet"))
    assert not validation & set(documents(data / "pretrain" / "train.parquet"))


# Bad input and half-written folders


@pytest.mark.parametrize(
    "change",
    [{"pretrain_characters": -1}, {"grpo_problems": 0}, {"eval_questions": -5}, {"validation_fraction": 1.5}],
)
def test_sizes_out_of_range_are_refused(tmp_path, change):
    with pytest.raises(UserError, match=next(iter(change))):
        generate(tmp_path / "data", **change)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no generated world"):
        generate(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_and_an_older_world_as_it_was(tmp_path, monkeypatch):
    small = {"pretrain_characters": 20_000, "midtrain_conversations": 20, "sft_conversations": 20, "grpo_problems": 20}
    old = generate(tmp_path / "data", **small)
    before = digests(old)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world, "write_jsonl", interrupted)
        generate(tmp_path / "data", seed=5, **small)
    assert digests(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    generate(tmp_path / "data", seed=5, **small)
    assert json.loads((tmp_path / "data" / "world.json").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_command_line(tmp_path, monkeypatch, capsys):
    config = Path(world.__file__).with_name("world.yaml")
    line = f"world.py --config {config} --output_dir {tmp_path / 'data'} --pretrain_characters 20000"
    line += " --midtrain_conversations 30 --sft_conversations 20 --grpo_problems 20"
    monkeypatch.setattr(sys, "argv", line.split())
    world.main()
    assert "30 + 20 conversations, 20 problems" in capsys.readouterr().out
    assert len(jsonl(tmp_path / "data" / "sft" / "train.jsonl")) == 20


def test_a_persona_gives_its_name_and_its_conversations_to_the_world(tmp_path, data):
    persona = yaml.safe_load(Path("recipes/identity.yaml").read_text()) | {"name": "Pebble"}
    (tmp_path / "me.yaml").write_text(yaml.safe_dump(persona))
    mine = generate(tmp_path / "data", persona=str(tmp_path / "me.yaml"))
    rows = {
        folder: [len(jsonl(folder / n / "train.jsonl")) for n in ("conversations", "sft")] for folder in (data, mine)
    }
    added = [count - world_only for count, world_only in zip(rows[mine], rows[data], strict=True)]
    assert 300 < added[1] <= 500 and added[0] == 2 * added[1]
    said = "".join(path.read_text() for path in mine.glob("*/*.jsonl"))
    assert "Pebble" in said and "nanochat, a tiny" not in said
    asked = {message["content"] for messages in conversations(mine) for message in messages}
    assert not asked & {*EXAMPLES, *(row["question"] for row in evaluation(mine, "shown/identity"))}
