"""Runs the full ladder: data, tokenizer, pretrain, midtrain, SFT, GRPO, an evaluation after each, report card.

    python recipes/run.py pocket

    python recipes/run.py pocket --from sft                      # redo sft and later stages
    python recipes/run.py pocket --max_hours 2                   # save and stop then; the same command continues
    python recipes/run.py pocket --config my_data.yaml           # your files instead of the recipe's
    python recipes/run.py pocket --set base.depth=6 'base.sample_prompts=["Once upon a time, there", "One day"]'
    python recipes/run.py pocket --dry_run true --hardware 1x4090    # hours, dollars and memory; runs nothing

Notable features:
- every stage runs in its own process, as the same command you would type
- finished stages are skipped, and an interrupted stage resumes from its last checkpoint
- the log is short; `--verbose true` shows the commands, all settings, evaluations, tables and progress bars
- a folder that this run did not create is never replaced unless `--from` requests it
- settings and files of all stages are checked before the first stage starts (`recipes/ladder/preflight.py`)
- `--set stage.key=value` sets any key of any stage
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import os
import sys
import time
from functools import partial
from pathlib import Path

from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.ladder.arguments import LADDER, RunArguments, parse_overrides, stage_number
from recipes.ladder.commands import RECIPES, ROOT, steps
from recipes.ladder.execution import only_run, run_step
from recipes.ladder.launch import launch_file
from recipes.ladder.log import closing_lines, outcome_lines, title
from recipes.ladder.plan import make_plan
from recipes.ladder.process import HoursOver, can_fork, check_in_fork, stage_environment, time_limit
from recipes.ladder.step import Step, has_checkpoints, is_finished, is_own


def main() -> None:
    recipe, words = recipe_and_words(sys.argv[1:])
    (args,) = parse(RunArguments, args=words)
    first = stage_number(args.from_stage) if args.from_stage else None
    last = stage_number(args.to_stage)
    if first is not None and first > last:
        raise UserError(f"--from {args.from_stage} comes after --to {args.to_stage}: nothing to do; give a later --to")
    overrides, run_dir = parse_overrides(args.set), Path(args.run_dir)
    if args.dry_run:
        return print_estimate(recipe, args, overrides, LADDER[: last + 1])
    started = time.perf_counter()
    with only_run(run_dir) as lock:
        ladder = {stage: steps(stage, RECIPES / recipe, args, overrides) for stage in LADDER[: last + 1]}
        ladder = {stage: of_stage for stage, of_stage in ladder.items() if of_stage}
        plan = make_plan(ladder, run_dir, first)
        os.environ.update(stage_environment(args.verbose))
        try:
            with time_limit(args.max_hours):
                check_pending([step for step, todo, _ in plan if todo], args.accelerate_config)
                print_skipped(plan, run_dir)
                run_plan(plan, list(ladder), run_dir, args.verbose, lock)
        except HoursOver:
            print(f"\nmax_hours {args.max_hours:g} reached; {continuation(plan, run_dir)}")
            return
    print("\nnothing was left to do" if not any(todo for _, todo, _ in plan) else "")
    seconds, next_commands = time.perf_counter() - started, args.next or chat_commands(ladder, args.run_dir)
    print("\n".join(closing_lines(recipe, run_dir, list(ladder), seconds, next_commands)))


def continuation(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> str:
    """What the same command would do after the plan was interrupted."""
    again = "the same command without --from" if any(redo for _, _, redo in plan) else "the same command"
    name = next((step.name for step, todo, _ in plan if todo and not is_finished(step, run_dir)), "report")
    return f"{again} {f'resumes {name} from its checkpoint' if has_checkpoints(name, run_dir) else f'starts {name}'}"


def print_estimate(recipe: str, args: RunArguments, overrides: dict[str, list[str]], stages: tuple[str, ...]) -> None:
    """Print what `--dry_run` tells, after importing all stages."""
    from recipes.ladder.estimate.table import estimate

    ladder = [step for stage in stages for step in steps(stage, RECIPES / recipe, args, overrides)]
    launch = launch_file(args.accelerate_config)[1] if args.accelerate_config else {}
    print(estimate(recipe, ladder, launch, args.hardware))


def run_plan(plan: list[tuple[Step, bool, bool]], stages: list[str], run_dir: Path, verbose: bool, lock: int) -> None:
    """Run the pending steps, printing a title per stage."""
    current_stage = None
    for step, _, redo in (entry for entry in plan if entry[1]):
        if step.stage != current_stage:
            current_stage = step.stage
            print(f"\n[{stages.index(current_stage) + 1}/{len(stages)}] {title(step.name)}", flush=True)
        run_step(step, run_dir, redo, lock, verbose)
        if step.is_measurement and not verbose and (lines := outcome_lines(step.result)):
            print("\n".join(lines), flush=True)


def print_skipped(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> None:
    skipped = [step.name for step, todo, _ in plan if not todo]
    own = [name for name in skipped if is_own(name, run_dir)]
    others = [name for name in skipped if name not in own]
    for names, what in ((own, "already finished"), (others, "not created by this run, kept")):
        if names:
            print(f"{what}: {', '.join(names)}")


def chat_commands(ladder: dict[str, list[Step]], run_dir: str) -> str:
    """Commands to chat with the last model that can, or how to continue if there is none yet."""
    trained = [stage.name for stage in STAGES.values() if stage.chats and stage.name in ladder]
    if not trained:
        return "the same command without --to"
    python, model = min(os.path.relpath(sys.executable), sys.executable, key=len), f"{run_dir}/{trained[-1]}"
    app = os.path.relpath(ROOT / "space" / "app.py")
    return f"{python} -m modeling_nanochat.chat {model}   (terminal),   {python} {app} {model}   (browser)"


def recipe_and_words(words: list[str]) -> tuple[str, list[str]]:
    """Split off the recipe's name; the other words get the recipe's run.yaml as `--config` unless they name one."""
    known = sorted(path.parent.name for path in RECIPES.glob("*/run.yaml"))
    usage = f"python recipes/run.py {{{','.join(known)}}} [--from stage] [--to stage] [...]"
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nRecipes: {', '.join(known)}. {usage}\n")
        parse(RunArguments, args=["--help"])
    if not words or words[0] not in known:
        given = f"{words[0]!r} is not a recipe" if words and not words[0].startswith("-") else "which recipe?"
        raise UserError(f"{given}; {usage}")
    recipe, *rest = words
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        rest = ["--config", str(RECIPES / recipe / "run.yaml"), *rest]
    return recipe, rest


def check_pending(pending: list[Step], accelerate_config: str | None) -> None:
    """Check settings and files of the pending steps. Imports all stages, so a run with nothing to do skips it."""
    if any(step.name != "report" for step in pending):
        from recipes.ladder.preflight import check_steps

        check = partial(check_steps, pending, accelerate_config)
        check_in_fork(check) if can_fork() else check()


if __name__ == "__main__":
    exit_on_user_error(main)
