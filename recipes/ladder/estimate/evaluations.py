"""Seconds of evaluations: CORE, tasks of questions, bits per byte."""

from collections.abc import Sequence

from evals.harness.arguments import EvaluateArguments
from evals.harness.published import BITS_PER_BYTE, CORE, parse_tasks
from modeling_nanochat import NanoChatConfig
from recipes.sft import SFTArguments

from ..preflight import arguments
from ..step import Step
from .line import START_SECONDS, Estimate, Trained
from .machine import Machine

# Examples of the CORE tasks, and tokens of each with its options and few-shot examples, such that d20 takes the
# published four minutes on 8 H100s.
CORE_EXAMPLES = (
    10042, 2117, 20321, 2376, 1172, 100, 1221, 1838, 500, 5153, 10042, 273, 1267, 1000, 230, 1320, 210, 32, 10570,
    7983, 3270, 10000,
)  # fmt: skip
CORE_TOKENS, CORE_BYTES = 4600, 0.5e9
QUESTIONS = {
    "arc_easy": 2376, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 1319, "humaneval": 164, "spelling_bee": 256,
}  # fmt: skip
SPOKEN = {"gsm8k", "humaneval", "spelling_bee"}
OTHER_QUESTIONS, PROMPT = 1000, 150  # of a task that is not published; tokens of a question


def evaluation(step: Step, trained: Trained, machine: Machine, planned: int) -> Estimate:
    """An evaluation by `evals/evaluate_model.py`: on all devices if the launch file is for several."""
    (args,) = arguments(step, EvaluateArguments)
    processes = machine.hardware.count if planned > 1 else 1
    names, config = list(parse_tasks(args.tasks)), trained.config
    seconds = machine.forward_seconds(config, args.max_text_tokens, config.max_position_embeddings, processes)
    if CORE in names:
        seconds += core_seconds(config, args.core_limit, machine, processes)
    asked = [entry for entry in args.tasks if not (args.base_model and entry.partition("=")[0] != "cloze")]
    seconds += questions_seconds(asked, args, config, machine, processes, args.batch_size)
    start = START_SECONDS / 3 if machine.hardware.kind == "cuda" else 0
    return Estimate(step.name, seconds={"evaluation": seconds, "start": start})


def questions_seconds(
    tasks: Sequence[str],
    args: EvaluateArguments | SFTArguments,
    config: NanoChatConfig,
    machine: Machine,
    processes: int,
    rows: int,
) -> float:
    """Seconds of tasks of questions: a forward pass over each, and replies where they are asked for in words."""
    seconds = 0.0
    for name, source in parse_tasks(tasks).items():
        if name in (CORE, BITS_PER_BYTE):
            continue
        count = QUESTIONS.get(name, OTHER_QUESTIONS)
        count = min(count, args.max_examples or count)
        seconds += machine.forward_seconds(config, count * PROMPT, PROMPT, processes)
        if name in SPOKEN or (source and name not in ("cloze", *QUESTIONS)):
            seconds += machine.decode_seconds(config, count / processes, rows, args.max_new_tokens)
    return seconds


def core_seconds(config: NanoChatConfig, most: int | None, machine: Machine, processes: int) -> float:
    examples = sum(min(count, most) if most and most > 0 else count for count in CORE_EXAMPLES)
    return machine.forward_seconds(config, examples * CORE_TOKENS, 1024, processes)
