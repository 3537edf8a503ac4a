"""Midtraining: a base model learns conversations, multiple choice and the python tool, still at pretraining's pace.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/midtrain.py --config recipes/pocket/midtrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/midtrain.py \\
        --config recipes/pocket/midtrain.yaml --model_name_or_path me/my-base

Notable features:
- whole conversations, best-fit packed and padded, never cut
- optional replay of running text, so that what pretraining taught is not unlearnt
- the same loop, optimizer and log as pretraining
"""

import random
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.data import ConversationRows, load_text_rows, read_conversations, render, row_loader
from recipes.loop import LoopArguments, make_accelerator, train
from recipes.model_card import model_card
from recipes.packing import Conversation
from recipes.stage import OutputArguments, StageLog, check_output, finish_stage, push, settings
from recipes.validation import validation


@dataclass
class MidtrainArguments:
    """What only midtraining has."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "JSONL: conversations, GSM8K, ARC or MMLU records."})
    replay_files: list[str] | None = field(default=None, metadata={"help": "Running text to mix in, as in pretraining."})
    replay_every: int = field(default=4, metadata={"help": "One row of replayed text after this many of conversations."})
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Learn only the assistant's tokens; the original learns all of them here."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the conversations if max_steps is -1."})
    validation_share: float = field(default=0.02, metadata={"help": "Share of the conversations set aside."})


def main() -> None:
    args, loop, output = parse(MidtrainArguments, LoopArguments, OutputArguments)
    check_output(output)
    conversations = read_conversations(args.train_files)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    accelerator = make_accelerator(loop, output.output_dir)
    set_seed(loop.seed)
    rendered = render(
        conversations,
        tokenizer,
        loop.max_length,
        assistant_only_loss=args.assistant_only_loss,
        show_progress=accelerator.is_main_process,
    )
    train_set, val_set = split(rendered, args.validation_share, loop.seed)
    derive_steps(train_set, args, loop)

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "seed": loop.seed}
    replay = None
    if args.replay_files:
        replay = load_text_rows(args.replay_files, tokenizer, loop.max_length, "replay_files", **share)
    rows = ConversationRows(
        train_set, tokenizer.pad_token_id, loop.max_length, replay=replay, replay_every=args.replay_every, **share
    )
    val_rows = ConversationRows(val_set, tokenizer.pad_token_id, loop.max_length)
    val_row_count = max(1, sum(len(ids) for ids, _ in val_set) // loop.max_length)
    evaluate = validation(accelerator, val_rows, tokenizer, loop.per_device_train_batch_size, val_row_count)
    log = StageLog(output.output_dir, accelerator.is_main_process)
    batches = iter(row_loader(rows, loop.per_device_train_batch_size))
    progress = train(accelerator, model, batches, loop, evaluate, log)

    if accelerator.is_main_process:
        record = {"stage": "mid", "base_model": args.model_name_or_path, "settings": settings(args, loop, output)}
        finish_stage(model, tokenizer, output, log, record | vars(progress), model_card)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        push(output)


def split(
    rendered: list[Conversation], validation_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation conversations; the latter at least one.

    Raises:
        UserError: Fewer than two conversations.
    """
    if len(rendered) < 2:
        raise UserError("midtraining needs at least two conversations, one of them for validation")
    shuffled = random.Random(seed).sample(rendered, len(rendered))
    held_out = max(1, round(validation_share * len(shuffled)))
    return shuffled[held_out:], shuffled[:held_out]


def derive_steps(train_set: list[Conversation], args: MidtrainArguments, loop: LoopArguments) -> None:
    """Set `max_steps` from the number of epochs unless it is given; replayed text counts on top."""
    if loop.max_steps >= 0:
        return
    tokens = args.num_train_epochs * sum(len(ids) for ids, _ in train_set)
    if args.replay_files:
        tokens *= 1 + 1 / args.replay_every
    loop.max_steps = max(1, round(tokens / loop.total_batch_size))


if __name__ == "__main__":
    exit_on_user_error(main)
