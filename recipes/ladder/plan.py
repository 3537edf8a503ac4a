"""Which steps of the ladder are to be run: those that are not finished, and what follows from them."""

from pathlib import Path

from modeling_nanochat.errors import UserError

from .arguments import STAGES
from .step import Step, difference, has_checkpoints, is_finished, is_own, read_marker


def make_plan(ladder: dict[str, list[Step]], run_dir: Path, first: int | None) -> list[tuple[Step, bool, bool]]:
    """Each step, whether it is to be run, and whether it was asked for by `--from`. Nothing is changed yet.

    Args:
        ladder: The steps of each stage, in order.
        first: Number of the stage that `--from` names.

    Raises:
        UserError: A YAML is missing, a step was finished with other settings, or its folder is not this run's.
    """
    plan, stale = [], False
    for stage, of_stage in ladder.items():
        for step in of_stage:
            wanted = step.fingerprint(run_dir)
            redo = first is not None and STAGES.index(stage) >= first
            todo = redo or is_to_do(step, run_dir, wanted, stale, keep=first is not None)
            todo = todo or (stage == "report" and report_is_old(plan, run_dir))
            stale = stale or (todo and step.makes_folder)  # all that follows was made from what it replaces
            plan.append((step, todo, redo))
    return plan


def is_to_do(step: Step, run_dir: Path, wanted: dict, stale: bool, keep: bool) -> bool:
    """Whether a step that was not asked for is to be run; `keep` folders that are not this run's."""
    if step.makes_folder and step.result.exists() and not is_own(step.name, run_dir):
        if keep:
            return False
        raise UserError(
            f"{step.result} is there, but not made by this run; give --from {step.name} to replace it, --from "
            f"{STAGES[STAGES.index(step.name) + 1]} to go on from it as it is, or another --run_dir"
        )
    if stale or not is_finished(step, run_dir):
        refuse_other_settings(step, run_dir, wanted)
        return True
    change = difference(read_marker(step, run_dir), wanted)
    if change and not step.is_measurement:  # that is cheap, a model may be dear
        raise UserError(
            f"{step.name} was finished with other settings ({change}); give --from {step.name} to redo it and what "
            "follows, or another --run_dir"
        )
    if change:
        print(f"{step.name}: settings changed ({change})")
    return bool(change)


def report_is_old(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> bool:
    """Whether anything that the report shows is to be made or was made since."""
    written = (run_dir / "report.md").stat().st_mtime_ns
    sources = [path for kind in ("stages", "results", "finished") for path in (run_dir / kind).glob("*.json")]
    newer = [path for path in sources if path.stem != "report" and path.stat().st_mtime_ns > written]
    return bool(newer) or any(todo for _, todo, _ in plan)


def refuse_other_settings(step: Step, run_dir: Path, wanted: dict) -> None:
    """Raise [`UserError`] where TRL's trainers would go on from a checkpoint of other settings; the loop's own check it."""
    if step.name not in ("sft", "rl") or not has_checkpoints(step.name, run_dir):
        return
    before = read_marker(step, run_dir)
    if change := before and difference(before, wanted):
        raise UserError(
            f"{step.name} has checkpoints of other settings ({change}); give the same, or --from {step.name} to start it anew"
        )
