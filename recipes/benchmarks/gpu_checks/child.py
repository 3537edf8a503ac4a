"""One check in a process of its own, started by the command, which reads what it tells."""

import json
import traceback

from . import CHECKS, MARK, Report, Setting, Skipped


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
