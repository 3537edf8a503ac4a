from golden import golden_json, shared

from evals.tasks import gsm8k
from modeling_nanochat.text.conversations import check_messages
from modeling_nanochat.text.records import read_jsonl


def spoken(messages):
    """(role, content, code) of each message."""
    calls = [m.get("tool_calls", [{"function": {"arguments": {"code": None}}}])[0] for m in messages]
    return [
        (m["role"], m["content"], c["function"]["arguments"]["code"]) for m, c in zip(messages, calls, strict=True)
    ]


def test_marks_become_calls_and_results():
    messages = gsm8k.to_messages("How many?", "12 + 7 = <<12+7=19>>19 apples.\n#### 19")
    assert spoken(messages) == [
        ("user", "How many?", None),
        ("assistant", "12 + 7 = ", "12+7"),
        ("tool", "19", None),
        ("assistant", "19 apples.\n#### 19", None),
    ]
    assert messages[1]["tool_calls"][0]["function"]["name"] == messages[2]["name"] == "python"


def test_an_answer_without_marks_is_one_message():
    assert spoken(gsm8k.to_messages("Q", "Five.\n#### 5")) == [
        ("user", "Q", None),
        ("assistant", "Five.\n#### 5", None),
    ]


def test_parts_equal_the_golden_ones():
    for case in golden_json("misc.json")["gsm8k"]:
        parts = []
        for role, content, code in spoken(gsm8k.to_messages("Q", case["answer"])[1:]):
            parts.append({"type": "python_output" if role == "tool" else "text", "text": content})
            parts += [{"type": "python", "text": code}] if code is not None else []
        assert parts == case["parts"]


def is_correct(reply, answer, grading="number"):
    question = gsm8k.Gsm8kQuestion.from_record({"question": "Q", "answer": answer, "grading": grading}, "f:1")
    return question.extract([{"role": "assistant", "content": reply}]) == question.reference


def test_grades_by_the_original_rule_equal_the_golden_ones():
    misc = golden_json("misc.json")
    for case in misc["gsm8k"]:
        for reply, grade in case["grades"].items():
            assert is_correct(reply, case["answer"], "original") == bool(grade), (reply, case["answer"])
    for text, answer in misc["gsm8k_extract"].items():
        assert gsm8k.extract_answer(text, "original") == answer, text


def test_numbers_are_compared_as_numbers_unless_the_record_asks_for_the_original_rule():
    assert is_correct("It is #### $1,234.50.", "#### 1234.5") and is_correct("#### 17.", "#### 17")
    assert not is_correct("#### 17.", "#### 17", "original") and not is_correct("#### 19/2", "#### 19")


def test_real_training_answers_become_well_formed_conversations():
    with_calls = 0
    for number, record in read_jsonl(shared("data/gsm8k/train.jsonl")):
        messages = gsm8k.to_messages(record["question"], record["answer"])
        check_messages(messages, f"line {number}")
        assert "<<" not in "".join(m["content"] for m in messages)
        assert gsm8k.extract_answer(messages[-1]["content"]) is not None
        with_calls += len(messages) > 2
    assert with_calls > 7000
