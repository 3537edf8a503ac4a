"""Midtraining: teaches a base model conversations, multiple choice and the python tool, at pretraining's rates.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/midtrain.py \\
        --config recipes/pocket/midtrain.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/midtrain.py \\
        --config recipes/pocket/midtrain.yaml --model_name_or_path me/my-base

Notable features:
- mixtures of data sets in YAML, by rows and epochs
- best-fit packing of conversations with padding; no conversation is truncated
- optional replay of pretraining text against forgetting
- the same loop, optimizer and log as pretraining
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.registered import is_nanochat
from modeling_nanochat.text.texts import text_source
from recipes.training.arguments import LoopArguments
from recipes.training.data.conversations import Renderer
from recipes.training.data.mixtures import MixtureArguments, parse_mixture, read_mixture
from recipes.training.data.packing import Conversation
from recipes.training.data.streams import ConversationStreams, MixedStreams, TextStreams
from recipes.training.evaluation import bits_per_byte_evaluation, conversation_rows, validation
from recipes.training.model_card import CardArguments
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters
from recipes.training.optim.overrides import check_ranges
from recipes.training.setup import LoopStage, given, make_accelerator, run_stage
from recipes.training.stage import OutputArguments, check_output


@dataclass
class MidtrainArguments(CardArguments, MixtureArguments):
    """Arguments specific to midtraining."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id."})
    validation_mixture: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out conversations, as `mixture`; default: validation_share."},
    )
    replay_files: list[str] | None = field(default=None, metadata={"help": "Raw text to mix in, as in pretraining."})
    replay_every: int | None = field(default=None, metadata={"help": "Conversation rows per row of replayed text, 4."})
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Loss on assistant tokens only; the original uses all tokens here."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs over conversations, if max_steps is -1."})
    validation_share: float | None = field(
        default=None, metadata={"help": "Fraction of the conversations held out, 0.02 without validation_mixture."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A value is missing, out of range or would train nothing, or a setting has no effect.
        """
        CardArguments.__post_init__(self)
        MixtureArguments.__post_init__(self)
        if not (self.train_files or self.mixture):
            raise UserError("--train_files is missing; set it, or mixture, in the --config file or as an option")
        parse_mixture(self.validation_mixture or [], "validation_mixture")
        if self.validation_mixture and self.validation_share is not None:
            raise UserError("validation_share has no effect with validation_mixture; leave one of them out")
        if self.validation_share is None:
            self.validation_share = 0.0 if self.validation_mixture else 0.02
        check_ranges(
            positive={"num_train_epochs": self.num_train_epochs, "replay_every": self.replay_every},
            not_negative={},
            shares={"validation_share": self.validation_share},
        )
        if self.replay_every is not None and not self.replay_files:
            raise UserError("replay_every has no effect without replay_files; give --replay_files, or leave it out")
        if self.replay_files and self.replay_every is None:
            self.replay_every = 4


def main() -> None:
    args, loop, output = parse(MidtrainArguments, LoopArguments, OutputArguments)
    if check_output(output, loop.resume, given(args, loop, output)):
        return
    args.check_beginnings()
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    if not is_nanochat(model):
        kind = model.config.model_type
        raise UserError(f"{args.model_name_or_path}: a {kind} model, which SFT and GRPO train, but not midtraining")
    accelerator = make_accelerator(loop, output.output_dir)
    set_seed(loop.seed)
    train_set, val_set = train_and_validation_sets(args, loop, tokenizer, accelerator.is_main_process)
    make_stream = ConversationStreams(train_set, tokenizer.bos_token_id, loop.max_length, loop.seed)
    if args.replay_files:
        texts = text_source(args.replay_files, what="replay_files")
        replay = TextStreams(texts, tokenizer, loop.max_length, loop.seed)
        make_stream = MixedStreams(make_stream, replay, args.replay_every)
    plan = make_plan(model, train_set, args, loop)
    val_rows = conversation_rows(val_set, tokenizer.bos_token_id, loop.max_length)
    bits_per_byte = validation(accelerator, val_rows, tokenizer, max_rows=len(val_set))
    evaluations = (bits_per_byte_evaluation(bits_per_byte, loop.eval_steps),)
    record = {"stage": "mid", "base_model": args.model_name_or_path, "examples": args.examples_or_those_of(model)}
    run_stage(LoopStage(record, (args, loop, output), accelerator, model, tokenizer, plan, make_stream, evaluations))


def train_and_validation_sets(
    args: MidtrainArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerFast, show_progress: bool
) -> tuple[list[Conversation], list[Conversation]]:
    """The rendered conversations to train and to validate on."""
    render = Renderer(tokenizer, loop.max_length, args.assistant_only_loss, args.on_bad_row, show_progress)
    conversations = args.conversations(render, loop.seed)
    if not args.validation_mixture:
        return split(conversations, args.validation_share, loop.seed)
    held_out = parse_mixture(args.validation_mixture, "validation_mixture")
    return conversations, read_mixture(held_out, render, loop.seed, "validation_mixture")


def split(
    rendered: list[Conversation], validation_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Random split into training and validation conversations, at least one for validation.

    A conversation that a mixture repeats, as the same object, is in one of them only, and once in validation.

    Raises:
        UserError: Fewer than two conversations, or none left to train on.
    """
    times = Counter(map(id, rendered))
    different = list({id(conversation): conversation for conversation in rendered}.values())
    if len(different) < 2:
        raise UserError("train_files: midtraining needs at least two conversations, one of them for validation")
    shuffled = random.Random(seed).sample(different, len(different))
    held_out = max(1, round(validation_share * len(shuffled)))
    if held_out == len(shuffled):
        raise UserError(f"validation_share {validation_share} leaves no conversation to train on; lower it")
    train_set = [conversation for conversation in shuffled[held_out:] for _ in range(times[id(conversation)])]
    return train_set, shuffled[:held_out]


def make_plan(
    model: PreTrainedModel, train_set: list[Conversation], args: MidtrainArguments, loop: LoopArguments
) -> Plan:
    """Hyperparameters, with max_steps from num_train_epochs unless given; replayed text adds to the tokens.

    Weight decay is 0 unless given.

    Raises:
        UserError: The epochs amount to less than half a step.
    """
    resolve = partial(resolve_hyperparameters, model.config, loop.training_recipe, max_length=loop.max_length)
    overrides = replace(loop.overrides(), weight_decay=loop.weight_decay or 0.0)
    if overrides.max_steps is not None:
        return resolve(overrides)
    tokens = args.num_train_epochs * sum(len(ids) for ids, _ in train_set)
    if args.replay_files:
        tokens *= 1 + 1 / args.replay_every
    batch = resolve(replace(overrides, max_steps=1)).total_batch_size
    steps = round(tokens / batch)
    if steps < 1:
        raise UserError(
            f"num_train_epochs {args.num_train_epochs:g}: {tokens:,.0f} tokens are less than one step of "
            f"{batch:,}; raise num_train_epochs, lower total_batch_size, or give max_steps"
        )
    return resolve(replace(overrides, max_steps=steps, total_batch_size=batch))


if __name__ == "__main__":
    exit_on_user_error(main)
