"""A question of an evaluation task, the model that is asked, and its answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from transformers import PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:  # training reads the same records and needs no engine
    from modeling_nanochat.chat.engine import Engine
    from modeling_nanochat.chat.sampling import SamplingOptions

Progress = Callable[[int], Any]  # called with the number of prompts just answered, like `tqdm.update`


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is asked, and how. A base model has no engine: it is only asked to continue text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    engine: "Engine | None"
    options: "SamplingOptions"
    batch_size: int = 32  # prompts per forward pass
    max_new_tokens: int = 96  # of a reply, tool results included
    seed: int = 0
    samples: int = 1  # replies to each question; letters and continuations are always one
    first: int = 0  # number of the first question asked, among those of its task


@dataclass(frozen=True)
class Answers:
    """A model's answers to the questions of a task, in their order."""

    predictions: list[list[str]]  # one for each sample, right if equal to the question's `reference`
    texts: list[list[str]]  # what the model answered in each sample, as kept with the predictions
    shown: list[str]  # what a reader compares to notice that all answers are the same; of the first sample
    conversations: list[list[dict]] = field(default_factory=list)  # question and first reply; empty if not in words
    settings: dict[str, Any] = field(default_factory=dict)  # what the record has to say about how it was asked


class Question(ABC):
    """A question with its right answer, read from a record of a data set.

    A task is one file with a subclass of `LetterQuestion`, `ContinuationQuestion` or `ReplyQuestion`, which decide how
    a model answers, and one line in `evals.tasks.table`.
    """

    name: ClassVar[str]  # of the task
    fields: ClassVar[frozenset[str]]  # a record with all of these is a question of the task
    needs_chat: ClassVar[bool] = True  # only a model trained on chat tokens can answer

    @property
    @abstractmethod
    def reference(self) -> str:
        """The right answer, equal to the prediction of a model that is right."""

    @classmethod  # noqa: B027, most tasks need nothing
    def check_grading(cls) -> None:
        """Raise [`UserError`] if answers cannot be graded on this machine; called before the model is asked."""

    @property
    def prompts(self) -> int:
        """Number of prompts that the model answers for a sample of this question, for the progress bar."""
        return 1

    @property
    def chance(self) -> float:
        """Probability that a random guess is right."""
        return 0.0

    @classmethod
    @abstractmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        """Check a record that has `fields`.

        Args:
            record: One object of a data set.
            where: Its file and line, for errors.

        Raises:
            UserError: A field has the wrong type or value.
        """

    def conversation(self) -> list[dict] | None:
        """Return the question and a right answer as messages to train on; None if the task has no such answer."""
        return None

    @classmethod
    @abstractmethod
    def answer(cls, questions: Sequence[Self], asked: EvaluatedModel, progress: Progress | None = None) -> Answers:
        """Return the model's answers to `questions`, which are all of this class."""
