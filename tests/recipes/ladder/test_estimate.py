"""`--dry_run`: computed sizes against the published ones, and what it says of hardware that does not fit."""

import json
from dataclasses import replace

import pytest

from modeling_nanochat.errors import UserError
from recipes.ladder.estimate import hardware as devices
from recipes.ladder.estimate.data_sizes import DataSizes, local_size
from recipes.ladder.estimate.hardware import GIB, choose_hardware
from recipes.ladder.estimate.machine import RESULTS, Machine, read_speeds
from recipes.ladder.estimate.table import data_settings, estimate, estimate_all, peak_disk, short
from recipes.ladder.launch import launch_file
from recipes.ladder.step import Step
from recipes.run import main

SPEEDRUN = {
    "data": "output_dir: runs/d20/data\ntrain_shards: 350\nval_shards: 1\n",
    "tokenizer": "train_files: [text]\noutput_dir: runs/d20/tokenizer\ntraining_recipe: classic\n",
    "base": """
        tokenizer: runs/d20/tokenizer
        train_files: [runs/d20/data/train]
        val_files: [runs/d20/data/val]
        output_dir: runs/d20/base
        depth: 20
        training_recipe: classic
        core_dir: data/core
        """,
    "base.eval": "{model_name_or_path: runs/d20/base, output_file: base.json, tasks: [core], base_model: true}\n",
    "mid": """
        model_name_or_path: runs/d20/base
        output_dir: runs/d20/mid
        mixture:
          - HuggingFaceTB/smol-smoltalk:train
          - cais/mmlu:all:auxiliary_train
          - openai/gsm8k:main:train
        validation_mixture: [{source: HuggingFaceTB/smol-smoltalk:test, rows: 24000}]
        """,
    "sft": """
        model_name_or_path: runs/d20/mid
        output_dir: runs/d20/sft
        packing: false
        per_device_train_batch_size: 4
        num_train_epochs: 1
        save_strategy: 'no'
        mixture:
          - allenai/ai2_arc:ARC-Easy:train
          - allenai/ai2_arc:ARC-Challenge:train
          - openai/gsm8k:main:train
          - {source: HuggingFaceTB/smol-smoltalk:train, rows: 10000}
        """,
    "sft.eval": """
        model_name_or_path: runs/d20/sft
        output_file: sft.json
        tasks: [arc_easy, arc_challenge, mmlu, gsm8k, humaneval]
        max_new_tokens: 512
        """,
    "rl": """
        model_name_or_path: runs/d20/sft
        output_dir: runs/d20/rl
        train_files: [openai/gsm8k:main:train]
        eval_files: [openai/gsm8k:main:test]
        save_strategy: 'no'
        """,
}


def ladder(folder, **more):
    """The steps of a speedrun, each with its YAML; `more` are arguments of single steps."""
    found = []
    for name, text in SPEEDRUN.items():
        config = folder / f"{name}.yaml"
        config.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
        words = [f"--output_dir=runs/d20/{name}"] if "output_dir" in text else []
        words = [part for word in words for part in word.split("=")]
        found.append(Step(name, ["python"], config, [*words, *more.get(name, [])]))
    return found


def estimated(steps, name, planned=8):
    machine = Machine(choose_hardware(name), read_speeds(*RESULTS))
    found, trained = estimate_all(steps, DataSizes(data_settings(steps)), machine, planned)
    return {step.name: step for step in found}, trained


def printed(steps, name, launch="ddp_8gpu"):
    return estimate("mine", steps, launch_file(f"accelerate_configs/{launch}.yaml")[1], name)


def hours(step):
    return sum(step.seconds.values()) / 3600


def test_the_speedrun_has_the_published_sizes(tmp_path):
    found, trained = estimated(ladder(tmp_path), "8xh100")
    base = found["base"]
    assert trained.weights == 4 * 560_988_160
    assert (base.steps, base.tokens, base.batch) == (21_400, 11_219_763_200, (32, 1, 8))
    assert base.flops == pytest.approx(3.917670e19, rel=1e-6)
    assert base.memory / GIB == pytest.approx(54.6, abs=0.1)
    assert found["data"].kept == pytest.approx(351 * 100e6, rel=0.15)
    assert found["mid"].steps == pytest.approx(765, rel=0.05) and found["mid"].batch == (32, 1, 8)
    assert found["sft"].steps == pytest.approx(651, abs=1)
    assert found["rl"].steps == 467


def test_the_speedrun_takes_the_published_hours(tmp_path):
    """3h26m of pretraining, of which 172 to 194 minutes of steps, 18 minutes of midtraining, 6 of SFT, 47 of RL."""
    found, _ = estimated(ladder(tmp_path), "8xh100")
    assert 2.6 < found["base"].seconds["steps"] / 3600 < 194 / 60
    assert 2.8 < hours(found["base"]) < 3.6
    assert 6 / 60 < hours(found["mid"]) < 20 / 60
    assert 2 / 60 < hours(found["sft"]) < 10 / 60
    assert 35 / 60 < hours(found["rl"]) < 60 / 60
    assert 3 / 60 < hours(found["base.eval"]) < 6 / 60


def test_fewer_devices_take_longer_for_the_same_training(tmp_path):
    eight, one = (estimated(ladder(tmp_path), name)[0]["base"] for name in ("8xh100", "1xh100"))
    assert one.batch[1] * one.batch[0] == 8 * eight.batch[0]
    assert one.tokens == eight.tokens and 7 < hours(one) / hours(eight) < 9


def test_sft_that_does_not_fit_is_told_what_to_set(tmp_path):
    rows = estimated(ladder(tmp_path, sft=["--per_device_train_batch_size", "16"]), "1x4090")[0]["sft"].notes
    assert rows == (
        "16 rows do not fit in a pass: --set sft.per_device_train_batch_size=4 sft.gradient_accumulation_steps=32",
    )
    checkpointing = ["--per_device_train_batch_size", "8", "--gradient_checkpointing", "true"]
    assert estimated(ladder(tmp_path, sft=checkpointing), "1x4090", planned=1)[0]["sft"].notes == ()
    large = estimated(ladder(tmp_path, base=["--depth", "32"]), "1x4090")[0]["sft"].notes
    assert "weights, gradients and optimizer do not fit" in large[0]


def test_overrides_and_the_dial_set_the_sizes(tmp_path):
    found, trained = estimated(ladder(tmp_path, base=["--depth", "12"], sft=["--max_steps", "7"]), "8xh100")
    assert trained.config.num_hidden_layers == 12 and found["base"].steps == 7_080
    assert found["sft"].steps == 7


def test_a_source_has_at_most_max_rows(tmp_path):
    found, _ = estimated(ladder(tmp_path, mid=["--max_rows", "1000"]), "8xh100")
    assert found["mid"].steps == round(1000 * (790 + 360 + 220) / 524_288)


def test_numbers_of_the_data_step_are_checked(tmp_path):
    with pytest.raises(UserError, match="data.train_shards: many is not a whole number"):
        estimated(ladder(tmp_path, data=["--train_shards", "many"]), "8xh100")


def test_midtraining_inherits_rows_and_batch(tmp_path):
    given = ["--total_batch_size", "262144", "--per_device_train_batch_size", "16"]
    found, _ = estimated(ladder(tmp_path, base=given), "8xh100")
    assert found["mid"].batch == (16, 1, 8) and found["mid"].steps == pytest.approx(2 * 765, rel=0.05)


@pytest.mark.parametrize(
    "name, words, advice",
    [
        ("1xl4", (), "take devices with more memory, or a lower base.depth or base.max_length"),
        ("8xl4", (), "shard the model with --accelerate_config accelerate_configs/fsdp2.yaml, or take devices with"),
        (
            "8x4090",
            ("--depth", "20", "--per_device_train_batch_size", "32"),
            "per_device_train_batch_size=8, the same",
        ),
        ("8x4090", ("--depth", "20"), None),
        ("3xh100", ("--depth", "20"), "256 rows a step cannot be divided among 3 devices"),
    ],
)
def test_hardware_that_is_too_small_is_told_what_to_set(tmp_path, name, words, advice):
    words = words or ("--depth", "32")
    base = estimated(ladder(tmp_path, base=list(words)), name)[0]["base"]
    assert (advice in " ".join(base.notes)) if advice else base.notes == ()


def test_the_printed_plan_fits_the_terminal_and_tells_what_is_assumed(tmp_path):
    text = printed(ladder(tmp_path), "8xh100")
    assert max(map(len, text.splitlines())) <= 100
    assert "560,988,160 parameters" in text and "21,400" in text and "3.92e+19" in text
    assert "172 to 194" in text and "measured on one H100" in text and "HuggingFaceTB/smol-smoltalk" in text
    other = printed(ladder(tmp_path), "8xa100")
    assert "assumed 40% of the bfloat16 peak of 312 TFLOP/s" in other and "172 to 194" not in other
    assert "172 to 194" not in printed(ladder(tmp_path, base=["--depth", "18"]), "8xh100")


def test_other_launch_files_are_advised(tmp_path):
    text = " ".join(printed(ladder(tmp_path), "1xa100", "fp8").split())
    assert "the launch file is for 8 processes: take single_gpu.yaml" in text
    assert "has no float8" in text and "another size than planned: --set sft.gradient_accumulation_steps=8" in text
    assert "is for 1 process: take ddp_8gpu.yaml with num_processes 4" in printed(
        ladder(tmp_path), "4xh100", "single_gpu"
    )
    assert "is for the CPU: take single_gpu.yaml" in printed(ladder(tmp_path), "1x4090", "cpu")


def test_float8_is_faster_where_there_is_float8(tmp_path):
    bf16, fp8 = (printed(ladder(tmp_path), "8xh100", launch) for launch in ("ddp_8gpu", "fp8"))
    assert total(fp8) < total(bf16)


def total(text):
    line = next(line for line in text.splitlines() if line.startswith("total"))
    return float(line.split()[-2])


def test_text_that_is_read_more_than_once_is_reported(tmp_path):
    base = estimated(ladder(tmp_path, data=["--train_shards", "100"]), "8xh100")[0]["base"]
    assert base.notes == ("reads its text 3.3 times: --set data.train_shards=332 for once",)


def test_disk_is_that_of_the_largest_step_and_all_before_it(tmp_path):
    found, trained = estimated(ladder(tmp_path), "8xh100")
    before = found["data"].kept + found["tokenizer"].kept + found["base"].kept
    assert peak_disk(list(found.values())) >= before + 2 * trained.checkpoint
    assert peak_disk([replace(found["base"], kept=3, passing=9), replace(found["base"], kept=4, passing=1)]) == 12


def test_a_full_disk_is_reported_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    assert f"1.0 are free in {tmp_path}" in " ".join(printed(ladder(tmp_path), None).split())


@pytest.mark.parametrize("name", ["8xh900", "0xh100", "2xcpu", "x", ""])
def test_unknown_hardware_is_refused_with_the_known_names(name):
    with pytest.raises(UserError, match=r"is unknown; give cpu, mps, or a number and a GPU as 8xh100: b200, h200"):
        choose_hardware(name)


def test_hardware_is_named_or_seen(monkeypatch):
    assert choose_hardware("8xH100").dollars == 24 and choose_hardware("h200").count == 1
    assert choose_hardware("cpu").kind == "cpu" and choose_hardware("mps").dollars is None
    assert choose_hardware(None).kind in ("cpu", "mps", "cuda")
    cuda = {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H100 PCIe",
        "device_count": lambda: 4,
        "get_device_properties": lambda index: type("Properties", (), {"total_memory": 100 * GIB}),
    }
    for function, value in cuda.items():
        monkeypatch.setattr(devices.torch.cuda, function, value)
    seen = choose_hardware(None)
    assert (seen.name, seen.gib, seen.flops) == ("4xh100", 100, 756e12)
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda: "NVIDIA Z9")
    with pytest.raises(UserError, match="nothing is known of NVIDIA Z9"):
        choose_hardware(None)


def test_local_files_are_counted_and_others_assumed(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": "x" * 469}) + "\n" + json.dumps({"text": "x" * 469}) + "\n")
    assert local_size(path) == (2, pytest.approx(100, rel=0.01))
    sizes = DataSizes()
    sizes.size(str(path))
    assert not sizes.assumed
    assert sizes.size("me/unknown") == (10_000, 500) and "me/unknown" in sizes.assumed
    assert sizes.size("cais/mmlu:all:auxiliary_train")[0] == 99_842


def test_the_pocket_recipe_is_planned_without_writing_anything(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(
        "sys.argv", ["run.py", "pocket", "--run_dir", str(run), "--dry_run", "true", "--hardware", "cpu"]
    )
    main()
    text = capsys.readouterr().out
    assert "680" in text and not run.exists()
    assert [line.split()[0] for line in text.splitlines()[6:17]] == [
        "data", "tokenizer", "base", "base.eval", "mid", "mid.eval", "sft", "sft.eval", "rl", "rl.eval", "total",
    ]  # fmt: skip


def test_hardware_without_a_dry_run_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "pocket", "--hardware", "8xh100"])
    with pytest.raises(UserError, match="hardware has no effect without --dry_run true"):
        main()


def test_numbers_are_short():
    assert [short(number) for number in (11.2e9, 401e6, 1392640, 2048, 12)] == [
        "11.20 B", "401 M", "1.39 M", "2.05 K", "12 ",
    ]  # fmt: skip
