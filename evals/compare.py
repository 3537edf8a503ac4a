"""Compare two models question by question: the difference of their accuracies with its paired standard error.

    python evals/compare.py --before runs/pocket/results/sft.jsonl --after runs/pocket/results/rl.jsonl

The files are those of `--output_predictions` of `evals/evaluate_model.py`, with the same tasks, `--max_examples` and
`--seed`. Most questions are as hard for one model as for the other, so the paired error is smaller than that of two
independent accuracies.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import statistics
from dataclasses import dataclass, field

from evals.metrics.paired import paired_difference
from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.text.records import read_jsonl

Shares = dict[str, dict[int, float]]  # task -> question -> share of right samples


@dataclass
class CompareArguments:
    """Two files of predictions."""

    before: str = field(metadata={"help": "Predictions of one model: JSONL with task, index, right."})
    after: str = field(metadata={"help": "Predictions of the other on the same questions."})


def main() -> None:
    (args,) = parse(CompareArguments)
    print(text_table(compare(read_shares(args.before), read_shares(args.after))))


def read_shares(path: str) -> Shares:
    """Return the share of right samples of each question.

    Raises:
        UserError: The file is missing, empty, or holds other rows; names file and line.
    """
    graded: dict[str, dict[int, list[bool]]] = {}
    for number, row in read_jsonl(path):
        kinds = [type(row.get(key)) for key in ("task", "index", "right")]
        if kinds != [str, int, bool]:
            raise UserError(f"{path}:{number}: needs `task`, `index` and `right`; give a file of output_predictions")
        graded.setdefault(row["task"], {}).setdefault(row["index"], []).append(row["right"])
    if not graded:
        raise UserError(f"{path}: is empty; give a file of output_predictions")
    return {task: {index: statistics.fmean(own) for index, own in rows.items()} for task, rows in graded.items()}


def compare(before: Shares, after: Shares) -> list[list[str]]:
    """Return header and a row per task of both models; errors are standard errors of the difference, in points.

    Raises:
        UserError: They have no task in common, or a task has other questions.
    """
    rows = [["task", "n", "before", "after", "difference"]]
    for task in (task for task in before if task in after):
        old, new = before[task], after[task]
        if old.keys() != new.keys():
            raise UserError(f"{task}: the two models were asked other questions; evaluate both with the same settings")
        shares = list(old.values()), [new[index] for index in old]
        difference, error = paired_difference(*shares)
        means = [f"{100 * statistics.fmean(each):.1f} %" for each in shares]
        rows.append([task, f"{len(old):,}", *means, f"{100 * difference:+.1f} ± {100 * error:.1f}"])
    if len(rows) == 1:
        raise UserError("the two models have no task in common; evaluate both with the same tasks")
    return rows


if __name__ == "__main__":
    exit_on_user_error(main)
