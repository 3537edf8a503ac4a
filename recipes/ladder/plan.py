"""Decides which steps of the ladder to run: unfinished ones and everything that depends on them."""

from pathlib import Path

from modeling_nanochat.errors import UserError

from .arguments import LADDER
from .step import Step, difference, is_finished, is_own, read_marker


def make_plan(ladder: dict[str, list[Step]], run_dir: Path, first: int | None) -> list[tuple[Step, bool, bool]]:
    """(step, whether to run it, whether `--from` requested it) for each step. Changes nothing on disk.

    Args:
        ladder: The steps of each stage, in order.
        first: Index of the stage given by `--from`.

    Raises:
        UserError: A YAML is missing, a step was finished with other settings, or this run did not create its folder.
    """
    plan, stale = [], False
    for stage, of_stage in ladder.items():
        for step in of_stage:
            wanted = step.fingerprint(run_dir)
            redo = first is not None and LADDER.index(stage) >= first
            todo = redo or is_to_do(step, run_dir, wanted, stale, keep=first is not None)
            todo = todo or (stage == "report" and report_is_old(plan, run_dir))
            stale = stale or (todo and step.makes_folder)  # later steps depend on what it replaces
            plan.append((step, todo, redo))
    return plan


def is_to_do(step: Step, run_dir: Path, wanted: dict, stale: bool, keep: bool) -> bool:
    """Whether to run a step that `--from` did not request; `keep` accepts folders that this run did not create."""
    if step.makes_folder and step.result.exists() and not is_own(step.name, run_dir):
        if keep:
            return False
        raise UserError(
            f"{step.result} exists but was not created by this run; give --from {step.name} to replace it, --from "
            f"{LADDER[LADDER.index(step.name) + 1]} to continue from it, or another --run_dir"
        )
    if stale or not is_finished(step, run_dir):
        return True
    change = difference(read_marker(step, run_dir), wanted)
    if change and not step.is_measurement:  # evaluations are cheap and repeated, a model may be expensive
        raise UserError(
            f"{step.name} was finished with other settings ({change}); give --from {step.name} to redo it and what "
            "follows, or another --run_dir"
        )
    if change:
        print(f"{step.name}: settings changed ({change})")
    return bool(change)


def report_is_old(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> bool:
    """Whether anything the report shows is newer than the report or about to be redone."""
    written = (run_dir / "report.md").stat().st_mtime_ns
    sources = [path for kind in ("stages", "results", "finished") for path in (run_dir / kind).glob("*.json")]
    newer = [path for path in sources if path.stem != "report" and path.stat().st_mtime_ns > written]
    return bool(newer) or any(todo for _, todo, _ in plan)
