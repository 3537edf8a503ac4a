"""The training stage of a model folder, and what to expect of it in a chat."""

from transformers import PreTrainedModel

from .examples import card_metadata

# What a user should know before the first question; a finished chat model needs no note.
STAGES = {
    "base": "a base model: it continues text and has never seen a conversation, so expect no answers; "
    "chat with the model after midtraining, SFT or GRPO",
    "mid": "a midtrained model: it has seen conversations among other text; the model after SFT answers better",
    "sft": "",
    "rl": "",
}


def training_stage(model: PreTrainedModel) -> str | None:
    """The key of `STAGES` for `model`, from the tags of its model card; None if unknown."""
    tags = card_metadata(model.name_or_path).get("tags")
    tags = tags if isinstance(tags, list) and "nanochat" in tags else []
    return next((stage for stage in STAGES if stage in tags), None)


def stage_note(model: PreTrainedModel) -> str:
    return STAGES.get(training_stage(model), "")
