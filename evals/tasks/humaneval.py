"""HumanEval, functions to complete: {"prompt", "canonical_solution", "test", "entry_point"}.

A reply is right if its code passes the tests. It runs in full CPython, isolated (`evals/full_python.py`); where that
cannot be, nothing is asked. Chen et al. 2021, https://arxiv.org/abs/2107.03374; on the Hub: openai/openai_humaneval.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from evals.full_python import check_full_python, run_program

from .fields import history, require_strings
from .replies import ReplyQuestion, assistant_text

FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n```", re.DOTALL)
PASSED = "passed"
EXIT_CODE = 42  # of a program whose tests have all run; one that calls `exit(0)` before has not passed
SECONDS = 5.0


@dataclass(frozen=True)
class HumanEvalQuestion(ReplyQuestion):
    """The beginning of a function, and the tests of the whole one."""

    solution: str
    test: str
    entry_point: str

    name = "humaneval"
    fields = frozenset({"prompt", "canonical_solution", "test", "entry_point"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("prompt", "canonical_solution", "test", "entry_point"), where)
        before = history(record, where)
        return cls(record["prompt"], before, record["canonical_solution"], record["test"], record["entry_point"])

    @classmethod
    def check_grading(cls) -> None:
        check_full_python()

    @property
    def reference(self) -> str:
        return PASSED

    def conversation(self) -> list[dict]:
        return [*self.messages, {"role": "assistant", "content": f"{self.question}\n{self.solution}"}]

    def extract(self, reply: Sequence[dict]) -> str:
        """Return `passed`, or how the program ended: `exit`, `signal`, `timeout`; "" if there is no code."""
        code = extract_code(assistant_text(reply))
        if not code:
            return ""
        result = run_program(f"{self.program(code)}\nraise SystemExit({EXIT_CODE})", timeout=SECONDS)
        return PASSED if result.ended == "exit" and result.code == EXIT_CODE else result.ended

    def program(self, code: str) -> str:
        """Return the imports before the prompt's function, `code`, the tests, and their call."""
        return f"{leading_imports(self.question)}\n\n{code}\n\n{self.test}\ncheck({self.entry_point})"

    @classmethod
    def extract_all(cls, questions: Sequence[Self], replies: Sequence[list[list[dict]]]) -> list[list[str]]:
        """Run the programs of all replies, as many at a time as this process has cores."""
        with ThreadPoolExecutor(cores()) as pool:
            running = [
                [pool.submit(question.extract, reply) for reply in samples]
                for question, samples in zip(questions, replies, strict=True)
            ]
            return [[program.result() for program in samples] for samples in running]


def extract_code(text: str) -> str:
    """Return the first fenced block of Python, or the whole text if there is none."""
    block = FENCED.search(text)
    return (block[1] if block else text).strip()


def leading_imports(prompt: str) -> str:
    """Return the imports before the first other statement, without the comments and blank lines between them."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def cores() -> int:
    """Return the cores that each of the processes on this machine can use."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
