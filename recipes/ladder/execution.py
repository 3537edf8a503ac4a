"""Runs a ladder step in its own process and locks the run folder against a second run."""

import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import write_json

from .arguments import LADDER
from .launch import ROOT
from .process import call, stage_environment
from .step import Step, has_checkpoints, is_own, marker


def run_step(step: Step, run_dir: Path, redo: bool, lock: int | None = None, verbose: bool = False) -> None:
    """Run a step, after marking everything derived from its previous result as unfinished.

    Raises:
        UserError: The command failed or was interrupted.
    """
    wanted, again = step.fingerprint(run_dir), "the same command without --from" if redo else "the same command"
    forget(step, run_dir)
    if step.record is not None:
        step.record.unlink(missing_ok=True)
    write_json(marker(step.name, run_dir, "started"), wanted)
    # The plan has checked that an existing folder is this run's. world.py replaces only a world, without the flag.
    overwrite = ["--overwrite_output_dir", "true"] if step.makes_folder and step.name != "data" else []
    resume = ["--resume", "auto"] if has_checkpoints(step.name, run_dir) and not redo else []
    command = [*step.command, *overwrite, *resume]
    if verbose:
        print(command_line(command), flush=True)
    started = time.perf_counter()
    environment = {**stage_environment(verbose), "PYTHONPATH": search_path()}
    code = call(command, environment, again, lock, silent=step.is_measurement and not verbose)
    if code or not (step.record is None or step.record.exists()):
        more = "" if verbose else "; --verbose true shows more"
        how = f"stopped with exit code {code}; fix the error above, then" if code else "was stopped before its end;"
        resumes = has_checkpoints(step.name, run_dir)
        then = f"continues from its checkpoint, --from {step.name} starts over" if resumes else "continues from there"
        raise UserError(f"{step.name} {how} {again} {then}{more}")
    seconds = round(time.perf_counter() - started, 1)
    cost = {"seconds": seconds, "peak_memory_mib_so_far": peak_memory_mib()}
    write_json(marker(step.name, run_dir, "finished"), wanted | cost)
    marker(step.name, run_dir, "started").unlink()


def search_path() -> str:
    """PYTHONPATH with the checkout first, so that stages import the project without installation."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def peak_memory_mib() -> int:
    """Peak resident memory of the largest child process that has ended so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit


def command_line(command: list[str]) -> str:
    """The command as you would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words).replace("python -m accelerate.commands.accelerate_cli", "accelerate", 1)


def forget(step: Step, run_dir: Path) -> None:
    """Mark the step and everything this run derived from its previous result as unfinished."""
    names = [step.name]
    if step.makes_folder:
        names += [name for stage in LADDER[LADDER.index(step.name) :] for name in (stage, f"{stage}.eval")]
    for name in names:
        if not is_own(name, run_dir):
            continue
        if marker(name, run_dir, "finished").exists():  # its output still belongs to this run
            (run_dir / "started").mkdir(exist_ok=True)
            marker(name, run_dir, "finished").replace(marker(name, run_dir, "started"))
        stage, _, evaluation = name.partition(".")
        marker(stage, run_dir, "results" if evaluation else "stages").unlink(missing_ok=True)
        if not evaluation and name != step.name:
            (run_dir / "logs" / f"{stage}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(run_dir / "checkpoints" / stage, ignore_errors=True)


@contextmanager
def only_run(run_dir: Path) -> Iterator[int]:
    """Lock the run folder, since two runs would overwrite each other's stages. Yields the lock's file descriptor.

    The lock belongs to the open file: a stage that inherits it holds it too, even after this process was killed. If
    the file system has no locks, nothing is locked.

    Raises:
        UserError: Another run holds the lock, or the folder is not writable.
    """
    import fcntl

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}); give another --run_dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run_dir} is in use by another run; wait for it or give another --run_dir") from error
        except OSError:
            pass
        yield lock.fileno()
