"""Pretraining: trains a model from scratch on raw text.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        --config recipes/pocket/pretrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/pretrain.py \\
        --tokenizer me/my-tokenizer --train_files 'text/*.parquet' --val_files val.parquet \\
        --output_dir runs/d20/base --depth 20 --max_length 2048 --total_batch_size 524288

Notable features:
- one dial, `depth`; the hyperparameters derived from it are printed and can be overridden by name
- best-fit packing: every row starts with `<|bos|>`, no padding
- Muon for the matrices, AdamW for the rest; update and optimizer state are sharded across processes
- periodic evaluation: bits per byte (comparable across tokenizers), CORE and samples
- checkpoints that survive a kill at any time; `--resume auto` continues exactly where training stopped
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evals.core.score import core, load_core
from evals.samples import PROMPTS, samples
from modeling_nanochat import ARCHITECTURES, NanoChatForCausalLM
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.cli import parse
from modeling_nanochat.configuration_nanochat import ASPECT_RATIO, HEAD_DIM
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.text.texts import text_source
from modeling_nanochat.tokenization_nanochat import special_token_ids
from recipes.training.arguments import LoopArguments
from recipes.training.data.documents import out_of_reach
from recipes.training.data.streams import TextStreams
from recipes.training.data.tokenized import token_cache
from recipes.training.evaluation import Evaluation, bits_per_byte_evaluation, text_rows, validation
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters
from recipes.training.optim.overrides import check_ranges, given_or_none
from recipes.training.processes import on_main_process
from recipes.training.setup import LoopStage, given, make_accelerator, run_stage
from recipes.training.stage import OutputArguments, check_output

CORE_DEFAULTS = {"core_steps": 2000, "core_max_per_task": 500}


@dataclass
class PretrainArguments:
    """Arguments specific to pretraining."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Text: parquet, JSON(L), .txt, globs, folders, Hub ids."})
    val_files: list[str] = field(metadata={"help": "Validation text, the same formats."})
    architecture: Literal["plain", "turbo"] = field(
        default="plain", metadata={"help": "plain loads without custom code; turbo learns faster and ships its code."}
    )
    depth: int = field(default=20, metadata={"help": "Number of layers; also sets the width."})
    aspect_ratio: int = field(default=ASPECT_RATIO, metadata={"help": "Width per layer, before rounding up to heads."})
    head_dim: int = field(default=HEAD_DIM, metadata={"help": "Dimension of an attention head."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Fewer than heads: grouped queries."})
    tokenized_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the token ids of train_files, to tokenize them only once."}
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Context length, if later stages train on rows longer than max_length."}
    )
    window_pattern: str | None = field(
        default=None, metadata={"help": "Windows of turbo's layers, repeated: S a quarter of the context, L all."}
    )
    target_param_data_ratio: float | None = field(
        default=None, metadata={"help": "Training tokens per parameter, if max_steps and target_flops are unset."}
    )
    target_flops: float | None = field(default=None, metadata={"help": "FLOPs of the entire run, if max_steps is -1."})
    eval_tokens: int = field(default=1048576, metadata={"help": "Tokens per validation."})
    core_dir: str | None = field(default=None, metadata={"help": "Folder of the CORE tasks; no CORE if unset."})
    core_steps: int | None = field(
        default=None, metadata={"help": "Steps between CORE evaluations, 2000; always run at the last step."}
    )
    core_max_per_task: int | None = field(default=None, metadata={"help": "Examples per CORE task, 500; -1: all."})
    sample_steps: int = field(default=2000, metadata={"help": "Steps between samples; always run at the last step."})
    sample_prompts: list[str] = field(
        default_factory=lambda: list(PROMPTS), metadata={"help": "Prompts to complete with 16 tokens each."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A value is out of range or would train nothing, or a setting has no effect.
        """
        positive = ("depth", "aspect_ratio", "head_dim", "num_key_value_heads", "eval_tokens", "core_max_per_task")
        positive += ("max_position_embeddings", "target_param_data_ratio", "target_flops")
        check_ranges(
            positive={name: given_or_none(getattr(self, name)) for name in positive},
            not_negative={name: getattr(self, name) for name in ("core_steps", "sample_steps")},
            shares={},
        )
        for name, default in CORE_DEFAULTS.items():
            if getattr(self, name) is None and self.core_dir:
                setattr(self, name, default)
            elif getattr(self, name) is not None and not self.core_dir:
                raise UserError(f"{name} has no effect without core_dir; give --core_dir, or leave it out")
        if self.window_pattern and self.architecture != "turbo":
            raise UserError("window_pattern needs turbo; add --architecture turbo, or clear it: --window_pattern ''")


def main() -> None:
    args, loop, output = parse(PretrainArguments, LoopArguments, OutputArguments)
    if check_output(output, loop.resume, given(args, loop, output)):
        return
    tokenizer = load_tokenizer(args.tokenizer)
    accelerator = make_accelerator(loop, output.output_dir)
    set_seed(loop.seed)
    model = build_model(args, loop, tokenizer)
    plan = make_plan(model, args, loop)
    texts = text_source(args.train_files, what="train_files")
    cache = token_cache(args.tokenized_cache, texts, args.train_files, tokenizer) if args.tokenized_cache else None
    make_stream = TextStreams(texts, tokenizer, loop.max_length, loop.seed, cache=cache)
    on_main_process(make_stream.fill_cache)
    if line := out_of_reach(texts, tokenizer, loop.max_length):
        accelerator.print(line)
    evaluations = make_evaluations(args, loop, accelerator, tokenizer)
    record = {"stage": "base"}
    run_stage(LoopStage(record, (args, loop, output), accelerator, model, tokenizer, plan, make_stream, evaluations))


def make_plan(model: NanoChatForCausalLM, args: PretrainArguments, loop: LoopArguments) -> Plan:
    targets = {"target_flops": args.target_flops, "target_param_data_ratio": args.target_param_data_ratio}
    return resolve_hyperparameters(
        model.config,
        loop.training_recipe,
        replace(loop.overrides(), **targets),
        max_length=loop.max_length,
        aspect_ratio=args.aspect_ratio,
    )


def make_evaluations(
    args: PretrainArguments, loop: LoopArguments, accelerator: Accelerator, tokenizer: PreTrainedTokenizerFast
) -> tuple[Evaluation, ...]:
    """Bits per byte, CORE and samples. All files are read now, so that a bad one is reported before training."""
    rows = text_rows(args.val_files, tokenizer, loop.max_length, "val_files")
    bits_per_byte = validation(accelerator, rows, tokenizer, max(1, args.eval_tokens // loop.max_length))
    tasks = load_core(args.core_dir) if args.core_dir else []

    # Under FSDP every rank must run the same forward passes, so each rank evaluates all tasks.
    split_tasks = not accelerator.is_fsdp2

    @without_cudnn_attention()
    def run_core(model: NanoChatForCausalLM) -> tuple[dict, list[str]]:
        result = core(
            model,
            tokenizer,
            tasks,
            max_per_task=args.core_max_per_task,
            process_index=accelerator.process_index if split_tasks else 0,
            num_processes=accelerator.num_processes if split_tasks else 1,
            gather=lambda counts: accelerator.reduce(counts, "sum") if split_tasks else counts,
        )
        return {"core": result.core, "core_tasks": result.tasks}, [f"CORE {result.core:.4f}"]

    @without_cudnn_attention()
    def run_samples(model: NanoChatForCausalLM) -> tuple[dict, list[str]]:
        texts = samples(model, tokenizer, args.sample_prompts)
        return {"samples": texts}, [repr(text) for text in texts]

    evaluations = [bits_per_byte_evaluation(bits_per_byte, loop.eval_steps)]
    evaluations += [Evaluation(args.core_steps, run_core)] if tasks else []
    evaluations += [Evaluation(args.sample_steps, run_samples)] if args.sample_prompts else []
    return tuple(evaluations)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Load a nanochat tokenizer from a folder or the Hub.

    Raises:
        UserError: No tokenizer was found, or it lacks the control tokens.
    """
    hint = f"{name_or_path}: no tokenizer there; train one with tokenizer_train/train.py --output_dir {name_or_path}"
    folder = Path(name_or_path)
    if folder.parent.is_dir() and not folder.is_dir() and "/" in name_or_path:  # `runs/tokenizer` is not a Hub id
        raise UserError(hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(hint) from error
    special_token_ids(tokenizer)
    return tokenizer


def build_model(
    args: PretrainArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerFast
) -> NanoChatForCausalLM:
    """A randomly initialised model, sized by `depth` and the tokenizer's vocabulary."""
    config_class, model_class = ARCHITECTURES[args.architecture]
    context = args.max_position_embeddings or loop.max_length
    if context < loop.max_length:
        raise UserError(
            f"max_position_embeddings {context} is less than max_length {loop.max_length}; raise it, or leave it out"
        )
    pattern = {"window_pattern": args.window_pattern} if args.window_pattern else {}
    try:
        config = config_class.from_depth(
            args.depth,
            aspect_ratio=args.aspect_ratio,
            head_dim=args.head_dim,
            num_key_value_heads=args.num_key_value_heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=context,
            **pattern,
        )
    except ValueError as error:
        raise UserError(
            f"{error}; change depth, aspect_ratio, head_dim, num_key_value_heads or window_pattern"
        ) from error
    return model_class(config)


if __name__ == "__main__":
    exit_on_user_error(main)
