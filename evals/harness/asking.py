"""How a model is asked: nanochat's models with their python tool, others by their chat template."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.tasks.question import EvaluatedModel
from evals.tasks.replies import ReplyQuestion, generate_replies
from evals.tasks.task_files import NamedTask
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.python_tool import run_python
from modeling_nanochat.chat.turn import MAX_TOOL_CALLS, ChatCodec, chat_codec
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import disable_special_tokens, has_control_tokens

GREETING = "Who are you?"
NO_TOKEN = -1


class TemplateCodec(ChatCodec):
    """Text and ids of any tokenizer with a chat template. No token calls the tool; a model's eos tokens end a turn.

    Unlike with nanochat's tokenizers, text that spells a control token becomes that token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        if not tokenizer.chat_template:
            raise UserError(f"{model.name_or_path}: the tokenizer has no chat template; take a chat model")
        self.python_start = self.python_end = self.output_start = self.output_end = NO_TOKEN
        ends = model.generation_config.eos_token_id
        self.stop = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        if not self.stop:
            raise UserError(f"{model.name_or_path}: has no eos token to end a reply with; set `eos_token_id`")
        self.tokenizer = tokenizer
        self.text_tokenizer = disable_special_tokens(copy.deepcopy(tokenizer.backend_tokenizer))


def codec_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ChatCodec:
    """Return how `model` is asked: by nanochat's control tokens where the tokenizer has them, else by its template."""
    return chat_codec(tokenizer) if has_control_tokens(tokenizer) else TemplateCodec(model, tokenizer)


def check_chat_template(tokenizer: PreTrainedTokenizerFast, tasks: Sequence[NamedTask], name: str) -> None:
    """Raise [`UserError`] if a task needs a chat template and the tokenizer of the model `name` has none."""
    if (needing := [task.name for task in tasks if task.task.needs_chat]) and not tokenizer.chat_template:
        raise UserError(
            f"{name}: the tokenizer has no chat template, which {', '.join(needing)} need; set base_model true to "
            "leave them out, or take a model trained on conversations"
        )


def chat_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[NamedTask]
) -> Engine | None:
    """Return what generates replies; None if no task asks for any."""
    if not any(issubclass(task.task, ReplyQuestion) for task in tasks):
        return None
    return engine_of(model, tokenizer)


def engine_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_tool_calls: int = MAX_TOOL_CALLS
) -> Engine:
    """Return the engine of `model`, with the python tool where the tokenizer has tokens for it."""
    tool = run_python if has_control_tokens(tokenizer) else None
    return Engine(model, tokenizer, tool=tool, max_tool_calls=max_tool_calls, codec=codec_of(model, tokenizer))


def greeting(asked: EvaluatedModel) -> dict[str, Any]:
    """Return a sample conversation without a task."""
    messages = [{"role": "user", "content": GREETING}]
    (reply,) = generate_replies(asked, [messages])
    return {"messages": [*messages, *reply]}
