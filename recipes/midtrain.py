"""Midtraining: teaches a base model conversations, multiple choice and the python tool, at pretraining's rates.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/midtrain.py \\
        --config recipes/pocket/midtrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/midtrain.py \\
        --config recipes/pocket/midtrain.yaml --model_name_or_path me/my-base

Notable features:
- mixtures of data sets in YAML, by rows and epochs
- best-fit packing of conversations with padding; no conversation is truncated
- optional replay of pretraining text against forgetting
- the same loop, optimizer and log as pretraining; row length, batch and learning rates are those of the base run, as
  its record tells, unless they are given
- the launch's schedule: learning rates stay constant, and fall to zero over the last fifth of the steps
- optional warm start from the base run's optimizer state
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.registered import is_nanochat
from modeling_nanochat.text.texts import text_source
from recipes.training.arguments import LoopArguments
from recipes.training.data.conversations import Renderer
from recipes.training.data.packing import Conversation
from recipes.training.data.streams import ConversationStreams, MixedStreams, TextStreams
from recipes.training.data.validation import ValidationArguments
from recipes.training.evaluation import bits_per_byte_evaluation, conversation_rows, validation
from recipes.training.inheritance import check_optimizer_state, find_inheritance
from recipes.training.model_card import CardArguments
from recipes.training.optim.hyperparameters import INHERITED, RECIPES, Plan, resolve_hyperparameters
from recipes.training.optim.overrides import SHAPE, check_ranges
from recipes.training.processes import on_main_process
from recipes.training.setup import LoopStage, given, make_accelerator, run_stage
from recipes.training.stage import OutputArguments, check_output

# The launch's constants of this stage: its schedule, neither weight decay nor clipping
STAGE_DEFAULTS = {name: getattr(RECIPES["classic"], name) for name in SHAPE}
STAGE_DEFAULTS |= {"weight_decay": 0.0, "max_grad_norm": None}


@dataclass
class MidtrainLoopArguments(LoopArguments):
    """The loop's arguments; those that are not given are inherited, see `recipes/training/inheritance.py`."""

    training_recipe: Literal["current", "classic"] | None = field(
        default=None, metadata={"help": "Optimizer: today's, or nanochat's launch version; default: the base run's."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens per row; default: the base run's."})


@dataclass
class MidtrainArguments(CardArguments, ValidationArguments):
    """Arguments specific to midtraining; without validation_mixture, validation_share is 0.02."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id."})
    replay_files: list[str] | None = field(default=None, metadata={"help": "Raw text to mix in, as in pretraining."})
    replay_every: int | None = field(default=None, metadata={"help": "Conversation rows per row of replayed text, 4."})
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Loss on assistant tokens only; the original uses all tokens here."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs over conversations, if max_steps is -1."})
    warm_start: bool = field(
        default=False,
        metadata={
            "help": "Begin with the optimizer state that the base run ended with, which its keep_checkpoint leaves. "
            "Averages over many steps spare the first ones noise; the launch version began without."
        },
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A value is missing, out of range or would train nothing, or a setting has no effect.
        """
        CardArguments.__post_init__(self)
        ValidationArguments.__post_init__(self)
        if not (self.train_files or self.mixture):
            raise UserError("--train_files is missing; set it, or mixture, in the --config file or as an option")
        if self.validation_share is None and not self.validation_mixture:
            self.validation_share = 0.02
        check_ranges(
            positive={"num_train_epochs": self.num_train_epochs, "replay_every": self.replay_every},
            not_negative={},
            shares={},
        )
        if self.replay_every is not None and not self.replay_files:
            raise UserError("replay_every has no effect without replay_files; give --replay_files, or leave it out")
        if self.replay_files and self.replay_every is None:
            self.replay_every = 4


def main() -> None:
    args, as_given, output = parse(MidtrainArguments, MidtrainLoopArguments, OutputArguments)
    if check_output(output, as_given.resume, given(args, as_given, output)):
        return
    on_main_process(args.check_beginnings)
    inheritance = find_inheritance(as_given, args.model_name_or_path, output.output_dir, args.warm_start)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    if not is_nanochat(model):
        kind = model.config.model_type
        raise UserError(f"{args.model_name_or_path}: a {kind} model, which SFT and GRPO train, but not midtraining")
    loop = inheritance.complete(as_given, model.config.max_position_embeddings)
    if inheritance.warm_start:  # before all conversations are rendered
        check_optimizer_state(model, loop.training_recipe, inheritance.warm_start)
    accelerator = make_accelerator(loop, output.output_dir)
    if line := inheritance.line(as_given, loop):
        accelerator.print(line)
    set_seed(loop.seed)
    train_set, val_set = train_and_validation_sets(args, loop, tokenizer, accelerator.is_main_process)
    make_stream = ConversationStreams(train_set, tokenizer.bos_token_id, loop.max_length, loop.seed)
    if args.replay_files:
        texts = text_source(args.replay_files, what="replay_files")
        replay = TextStreams(texts, tokenizer, loop.max_length, loop.seed)
        make_stream = MixedStreams(make_stream, replay, args.replay_every)
    inherited = inheritance.values(as_given)
    tokens = sum(len(ids) for ids, _ in train_set)
    plan = make_plan(model.config, tokens, args, loop, inherited)
    val_rows = conversation_rows(val_set, tokenizer.bos_token_id, loop.max_length)
    bits_per_byte = validation(accelerator, val_rows, tokenizer, max_rows=len(val_set))
    evaluations = (bits_per_byte_evaluation(bits_per_byte, loop.eval_steps),)
    record = {"stage": "mid", "base_model": args.model_name_or_path, "examples": args.examples_or_those_of(model)}
    record |= {"given": given(args, as_given, output), "inherited": inherited}
    run_stage(
        LoopStage(
            record,
            (args, loop, output),
            accelerator,
            model,
            tokenizer,
            plan,
            make_stream,
            evaluations,
            most_rows=inheritance.most_rows(loop),
            warm_start=inheritance.warm_start,
        )
    )


def train_and_validation_sets(
    args: MidtrainArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerFast, show_progress: bool
) -> tuple[list[Conversation], list[Conversation]]:
    """The rendered conversations to train and to validate on."""
    render = Renderer(tokenizer, loop.max_length, args.assistant_only_loss, args.on_bad_row, show_progress)
    return args.train_and_validation_sets(render, loop.seed)


def make_plan(
    config: NanoChatConfig,
    tokens: int,
    args: MidtrainArguments,
    loop: LoopArguments,
    inherited: Collection[str] = (),
) -> Plan:
    """Hyperparameters, with max_steps from num_train_epochs unless given; replayed text adds to the tokens.

    Args:
        tokens: Of the conversations of one epoch.
        inherited: Names of those that `loop` has from the base run.

    Raises:
        UserError: The epochs amount to less than half a step.
    """
    constants = {"max_length": loop.max_length, "stage_defaults": STAGE_DEFAULTS}
    resolve = partial(resolve_hyperparameters, config, loop.training_recipe, **constants)
    overrides = loop.overrides()
    if overrides.max_steps is None:
        batch = resolve(replace(overrides, max_steps=1)).total_batch_size
        overrides = replace(overrides, max_steps=steps_of_epochs(tokens, args, batch))
    plan = resolve(overrides)
    taken_over = {name: INHERITED for name in inherited if name in plan.origins}
    return replace(plan, origins=plan.origins | taken_over)


def steps_of_epochs(tokens: int, args: MidtrainArguments, batch: int) -> int:
    trained_on = args.num_train_epochs * tokens
    if args.replay_files:
        trained_on *= 1 + 1 / args.replay_every
    if steps := round(trained_on / batch):
        return steps
    raise UserError(
        f"num_train_epochs {args.num_train_epochs:g}: {trained_on:,.0f} tokens are less than one step of "
        f"{batch:,}; raise num_train_epochs, lower total_batch_size, or give max_steps"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
