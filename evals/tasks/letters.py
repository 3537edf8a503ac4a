"""Multiple choice by letter: nanochat's prompt, answered by the letter with the highest logit (no generation)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.batching import batches_by_length, with_progress
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import whole_characters

from .question import Answers, EvaluatedModel, Progress, Question

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
        letters = predict_letters(asked.model, asked.tokenizer, questions, asked.batch_size, progress)
        given = [[letter] for letter in letters]
        return Answers(predictions=given, texts=given, shown=letters, settings={"shots": 0})


def predict_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[LetterQuestion],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """Return for each question the letter whose token has the highest logit after the prompt (the first on ties).

    Raises:
        UserError: A letter is not exactly one token.
    """
    letter_ids = {letter: letter_id(tokenizer, letter) for question in questions for letter in question.letters}
    prompts = [prompt_ids(tokenizer, question.prompt) for question in questions]
    predictions = [""] * len(questions)
    for batch in with_progress(batches_by_length([len(p) for p in prompts], batch_size), progress):
        for index, logits in zip(batch, last_logits(model, [prompts[i] for i in batch]), strict=True):
            letters = questions[index].letters
            scores = logits[[letter_ids[letter] for letter in letters]].tolist()
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
    return cast(list[int], tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits (B, V) at the last token of each prompt.

    Padding is on the right, where causal attention hides it from all earlier positions, so no mask is needed; the head
    runs only at positions where a prompt ends.
    """
    input_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    kept, column = torch.unique(ends, return_inverse=True)
    logits = model(input_ids=input_ids, logits_to_keep=kept, use_cache=False).logits
    return logits[torch.arange(len(prompts), device=model.device), column].float()
