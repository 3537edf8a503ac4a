"""Every world in recipes/pocket/worlds: its file is complete and consistent, its data well-formed and held out."""

import copy
import functools
import itertools
import json
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import toy_model

from evals.tasks.match import has_word
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.turn import TextDelta
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages
from recipes.ladder.arguments import parse_overrides
from recipes.pocket import facts, world
from recipes.pocket.problems import KINDS, wordings
from recipes.pocket.world import WorldArguments, write_world
from tokenizer_train.bpe import train_tokenizer

# Each world with the configuration of the run that trains on it.
WORLDS = {"english": "run.yaml", "chinese": "chinese.yaml"}
# The slots of every template, by the keys that lead to it; a template has all of them, or where marked some of them.
SLOTS = {
    ("attributes", "answer"): "e v",
    ("attributes", "statements"): "e v",
    ("attributes", "questions"): "e",
    ("attributes", "held_out_questions"): "e",
    ("attributes", "held_out_statements"): "e",
    ("stories", "openings"): "h o p",
    ("stories", "requests"): "h o",
    ("stories", "held_out_requests"): "h o",
    ("spelling", "answer"): "w s",
    ("spelling", "sentences"): "w s",
    ("spelling", "count_sentence"): "w l c",
    ("spelling", "requests"): "w",
    ("spelling", "held_out_requests"): "w",
    ("spelling", "counting_requests"): "w l",
    ("spelling", "counting_answer"): "call result",
    ("problems", "answer"): "shown call result unit",
    ("sums", "wordings"): "a b",
    ("sums", "descriptions"): "a b",
    ("sums", "requests"): "s",
    ("sums", "held_out_requests"): "s",
    ("sums", "answer"): "shown call result",
    ("sums", "more"): "b",
    ("sums", "held_out_more"): "b",
    ("references", "and"): "q",
    ("references", "name", "told"): "n",
    ("references", "name", "held_out_told"): "n",
    ("references", "name", "reply"): "n",
    ("references", "name", "answer"): "n",
    ("references", "story", "answer"): "h o",
    ("references", "result", "answer"): "r",
    ("references", "word", "answer"): "w",
    ("prose", "town_openings"): "t",
    ("prose", "town_people"): "list last t",
    ("prose", "remarks"): "e",
    ("prose", "question"): "q",
    ("prose", "answer"): "a",
    ("prose", "name"): "e",
    ("prose", "field"): "k v",
}
SOME_SLOTS = {
    ("stories", "plots"): "h f o",
    ("problems", "kinds"): "n m t a b c",
    ("unknown", "questions"): "x y",
    ("unknown", "held_out"): "x y",
}
CJK = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"  # characters and full-width punctuation


@pytest.fixture(scope="module", params=WORLDS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def texts(name) -> facts.Texts:
    return facts.read_texts(name)


@pytest.fixture(scope="module")
def run(name) -> dict[str, Any]:
    return yaml.safe_load(Path(world.__file__).with_name(WORLDS[name]).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def examples(run) -> list[str]:
    return run["examples"]


@pytest.fixture(scope="module")
def data(name, examples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(name) / "data"
    sizes = {"midtrain_conversations": 1200, "sft_conversations": 600, "grpo_problems": 200, "eval_questions": 160}
    write_world(WorldArguments(str(folder), world=name, pretrain_characters=200_000, examples=examples, **sizes))
    return folder


@pytest.fixture(scope="module")
def closed_world(texts, examples) -> facts.World:
    return facts.World(0, texts, examples)


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(data: Path) -> list[list[dict]]:
    return [row["messages"] for folder in ("conversations", "sft") for row in jsonl(data / folder / "train.jsonl")]


def documents(data: Path) -> list[str]:
    return pyarrow.parquet.read_table(data / "pretrain" / "train.parquet")["text"].to_pylist()


@pytest.fixture(scope="module")
def training_text(data) -> str:
    """Everything that training sees, code included."""
    said = [message["content"] for messages in conversations(data) for message in messages]
    return "\n\n".join([*documents(data), *said, *codes(data), *practised(data)])


def practised(data: Path) -> list[str]:
    """Everything that GRPO sees: its questions, what precedes them, and what is rewarded."""
    rows = [row for name in ("train", "dialogues") for row in jsonl(data / "problems" / f"{name}.jsonl")]
    before = [message["content"] for row in rows for message in row.get("history", ())]
    answers = [row["answer"] if isinstance(row["answer"], str) else "\n".join(row["answer"]) for row in rows]
    return before + [f"{row['question']}\n{answer}" for row, answer in zip(rows, answers, strict=True)]


def codes(data: Path) -> list[str]:
    messages = itertools.chain(*conversations(data))
    return [call["function"]["arguments"]["code"] for message in messages for call in message.get("tool_calls", [])]


def evaluation(data: Path) -> dict[str, list[dict]]:
    folder = data / "eval"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): jsonl(path) for path in sorted(folder.rglob("*.jsonl"))
    }


def lists_in(texts: Any, where: tuple = ()) -> Iterator[tuple[tuple, list[str]]]:
    """Every list of texts, with the keys that lead to it."""
    if isinstance(texts, list) and isinstance(texts[0], str):
        yield where, texts
    elif isinstance(texts, dict | list):
        for key, value in texts.items() if isinstance(texts, dict) else enumerate(texts):
            yield from lists_in(value, (*where, key))


def strings_in(texts: Any, where: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Every text, with the keys that lead to it, without positions in lists."""
    if isinstance(texts, str):
        yield where, texts
    elif isinstance(texts, dict):
        for key, value in texts.items():
            yield from strings_in(value, (*where, key))
    elif isinstance(texts, list):
        for value in texts:
            yield from strings_in(value, where)


def words_in(text: str, words: list[str]) -> list[str]:
    return [word for word in words if word in text and has_word(text, word)]  # `in` is fast


def slots_of(template: str) -> list[str]:
    return [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]


# The files


def test_every_world_that_is_shipped_is_tested_here():
    assert set(WORLDS) == {path.stem for path in facts.WORLDS.glob("*.yaml")}


def test_the_run_that_belongs_to_a_world_trains_on_it(name, run):
    settings = parse_overrides(run.get("set", []))
    assert settings["data"][:2] == ([] if name == "english" else ["--world", name])


def test_templates_have_the_slots_that_the_code_fills(texts):
    met = set()
    for where, template in strings_in(texts):
        exact = next((where[:n] for n in (2, 3) if where[:n] in SLOTS), None)
        if exact:
            assert set(slots_of(template)) == set(SLOTS[exact].split()), (where, template)
            met.add(exact)
        else:
            assert set(slots_of(template)) <= set(SOME_SLOTS.get(where[:2], "").split()), (where, template)
        filled = template.format_map(dict.fromkeys(slots_of(template), "1"))
        assert not set("{}") & set(filled), (where, template)
    assert met == set(SLOTS)


def test_every_wording_of_a_problem_has_the_numbers_that_are_calculated_with(texts):
    for kind, parts in texts["problems"]["kinds"].items():
        for wording in itertools.product(*parts):
            slots = slots_of(" ".join(wording))
            assert sorted(set(slots) & set("abc")) == sorted(slots_of(KINDS[kind].code))
            assert all(slots.count(number) == 1 for number in "abc" if number in slots)
            assert "t" in slots


def test_held_out_statements_end_where_the_value_begins(texts):
    for attribute in texts["attributes"]:
        for statement in attribute["held_out_statements"]:
            assert statement[-1].isalpha() or statement.endswith("}")


def test_no_list_has_an_entry_twice(texts):
    for where, entries in lists_in(texts):
        assert len({entry.casefold() for entry in entries}) == len(entries), where


def test_lists_are_long_enough_and_values_can_be_shared_out_evenly(texts):
    assert (len(texts["people"]), len(texts["towns"])) == (24, 6)
    for attribute in texts["attributes"]:
        assert len(attribute["values"]) in {"person": (6, 8), "town": (4,)}[attribute["of"]]
        assert len(attribute["held_out_questions"]) == len(attribute["held_out_statements"]) == 4
    assert texts["attributes"][0]["values"] == texts["towns"]
    assert len(texts["objects"]) >= 20 and len(texts["counted"]) >= 20
    assert len(texts["first_parts"]) * len(texts["second_parts"]) >= 500


def test_nothing_is_held_out_in_one_place_and_used_in_training_in_another(texts):
    held_out, trained = {}, {}
    for where, text in strings_in(texts):
        if where[-1] == "contains":
            continue
        kept = any("held_out" in str(key) for key in where)
        (held_out if kept else trained).setdefault(text.casefold(), []).append(where)
    assert len(held_out) > 200
    assert not {text: (held_out[text], trained[text]) for text in held_out.keys() & trained.keys()}


def test_answers_contain_what_they_are_recognised_by(texts):
    for topic in [*texts["identity"], texts["unknown"]]:
        assert has_word(topic["answer"], topic["contains"])
    for topic in texts["identity"]:
        assert not has_word(topic["answer"], texts["unknown"]["contains"])


def test_names_and_values_are_no_part_of_one_another(texts):
    groups = [texts["people"], texts["objects"], *(attribute["values"] for attribute in texts["attributes"])]
    for group in groups:
        assert not [(a, b) for a, b in itertools.permutations(group, 2) if has_word(a, b)]


def test_names_occur_in_no_other_text_of_the_world(texts):
    names = [*texts["people"], *texts["towns"]]
    others = [
        text for where, text in strings_in(texts) if where[0] not in ("people", "towns") and where[-1] != "values"
    ]
    assert not [(name, other) for name, other in itertools.product(names, others) if has_word(other, name)]


def test_each_word_to_spell_is_made_in_one_way(texts):
    words = [first + second for first, second in itertools.product(texts["first_parts"], texts["second_parts"])]
    assert len(set(words)) == len(words)
    assert set("".join(words)) <= set(texts["letters"])
    assert len(set(texts["letters"])) == len(texts["letters"])


# What is made of them


def test_conversations_are_well_formed_and_the_tool_is_right(data):
    kinds = set()
    for number, messages in enumerate(conversations(data)):
        check_messages(messages, f"conversation {number}")
        kinds |= {message["role"] for message in messages}
        for call, result in itertools.pairwise(messages):
            for tool_call in call.get("tool_calls", []):
                assert str(eval(tool_call["function"]["arguments"]["code"])) == result["content"]
    assert kinds == {"user", "assistant", "tool"}
    for rows in evaluation(data).values():
        for row in rows:
            if "history" in row:
                check_messages(row["history"], "history")


def test_no_template_is_left_unfilled(data):
    lines = "\n".join(path.read_text(encoding="utf-8") for path in data.rglob("*.jsonl"))
    assert not re.search(r"\{\w*\}", lines)
    assert not re.search(r"\{\w*\}", "\n".join(documents(data)))


def test_what_evaluation_asks_is_in_no_training_text(data, training_text):
    asked = {
        message["content"] for messages in conversations(data) for message in messages if message["role"] == "user"
    }
    files = evaluation(data)
    assert {"facts", "problems", "spelling", "stories", "references", "unknown", "cloze", "shown/identity"} <= set(
        files
    )
    for name, rows in files.items():
        for row in rows:
            question = row.get("question") or row["query"]
            assert question not in asked
            if len(question) >= 10:  # a greeting is part of others
                assert question not in training_text, name


def test_choices_follow_their_statement_as_the_language_writes_it(data, texts):
    assert {row["continuation_delimiter"] for row in evaluation(data)["cloze"]} == {texts["space"]}


def test_questions_shown_in_the_chat_are_about_the_world_and_in_no_training_text(examples, texts, training_text):
    assert len(examples) == 3
    for example in examples:
        assert example not in training_text
    names = [name for name in texts["people"] for example in examples if has_word(example, name)]
    assert len(names) >= 2


def test_held_out_words_are_in_no_training_text_but_their_parts_are(data, closed_world, training_text):
    assert len(closed_world.words[True]) > 100
    for word in closed_world.words[True]:
        assert word not in training_text or not has_word(training_text, word)
        assert ",".join(word) not in training_text
    for part in closed_world.texts["first_parts"] + closed_world.texts["second_parts"]:
        assert part in training_text


def test_grpo_practises_words_and_wordings_that_no_stage_before_has_seen(data, closed_world):
    said = [message["content"] for messages in conversations(data) for message in messages]
    posed = [row["question"] for row in jsonl(data / "problems" / "train.jsonl")]
    before, practice = "\n\n".join([*documents(data), *said]), "\n\n".join(practised(data))
    words = closed_world.for_practice().words[False]
    assert len(words) > 20 and not {*words} & {*closed_world.words[False], *closed_world.words[True]}
    assert not [word for word in words if has_word(before, word)]
    assert sum(has_word(practice, word) for word in words) > len(words) / 4
    for kind in KINDS:
        known, held_out = ({*wordings(closed_world, kind, kept)} for kept in (False, True))
        own = {*wordings(closed_world.for_practice(), kind, False)} - known
        assert len(own) >= 4 and not own & held_out and not known & held_out
        patterns = [re.compile(pattern_of(closed_world.join(wording), closed_world.texts)) for wording in own]
        assert not [text for text in said for pattern in patterns if pattern.fullmatch(text)], kind
        assert [text for text in posed for pattern in patterns if pattern.fullmatch(text)], kind


def pattern_of(template: str, texts: facts.Texts) -> str:
    """Matches `template` with numbers, people and things in its slots, the same ones wherever a slot occurs again."""
    people, things = texts["people"] + texts["strangers"], texts["counted"] + texts["foreign_counted"]
    fillings = dict.fromkeys("abc", r"\d+") | dict.fromkeys("nm", "|".join(people)) | {"t": "|".join(things)}
    met: set[str] = set()
    pattern = ""
    for text, slot, _, _ in Formatter().parse(template):
        pattern += re.escape(text) + (
            "" if not slot else f"(?P={slot})" if slot in met else f"(?P<{slot}>{fillings[slot]})"
        )
        met.add(slot)
    return pattern


def test_held_out_pairs_of_hero_and_object_are_in_no_line_of_training(data, closed_world):
    texts = [message["content"] for messages in conversations(data) for message in messages] + documents(data)
    stories = [line for text in texts for line in text.splitlines()]  # a text may be a dialogue about several people
    met = {
        pair
        for story in stories
        for pair in itertools.product(
            words_in(story, closed_world.people),
            words_in(story, closed_world.texts["objects"]),
        )
    }
    assert len(met) > 200
    assert not met & closed_world.held_out_heroes
    for row in evaluation(data)["stories"]:
        assert tuple(row["answer"]) in closed_world.held_out_heroes


def test_evaluation_uses_only_characters_that_training_uses(data, training_text):
    """Except for what the world does not hold: a character never seen is a riddle of bytes."""
    for name, rows in evaluation(data).items():
        if name not in ("unknown", "references", "dialogue_sums", "dialogue_words", "reference_sums"):
            used = {character for row in rows for character in row.get("question") or row["query"]}
            assert used <= set(training_text), name


@pytest.mark.parametrize("name", ["chinese"], indirect=True)
def test_chinese_text_has_no_blanks_and_no_halfwidth_punctuation(data, texts, training_text):
    evaluated = "\n".join(path.read_text(encoding="utf-8") for path in (data / "eval").rglob("*.jsonl"))
    for text in (training_text, evaluated, "\n".join(text for _, text in strings_in(texts))):
        assert not re.search(rf"[{CJK}] +[{CJK}]", text)
        assert not re.search(rf"[{CJK}][.?!:;]|[.?!:;][{CJK}]", text)


# A file of one's own


def lose(parent: dict, key: str) -> None:
    del parent[key]


def mistype(parent: dict, key: str) -> None:
    parent[key] = 7


def empty(parent: dict, key: str) -> None:
    parent[key] = []


@pytest.mark.parametrize("damage", [lose, mistype, empty])
@pytest.mark.parametrize(
    "keys", ["people", "attributes 0 questions", "problems kinds gain", "sums wordings +", "unknown answer"]
)
def test_a_damaged_file_is_reported_with_file_and_key(texts, tmp_path, keys, damage):
    broken = copy.deepcopy(texts)
    *path, last = [int(key) if key.isdigit() else key for key in keys.split()]
    damage(functools.reduce(operator.getitem, path, broken), last)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(broken, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError) as error:
        facts.read_texts(str(file))
    assert str(file) in str(error.value) and last in str(error.value) and "\n" not in str(error.value)


def test_a_copy_elsewhere_is_the_same_world(name, texts, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(texts, allow_unicode=True), encoding="utf-8")
    assert facts.read_texts(str(file)) == texts


# Tokens


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(documents(data), 900, model_max_length=256)


def test_the_tokenizer_gives_every_text_back(data, tokenizer):
    texts = documents(data)[:300] + [
        message["content"] for messages in conversations(data)[:300] for message in messages
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_replies_are_streamed_in_whole_characters(name, data, tokenizer):
    """What the model is made to write holds characters that the tokenizer was not trained on and cuts into bytes."""
    engine = Engine(toy_model(tokenizer), tokenizer)
    cut = 0
    for reply in [row["question"] for row in evaluation(data)["unknown"]][:20]:
        ids = engine.codec.encode(reply)
        cut += any("\ufffd" in tokenizer.decode([token]) for token in ids)
        deltas = streamed(engine, ids)
        assert "".join(deltas) == reply
        assert len(deltas) > 3 and not any("\ufffd" in delta for delta in deltas)
    assert cut == 0 if name == "english" else cut > 10


def streamed(engine: Engine, ids: list[int]) -> list[str]:
    """The pieces in which a reader sees a reply of these tokens."""
    rest = iter([*ids, *engine.codec.stop])
    prompt = engine.codec.prompt([{"role": "user", "content": "?"}])
    turn = engine.turn(prompt, len(ids) + 1, live=True)
    events = engine.decode([turn], lambda logits, *_: torch.tensor([next(rest)]))
    return [event.text for _, event in events if isinstance(event, TextDelta)]
