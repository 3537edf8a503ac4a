"""Multiple choice by letter: nanochat's prompt, answered by the letter with the highest logit (no generation)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.batching import batches_by_length, most_tokens, with_progress
from evals.scoring import context_of, logits_at, padded
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import whole_characters

from .question import Answers, EvaluatedModel, Progress, Question

NO_LETTER = ""  # where logits are not finite
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def multiple_choice_prompt(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """Return the user message of a multiple-choice question.

    The letter follows its choice without a space around "=", so that it is the same token in the prompt and as the
    bare answer; small models depend on that.
    """
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


@dataclass(frozen=True)
class LetterQuestion(Question):
    """A question, its choices, one letter per choice, and the letter of the right choice."""

    question: str
    choices: tuple[str, ...]
    letters: tuple[str, ...]
    right: str

    @property
    def prompt(self) -> str:
        return multiple_choice_prompt(self.question, self.choices, self.letters)

    @property
    def reference(self) -> str:
        return self.right

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)

    def conversation(self) -> list[dict]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.right}]

    @classmethod
    def answer(cls, questions: Sequence[Self], asked: EvaluatedModel, progress: Progress | None = None) -> Answers:
        context = context_of(asked.model)
        prompts = [prompt_ids(asked.tokenizer, question.prompt) for question in questions]
        fitting = [prompt[-context:] for prompt in prompts]  # the end, as in CORE and cloze
        letters = predict_letters(asked.model, asked.tokenizer, questions, fitting, asked.batch_size, progress)
        given = [[letter] for letter in letters]
        settings = {"shots": 0, "questions_not_finite": letters.count(NO_LETTER)}
        settings["questions_beyond_context"] = sum(len(prompt) > context for prompt in prompts)
        return Answers(predictions=given, texts=given, shown=letters, settings=settings)


def predict_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[LetterQuestion],
    prompts: Sequence[list[int]],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """Return for each question the letter whose token has the highest logit after its prompt (the first on ties).

    NO_LETTER if a logit is not finite, so that there is no highest one.

    Raises:
        UserError: A letter is not exactly one token.
    """
    letter_ids = {letter: letter_id(tokenizer, letter) for question in questions for letter in question.letters}
    predictions = [NO_LETTER] * len(questions)
    batches = batches_by_length([len(prompt) for prompt in prompts], batch_size, most_tokens(model))
    for batch in with_progress(batches, progress):
        for index, logits in zip(batch, last_logits(model, [prompts[i] for i in batch]).cpu(), strict=True):
            letters = questions[index].letters
            scores = logits[[letter_ids[letter] for letter in letters]].tolist()
            if all(map(math.isfinite, scores)):
                predictions[index] = letters[scores.index(max(scores))]
    return predictions


def letter_id(tokenizer: PreTrainedTokenizerFast, letter: str) -> int:
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"answer letter {letter!r} is {len(ids)} tokens in this tokenizer; letters must be one token each"
        )
    return ids[0]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Return the ids of the conversation up to the position of the assistant's first token."""
    messages = [{"role": "user", "content": whole_characters(prompt)}]
    quiet = {"verbose": False}  # the caller itself checks the length
    render = tokenizer.apply_chat_template
    return cast(list[int], render(messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet))


@torch.no_grad()
def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits (B, V) at the last token of each prompt.

    Padding is on the right, where causal attention hides it from all earlier positions, so no mask is needed.
    """
    ends = [(row, len(prompt) - 1) for row, prompt in enumerate(prompts)]
    return logits_at(model, ends, input_ids=padded(model, prompts), use_cache=False).float()
