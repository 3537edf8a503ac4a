"""Entry points of the processes that gpu_check.py starts: run one check, or compile for the next ones."""

import json
import traceback

import torch

from . import CHECKS, MARK, Report, Setting, Skipped, load

LEAST_MEMORY = 70 * 2**30  # bytes on a device to run a check and compile concurrently


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


def prepare(setting: str, *names: str) -> None:
    """Fill torch's compile cache for the checks `names`, if the device has memory for a concurrent check."""
    setting = Setting(**json.loads(setting))
    if setting.on_gpu and torch.cuda.get_device_properties(0).total_memory < LEAST_MEMORY:
        return
    for name in names:
        load(CHECKS[name].prepare)(setting)
