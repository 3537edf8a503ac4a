"""The process in which `chat_templates` renders templates: answers each line, a JSON request, with a line of JSON.

A script that is started, never imported. It imports no torch and nothing of this package.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MEMORY = 256 * 2**20  # bytes for a template and what it renders
MAX_CHARACTERS = 2**22  # of a request's renderings: a million tokens or more
ORPHAN_SECONDS = 60  # the deadline is the parent's; this ends a rendering whose parent was killed


def limit_memory() -> None:
    """Limit the process to `MEMORY` more than now; only Linux reports and limits it."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        import resource

        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The rendered `texts` and the `spans` that the model writes in each, or an `error` in one line."""
    render: Callable[..., Any] = render_jinja_template  # its annotation says that it returns one string
    try:
        texts, spans = render(**request)
    except MemoryError:
        return {"error": f"more than {MEMORY // 2**20} MB of memory"}
    except Exception as error:  # a template can raise anything
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    if sum(map(len, texts)) > MAX_CHARACTERS:
        return {"error": f"more than {MAX_CHARACTERS:,} characters of text"}
    return {"texts": texts, "spans": spans}


def main() -> None:
    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(ORPHAN_SECONDS)
        print(json.dumps(answer(json.loads(line))), flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
