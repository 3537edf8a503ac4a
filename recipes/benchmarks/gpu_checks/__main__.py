"""One check in this process: `python -m recipes.benchmarks.gpu_checks NAME SETTING`, as the command starts it."""

import json
import sys
import traceback

from . import CHECKS, MARK, Report, Setting, Skipped


def tell(kind: str, content: object) -> None:
    print(f"{MARK}{json.dumps({'kind': kind, 'content': content}, default=str)}", flush=True)


def main(name: str, setting: str) -> None:
    try:
        CHECKS[name].load()(Setting(**json.loads(setting)), Report(tell))
    except Skipped as reason:
        tell("skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        said = traceback.format_exception_only(error)[-1].strip().splitlines() or [type(error).__name__]
        tell("error", said[0][:500])


if __name__ == "__main__":
    main(*sys.argv[1:])
