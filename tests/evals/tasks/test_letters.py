import math

import pytest
import torch
from golden import core_model, golden_json, golden_tokenizer

from evals.batching import batches_by_length
from evals.tasks.arc import ArcQuestion
from evals.tasks.letters import (
    last_logits,
    letter_id,
    multiple_choice_prompt,
    predict_letters,
    prompt_ids,
)
from evals.tasks.question import EvaluatedModel
from modeling_nanochat.errors import UserError


@pytest.fixture(scope="module")
def cases():
    return golden_json("misc.json")["categorical"]["examples"]


def as_question(case):
    return ArcQuestion(case["question"], tuple(case["choices"]), tuple(case["letters"]), case["gold"])


def test_the_letter_stands_behind_its_choice():
    prompt = multiple_choice_prompt("Which?", ["red", "blue"], ["A", "B"])
    assert prompt == (
        "Multiple Choice question: Which?\n- red=A\n- blue=B\n\nRespond only with the letter of the correct answer."
    )


def test_prompts_and_ids_equal_the_golden_ones(cases):
    tokenizer = golden_tokenizer()
    for case in cases:
        assert as_question(case).prompt == case["prompt"]
        assert prompt_ids(tokenizer, case["prompt"]) == case["prompt_ids"]


def test_letter_logits_equal_the_golden_ones_in_a_padded_batch(cases):
    logits = last_logits(core_model(), [case["prompt_ids"] for case in cases])
    for row, case in zip(logits, cases, strict=True):
        torch.testing.assert_close(row[case["letter_ids"]], torch.tensor(case["letter_logits"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_predicted_letters_equal_the_golden_ones(cases, batch_size):
    questions = [as_question(case) for case in cases]
    prompts = [case["prompt_ids"] for case in cases]
    predictions = predict_letters(core_model(), golden_tokenizer(), questions, prompts, batch_size=batch_size)
    assert predictions == [case["predicted"] for case in cases]


def test_of_a_prompt_beyond_the_context_the_end_is_read_and_it_is_counted(cases):
    model, questions = core_model(), [as_question(case) for case in cases]
    lengths = sorted(len(case["prompt_ids"]) for case in cases)
    assert lengths[0] < lengths[-1]
    model.config.max_position_embeddings = context = lengths[-1] - 1
    answers = ArcQuestion.answer(questions, EvaluatedModel(model, golden_tokenizer(), None, None))
    assert answers.settings["questions_beyond_context"] == lengths.count(lengths[-1])
    prompts = [case["prompt_ids"][-context:] for case in cases]
    assert answers.shown == predict_letters(model, golden_tokenizer(), questions, prompts)


def test_no_letter_is_predicted_if_logits_are_not_finite(cases):
    model, questions = core_model(), [as_question(case) for case in cases]
    model.lm_head.weight.data.fill_(math.nan)
    asked = EvaluatedModel(model, golden_tokenizer(), None, None)
    answers = ArcQuestion.answer(questions, asked)
    assert answers.shown == [""] * len(cases) and answers.settings["questions_not_finite"] == len(cases)


def test_a_letter_of_several_tokens_is_refused(cases):
    with pytest.raises(UserError, match="'Ab2' is 3 tokens"):
        letter_id(golden_tokenizer(), "Ab2")


def test_batches_hold_every_example_once_within_both_limits():
    lengths = [5, 900, 7, 7, 300, 2, 40]
    batches = batches_by_length(lengths, batch_size=3, max_tokens=600)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [1]  # longer than the limit: alone, and first
    for batch in batches[1:]:
        assert len(batch) <= 3 and len(batch) * max(lengths[i] for i in batch) <= 600
