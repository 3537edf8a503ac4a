"""Whether everything works, and how fast, on one GPU: kernels, gradients, training, decoding, every stage.

    python recipes/benchmarks/gpu_check.py
    python recipes/benchmarks/gpu_check.py --only g0 g2 g3 --output check.jsonl
    python recipes/benchmarks/gpu_check.py --only g4 --original ../nanochat

Made for one H100. Each check runs in a process of its own with a time limit, and its result is printed and appended to
`--output` as one line of JSON as soon as it ends, so a run that is cut off has told what it found. Figures describe; gates
must hold, or the command fails. What the checks print themselves goes to a log beside the output.

Most of the time is torch.compile's. What it makes is kept in torch's cache (TORCHINDUCTOR_CACHE_DIR, if set), so a check that
is run again measures at once, and while a check runs that measures no time, another process compiles for those that
follow. `--help` has the seconds of each check with nothing compiled. With that the eight minutes suffice for about the first
seven checks; what is left is named as skipped, for a second command with `--only`.

With `--device cpu` the same code runs at toy sizes in float32, where only gates about results hold, none about speed.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from evals.reporting.records import aligned_table
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.benchmarks.gpu_checks import CHECKS, MARK, ROOT, Setting, environment
from recipes.training.attention import check_attention

CHILD = "import sys; from recipes.benchmarks.gpu_checks import child; child.{function}(*sys.argv[1:])"
MOST_WAIT = 60  # seconds for what is being compiled beside a check, once that has ended
Result = dict[str, Any]


def seconds_of_checks() -> str:
    return ", ".join(f"{name} {check.seconds}" for name, check in CHECKS.items())


@dataclass
class GPUCheckArguments:
    """What to check."""

    only: list[str] = field(
        default_factory=list,
        metadata={"help": f"Checks to run; g3 stands for all g3_… too. With their seconds: {seconds_of_checks()}."},
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "cpu: everything at toy size."})
    output: str = field(default="runs/gpu_check.jsonl", metadata={"help": "Results, one JSON line per check; begun anew."})
    original: str | None = field(
        default=None, metadata={"help": "A checkout of the original nanochat, to measure beside ours (g4)."}
    )
    rows: int | None = field(default=None, metadata={"help": "Rows of a training step; default: 32 plain, 16 turbo."})
    window_pattern: str | None = field(default=None, metadata={"help": "Of turbo's layers in training; L: no windows."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of training, as in the recipes; default: what they take on this GPU."}
    )
    limit: int | None = field(default=None, metadata={"help": "Most seconds of a check; default: each has its own."})
    total: int = field(default=480, metadata={"help": "Seconds after which no check begins and the running one ends."})

    def check(self) -> None:
        """Fill in what is `auto`; raise [`UserError`] on a setting that cannot be."""
        cuda = torch.cuda.is_available()
        self.device = self.device.replace("auto", "cuda" if cuda else "cpu")
        if self.device == "cuda" and not cuda:
            raise UserError("device cuda: torch sees no GPU; take cpu")
        for name in self.only:
            if not selected(name):
                raise UserError(f"only: {name!r} is none of {', '.join(CHECKS)}")
        check_attention(self.attn_implementation)
        if self.original and not Path(self.original).is_dir():
            raise UserError(f"original: {self.original} is no folder; give a checkout of the original nanochat")
        for name in ("limit", "total", "rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    def names(self) -> list[str]:
        """The checks to run, in the order of [`CHECKS`]."""
        asked = {name for only in self.only for name in selected(only)}
        return [name for name in CHECKS if not asked or name in asked]


def parse_arguments() -> tuple[GPUCheckArguments]:
    """As in every script; where TRL is missing, whose parser that is, by transformers' own, of which it is a kind."""
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
        raise UserError(f"output: {error.filename or output} cannot be written ({error.strerror}); give another") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # `finally` ends the running check
    end, results = time.monotonic() + args.total, []
    with log, tempfile.TemporaryDirectory(prefix="gpu_check_") as work_dir:
        original = str(Path(args.original).resolve()) if args.original else None
        setting = Setting(args.device, work_dir, original, args.window_pattern, args.rows, args.attn_implementation)
        for name, following in with_following(args.names()):
            limit = min(args.limit or CHECKS[name].limit, end - time.monotonic())
            with preparing(following if setting.on_gpu else [], setting, log):
                results.append(run_check(name, setting, limit, log))
                line = json.dumps(results[-1])
                print(line, flush=True)
                with output.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
    print(summary(results), flush=True)
    if wrong := [result["check"] for result in results if result["status"] in ("failed", "error", "timed out")]:
        raise UserError(f"{', '.join(wrong)}: not as it should be; {output} has the figures, {log_path} the output")


def with_following(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each check with those to be made ready while it runs: all after it up to the next one that does as much."""
    for number, name in enumerate(names):
        following = []
        if not CHECKS[name].timed:
            following = list(itertools.takewhile(lambda after: CHECKS[after].timed, names[number + 1 :]))
        yield name, [after for after in following if CHECKS[after].prepare and not missing(after)]


@contextlib.contextmanager
def preparing(names: list[str], setting: Setting, log: Any) -> Iterator[None]:
    """In this block a process compiles for the checks `names`; it has a while to finish, and fails unnoticed."""
    if not names:
        yield
        return
    command = [sys.executable, "-c", CHILD.format(function="prepare"), json.dumps(asdict(setting)), *names]
    with own_group(command, setting, log) as process:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(MOST_WAIT)


def run_check(name: str, setting: Setting, limit: float, log: Any) -> Result:
    """Run one check in a new process; its result, whatever becomes of the process."""
    check = CHECKS[name]
    result: Result = {"check": name, "title": check.title, "status": "passed", "reason": None, "seconds": 0.0}
    result |= {"figures": {}, "gates": []}
    if reason := why_not(name, setting, limit):
        return result | {"status": "skipped", "reason": reason}
    log.write(f"\n===== {name} {check.title}\n")
    started = time.monotonic()
    command = [sys.executable, "-c", CHILD.format(function="main"), name, json.dumps(asdict(setting))]
    with own_group(command, setting, subprocess.PIPE) as process:
        reader = threading.Thread(target=listen, args=(process, result, log), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            result |= {"status": "timed out", "reason": f"stopped after {limit:.0f} s; the figures are those found so far"}
            code = 0
    reader.join(10)
    result["seconds"] = round(time.monotonic() - started, 1)
    if code and result["status"] == "passed":
        result |= {"status": "error", "reason": f"the process ended with code {code}"}
    if not all(gate["passed"] for gate in result["gates"]) and result["status"] in ("passed", "timed out"):
        result["status"] = "failed"
    log.flush()
    return result


def why_not(name: str, setting: Setting, limit: float) -> str | None:
    """Why a check is not even begun, if it is not."""
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
def own_group(command: list[str], setting: Setting, output: Any) -> Iterator[subprocess.Popen]:
    """A process with its descendants in a session of their own, all of which end with this block."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(setting), stdout=output, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listen(process: subprocess.Popen, result: Result, log: Any) -> None:
    """Sort a check's output into its result and the log."""
    for line in process.stdout:
        log.write(line)
        if not line.startswith(MARK):
            continue
        with contextlib.suppress(ValueError):  # half a line of a process that was killed
            message = json.loads(line.removeprefix(MARK))
            kind, content = message["kind"], message["content"]
            if kind == "figure":
                result["figures"][content["name"]] = content["value"]
            elif kind == "gate":
                result["gates"].append(content)
            else:
                result |= {"status": kind, "reason": content}


def summary(results: list[Result]) -> str:
    """A table: a row for each check, and one for each of its gates."""
    rows = [["check", "", "value", "limit", "result"]]
    for result in results:
        status = result["status"] + (f": {result['reason']}" if result["reason"] else "")
        rows.append([result["check"], result["title"], f"{result['seconds']:.0f} s", "", status])
        for gate in result["gates"]:
            rows.append(["", gate["gate"], str(gate["value"]), str(gate["limit"]), "yes" if gate["passed"] else "NO"])
    return "\n" + aligned_table(rows)


if __name__ == "__main__":
    exit_on_user_error(main)
