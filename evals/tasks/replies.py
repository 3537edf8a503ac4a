"""Questions that a model answers in words, with its python tool."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from .question import Answers, EvaluatedModel, Progress, Question

if TYPE_CHECKING:
    from modeling_nanochat.chat.engine import Engine


@dataclass(frozen=True)
class ReplyQuestion(Question):
    """A question, and the messages before it."""

    question: str
    history: list[dict]

    @property
    def messages(self) -> list[dict]:
        """The conversation to answer: the history, then the question as the user's turn."""
        return [*self.history, {"role": "user", "content": self.question}]

    @abstractmethod
    def extract(self, reply: Sequence[dict]) -> str:
        """Return the answer that a reply gives, "" if none; it is right if equal to `reference`.

        Only the assistant's own text may count, not its code or the tool's output: otherwise printing an answer would
        be enough.
        """

    @classmethod
    def extract_all(cls, questions: Sequence[Self], replies: Sequence[list[list[dict]]]) -> list[list[str]]:
        """Return the answer of each of the replies to each question."""
        return [[question.extract(reply) for reply in each] for question, each in zip(questions, replies, strict=True)]

    def shown(self, reply: Sequence[dict]) -> str:
        """Return what a reader compares between the replies to different questions."""
        return last_words(reply)

    @classmethod
    def answer(cls, questions: Sequence[Self], asked: EvaluatedModel, progress: Progress | None = None) -> Answers:
        conversations = [question.messages for question in questions]
        replies = generate_replies(asked, [each for each in conversations for _ in range(asked.samples)], progress)
        of_each = [replies[i : i + asked.samples] for i in range(0, len(replies), asked.samples)]
        firsts = [samples[0] for samples in of_each]
        settings: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "temperature": asked.options.temperature}
        settings |= {"top_k": asked.options.top_k} if asked.options.temperature else {}
        settings |= {"samples": asked.samples} if asked.samples > 1 else {}
        settings["questions_beyond_context"] = sum(not reply for reply in firsts)
        return Answers(
            predictions=cls.extract_all(questions, of_each),
            texts=[[assistant_text(reply) for reply in samples] for samples in of_each],
            shown=[question.shown(reply) for question, reply in zip(questions, firsts, strict=True)],
            conversations=[[*messages, *reply] for messages, reply in zip(conversations, firsts, strict=True)],
            settings=settings,
        )


def generate_replies(
    asked: EvaluatedModel, conversations: Sequence[list[dict]], progress: Progress | None = None
) -> list[list[dict]]:
    """Return the new messages of each conversation: the assistant's, and the results of its python calls.

    A conversation that does not fit the model's context gets no messages, and so is graded as wrong.
    """
    engine = chat_engine(asked)
    prompts = [engine.codec.prompt(messages) for messages in conversations]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.context]
    replies: list[list[dict]] = [[] for _ in conversations]
    if progress is not None:
        progress(len(conversations) - len(fitting))
    turns = {i: engine.turn(prompts[i], asked.max_new_tokens, asked.options) for i in fitting}
    for index, turn in turns.items():
        turn.generator = None if asked.options.is_greedy else engine.sampler(reply_seed(asked, index)).generator
    engine.complete(list(turns.values()), engine.sampler(asked.seed), asked.batch_size, progress)
    for index, turn in turns.items():
        replies[index] = turn.messages
    return replies


def reply_seed(asked: EvaluatedModel, index: int) -> int:
    """Return the seed of a reply, which depends on question and sample alone: not on batches or processes."""
    question, sample = divmod(index, asked.samples)
    return random.Random(f"{asked.seed} {asked.first + question} {sample}").getrandbits(63)


def chat_engine(asked: EvaluatedModel) -> "Engine":
    assert asked.engine is not None, "a base model is not asked questions that need chat tokens"
    return asked.engine


def assistant_text(reply: Sequence[dict]) -> str:
    """Return the assistant's own text, without its code and the tool's output."""
    return " ".join(message["content"] or "" for message in reply if message["role"] == "assistant")


def last_words(reply: Sequence[dict]) -> str:
    """Return the assistant's last text; empty if its turn is unfinished."""
    last = reply[-1] if reply else {}
    return (last.get("content") or "") if last.get("role") == "assistant" else ""
