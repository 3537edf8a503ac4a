"""Which stage of training a model folder comes from, and what to expect of it in a chat."""

from pathlib import Path

from huggingface_hub import metadata_load
from transformers import PreTrainedModel

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
    card = Path(model.name_or_path or ".") / "README.md"
    try:
        tags = (metadata_load(card) or {}).get("tags") if model.name_or_path and card.is_file() else None
    except Exception:  # a card is free text: YAML or not, UTF-8 or not
        return None
    tags = tags if isinstance(tags, list) and "nanochat" in tags else []
    return next((stage for stage in STAGES if stage in tags), None)


def stage_note(model: PreTrainedModel) -> str:
    return STAGES.get(training_stage(model), "")
