import pytest

from evals.tasks import gsm8k
from evals.tasks.table import TASKS, task_of, to_conversation
from modeling_nanochat.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
GSM8K = {"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}
ARC = {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"}
MMLU = {"question": "Which?", "subject": "colours", "choices": ["red", "blue", "green", "grey"], "answer": 2}
MATCH = {"question": "Which?", "answer": "red", "rivals": ["blue"]}
CLOZE = {"query": "The sky is", "choices": ["blue", "square"], "gold": 0}
HUMANEVAL = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "", "entry_point": "f"}


def test_the_fields_tell_the_task():
    records = (CHAT, GSM8K, ARC, MMLU, MATCH, CLOZE, HUMANEVAL, {"text": "x"})
    names = [getattr(task_of(record), "name", None) for record in records]
    assert names == [None, "gsm8k", "arc", "mmlu", "match", "cloze", "humaneval", None]


def test_no_task_hides_a_later_one():
    """The first task whose fields a record has is taken."""
    for i, task in enumerate(TASKS):
        assert not any(task.fields <= later.fields for later in TASKS[i + 1 :])


def test_a_conversation_stays_as_it_is_and_loses_other_fields():
    assert to_conversation(CHAT | {"source": "x"}, "f:1") == CHAT


def test_a_word_problem_becomes_a_conversation_with_a_call():
    roles = [message["role"] for message in to_conversation(GSM8K, "f:1")["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_a_word_problem_with_a_history_becomes_one_conversation():
    before = gsm8k.to_messages("2 + 2?", "<<2+2=4>>4")
    messages = to_conversation(GSM8K | {"history": before}, "f:1")["messages"]
    assert messages == before + to_conversation(GSM8K, "f:1")["messages"]


def test_a_function_is_answered_by_the_whole_of_it():
    assert to_conversation(HUMANEVAL, "f:1")["messages"][1]["content"] == "def f():\n\n    pass\n"


@pytest.mark.parametrize(("record", "letter"), [(ARC, "2"), (MMLU, "C")])
def test_multiple_choice_is_answered_by_the_bare_letter(record, letter):
    user, assistant = to_conversation(record, "f:1")["messages"]
    assert user["content"].startswith("Multiple Choice question: Which?\n- red=")
    assert assistant == {"role": "assistant", "content": letter}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"text": "x"}, "no `messages`.*its fields are text"),
        ({}, "fields are none"),
        (MATCH, "no `messages`"),
        ({"messages": []}, "non-empty list"),
        ({"messages": CHAT["messages"][::-1]}, "out of order"),
        (GSM8K | {"answer": "2"}, "no final '#### <number>'"),
        (GSM8K | {"answer": "#### 19/2"}, "no final '#### <number>'"),
        (GSM8K | {"answer": "#### 1 234"}, "no final '#### <number>'"),
        (GSM8K | {"answer": "#### ,"}, "no final '#### <number>'"),
        (GSM8K | {"answer": "#### " + "1" * 102}, "no final '#### <number>'"),
        (GSM8K | {"answer": "#### $5 each\n#### 10"}, "no final '#### <number>'"),
        (GSM8K | {"grading": "exact"}, "`grading` must be one of number, original, found 'exact'"),
        (GSM8K | {"history": CHAT["messages"][:1]}, "`history` must end with an answer of the assistant"),
        (MMLU | {"history": CHAT["messages"]}, "only questions that are answered in words"),
        (GSM8K | {"question": 3}, "`question` must be a string"),
        (ARC | {"answerKey": "3"}, "must be one of the labels"),
        (ARC | {"choices": {"text": ["red", "blue"], "label": ["1"]}}, "one `label` per `text`"),
        (ARC | {"choices": "red, blue"}, "2 to 26 strings"),
        (MMLU | {"answer": 4}, "index of a choice, 0 to 3, found 4"),
        (MMLU | {"answer": True}, "found True"),
        (MMLU | {"choices": ["red", 2, "x", "y"]}, "2 to 26 strings"),
    ],
)
def test_a_malformed_record_is_named(record, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        to_conversation(record, "train.jsonl:7")
    assert str(error.value).startswith("train.jsonl:7") and "\n" not in str(error.value)
