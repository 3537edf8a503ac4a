"""The README of a model folder, made from the stage's record alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from modeling_nanochat.chat.examples import check_examples, example_questions, widget
from modeling_nanochat.chat.stages import STAGES

DESCRIPTIONS = {
    "base": "pretraining on running text; it continues text and does not chat",
    "mid": "midtraining on conversations, multiple choice and tool use",
    "sft": "supervised fine-tuning on conversations",
    "rl": "reinforcement learning (GRPO) on problems",
}

INTRODUCTION = """A small language model with {parameters:,} parameters, after {stage}. Trained from scratch with
nanochat on the Hugging Face stack. {architecture}"""

ARCHITECTURES = {
    "nanochat": "The architecture is the `nanochat` of transformers: this folder carries no code and opens "
    "everywhere.",
    "nanochat_turbo": "The architecture is not part of transformers: this folder carries its code, which "
    "`trust_remote_code=True` runs. Where `modeling-nanochat` is installed and imported, none of it is run.",
}

LIMITS = """\
It is small, makes things up, and knows nothing but its training text. Do not rely on it, and run what it writes
only in isolation."""

OTHER_INTRODUCTION = """A `{kind}` model with {parameters:,} parameters, trained further with nanochat on the Hugging
Face stack: {stage}."""
OTHER_LIMITS = "It makes things up. Do not rely on it, and run what it writes only in isolation."
ADAPTER = "This folder is a LoRA adapter, which opens where `peft` is installed and its base model can be read."

# Extra arguments to load a folder in Python: no library ships turbo.
TRUST = {"nanochat": "", "nanochat_turbo": ", trust_remote_code=True"}
# `transformers serve` ignores `trust_remote_code`: it looks for the class in transformers only (5.24).
SERVE = "transformers serve {model}    # an API like OpenAI's\n"
TERMINAL = (
    "nanochat-chat {model}    # in the terminal, with `modeling-nanochat` installed; runs the Python that it calls\n"
)

CHAT = """```python
from transformers import pipeline

chat = pipeline("text-generation", "{model}"{trust})
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)[0]["generated_text"][-1])
```"""

# The tokenizer prepends `<|bos|>` automatically.
TEXT = """```python
from transformers import pipeline

print(pipeline("text-generation", "{model}"{trust})("Once upon a time", max_new_tokens=64)[0]["generated_text"])
```"""


@dataclass(kw_only=True)
class CardArguments:
    """A stage's additions to its model card. The same options in every stage whose model chats."""

    examples: list[str] | None = field(
        default=None,
        metadata={"help": "Questions to show in the chat and on the model page; default: the starting model's."},
    )

    def __post_init__(self) -> None:
        check_examples(self.examples)

    def examples_or_those_of(self, model: PreTrainedModel) -> list[str]:
        """The given questions, else those in the card of the folder that `model` was loaded from."""
        return example_questions(model.name_or_path) if self.examples is None else self.examples


def model_card(record: dict) -> str:
    """Markdown with the Hub's metadata block."""
    kind, given = record["model_type"], record["settings"]
    is_ours, is_adapter = kind in ARCHITECTURES, given.get("use_peft") and not given["merge_adapter"]
    commands = (SERVE if kind != "nanochat_turbo" else "") + (TERMINAL if is_ours and not is_adapter else "")
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["nanochat"] if is_ours else []), record["stage"], *(["lora"] if is_adapter else [])],
        base_model=hub_id(record.get("base_model")),
        widget=widget(examples_of(record)) or None,
    )
    name = record["settings"].get("hub_model_id") or record["settings"]["output_dir"]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        (INTRODUCTION if is_ours else OTHER_INTRODUCTION).format(
            kind=kind,
            parameters=record["parameters"],
            stage=DESCRIPTIONS[record["stage"]],
            architecture=ARCHITECTURES.get(kind),
        ),
        *([ADAPTER] if is_adapter else []),
        (CHAT if STAGES[record["stage"]].chats else TEXT).format(model=name, trust=TRUST.get(kind, "")),
        *([f"```bash\n{commands.format(model=name)}```"] if commands and STAGES[record["stage"]].chats else []),
        "## Training",
        facts(record),
        "## Limits",
        LIMITS if is_ours else OTHER_LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def examples_of(record: dict[str, Any]) -> list[str]:
    """The questions for the chat: as resolved by the stage, else from its settings."""
    return record.get("examples", record["settings"].get("examples")) or []


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id, else None: the Hub rejects a card whose `base_model` is a path."""
    is_path = name is None or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    return None if is_path else name


def facts(record: dict) -> str:
    rows = {
        "started from": record.get("base_model") or "random weights",
        "steps": record.get("steps"),
        "tokens": record.get("tokens"),
        "seconds": record["seconds"],
        "machine": ", ".join(record["machine"]["gpus"]) or f"{record['machine']['cores']} CPU cores",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    lines = [f"- {key}: {value:,}" if isinstance(value, int) else f"- {key}: {value}" for key, value in rows.items()]
    return "\n".join(lines)
