"""Supervised fine-tuning with TRL's `SFTTrainer`: the loss is on the assistant's tokens only.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/pocket/sft.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/sft.py \\
        --config recipes/pocket/sft.yaml --model_name_or_path me/my-mid --push_to_hub true --hub_model_id me/my-sft

Every key of `trl.SFTConfig` can be set beside those listed here.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.data import read_conversations, render
from recipes.packing import Conversation
from recipes.stage import StageLog, check_output
from recipes.trl_stage import MuonOptimizer, RateArguments, StageLogCallback, finish_trl_stage, output_arguments


@dataclass
class SFTArguments(RateArguments):
    """What `trl.SFTConfig` does not have."""

    model_name_or_path: str = field(default="", metadata={"help": "Midtrained model: folder or Hub id."})
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "JSONL: conversations, GSM8K, ARC or MMLU records."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model there."})


class NanoChatSFTTrainer(MuonOptimizer, SFTTrainer):
    """`SFTTrainer` with Muon."""


def main() -> None:
    args, training = parse(SFTArguments, SFTConfig)
    output = output_arguments(args, training)
    check_output(output)
    conversations = read_conversations(args.train_files)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    set_seed(training.seed)
    main_process = training.process_index == 0
    rendered = render(conversations, tokenizer, training.max_length, show_progress=main_process)
    log = StageLog(output.output_dir, main_process)
    trainer = NanoChatSFTTrainer(
        model=model,
        args=training,
        train_dataset=token_dataset(rendered),
        processing_class=tokenizer,
        callbacks=[StageLogCallback(log)],
        muon_rates=args.scaled(),
    )
    trainer.train()
    finish_trl_stage("sft", args, training, trainer, output, log)


def token_dataset(rendered: list[Conversation]) -> Dataset:
    """Columns `input_ids` and `assistant_masks`, which TRL takes as they are: one renderer, one length check."""
    ids, masks = zip(*rendered, strict=True)
    return Dataset.from_dict({"input_ids": list(ids), "assistant_masks": list(masks)})


if __name__ == "__main__":
    exit_on_user_error(main)
