"""Our questions for EleutherAI's lm-eval: the prompts and the grading of `evals/evaluate_model.py`.

The tasks of the YAML files beside this module get their questions from `--metadata cloze=SOURCE letters=SOURCE
replies=SOURCE`, each any file, folder or Hub id with records of that kind. lm-eval passes prompts as strings, so each
conversation is rendered here; `--apply_chat_template` would render it twice.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from evals.tasks.continuations import ContinuationQuestion, continuation_rows
from evals.tasks.letters import LetterQuestion, letter_id
from evals.tasks.replies import ReplyQuestion
from evals.tasks.table import question_of
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_records
from modeling_nanochat.tokenization_nanochat import escaped, whole_characters, whole_messages

Document = dict[str, Any]


def cloze_documents(**metadata: Any) -> dict[str, Dataset]:
    return documents("cloze", ContinuationQuestion, cloze_document, metadata)


def letter_documents(**metadata: Any) -> dict[str, Dataset]:
    return documents("letters", LetterQuestion, letter_document, metadata)


def reply_documents(**metadata: Any) -> dict[str, Dataset]:
    return documents("replies", ReplyQuestion, reply_document, metadata)


def documents(
    name: str, kind: type, document: Callable[[Any, Any], Document], metadata: dict[str, Any]
) -> dict[str, Dataset]:
    """Return the questions of a task as the split that lm-eval reads.

    Args:
        name: The key of the questions' source in `metadata`.
        kind: The class of the questions.
        document: Makes the document from tokenizer and question; it also gets the `record`, as JSON.
        metadata: lm-eval's model arguments and `--metadata`.

    Raises:
        UserError: The source is not given, or has another kind of question or a malformed one.
    """
    if not isinstance(metadata.get(name), str):
        raise UserError(f"nanochat_{name} has no questions; add --metadata {name}=SOURCE, a file, folder or Hub id")
    folder = metadata.get("tokenizer") or metadata.get("pretrained")
    if not folder:
        raise UserError(f"nanochat_{name} needs the tokenizer; add --metadata tokenizer=FOLDER, or a Hub id")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, revision=metadata.get("revision", "main"))
    rows = []
    for where, record in read_records([metadata[name]], name):
        question = question_of(record, where)
        if not isinstance(question, kind):
            raise UserError(f"{where}: nanochat_{name} has no records of {question.name}")
        rows.append(document(tokenizer, question) | {"record": json.dumps(record)})
    return {"test": Dataset.from_list(rows)}


def cloze_document(tokenizer: PreTrainedTokenizerFast, question: ContinuationQuestion) -> Document:
    """Return what makes lm-eval score exactly the tokens from the first one in which the choices differ.

    lm-eval scores all tokens behind those of the context, which must not end in a blank. A blank that is a token of
    its own in all choices, as before numbers, is therefore one more continuation, whose loss `cloze_choice` subtracts.
    """
    rows = continuation_rows(tokenizer, [question.query + choice for choice in question.choices])
    texts = [escaped(whole_characters(question.query + c), tokenizer.backend_tokenizer) for c in question.choices]
    start = rows[0][1]  # of every row
    differs = tokenizer(texts[0], return_offsets_mapping=True)["offset_mapping"][start][0]
    context = texts[0][:differs].rstrip()
    scored = len(tokenizer(context)["input_ids"])  # before `start` if a blank follows, or amid a character
    blank = [texts[0][len(context) : differs]] if scored < start and len(context) < differs else []
    return {
        "context": context,
        "continuations": [text[len(context) :] for text in texts] + blank,
        "lengths": [len(ids) - (start if blank else scored) for ids, _ in rows],
        "gold": question.gold,
    }


def cloze_choice(document: Document, results: Sequence[tuple[float, bool]]) -> int:
    """Return the index of the choice with the lowest mean loss per token, the first on ties.

    Args:
        document: Made by `cloze_document`.
        results: Log-likelihood of each of its continuations, and whether it is the most likely one.
    """
    likelihoods, lengths = [likelihood for likelihood, _ in results], document["lengths"]
    before = sum(likelihoods[len(lengths) :])
    means = [(likelihood - before) / length for likelihood, length in zip(likelihoods, lengths, strict=False)]
    return means.index(max(means))


def grade_cloze(document: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    return {"acc": float(cloze_choice(document, results) == document["gold"])}


def letter_document(tokenizer: PreTrainedTokenizerFast, question: LetterQuestion) -> Document:
    for letter in question.letters:
        letter_id(tokenizer, letter)  # an error unless it is one token
    messages = [{"role": "user", "content": question.prompt}]
    gold = question.letters.index(question.right)
    return {"prompt": rendered(tokenizer, messages), "letters": list(question.letters), "gold": gold}


def reply_document(tokenizer: PreTrainedTokenizerFast, question: ReplyQuestion) -> Document:
    return {"prompt": rendered(tokenizer, question.messages), "reference": question.reference}


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> str:
    """Return the conversation up to the assistant's first token, as a string whose ids are the engine's."""
    text = tokenizer.apply_chat_template(whole_messages(messages), add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def grade_reply(document: Document, results: Sequence[str]) -> dict[str, float]:
    """Return whether the reply is right. lm-eval has no tool loop: a reply ends with its first call."""
    question = question_of(json.loads(document["record"]), "record")
    assert isinstance(question, ReplyQuestion)
    answer = question.extract([{"role": "assistant", "content": results[0]}])
    return {"acc": float(answer == question.reference)}
