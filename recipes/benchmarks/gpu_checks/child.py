"""One check in a process of its own, started by the command, which reads what it tells; or what makes checks ready."""

import json
import traceback

import torch

from . import CHECKS, MARK, Report, Setting, Skipped, load

LEAST_MEMORY = 70 * 2**30  # bytes of a device on which checks and their preparation run side by side


def tell(kind: str, content: object) -> None:
    print(f"{MARK}{json.dumps({'kind': kind, 'content': content}, default=str)}", flush=True)


def main(name: str, setting: str) -> None:
    """Run the check `name` with a [`Setting`] as JSON; lines of the output tell figures, gates and how it ended."""
    try:
        CHECKS[name].load()(Setting(**json.loads(setting)), Report(tell))
    except Skipped as reason:
        tell("skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        said = traceback.format_exception_only(error)[-1].strip().splitlines() or [type(error).__name__]
        tell("error", said[0][:500])


def prepare(setting: str, *names: str) -> None:
    """Compile for the checks `names`, so that they find it in torch's cache. Only on a device with room for both."""
    setting = Setting(**json.loads(setting))
    if setting.on_gpu and torch.cuda.get_device_properties(0).total_memory < LEAST_MEMORY:
        return
    for name in names:
        load(CHECKS[name].prepare)(setting)
