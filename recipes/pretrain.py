"""Pretraining: a model from nothing, on running text.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py --config recipes/pocket/pretrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/pretrain.py \\
        --tokenizer me/my-tokenizer --train_files 'text/*.parquet' --val_files val.parquet --output_dir runs/d20/base \\
        --depth 20 --max_length 2048 --total_batch_size 524288

Notable features:
- one dial, `depth`; what follows from it is printed and can be set by name
- best-fit packing: every row begins with `<|bos|>`, nothing is padded
- Muon for the matrices, AdamW for the rest
- validation in bits per byte, comparable between tokenizers
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.cli import parse
from modeling_nanochat.configuration_nanochat import ASPECT_RATIO, HEAD_DIM
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.sizes import scaling_parameters
from modeling_nanochat.tokenization_nanochat import special_token_ids
from recipes.data import load_text_rows, row_loader
from recipes.loop import LoopArguments, make_accelerator, train
from recipes.model_card import model_card
from recipes.stage import OutputArguments, StageLog, check_output, finish_stage, push, settings
from recipes.validation import validation

ARCHITECTURES = {
    "plain": (NanoChatConfig, NanoChatForCausalLM),
    "turbo": (NanoChatTurboConfig, NanoChatTurboForCausalLM),
}


@dataclass
class PretrainArguments:
    """What only pretraining has."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Parquet, JSONL or text files or patterns, or one Hub dataset."})
    val_files: list[str] = field(metadata={"help": "The same, for validation."})
    architecture: str = field(
        default="plain", metadata={"help": "plain opens everywhere; turbo learns faster and carries its code."}
    )
    depth: int = field(default=20, metadata={"help": "Number of layers; sets the width."})
    aspect_ratio: int = field(default=ASPECT_RATIO, metadata={"help": "Width per layer, before rounding up to heads."})
    head_dim: int = field(default=HEAD_DIM, metadata={"help": "Width of an attention head."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Fewer than heads: grouped queries."})
    target_param_data_ratio: float = field(
        default=12.0, metadata={"help": "Training tokens per parameter in matrices and head, where max_steps is -1."}
    )
    eval_tokens: int = field(default=1048576, metadata={"help": "Tokens of one validation."})


def main() -> None:
    args, loop, output = parse(PretrainArguments, LoopArguments, OutputArguments)
    check_output(output)
    tokenizer = load_tokenizer(args.tokenizer)
    accelerator = make_accelerator(loop, output.output_dir)
    set_seed(loop.seed)
    model = build_model(args, loop, tokenizer)
    derive_steps(model, args, loop)
    if accelerator.is_main_process:
        print_derived(model, loop)

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "seed": loop.seed}
    rows = load_text_rows(args.train_files, tokenizer, loop.max_length, "train_files", **share)
    val_rows = load_text_rows(args.val_files, tokenizer, loop.max_length, "val_files", epochs=1)
    evaluate = validation(
        accelerator, val_rows, tokenizer, loop.per_device_train_batch_size, max(1, args.eval_tokens // loop.max_length)
    )
    log = StageLog(output.output_dir, accelerator.is_main_process)
    batches = iter(row_loader(rows, loop.per_device_train_batch_size, loop.dataloader_num_workers))
    progress = train(accelerator, model, batches, loop, evaluate, log)

    if accelerator.is_main_process:
        record = {"stage": "base", "settings": settings(args, loop, output), **vars(progress)}
        finish_stage(model, tokenizer, output, log, record, model_card)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        push(output)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A nanochat tokenizer.

    Raises:
        UserError: There is none, or it lacks the control tokens.
    """
    hint = f"{name_or_path}: no tokenizer there; train one with tokenizer_train/train.py --output_dir {name_or_path}"
    folder = Path(name_or_path)
    if folder.parent.is_dir() and not folder.is_dir() and "/" in name_or_path:  # `runs/tokenizer` is no Hub id
        raise UserError(hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(hint) from error
    special_token_ids(tokenizer)
    return tokenizer


def build_model(args: PretrainArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerFast) -> NanoChatForCausalLM:
    """Random weights, sizes from the dial; the vocabulary is the tokenizer's."""
    if args.architecture not in ARCHITECTURES:
        raise UserError(f"architecture {args.architecture} is unknown; take {' or '.join(ARCHITECTURES)}")
    config_class, model_class = ARCHITECTURES[args.architecture]
    try:
        config = config_class.from_depth(
            args.depth,
            aspect_ratio=args.aspect_ratio,
            head_dim=args.head_dim,
            num_key_value_heads=args.num_key_value_heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=loop.max_length,
        )
    except ValueError as error:
        raise UserError(f"{error}; change depth, aspect_ratio, head_dim or num_key_value_heads") from error
    return model_class(config)


def derive_steps(model: NanoChatForCausalLM, args: PretrainArguments, loop: LoopArguments) -> None:
    """Set `max_steps` from the tokens-per-parameter ratio unless it is given.

    Counted are the parameters inside linear layers: they alone do arithmetic, and so set the useful number of tokens.
    """
    if loop.max_steps < 0:
        loop.max_steps = int(args.target_param_data_ratio * scaling_parameters(model.config) // loop.total_batch_size)
    if loop.max_steps < 1:
        raise UserError(f"max_steps is {loop.max_steps}; raise target_param_data_ratio or lower total_batch_size")


def print_derived(model: NanoChatForCausalLM, loop: LoopArguments) -> None:
    config, tokens = model.config, loop.max_steps * loop.total_batch_size
    print(
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads, "
        f"vocabulary {config.vocab_size}: {model.num_parameters():,} parameters\n"
        f"{loop.max_steps:,} steps of {loop.total_batch_size:,} tokens = {tokens:,} tokens, "
        f"{tokens / scaling_parameters(model.config):.1f} per parameter in matrices and head"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
