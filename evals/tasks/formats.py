"""Records of common datasets: detect the kind, check the fields, convert to conversations.

Fields are those of the datasets on the Hub:
conversation    {"messages": [...]}, optionally "tools"; nanochat's own parts `python`, `python_output` are converted
gsm8k           {"question", "answer", "history"?}, the answer with `<<12+7=19>>` marks and `#### 19` at the end
arc             {"question", "choices": {"text": [...], "label": [...]}, "answerKey"}
mmlu            {"question", "choices": [...], "answer": index}, often with "subject"
match           {"question", "answer", "rivals": [...], "history"?}: a reply is right if it has `answer` and no rival;
                `answer` may be a list of strings, all of which must occur
cloze           {"query", "choices": [...], "gold": index, "continuation_delimiter"?}, CORE's multiple choice; the
                delimiter defaults to a space

`history` is a list of messages that precede the question, as in a conversation; it may be empty.
"""

from typing import Any

from evals.fields import is_list_of_strings, require_index, require_strings
from modeling_nanochat.convert.conversations import from_original, has_call_parts
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages, check_tools

from . import gsm8k
from .multiple_choice import MultipleChoiceQuestion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def kind_of(record: dict[str, Any]) -> str | None:
    """Return the kind of a record, detected by its fields as listed above; None if it is none of these."""
    fields = record.keys()
    if "messages" in fields:
        return "conversation"
    if {"query", "choices", "gold"} <= fields:
        return "cloze"
    if {"question", "choices", "answerKey"} <= fields:
        return "arc"
    if {"question", "choices", "answer"} <= fields:
        return "mmlu"
    if {"question", "answer", "rivals"} <= fields:
        return "match"
    return "gsm8k" if {"question", "answer"} <= fields else None


def to_conversation(record: dict[str, Any], where: str) -> dict[str, list[dict]]:
    """Return a training record as {"messages": [...], "tools"?: [...]}: GSM8K with tool calls, ARC and MMLU by letter.

    Args:
        record: One object of a JSONL file.
        where: File and line, for errors.

    Raises:
        UserError: The record is malformed or of another kind.
    """
    kind, tools = kind_of(record), {}
    if kind == "conversation":
        messages = record["messages"]
        if has_call_parts(messages):
            messages = from_original(messages, where)
        if record.get("tools") is not None:
            check_tools(record["tools"], where)
            tools = {"tools": record["tools"]}
    elif kind == "gsm8k":
        check_gsm8k(record, where)
        messages = [*history(record), *gsm8k.to_messages(record["question"], record["answer"])]
    elif kind in ("arc", "mmlu"):
        question = multiple_choice_question(record, where)
        messages = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.answer}]
    else:
        raise UserError(
            f"{where}: no `messages`, and not a GSM8K, ARC or MMLU record; fields are {', '.join(record) or 'none'}"
        )
    check_messages(messages, where)
    return {"messages": messages} | tools


def history(record: dict[str, Any]) -> list[dict]:
    """Return the messages before a record's question; empty if it has no `history`."""
    return record.get("history") or []


def question_messages(record: dict[str, Any]) -> list[dict]:
    """Return the conversation to answer: the history, then the question as the user's turn."""
    return [*history(record), {"role": "user", "content": record["question"]}]


def check_history(record: dict[str, Any], where: str) -> None:
    if record.get("history") in (None, []):
        return
    check_messages(record["history"], f"{where}, `history`")
    last = record["history"][-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise UserError(f"{where}: `history` must end with an answer of the assistant; the question is the next turn")


def require_no_history(record: dict[str, Any], where: str) -> None:
    if record.get("history") not in (None, []):
        raise UserError(f"{where}: only GSM8K and match records can have a `history`; leave it out")


def check_gsm8k(record: dict[str, Any], where: str) -> None:
    require_strings(record, ("question", "answer"), where)
    check_history(record, where)
    if gsm8k.extract_answer(record["answer"]) is None:
        raise UserError(f"{where}: `answer` has no final '#### <number>'; add it, as in GSM8K")


def check_match(record: dict[str, Any], where: str) -> None:
    require_strings(record, ("question",), where)
    check_history(record, where)
    for field, words in (("answer", match_answers(record)), ("rivals", record["rivals"])):
        if not is_list_of_strings(words) or not all(word.strip() for word in words):
            kind = "a string or a list" if field == "answer" else "a list"
            raise UserError(f"{where}: `{field}` must be {kind} of strings, none of them empty")
    if not record["answer"]:
        raise UserError(f"{where}: `answer` is empty; give at least one word that a right reply contains")


def match_answers(record: dict[str, Any]) -> Any:
    """Return the strings that a right reply to a match record contains."""
    return [record["answer"]] if isinstance(record["answer"], str) else record["answer"]


def check_cloze(record: dict[str, Any], where: str) -> None:
    require_strings({"continuation_delimiter": " "} | record, ("query", "continuation_delimiter"), where)
    require_no_history(record, where)
    require_choices(record["choices"], where)
    require_index(record["gold"], "gold", len(record["choices"]), where)


def multiple_choice_question(record: dict[str, Any], where: str) -> MultipleChoiceQuestion:
    """Return an ARC or MMLU record as a question; MMLU's choices get the letters A, B, C, ...

    Raises:
        UserError: A field has the wrong type, or the answer is not one of the choices.
    """
    require_strings(record, ("question",), where)
    require_no_history(record, where)
    if kind_of(record) == "mmlu":
        require_choices(record["choices"], where)
        require_index(record["answer"], "answer", len(record["choices"]), where)
        letters = LETTERS[: len(record["choices"])]
        choices, answer = record["choices"], letters[record["answer"]]
    else:
        texts_and_labels = record["choices"] if isinstance(record["choices"], dict) else {}
        choices, letters = texts_and_labels.get("text"), texts_and_labels.get("label")
        require_choices(choices, where)
        answer = record["answerKey"]
        if not is_list_of_strings(letters) or len(letters) != len(choices) or answer not in letters:
            raise UserError(
                f"{where}: `choices` needs one `label` per `text`, and `answerKey` must be one of the labels"
            )
    return MultipleChoiceQuestion(record["question"], tuple(choices), tuple(letters), answer)


def require_choices(choices: Any, where: str) -> None:
    if not is_list_of_strings(choices) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: `choices` must hold 2 to {len(LETTERS)} strings")
