"""Pretraining: a model from nothing, on running text.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py --config recipes/pocket/pretrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/pretrain.py \\
        --tokenizer me/my-tokenizer --train_files 'text/*.parquet' --val_files val.parquet --output_dir runs/d20/base \\
        --depth 20 --max_length 2048 --total_batch_size 524288

Notable features:
- one dial, `depth`; what follows from it is printed and can be set by name
- best-fit packing: every row begins with `<|bos|>`, nothing is padded
- Muon for the matrices, AdamW for the rest; the work and its state shared between processes
- at intervals bits per byte (comparable between tokenizers), CORE and samples
- checkpoints that survive a kill at any instant; `--resume auto` goes on as if nothing had happened
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

from dataclasses import dataclass, field
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
from modeling_nanochat.text.sources import text_source
from modeling_nanochat.tokenization_nanochat import special_token_ids
from recipes.training.arguments import LoopArguments
from recipes.training.data.documents import out_of_reach
from recipes.training.data.streams import TextStreams
from recipes.training.evaluation import Evaluation, bits_per_byte_evaluation, text_rows, validation
from recipes.training.optim.hyperparameters import Plan, check_ranges, given_or_none, resolve_hyperparameters
from recipes.training.setup import LoopStage, given, make_accelerator, run_stage
from recipes.training.stage import OutputArguments, check_output

CORE_DEFAULTS = {"core_steps": 2000, "core_max_per_task": 500}


@dataclass
class PretrainArguments:
    """What only pretraining has."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Parquet, JSONL or text files or patterns, or one Hub dataset."})
    val_files: list[str] = field(metadata={"help": "The same, for validation."})
    architecture: Literal["plain", "turbo"] = field(
        default="plain", metadata={"help": "plain opens everywhere; turbo learns faster and carries its code."}
    )
    depth: int = field(default=20, metadata={"help": "Number of layers; sets the width."})
    aspect_ratio: int = field(default=ASPECT_RATIO, metadata={"help": "Width per layer, before rounding up to heads."})
    head_dim: int = field(default=HEAD_DIM, metadata={"help": "Width of an attention head."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Fewer than heads: grouped queries."})
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Context of the model, where later stages train on longer rows than max_length."}
    )
    window_pattern: str | None = field(
        default=None, metadata={"help": "Of turbo's layers, S sees a quarter of the context, L all of it; SSSL, repeated."}
    )
    target_param_data_ratio: float | None = field(
        default=None, metadata={"help": "Training tokens per parameter, where neither max_steps nor target_flops is given."}
    )
    target_flops: float | None = field(default=None, metadata={"help": "Arithmetic of the whole run, where max_steps is -1."})
    eval_tokens: int = field(default=1048576, metadata={"help": "Tokens of one validation."})
    core_dir: str | None = field(default=None, metadata={"help": "Folder of the CORE tasks; without it, no CORE."})
    core_steps: int | None = field(
        default=None, metadata={"help": "Steps between two CORE, 2000; the last step always has one."}
    )
    core_max_per_task: int | None = field(default=None, metadata={"help": "Examples per CORE task, 500; -1: all."})
    sample_steps: int = field(default=2000, metadata={"help": "Steps between two samples; the last step always has some."})
    sample_prompts: list[str] = field(
        default_factory=lambda: list(PROMPTS), metadata={"help": "Beginnings that the model continues; 16 tokens each."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A number that no run can have, or that would train nothing; a setting without effect.
        """
        positive = ("depth", "aspect_ratio", "head_dim", "num_key_value_heads", "eval_tokens", "core_max_per_task")
        positive += ("max_position_embeddings", "target_param_data_ratio", "target_flops")
        check_ranges(
            positive={name: given_or_none(getattr(self, name)) for name in positive},
            not_negative={name: getattr(self, name) for name in ("core_steps", "sample_steps")},
            shares={},
        )
        for name, usual in CORE_DEFAULTS.items():
            if getattr(self, name) is None and self.core_dir:
                setattr(self, name, usual)
            elif getattr(self, name) is not None and not self.core_dir:
                raise UserError(f"{name} has no effect without core_dir; give --core_dir, or leave it out")
        if self.window_pattern and self.architecture != "turbo":
            raise UserError("window_pattern is turbo's; add --architecture turbo, or make it empty: --window_pattern ''")


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
    make_stream = TextStreams(texts, tokenizer, loop.max_length, loop.seed)
    if line := out_of_reach(texts, tokenizer, loop.max_length):
        accelerator.print(line)
    evaluations = make_evaluations(args, loop, accelerator, tokenizer)
    record = {"stage": "base"}
    run_stage(LoopStage(record, (args, loop, output), accelerator, model, tokenizer, plan, make_stream, evaluations))


def make_plan(model: NanoChatForCausalLM, args: PretrainArguments, loop: LoopArguments) -> Plan:
    given = ("target_flops", "target_param_data_ratio")
    return resolve_hyperparameters(
        model.config,
        loop.training_recipe,
        max_length=loop.max_length,
        max_steps=loop.max_steps,
        aspect_ratio=args.aspect_ratio,
        **{name: getattr(args, name) for name in given},
        **loop.rates(),
    )


def make_evaluations(
    args: PretrainArguments, loop: LoopArguments, accelerator: Accelerator, tokenizer: PreTrainedTokenizerFast
) -> tuple[Evaluation, ...]:
    """Bits per byte, CORE and samples. All files are read now: a bad one is told before training, not after."""
    rows = text_rows(args.val_files, tokenizer, loop.max_length, "val_files")
    bits_per_byte = validation(accelerator, rows, tokenizer, max(1, args.eval_tokens // loop.max_length))
    tasks = load_core(args.core_dir) if args.core_dir else []

    # a model that FSDP has sharded is called by all processes alike, so each of them does all tasks
    dealt_out = not accelerator.is_fsdp2

    @without_cudnn_attention()
    def run_core(model: NanoChatForCausalLM) -> tuple[dict, list[str]]:
        result = core(
            model,
            tokenizer,
            tasks,
            max_per_task=args.core_max_per_task,
            process_index=accelerator.process_index if dealt_out else 0,
            num_processes=accelerator.num_processes if dealt_out else 1,
            gather=lambda counts: accelerator.reduce(counts, "sum") if dealt_out else counts,
        )
        return {"core": result.core, "core_tasks": result.tasks}, [f"CORE {result.core:.4f}"]

    @without_cudnn_attention()
    def run_samples(model: NanoChatForCausalLM) -> tuple[dict, list[str]]:
        texts = samples(model, tokenizer, args.sample_prompts)
        return {"samples": texts}, [repr(text) for text in texts]

    found = [bits_per_byte_evaluation(bits_per_byte, loop.eval_steps)]
    found += [Evaluation(args.core_steps, run_core)] if tasks else []
    found += [Evaluation(args.sample_steps, run_samples)] if args.sample_prompts else []
    return tuple(found)


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
    config_class, model_class = ARCHITECTURES[args.architecture]
    context = args.max_position_embeddings or loop.max_length
    if context < loop.max_length:
        raise UserError(f"max_position_embeddings {context} is less than max_length {loop.max_length}; raise it, or leave it out")
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
