"""Supervised fine-tuning with TRL's `SFTTrainer`, with the loss on assistant tokens only.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/pocket/sft.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/sft.py \\
        --config recipes/pocket/sft.yaml --model_name_or_path me/my-mid --push_to_hub true --hub_model_id me/my-sft

Notable features:
- mixtures of data sets in YAML, by rows and epochs
- rows packed with whole conversations, which do not see each other; none is truncated
- loss on held-out conversations, accuracy on tasks and ChatCORE at intervals
- Muon with AdamW

Keys of `trl.SFTConfig` that have an effect can be set too, see `training/trl/keys.py`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from dataclasses import dataclass, field, replace

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.training.arguments import ResumeArguments
from recipes.training.attention import AttentionArguments, set_attention
from recipes.training.data.chat_templates import end_of_turn
from recipes.training.data.conversations import Renderer
from recipes.training.data.packing import Conversation
from recipes.training.data.validation import ValidationArguments
from recipes.training.model_card import CardArguments
from recipes.training.processes import on_main_process
from recipes.training.stage import check_output
from recipes.training.trl.adapters import AdapterArguments
from recipes.training.trl.optimizers import training_options
from recipes.training.trl.packing import Packing
from recipes.training.trl.settings import SFTSettings, parse_settings
from recipes.training.trl.sft_evaluation import SFTEvaluation, TaskArguments
from recipes.training.trl.stage import (
    find_checkpoint,
    output_arguments,
    run_settings,
    run_trl_stage,
    start_log,
)
from recipes.training.trl.trainer import MuonTrainer, RateArguments

LONGEST_ROW = 2048  # tokens, the original's, if max_length is not given


@dataclass
class SFTArguments(
    CardArguments,
    RateArguments,
    AdapterArguments,
    AttentionArguments,
    TaskArguments,
    ValidationArguments,
    ResumeArguments,
):
    """Arguments that `trl.SFTConfig` does not have."""

    model_name_or_path: str = field(default="", metadata={"help": "Midtrained or chat model: folder or Hub id."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model in output_dir."})

    def __post_init__(self) -> None:
        CardArguments.__post_init__(self)
        ValidationArguments.__post_init__(self)


class NanoChatSFTTrainer(MuonTrainer, Packing, SFTEvaluation):
    """`SFTTrainer` with Muon, packed rows and our evaluations."""

    stage = "sft"


def main() -> None:
    args, training, given = parse_settings(SFTArguments, SFTSettings)
    output = output_arguments(args, training)
    if check_output(output, args.resume, run_settings(given)):
        return
    checkpoint = find_checkpoint(args, training, given)
    on_main_process(args.check_beginnings)
    tasks = args.load_tasks(training.seed)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    set_attention(model, args.attn_implementation, training.device, training.bf16)
    options = training_options(args, model, given)
    set_max_length(training, model.config.max_position_embeddings)
    args = replace(args, examples=args.examples_or_those_of(model))
    set_seed(training.seed)
    shown = training.process_index == 0
    render = Renderer(tokenizer, training.max_length, on_bad_row=args.on_bad_row, show_progress=shown)
    stop_at(model, end_of_turn(render.rendering))
    train_set, validation_set = args.train_and_validation_sets(render, training.seed)
    log = start_log(output.output_dir, training, checkpoint)

    def make_trainer() -> NanoChatSFTTrainer:
        trainer = NanoChatSFTTrainer(
            model=model,
            args=training,
            train_dataset=token_dataset(train_set),
            eval_dataset=token_dataset(validation_set) if validation_set else None,
            processing_class=tokenizer,
            **options,
        )
        trainer.evaluate_on(tasks, args)
        return trainer

    run_trl_stage(make_trainer, args, training, given, output, log, checkpoint)


def stop_at(model: PreTrainedModel, end: int) -> None:
    """Make generation stop at `end`, which a base model's configuration may lack."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if end not in ends:
        model.generation_config.eos_token_id = [end, *(other for other in ends if other is not None)]


def set_max_length(training: SFTSettings, context: int) -> None:
    """Default `max_length` to the model's context length, at most `LONGEST_ROW`: packing fills rows.

    Raises:
        UserError: `max_length` exceeds the context length.
    """
    if training.max_length is None:
        training.max_length = min(context, LONGEST_ROW)
    if training.max_length > context:
        raise UserError(f"max_length {training.max_length} exceeds the model's context of {context} tokens; lower it")


def token_dataset(rendered: list[Conversation]) -> Dataset:
    """Pretokenized `input_ids` and `assistant_masks`, which TRL uses as is: one renderer, one length check."""
    ids, masks = zip(*rendered, strict=True)
    return Dataset.from_dict({"input_ids": list(ids), "assistant_masks": list(masks)})


if __name__ == "__main__":
    exit_on_user_error(main)
