"""The README of a model folder, from the stage's record alone."""

from pathlib import Path

from huggingface_hub import ModelCardData

STAGES = {
    "base": "pretraining on running text; it continues text and does not chat",
    "mid": "midtraining on conversations, multiple choice and tool use",
    "sft": "supervised fine-tuning on conversations",
    "rl": "reinforcement learning (GRPO) on word problems with the python tool",
}

INTRODUCTION = """A small language model with {parameters:,} parameters, after {stage}. Trained from scratch with
nanochat on the Hugging Face stack. {architecture}"""

ARCHITECTURES = {
    "nanochat": "The architecture is the `nanochat` of transformers: no code from this folder is run when it is loaded.",
    "nanochat_turbo": "The architecture is not part of transformers: install `modeling-nanochat`, or load it with "
    "`trust_remote_code=True`, which runs the code in this folder.",
}

LIMITS = """It is small, makes things up, and knows nothing but its training text. Do not rely on it, and run what it writes
only in isolation."""

# What a snippet needs before its own lines: no library ships turbo.
IMPORTS = {"nanochat": "", "nanochat_turbo": "import modeling_nanochat  # registers the architecture\n"}

CHAT = """```python
{imports}from transformers import pipeline

chat = pipeline("text-generation", "{model}")
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)[0]["generated_text"][-1])
```

With `modeling-nanochat` installed, `nanochat-chat {model}` talks to it in the terminal and runs the Python that it calls."""

# The tokenizer begins the text with `<|bos|>` by itself.
TEXT = """```python
{imports}from transformers import pipeline

print(pipeline("text-generation", "{model}")("Once upon a time", max_new_tokens=64)[0]["generated_text"])
```"""


def model_card(record: dict) -> str:
    """Markdown with the Hub's metadata block."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", record["stage"]],
        base_model=hub_id(record.get("base_model")),
    )
    name = record["settings"].get("hub_model_id") or record["settings"]["output_dir"]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        INTRODUCTION.format(
            parameters=record["parameters"],
            stage=STAGES[record["stage"]],
            architecture=ARCHITECTURES[record["model_type"]],
        ),
        (TEXT if record["stage"] == "base" else CHAT).format(model=name, imports=IMPORTS[record["model_type"]]),
        "## Training",
        facts(record),
        "## Limits",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id: the Hub refuses a card whose `base_model` is a path."""
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
