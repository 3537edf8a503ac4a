"""The output folder: checked before any work, held by one trainer, in order again after an interrupted end."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import training

from evals.report import render
from evals.reporting.run_folder import read_run
from modeling_nanochat.errors import UserError
from recipes import midtrain, pretrain
from recipes.training.checkpoint.folders import discard
from recipes.training.stage import JsonlLogger, OutputArguments, beside, check_output, finish_stage
from recipes.training.stopping import stop_request

GIVEN = {"depth": 2, "train_files": ["a.parquet"], "matrix_lr": None}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")  # audit events of a folder's changes


def finish(model_and_tokenizer, output_dir, steps, **settings):
    """The end of a stage, as `run_stage` has it."""
    args = OutputArguments(str(output_dir))
    record = {"stage": "base", "settings": settings, "given": GIVEN, "steps": steps}
    log = JsonlLogger(output_dir, enabled=False)
    finish_stage(*model_and_tokenizer, args, log, record, card=lambda record: f"trained for {record['steps']} steps")
    discard(beside(output_dir, "checkpoints", ""))


def left_by_training(run: Path, steps: int) -> None:
    for name in (f"checkpoints/base/step-{steps:08d}/model.safetensors", "logs/base.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")


def killed_at(change: int, work) -> bool:
    """Whether `work`, in a process of its own, was killed just before that change to a folder."""
    process = os.fork()
    if process == 0:
        remaining = [change]

        def count(event, arguments):
            if event in CHANGES:
                remaining[0] -= 1
                if remaining[0] < 0:
                    os._exit(9)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0


def listing(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - {".base.lock"} | {
        f"stages/{p.name}" for p in (run / "stages").iterdir()
    }


def steps_of(run: Path) -> tuple[str, int]:
    """What the model and its record say."""
    return (run / "base" / "README.md").read_text().split()[2], json.loads((run / "stages" / "base.json").read_text())[
        "steps"
    ]


@pytest.mark.slow
def test_wherever_its_ending_is_killed_a_run_goes_on_or_is_found_finished(toy_model_and_tokenizer, tmp_path):
    outcomes = []
    for change in range(100):
        run = tmp_path / str(change)
        left_by_training(run, 2)
        killed = killed_at(change, lambda run=run: finish(toy_model_and_tokenizer, run / "base", 2))
        outcomes.append(check_output(OutputArguments(str(run / "base")), "auto", GIVEN))
        if not outcomes[-1]:
            assert not (run / "base").exists() and (run / "checkpoints" / "base" / "step-00000002").exists()
            finish(toy_model_and_tokenizer, run / "base", 2)
        assert listing(run) == {"base", "logs", "stages", "stages/base.json"}, change
        assert steps_of(run) == ("2", 2)
        if not killed:
            break
    assert not killed and outcomes == sorted(outcomes) and 2 < sum(outcomes) < len(outcomes)


@pytest.mark.slow
def test_wherever_its_ending_is_killed_a_model_has_its_own_record(toy_model_and_tokenizer, tmp_path):
    """Also while another model is replaced, which is there until the new one is."""
    for change in range(100):
        run = tmp_path / str(change)
        finish(toy_model_and_tokenizer, run / "base", 1)
        left_by_training(run, 2)
        killed = killed_at(change, lambda run=run: finish(toy_model_and_tokenizer, run / "base", 2))
        assert not check_output(OutputArguments(str(run / "base"), overwrite_output_dir=True), "auto", GIVEN)
        assert steps_of(run) in (("1", 1), ("2", 2)), change
        assert listing(run) - {"checkpoints"} == {"base", "logs", "stages", "stages/base.json"}
        if not killed:
            break
    assert not killed and steps_of(run) == ("2", 2)


def test_a_finished_run_is_found_by_its_settings_and_never_replaced(toy_model_and_tokenizer, tmp_path, capsys):
    args = OutputArguments(str(tmp_path / "base"))
    finish(toy_model_and_tokenizer, args.output_dir, 2)
    assert check_output(args, None, GIVEN)
    assert "already finished with these settings" in capsys.readouterr().out
    for given in (GIVEN | {"depth": 3}, None):
        with pytest.raises(UserError, match="already exists; pass --overwrite_output_dir true"):
            check_output(args, "auto", given)
    (tmp_path / "stages" / "base.json").unlink()
    with pytest.raises(UserError, match="already exists"):
        check_output(args, "auto", GIVEN)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_finished_run_found_again_leaves_the_checkpoint_that_it_keeps(toy_model_and_tokenizer, tmp_path, keeps):
    finish(toy_model_and_tokenizer, tmp_path / "base", 8, keep_checkpoint=keeps)
    left_by_training(tmp_path, 8)
    assert check_output(OutputArguments(str(tmp_path / "base")), "auto", GIVEN)
    assert (tmp_path / "checkpoints" / "base" / "step-00000008").exists() == keeps


def test_checkpoints_of_a_run_that_was_to_replace_a_finished_one_stay(toy_model_and_tokenizer, tmp_path):
    finish(toy_model_and_tokenizer, tmp_path / "base", 20)
    left_by_training(tmp_path, 8)
    assert check_output(OutputArguments(str(tmp_path / "base")), "auto", GIVEN)
    assert (tmp_path / "checkpoints" / "base" / "step-00000008").exists()


def test_a_link_to_a_folder_is_replaced_and_its_folder_kept(toy_model_and_tokenizer, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base").symlink_to(tmp_path / "elsewhere")
    for steps in (1, 2):
        finish(toy_model_and_tokenizer, tmp_path / "run" / "base", steps)
    assert listing(tmp_path / "run") == {"base", "stages", "stages/base.json"} and (tmp_path / "elsewhere").is_dir()


def test_another_stages_checkpoints_stay(tmp_path):
    left_by_training(tmp_path, 2)
    (tmp_path / "checkpoints" / "mid").mkdir()
    discard(tmp_path / "checkpoints" / "base")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mid"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/base", "file cannot be written"),
        ("file/runs/base", "cannot be written"),
        ("file", "is not a folder name"),
        ("link", "is not a folder name"),
        ("..", "is not a folder name"),
        ("a/base", "a/logs cannot be written"),
        ("b/base", "b/checkpoints cannot be written"),
        ("/proc/nowhere/base", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for folder, kind in (("a", "logs"), ("b", "checkpoints")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / kind).write_text("")
    with pytest.raises(UserError, match=message) as caught:
        check_output(OutputArguments(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_before_any_work(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*free space"):
            check_output(OutputArguments(str(tmp_path / "run" / "base")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("stage", [pretrain, midtrain])
def test_the_stages_check_their_output_before_any_work(stage, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    needed = {"pretrain": "--tokenizer t --val_files v", "midtrain": "--model_name_or_path m"}[
        stage.__name__.split(".")[1]
    ]
    monkeypatch.setattr(
        "sys.argv", ["x", *needed.split(), "--train_files", "f", "--output_dir", str(tmp_path / "file" / "base")]
    )
    with pytest.raises(UserError, match="cannot be written"):  # and not that there are no such files
        stage.main()


def hold(output_dir, connection):
    check_output(OutputArguments(output_dir))
    connection.send(os.getpid())
    connection.recv()


def test_a_second_trainer_in_one_folder_is_refused_until_the_first_is_gone(tmp_path):
    args = OutputArguments(str(tmp_path / "base"))
    ours, theirs = multiprocessing.Pipe()
    first = multiprocessing.get_context("fork").Process(target=hold, args=(args.output_dir, theirs))
    first.start()
    holder = ours.recv()
    with pytest.raises(UserError, match=rf"in use by another trainer \(process {holder}\)"):
        check_output(args)
    check_output(OutputArguments(str(tmp_path / "mid")))
    first.kill()
    first.join()
    assert not check_output(args)
    assert not check_output(args)  # a process does not lock itself out


def test_a_log_that_cannot_be_written_costs_its_lines_and_one_warning(tmp_path, capsys):
    log = JsonlLogger(tmp_path / "base")
    log.log(step=1, loss=2.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limit[1]))
    try:
        for step in (2, 3):
            log.log(step=step, loss=1.0)  # 10 bytes of the line reach the disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.log(step=4, loss=0.5)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 4]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "base.jsonl cannot be written (File too large); training goes on" in warning


def test_a_log_that_cannot_be_begun_is_a_warning_too(tmp_path, capsys):
    (tmp_path / "logs").write_text("")
    JsonlLogger(tmp_path / "base").log(step=1)
    assert capsys.readouterr().err.count("warning") == 1


@pytest.fixture(scope="module")
def forks():
    return training.forkserver()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training.write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_a_base_model_that_learns_nothing_says_so_also_after_it_was_resumed(world, forks, tmp_path):
    output, says, still = (
        tmp_path / "run" / "base",
        tmp_path / "said",
        {"matrix_lr": 0, "embedding_lr": 0, "unembedding_lr": 0},
    )
    arguments = training.pretrain_arguments(world, output, resume="auto", **still)
    assert training.run(forks, arguments, before=training.ask_to_stop_after_a_checkpoint) == 0
    assert not output.exists()
    assert training.run(forks, arguments, says=says) == 0
    record = json.loads((output.parent / "stages" / "base.json").read_text())
    (warning,) = record["warnings"]
    assert warning.startswith("the loss did not fall") and "over the first 2 steps" in warning
    said = says.read_text()
    assert f"warning: {warning}" in said and "going on after step" in said
    assert f"> ⚠ Base: {warning}" in render(read_run(output.parent), {})
    assert sorted(path.name for path in output.parent.iterdir() if path.name != ".base.lock") == [
        "base",
        "logs",
        "stages",
    ]

    written = (output / "model.safetensors").stat().st_mtime_ns
    assert training.run(forks, arguments, processes=2, says=says) == 0
    assert "already finished" in says.read_text()
    assert (output / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_closed_terminal_stops_training_with_a_checkpoint(world, tmp_path):
    output, (master, slave) = tmp_path / "base", os.openpty()
    arguments = training.pretrain_arguments(world, output, max_steps=100_000, save_steps=2, eval_steps=0)
    process = training.start(arguments, stdout=slave, stderr=slave)
    os.close(slave)
    os.set_blocking(master, False)
    deadline = time.monotonic() + 60
    try:
        while not list((tmp_path / "checkpoints" / "base").glob("step-*")):
            assert process.poll() is None and time.monotonic() < deadline
            with suppress(BlockingIOError):
                os.read(master, 2**16)
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        os.close(master)  # from now on writing to the terminal fails
        assert process.wait(30) == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in (tmp_path / "logs" / "base.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == training.newest_step(output) >= 2


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)
