import random

import pytest
from golden import shared

from evals.tasks.gsm8k import Gsm8kQuestion
from evals.tasks.match import MatchQuestion
from evals.tasks.spelling_bee import QUESTIONS, SimpleSpelling, SpellingBee, read_words
from modeling_nanochat.chat.python_tool import run_python
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages

WORDS = ["lamp", "strawberry", "zoo", "a", "queue", "mississippi"] * 3


@pytest.fixture(scope="module")
def words():
    return read_words(str(shared("data/words/words_alpha.txt")))


def code_of(question):
    return question.conversation()[1]["tool_calls"][0]["function"]["arguments"]["code"]


def test_words_are_read_in_order(words):
    lines = shared("data/words/words_alpha.txt").read_text(encoding="utf-8").split()
    assert words == lines and len(words) == 370_099


def test_word_and_letter_are_drawn_first_from_the_seed_of_the_question(words):
    """So they are those of the original, whatever the templates."""
    for split, offset in (("train", 0), ("test", 10_000_000)):
        bee = SpellingBee(words, 256, split)
        for index in (0, 1, 100, 255):
            rng = random.Random(offset + index)
            word = rng.choice(words)
            letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
            assert code_of(bee[index]) == f"'{word}'.count('{letter}')"
            assert bee[index].reference == str(word.count(letter))


def test_every_answer_is_right_by_its_own_tool_and_reads_as_a_conversation():
    for question in SpellingBee(WORDS, 200):
        messages = question.conversation()
        check_messages(messages, "x")
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        assert run_python(code_of(question)) == messages[2]["content"] == question.reference
        assert question.extract(messages[1:]) == question.reference
        assert (question.extract([{"role": "assistant", "content": "#### 99"}])) != question.reference
        assert question.history == [] and isinstance(question, Gsm8kQuestion)


def test_the_count_by_hand_is_spelled_letter_by_letter():
    bee = SpellingBee(["queue"], 50)
    question = next(question for question in bee if code_of(question) == "'queue'.count('u')")
    text = question.conversation()[1]["content"]
    assert "\nqueue:q,u,e,u,e\n" in text
    assert "\n1:q\n2:u hit! count=1\n3:e\n4:u hit! count=2\n5:e\n" in text


def test_the_questions_are_as_varied_as_drawn():
    asked = [question.question for question in SpellingBee(["strawberry"], 2000)]
    assert 0.45 < sum(text.endswith("?") for text in asked) / 2000 < 0.55
    for quote in "'\"":
        assert 0.3 < sum(f"{quote}strawberry{quote}" in text for text in asked) / 2000 < 0.37
    english = [text for text in asked if text[0].isascii() and text[0].isalpha()]
    assert 0.25 < sum(text.islower() for text in english) / len(english) < 0.4
    assert all("strawberry" in text and "{" not in text for text in asked)


def test_each_template_has_a_word_and_a_letter():
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 51
    for template in QUESTIONS:
        assert template.count("{word}") == template.count("{letter}") == 1 and not template.endswith("?")


@pytest.mark.parametrize("kind", [SpellingBee, SimpleSpelling])
def test_a_split_is_a_sequence_that_is_the_same_every_time(kind):
    train, test = kind(WORDS, 30, "train"), kind(WORDS, 30, "test")
    assert len(train) == 30 and [*train] == [train[i] for i in range(30)] == [*kind(WORDS, 30)]
    assert kind(WORDS, 5, "test")[4] == test[4] and [*train] != [*test]
    assert train[-1] == train[29] and train[3:9:2] == [train[3], train[5], train[7]]
    with pytest.raises(IndexError):
        train[30]


def test_spelling_uses_the_words_in_another_order(words):
    shuffled = list(words)
    random.Random(42).shuffle(shuffled)
    word = random.Random(10_000_003).choice(shuffled)
    question = SimpleSpelling(words, 4, "test")[3]
    assert question.conversation() == [
        {"role": "user", "content": f"Spell the word: {word}"},
        {"role": "assistant", "content": f"{word}:{','.join(word)}"},
    ]
    assert isinstance(question, MatchQuestion) and question.extract(question.conversation()[1:]) == question.reference
    assert question.extract([{"role": "assistant", "content": f"{word}:{','.join(word)},s"}]) != question.reference


@pytest.mark.parametrize("text", ["lamp\nLamp\n", "lamp\nit's\n", "lamp,zoo", "café"])
def test_what_is_no_list_of_words_is_refused(tmp_path, text):
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="words.txt: .* is no word of the letters a to z"):
        read_words(str(tmp_path / "words.txt"))
