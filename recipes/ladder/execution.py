"""Running one step of the ladder as a process of its own, in a run folder that no other run holds."""

import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evals.reporting.records import write_json
from modeling_nanochat.errors import UserError

from .arguments import STAGES
from .commands import ROOT
from .process import call, stage_environment
from .step import RESUME, Step, has_checkpoints, is_own, marker


def run_step(step: Step, run_dir: Path, redo: bool, lock: int | None = None, verbose: bool = False) -> None:
    """Run a step; while it runs, nothing that follows from its earlier result counts as finished.

    Raises:
        UserError: The command failed or was stopped.
    """
    wanted, again = step.fingerprint(run_dir), "the same command without --from" if redo else "the same command"
    forget(step, run_dir)
    if step.record is not None:
        step.record.unlink(missing_ok=True)
    write_json(marker(step.name, run_dir, "started"), wanted)
    # a folder of that name is this run's, unfinished or unwanted; the world replaces only itself
    overwrite = ["--overwrite_output_dir", "true"] if step.makes_folder and step.name != "data" else []
    resume = [RESUME[step.name], "auto"] if has_checkpoints(step.name, run_dir) and not redo else []
    command = [*step.command, *overwrite, *resume]
    if verbose:
        print(shown(command), flush=True)
    started = time.perf_counter()
    environment = {**stage_environment(verbose), "PYTHONPATH": search_path()}
    code = call(command, environment, again, lock, silent=step.is_measurement and not verbose)
    if code or not (step.record is None or step.record.exists()):
        more = "" if verbose else "; --verbose true shows more"
        how = f"stopped with exit code {code}; fix the error above, then" if code else "was stopped before its end;"
        resumes = has_checkpoints(step.name, run_dir)
        then = f"goes on from its checkpoint, --from {step.name} starts anew" if resumes else "goes on from there"
        raise UserError(f"{step.name} {how} {again} {then}{more}")
    seconds = round(time.perf_counter() - started, 1)
    cost = {"seconds": seconds, "peak_memory_mib_so_far": peak_memory_mib()}
    write_json(marker(step.name, run_dir, "finished"), wanted | cost)
    marker(step.name, run_dir, "started").unlink()


def search_path() -> str:
    """Where a stage finds the project's packages though they are not installed."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def peak_memory_mib() -> int:
    """Of the largest process among all that this run has started and seen end."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words).replace("python -m accelerate.commands.accelerate_cli", "accelerate", 1)


def forget(step: Step, run_dir: Path) -> None:
    """Let neither the step nor what this run made from its earlier result count as finished."""
    names = [step.name]
    if step.makes_folder:
        names += [name for stage in STAGES[STAGES.index(step.name) :] for name in (stage, f"{stage}.eval")]
    for name in names:
        if not is_own(name, run_dir):
            continue
        if marker(name, run_dir, "finished").exists():  # what it left is still the run's own
            (run_dir / "started").mkdir(exist_ok=True)
            marker(name, run_dir, "finished").replace(marker(name, run_dir, "started"))
        stage, _, evaluation = name.partition(".")
        marker(stage, run_dir, "results" if evaluation else "stages").unlink(missing_ok=True)
        if not evaluation and name != step.name:
            (run_dir / "logs" / f"{stage}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(run_dir / "checkpoints" / stage, ignore_errors=True)


@contextmanager
def only_run(run_dir: Path) -> Iterator[int]:
    """Hold the run folder: two runs in it would overwrite each other's stages. Gives the lock's descriptor."""
    import fcntl

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}); give another --run_dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{run_dir} is in use by another run; wait for it or give another --run_dir") from error
        yield lock.fileno()
