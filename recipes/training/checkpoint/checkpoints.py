"""Checkpoints that survive a kill at any instant, a full disk and a flipped bit.

A checkpoint is a folder `<run>/checkpoints/<stage>/step-00000500` of safetensors and JSON files. It is written under a
temporary name; every file is flushed to disk; `complete.json`, the marker, lists every file with its size and SHA-256
and is written last; then the folder is renamed. Only after that are older checkpoints deleted. A folder without a
marker, or that does not match it, is not a checkpoint. Loading runs no code: there is no pickle in it. A checkpoint of
another `FORMAT` is refused.

Training waits only until its tensors are copied to CPU memory. A thread writes, flushes and hashes the files;
`complete`, which the loop calls once all processes have done so, writes the marker.

Each process writes its shard of optimizer and data state, and reads what it needs from all shards: the number of
processes may change between runs (see `MuonAdamW.load_sharded_state_dict`, `Loader.load_state_dict`). With several
machines the folder must be on shared storage.

Only this package knows names and contents of these files: others hand over states and get them back.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import flush

from ..processes import on_main_process
from .files import Damaged, copied, verify, write_files, write_marker
from .folders import checkpoint_folders, discard

KEPT = 2  # checkpoints: one is left if the newest is damaged
FORMAT = 3  # of files and states; raise it when one of them changes. Checkpoints without a version are of format 1


@dataclass(frozen=True)
class RunState:
    """The plain values of a checkpoint, which state.json holds.

    Attributes:
        train_state: `TrainState.state_dict()`.
        learning: `LearningWatch.state_dict()`.
        run_config: The settings that define the run.
        seconds: Since the run's start, without interruptions.
        processes: Number of processes that saved, each with `per_device_train_batch_size` rows per pass.
    """

    train_state: dict[str, Any] = field(default_factory=dict)
    learning: dict[str, Any] = field(default_factory=dict)
    run_config: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 1
    per_device_train_batch_size: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    @property
    def state(self) -> RunState:
        """The `state` passed to [`Checkpoints.save`].

        Raises:
            UserError: It was written in another format.
        """
        # The version is in this file and not in the marker, because a flipped bit here is detected as damage
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        version = state.pop("format", 1)
        if version != FORMAT:
            raise UserError(
                f"{self.folder} has checkpoint format {version}, this version of nanochat resumes format {FORMAT}; "
                "train from scratch with --overwrite_output_dir true and without --resume, or resume with the version "
                "that wrote it"
            )
        return RunState(**state)

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def shards(self, kind: str) -> list[safe_open]:
        """The "optimizer", "data" or "random" state of each process that saved, by rank; tensors are read lazily."""
        return [safe_open(path, "pt") for path in sorted(self.folder.glob(f"{kind}-*-of-*.safetensors"))]


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that a thread is writing; `files` resolves to the result of [`write_files`]."""

    step: int
    folder: Path
    files: Future


class Checkpoints:
    """The checkpoints of one stage, newest last.

    Args:
        folder: Where they are; created with the first checkpoint.
    """

    def __init__(self, folder: str | Path, accelerator: Accelerator | PartialState):
        self.folder, self.accelerator = Path(folder), accelerator
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.unfinished: Unfinished | None = None

    def present(self) -> list[Checkpoint]:
        """Every folder with a checkpoint's name, valid or not, oldest first."""
        return [Checkpoint(path) for path in checkpoint_folders(self.folder).values()]

    def find(self, resume: str) -> Checkpoint | None:
        """The checkpoint to resume from: the newest good one for "auto" (None if there are none), or the named folder.

        The main process searches and broadcasts the result.

        Raises:
            UserError: The named folder is not a checkpoint or is damaged, or all checkpoints are damaged.
        """
        return on_main_process(lambda: self.newest_good() if resume == "auto" else self.named(resume))

    def newest_good(self) -> Checkpoint | None:
        damages = []
        for checkpoint in reversed(self.present()):
            try:
                verify(checkpoint.folder)
            except Damaged as damage:
                damages.append(str(damage))
                print(f"checkpoint {checkpoint.folder} is damaged ({damage}); trying an older one", file=sys.stderr)
            else:
                return checkpoint
        if damages:
            raise UserError(
                f"no good checkpoint is left in {self.folder} ({damages[0]}); delete it to train from scratch"
            )
        return None

    def named(self, folder: str) -> Checkpoint:
        path = Path(folder)
        if path not in checkpoint_folders(path.parent).values():
            raise UserError(
                f"--resume {folder}: not a checkpoint; give auto, or a folder such as {self.folder}/step-00000500"
            )
        try:
            verify(path)
        except Damaged as damage:
            raise UserError(
                f"--resume {folder}: damaged ({damage}); --resume auto takes the newest good one"
            ) from damage
        return Checkpoint(path)

    def save(
        self, step: int, state: RunState, shards: dict[str, dict[str, torch.Tensor]], weights: Callable[[], dict]
    ) -> None:
        """Start writing the checkpoint of `step`, which is valid after [`complete`]. Called by every process.

        Completes the previous checkpoint first. The arguments may change once this returns.

        Args:
            state: The main process's is saved.
            shards: This process's tensors by kind: "optimizer", "data"; the random generators' states are added.
            weights: Returns the full model's tensors, at least on the main process; called by every process.

        Raises:
            UserError: Writing failed on some process; earlier checkpoints are unchanged.
        """
        self.complete()
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        unfinished = self.folder / f".step-{step:08d}.unfinished"
        self.together(lambda: self.start(unfinished), main_only=True)
        tensors = {f"{kind}-{rank:05d}-of-{world_size:05d}": shard for kind, shard in shards.items()}
        tensors[f"random-{rank:05d}-of-{world_size:05d}"] = random_state(self.accelerator.device)
        model = weights()
        if self.accelerator.is_main_process:
            tensors["model"] = model
        text = json.dumps({"format": FORMAT} | asdict(state)) if self.accelerator.is_main_process else None
        copies = {name: copied(content) for name, content in tensors.items()}
        self.unfinished = Unfinished(step, unfinished, self.writer.submit(write_files, unfinished, copies, text))

    @property
    def being_written(self) -> bool:
        """Whether [`complete`] would wait for this process's files."""
        return self.unfinished is not None and not self.unfinished.files.done()

    def complete(self) -> None:
        """Wait for the files of the last `save` and turn them into a checkpoint. Called by every process.

        Raises:
            UserError: Writing failed on some process; earlier checkpoints are unchanged.
        """
        if self.unfinished is None:
            return
        unfinished, self.unfinished = self.unfinished, None
        written = self.together(unfinished.files.result)
        self.together(lambda: self.finish(unfinished.folder, unfinished.step, written), main_only=True)

    def together(self, write: Callable[[], dict | None], main_only: bool = False) -> dict:
        """Run `write` on every process and merge the results; if one fails, all raise the error and clean up."""
        result, problem = {}, None
        if self.accelerator.is_main_process or not main_only:
            try:
                result = write() or {}
            except (OSError, SafetensorError) as error:
                problem = " ".join(str(error).split())
        outcomes = gather_object([(result, problem)])
        problems = [problem for _, problem in outcomes if problem]
        if problems:
            if self.accelerator.is_main_process:
                self.discard_unfinished()
            intact = self.present()
            kept = f"{intact[-1].folder} is intact" if intact else "there is no earlier one"
            raise UserError(
                f"checkpoint in {self.folder} could not be written ({problems[0]}); {kept}; "
                "free space, then --resume auto"
            )
        return {name: value for files, _ in outcomes for name, value in files.items()}

    def start(self, unfinished: Path) -> None:
        self.discard_unfinished()
        unfinished.mkdir(parents=True)

    def finish(self, unfinished: Path, step: int, files: dict[str, dict]) -> None:
        """Write the marker, rename the folder, and only then delete older checkpoints."""
        missing = [name for name in files if not (unfinished / name).exists()]
        if missing:
            raise OSError(f"{missing[0]} was written on another machine; {self.folder} must be on shared storage")
        write_marker(unfinished, files)
        target = self.folder / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)  # only a damaged one: this run did not resume from it
        unfinished.rename(target)
        flush(self.folder)
        abandoned = [other for other in self.present() if other.step > step]  # this run resumed from before them
        for other in [*abandoned, *[other for other in self.present() if other.step <= step][:-KEPT]]:
            shutil.rmtree(other.folder, ignore_errors=True)

    def discard_unfinished(self) -> None:
        for path in self.folder.glob(".step-*.unfinished"):
            shutil.rmtree(path, ignore_errors=True)

    def delete(self, keep_newest: bool = False) -> None:
        """Delete all checkpoints, or all but the newest."""
        if not self.accelerator.is_main_process:
            return
        if not keep_newest:
            discard(self.folder)
        for older in self.present()[:-1]:
            shutil.rmtree(older.folder, ignore_errors=True)


def interrupted_run(folder: Path, resume: str) -> dict[str, Any] | None:
    """The settings that define the run whose checkpoints are in `folder`, or whose checkpoint is `resume`, if any.

    Only the small state file is verified: the run that resumes verifies the others.
    """
    newest_first = [*checkpoint_folders(folder).values()][::-1] if resume == "auto" else [Path(resume)]
    for path in newest_first:
        with suppress(Damaged):
            verify(path, only="state.json")
            return Checkpoint(path).state.run_config
    return None


def restore_random_state(checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Restore each process's random generators; a rank that had not saved any keeps those of the seed."""
    shards = checkpoint.shards("random")
    if accelerator.process_index < len(shards):
        shard = shards[accelerator.process_index]
        set_random_state({name: shard.get_tensor(name) for name in shard.keys()}, accelerator.device)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's random generators, as tensors."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy_keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states returned by [`random_state`]."""
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
