"""Which stage of training a model folder comes from, and what to expect of it in a chat."""

from transformers import PreTrainedModel

from .examples import card_metadata

# What a visitor should know before the first question; a finished chat model needs no word.
STAGES = {
    "base": "a base model: it continues text and has never seen a conversation, so expect no answers; "
    "chat with the model after midtraining, SFT or GRPO",
    "mid": "a midtrained model: it has seen conversations among other text; the model after SFT answers better",
    "sft": "",
    "rl": "",
}


def training_stage(model: PreTrainedModel) -> str | None:
    """The key of `STAGES` whose folder `model` was loaded from, by the tags of its model card; None if that is unknown."""
    tags = card_metadata(model.name_or_path).get("tags")
    tags = tags if isinstance(tags, list) and "nanochat" in tags else []
    return next((stage for stage in STAGES if stage in tags), None)


def stage_note(model: PreTrainedModel) -> str:
    return STAGES.get(training_stage(model), "")
