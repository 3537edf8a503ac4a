"""Entry points of the processes that gpu_check.py starts: run one check, or compile for the next ones."""

import json
import time
import traceback

import torch

from . import CHECKS, MARK, Report, Setting, Skipped, free, load

LEAST_MEMORY = 70 * 2**30  # bytes on a device to run checks and compile concurrently
TRIES, WAIT = 8, 8.0  # seconds


def send(kind: str, content: object) -> None:
    print(f"{MARK}{json.dumps({'kind': kind, 'content': content}, default=str)}", flush=True)


def main(name: str, setting: str) -> None:
    """Run the check `name` with a [`Setting`] as JSON; prints its figures, gates and outcome as messages."""
    try:
        CHECKS[name].load()(Setting(**json.loads(setting)), Report(send))
    except Skipped as reason:
        send("skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        lines = traceback.format_exception_only(error)[-1].strip().splitlines() or [type(error).__name__]
        send("error", lines[0][:500])


def prepare(setting: str, function: str) -> None:
    """Fill torch's compile cache by a check's `prepare` function, if the device has memory for several processes."""
    setting = Setting(**json.loads(setting))
    if setting.on_gpu and torch.cuda.get_device_properties(0).total_memory < LEAST_MEMORY:
        return
    for _ in range(TRIES):
        try:
            return load(function)(setting)
        except torch.OutOfMemoryError:  # the processes beside this one will have ended
            free()
            time.sleep(WAIT)
