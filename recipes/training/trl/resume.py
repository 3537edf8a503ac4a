"""TRL's trainers with pretraining's checkpoints and signals: killed at any instant or asked to stop, they go on.

transformers writes its checkpoints in place and with pickles. Here they are those of [`Checkpoints`], under the same
names: the trainer's methods that save and load are replaced, its loop is not. Training waits until a checkpoint is
complete.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import GRPOConfig

from modeling_nanochat.errors import UserError

from ..checkpoint.checkpoints import Checkpoint, Checkpoints, RunState, restore_random_state
from ..checkpoint.optimizer_state import load_optimizer_state, optimizer_state
from ..learning import LearningWatch
from ..stage import JsonlLogger
from ..stopping import StopRequest, stop_request, stopped

TRAINER_STATE = ("epoch", "global_step", "max_steps", "num_input_tokens_seen", "total_flos")
ATTRIBUTES = ("_step", "_total_train_tokens", "entropy_coef", "_last_world_entropy")  # where the trainer has them


class Trained(Exception):
    """The checkpoint is of the last step: there is nothing left to train."""


class ResumableTrainer(Trainer):
    """Trainer mixin: saves to and resumes from [`Checkpoints`].

    Attributes:
        stopping: Some process was asked to stop.
        watch: Observes every step.
    """

    model: PreTrainedModel
    optimizer: Any
    lr_scheduler: Any
    ref_model: PreTrainedModel  # of GRPO
    _step: int  # of GRPO
    train_dataset: Dataset
    checkpoints: Checkpoints
    resumed: Checkpoint | None = None
    request: StopRequest | None = None
    stopping = False
    watch: LearningWatch

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this process was."""
        return self.request is not None and self.request.reason is not None

    def train_from(
        self, resumed: Checkpoint | None, checkpoints: Checkpoints, run_config: dict[str, Any], log: JsonlLogger
    ) -> None:
        """Train from the checkpoint `resumed`, or from the start, to the last step.

        Raises:
            Stopped: On SIGTERM or Ctrl-C, after writing a checkpoint.
            UserError: The training data has changed since the checkpoint was written.
        """
        self.resumed, self.checkpoints, self.run_config, self.stage_log = resumed, checkpoints, run_config, log
        self.add_callback(SavingAndStopping(self))
        with stop_request() as self.request, TemporaryDirectory() as folder:
            if resumed:
                self.write_trainer_state(Path(folder, "trainer_state.json"), resumed.state.train_state)
            try:
                self.train(resume_from_checkpoint=folder if resumed else None)
            except Trained:
                pass

    def write_trainer_state(self, path: Path, saved: dict[str, Any]) -> None:
        """Write the one file that transformers reads itself."""
        if saved["rows"] != len(self.train_dataset):
            raise UserError(
                f"the checkpoint was trained on {saved['rows']} rows, now there are {len(self.train_dataset)}; give "
                "the same data, or train from scratch with --overwrite_output_dir true and without --resume"
            )
        state = TrainerState(train_batch_size=self.args.train_batch_size, **saved["trainer"])
        state.compute_steps(self.args, state.max_steps)  # may have changed
        state.save_to_json(str(path))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.store_flos()
        shards = {}
        if self.accelerator.is_main_process:
            shards["optimizer"] = optimizer_state(self.optimizer)
            if reference := self.reference:
                shards["reference"] = reference.state_dict()
        self.checkpoints.save(self.state.global_step, self.run_state(), shards, self.trained_weights)
        self.checkpoints.complete()

    def run_state(self) -> RunState:
        args = self.args
        saved = {
            "trainer": {name: getattr(self.state, name) for name in TRAINER_STATE},
            "scheduler": self.lr_scheduler.state_dict(),
            "attributes": {name: getattr(self, name) for name in ATTRIBUTES if hasattr(self, name)},
            "rows": len(self.train_dataset),
            "rows_per_step": rows_per_step(args),
            "passes_per_step": args.gradient_accumulation_steps,
            "rows_per_generation": getattr(args, "generation_batch_size", None),
        }
        return RunState(
            train_state=saved,
            learning=self.watch.state_dict(),
            run_config=self.run_config,
            seconds=self.stage_log.seconds,
            processes=args.world_size,
            per_device_train_batch_size=args.per_device_train_batch_size,
        )

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """All but frozen parameters, such as those below an adapter."""
        model = self.unwrapped(self.model)
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}

    def unwrapped(self, model: torch.nn.Module) -> PreTrainedModel:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def reference(self) -> PreTrainedModel | None:
        """GRPO's reference model if it follows the trained one; otherwise it is the stage's input."""
        return self.unwrapped(self.ref_model) if getattr(self.args, "sync_ref_model", False) else None

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.resumed is not None
        self.unwrapped(self.model).load_state_dict(self.resumed.weights(), strict=False)  # frozen ones are not saved
        if reference := self.reference:
            (shard,) = self.resumed.shards("reference")
            reference.load_state_dict({name: shard.get_tensor(name) for name in shard.keys()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        saved = self.resumed.state.train_state
        load_optimizer_state(self.optimizer, *self.resumed.shards("optimizer"))
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # the scheduler sets it only after the next step
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        if hasattr(self, "_step"):  # counts passes, of which a step may now have another number
            self._step = self._step * self.args.gradient_accumulation_steps // saved["passes_per_step"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed:
            restore_random_state(self.resumed, self.accelerator)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        return EpochOrder(sampler, self) if hasattr(sampler, "generator") else sampler

    @property
    def is_within_rollouts(self) -> bool:
        """Whether the next step takes completions that GRPO has already generated, which no checkpoint holds."""
        if not isinstance(self.args, GRPOConfig):
            return False
        assert self.args.steps_per_generation, "TRL has a default"
        return bool(self._step % (self.args.steps_per_generation * self.args.num_iterations))


class EpochOrder(Sampler):
    """`sampler` in an order that depends on seed and epoch only, so that a resumed run has it too.

    TRL's sampler, and transformers' by length, draw an epoch's order from where the last one's draws ended.
    """

    def __init__(self, sampler: Any, trainer: ResumableTrainer):
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        args, epoch = self.trainer.args, int(self.trainer.state.epoch)
        if epoch or not isinstance(self.sampler, LengthGroupedSampler):  # its first epoch follows from `set_seed`
            seed = args.seed if args.data_seed is None else args.data_seed
            self.sampler.generator = torch.Generator().manual_seed(seed + epoch)
        return iter(self.sampler)


class SavingAndStopping(TrainerCallback):
    """Ends training that is complete already, or that was asked to stop; postpones checkpoints within rollouts.

    A run that stops within rollouts, or was killed before the postponed checkpoint, generates them again.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer, self.postponed = trainer, False

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            raise Trained  # the trainer would take one step more

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_save or self.postponed
        self.postponed = (
            control.should_save and self.trainer.is_within_rollouts and state.global_step < state.max_steps
        )
        control.should_save = self.trainer.stopping or (control.should_save and not self.postponed)

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.trainer.stopping and state.global_step < state.max_steps:
            assert self.trainer.request is not None
            raise stopped(self.trainer.request, state.global_step, state.max_steps, self.trainer.checkpoints.folder)


def rows_per_step(training: TrainingArguments) -> int:
    """Conversations or completions of an optimizer step, over all processes."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size


def keep_step_size(training: TrainingArguments, checkpoint: Checkpoint) -> None:
    """Set rows and passes of each process so that a step has as many rows as before on another number of processes.

    Raises:
        UserError: They cannot be divided evenly, or the same number of processes was given another size.
    """
    saved, processes = checkpoint.state.train_state, training.world_size
    rows, generated = saved["rows_per_step"], saved["rows_per_generation"] or 0
    if rows_per_step(training) == rows:
        return
    if checkpoint.state.processes == processes or rows % processes or generated % processes:
        raise UserError(
            f"{checkpoint.folder} was trained in steps of {rows} rows, now they have {rows_per_step(training)}; set "
            "per_device_train_batch_size and gradient_accumulation_steps so that they have as many on "
            f"{processes} processes"
        )
    each = math.gcd(rows // processes, generated // processes)
    most = training.per_device_train_batch_size
    size = max(size for size in range(1, most + 1) if each % size == 0)
    training.per_device_train_batch_size, training.gradient_accumulation_steps = size, rows // processes // size
    if isinstance(training, GRPOConfig):
        training.generation_batch_size, training.steps_per_generation = generated, generated // processes // size
    if training.process_index == 0:
        passes = training.gradient_accumulation_steps
        print(f"each step: {processes} processes x {passes} passes x {size} rows, as many rows as before")
