"""Checks correctness and speed on one GPU: kernels, gradients, training, decoding, every stage.

    python recipes/benchmarks/gpu_check.py
    python recipes/benchmarks/gpu_check.py --only g0 g2 g3 --output check.jsonl
    python recipes/benchmarks/gpu_check.py --only g4 --original ../nanochat

Made for one H100. Each check runs in its own process with a time limit. Its result is printed and appended to
`--output` as one JSON line as soon as it ends, so that an interrupted run keeps its results. Figures are informative;
gates must pass, or the command fails. Output of the checks themselves goes to a log next to `--output`.

Most of the time is torch.compile. On a GPU, checks that measure no time therefore run first, `--jobs` at once, and
beside them processes that compile for the others, which then run alone. What was compiled stays in torch's cache
(TORCHINDUCTOR_CACHE_DIR, if set), so that a repeated check measures immediately. `--help` lists the seconds of each
check with a cold cache.

With `--device cpu` the same code runs at toy sizes in float32, with gates on results only, not on speed.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.benchmarks.gpu_checks import CHECKS, MARK, ROOT, Setting, environment
from recipes.training.attention import check_attention

CHILD = "import sys; from recipes.benchmarks.gpu_checks import child; child.{function}(*sys.argv[1:])"
MOST_PREPARATION = 200  # seconds to compile for one check
CORES_PER_JOB = 4  # with ten jobs on 16 cores, each took two to three times as long
Result = dict[str, Any]


def seconds_of_checks() -> str:
    return ", ".join(f"{name} {check.seconds}" for name, check in CHECKS.items())


@dataclass
class GPUCheckArguments:
    """Which checks to run, and how."""

    only: list[str] = field(
        default_factory=list,
        metadata={"help": f"Checks to run; g3 includes all g3_…. With their seconds: {seconds_of_checks()}."},
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "cpu: toy sizes."})
    output: str = field(default="runs/gpu_check.jsonl", metadata={"help": "Results, one JSON line per check."})
    original: str | None = field(
        default=None, metadata={"help": "Checkout of the original nanochat, to compare with (g4)."}
    )
    rows: int | None = field(default=None, metadata={"help": "Rows per training step; default: 32 plain, 16 turbo."})
    window_pattern: str | None = field(default=None, metadata={"help": "Turbo's windows in training; L: none."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention in training; default: the recipes' choice on this GPU."}
    )
    limit: int | None = field(default=None, metadata={"help": "Time limit per check in seconds; default: its own."})
    total: int = field(default=480, metadata={"help": "Time limit for all checks in seconds."})
    jobs: int | None = field(
        default=None, metadata={"help": "Processes at once that measure no time; default: 1 on a CPU, else by cores."}
    )

    def check(self) -> None:
        """Resolve `auto`; raise [`UserError`] on an invalid setting."""
        cuda = torch.cuda.is_available()
        self.device = self.device.replace("auto", "cuda" if cuda else "cpu")
        if self.device == "cuda" and not cuda:
            raise UserError("device cuda: torch sees no GPU; use cpu")
        for name in self.only:
            if not selected(name):
                raise UserError(f"only: {name!r} is not one of {', '.join(CHECKS)}")
        check_attention(self.attn_implementation)
        if self.original and not Path(self.original).is_dir():
            raise UserError(f"original: {self.original} is not a folder; give a checkout of the original nanochat")
        if self.jobs is None:
            self.jobs = max(1, (os.cpu_count() or 1) // CORES_PER_JOB) if self.device == "cuda" else 1
        for name in ("limit", "total", "rows", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    def names(self) -> list[str]:
        """The checks to run, in the order of [`CHECKS`]."""
        requested = {name for only in self.only for name in selected(only)}
        return [name for name in CHECKS if not requested or name in requested]


def parse_arguments() -> tuple[GPUCheckArguments]:
    """Parse the command line with our usual `TrlParser`, or with its base class if TRL is not installed."""
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        return parse(GPUCheckArguments)
    return HfArgumentParser(GPUCheckArguments).parse_args_into_dataclasses()


def selected(only: str) -> list[str]:
    return [name for name in CHECKS if name == only or name.startswith(f"{only}_")]


def main() -> None:
    (args,) = parse_arguments()
    args.check()
    output = Path(args.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("")
        log_path = output.with_suffix(".log")
        log = log_path.open("w", encoding="utf-8")
    except OSError as error:
        path = error.filename or output
        raise UserError(f"output: {path} cannot be written ({error.strerror}); give another") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs `finally`, which kills the checks
    with log, tempfile.TemporaryDirectory(prefix="gpu_check_") as work_dir:
        original = str(Path(args.original).resolve()) if args.original else None
        setting = Setting(args.device, work_dir, original, args.window_pattern, args.rows, args.attn_implementation)
        results = []
        for result in run_checks(args, setting, log):
            results.append(result)
            line = json.dumps(result)
            print(line, flush=True)
            with output.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    print(summary(results), flush=True)
    if failed := [result["check"] for result in results if result["status"] in ("failed", "error", "timed out")]:
        raise UserError(f"{', '.join(failed)}: failed; {output} has the figures, {log_path} the output")


def run_checks(args: GPUCheckArguments, setting: Setting, log: Any) -> Iterator[Result]:
    """The results as they come: first of the checks that measure no time, several at once, then of each other one."""
    end = time.monotonic() + args.total
    processes: list[subprocess.Popen] = []

    def run(name: str) -> Result:
        return run_check(name, setting, min(args.limit or CHECKS[name].limit, end - time.monotonic()), log, processes)

    timed = [name for name in args.names() if CHECKS[name].timed]
    with ThreadPoolExecutor(args.jobs) as pool:
        untimed = [pool.submit(run, name) for name in args.names() if name not in timed]
        for function in compiling(timed, setting):
            pool.submit(prepare, function, setting, min(MOST_PREPARATION, end - time.monotonic()), log, processes)
        try:
            yield from (future.result() for future in as_completed(untimed))
        except BaseException:  # also an interrupt; the pool would wait for its processes
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                kill(process)
            raise
    yield from map(run, timed)


def compiling(names: list[str], setting: Setting) -> list[str]:
    """What compiles for the checks `names` on this device."""
    return [function for name in names if setting.on_gpu and not missing(name) for function in CHECKS[name].prepare]


def prepare(function: str, setting: Setting, limit: float, log: Any, processes: list[subprocess.Popen]) -> None:
    """Compile what a check will run; if that fails, the check itself compiles."""
    command = [sys.executable, "-c", CHILD.format(function="prepare"), json.dumps(asdict(setting)), function]
    with own_group(command, setting, log, processes) as process, contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)


def run_check(
    name: str, setting: Setting, limit: float, log: Any, processes: list[subprocess.Popen] | None = None
) -> Result:
    """Run one check in a new process and return its result, even if the process crashes or is killed."""
    check = CHECKS[name]
    result: Result = {"check": name, "title": check.title, "status": "passed", "reason": None, "seconds": 0.0}
    result |= {"figures": {}, "gates": []}
    if reason := skip_reason(name, setting, limit):
        return result | {"status": "skipped", "reason": reason}
    log.write(f"\n===== {name} {check.title}\n")
    started = time.monotonic()
    command = [sys.executable, "-c", CHILD.format(function="main"), name, json.dumps(asdict(setting))]
    with own_group(command, setting, subprocess.PIPE, processes) as process:
        reader = threading.Thread(target=listen, args=(process, result, log), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            result |= {"status": "timed out", "reason": f"stopped after {limit:.0f} s; figures are incomplete"}
            code = 0
    reader.join(10)
    result["seconds"] = round(time.monotonic() - started, 1)
    if code and result["status"] == "passed":
        result |= {"status": "error", "reason": f"the process ended with code {code}"}
    if not all(gate["passed"] for gate in result["gates"]) and result["status"] in ("passed", "timed out"):
        result["status"] = "failed"
    log.flush()
    return result


def skip_reason(name: str, setting: Setting, limit: float) -> str | None:
    """The reason to skip a check, or None."""
    check = CHECKS[name]
    if limit < 1:
        return "no time left"
    if check.gpu_only and not setting.on_gpu:
        return "needs a GPU"
    if absent := missing(name):
        return f"{absent[0]} is not installed"
    return None


def missing(name: str) -> list[str]:
    return [module for module in CHECKS[name].needs if importlib.util.find_spec(module) is None]


@contextlib.contextmanager
def own_group(
    command: list[str], setting: Setting, output: Any, processes: list[subprocess.Popen] | None = None
) -> Iterator[subprocess.Popen]:
    """A process in its own session, in `processes` during the block; killed with its descendants at its end."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(setting), stdout=output, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    processes = [] if processes is None else processes
    processes.append(process)
    try:
        yield process
    finally:
        processes.remove(process)
        kill(process)
        process.wait()


def kill(process: subprocess.Popen) -> None:
    """Kill a process with its descendants."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def listen(process: subprocess.Popen, result: Result, log: Any) -> None:
    """Write a check's output to the log and its messages into `result`."""
    for line in process.stdout:
        log.write(line)
        if not line.startswith(MARK):
            continue
        with contextlib.suppress(ValueError):  # a truncated line of a killed process
            message = json.loads(line.removeprefix(MARK))
            kind, content = message["kind"], message["content"]
            if kind == "figure":
                result["figures"][content["name"]] = content["value"]
            elif kind == "gate":
                result["gates"].append(content)
            else:
                result |= {"status": kind, "reason": content}


def summary(results: list[Result]) -> str:
    """A table with one row per check and one per gate."""
    rows = [["check", "", "value", "limit", "result"]]
    for result in results:
        status = result["status"] + (f": {result['reason']}" if result["reason"] else "")
        rows.append([result["check"], result["title"], f"{result['seconds']:.0f} s", "", status])
        for gate in result["gates"]:
            rows.append(["", gate["gate"], str(gate["value"]), str(gate["limit"]), "yes" if gate["passed"] else "NO"])
    return "\n" + text_table(rows)


if __name__ == "__main__":
    exit_on_user_error(main)
