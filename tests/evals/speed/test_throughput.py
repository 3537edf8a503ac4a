import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.speed import throughput
from evals.speed.candidates import Setting, build_model, decoders
from evals.speed.device_peaks import device_peaks
from evals.speed.peak_memory import peak_memory, resident_bytes
from evals.speed.throughput import ThroughputArguments, measure_decode, measure_training
from evals.speed.timing import take_turns
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import training_flops_per_token

ROOT = Path(__file__).parents[3]
TINY = {
    "depths": [1],
    "vocab_size": 128,
    "train_batch_size": 2,
    "sequence_length": 16,
    "decode_batch_sizes": [2],
    "prompt_length": 4,
    "new_tokens": 6,
    "repeats": 3,
    "memory": False,
    "torch_compile": False,
    "device": "cpu",
}


def words(**changes) -> list[str]:
    pairs = (TINY | changes).items()
    return [
        word for key, value in pairs for word in (f"--{key}", *map(str, value if type(value) is list else [value]))
    ]


def setting(**changes) -> Setting:
    sizes = {"depth": 1, "vocab_size": 128, "context": 64, "device": "cpu", "dtype": torch.float32, "threads": 1}
    return Setting(**sizes | changes)


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: what it prints."""

    def run(**changes) -> str:
        monkeypatch.setattr(sys, "argv", ["throughput.py", *words(**changes)])
        throughput.main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_command_measures_every_contender_and_ends_in_json():
    command = [sys.executable, "evals/speed/throughput.py", *words(decode_batch_sizes=[1, 3])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    results = json.loads(lines[-1])
    assert [row["candidate"] for row in results["training"]] == ["transformers eager", "plain eager", "turbo eager"]
    decoded = [(row["batch_size"], row["candidate"].split()[0]) for row in results["decode"]]
    assert decoded == [(size, name) for size in (1, 3) for name in ("transformers", "plain", "turbo")]
    assert results["settings"]["vocab_size"] == 128 and torch.__version__.startswith(results["machine"]["torch"])
    for rows in (results["training"], results["decode"][:3], results["decode"][3:]):
        for row in rows:
            assert row["agrees"] and row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
            assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
            shown = [
                line for line in lines[:-1] if row["candidate"] in line and f"{row['ratio']:,.5g}" in line.split()
            ]
            assert any(f"{row['tokens_per_second']:,.5g}" in line.split() for line in shown)
    losses = {row["candidate"]: row["loss"] for row in results["training"]}
    assert losses["plain eager"] == pytest.approx(losses["transformers eager"], abs=1e-4)
    assert losses["turbo eager"] != pytest.approx(losses["plain eager"], abs=1e-2)


@pytest.mark.slow
def test_what_is_compiled_is_measured_beside_the_rest(run):
    results = json.loads(run(torch_compile=True, architectures=["plain"]).splitlines()[-1])
    assert [row["candidate"] for row in results["training"]] == ["plain eager", "plain compiled"]
    assert [row["candidate"] for row in results["decode"]] == ["plain generate", "plain compiled"]
    assert all(row["agrees"] for row in results["training"] + results["decode"])


def test_other_weights_are_found_out(run, monkeypatch, capsys):
    def tampered(architecture, setting):
        model = build_model(architecture, setting)
        if architecture == "plain":
            model.lm_head.weight.data.neg_()
        return model

    monkeypatch.setattr(throughput, "build_model", tampered)
    with pytest.raises(UserError, match=r"plain eager, plain generate: results differ"):
        run(architectures=["transformers", "plain"])
    assert capsys.readouterr().out.count("equal weights give equal results: NO") == 2


def test_equal_names_have_equal_weights_and_no_choice_is_trivial():
    models = {name: build_model(name, setting()) for name in ("transformers", "plain", "turbo")}
    theirs, ours = (models[name].state_dict() for name in ("transformers", "plain"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    ids = torch.arange(8).reshape(2, 4)
    for decode in decoders(models, setting(), compiled=False).values():
        rows = decode(ids, 12)
        assert all(len(row) == 12 for row in rows)
        assert rows[0] != rows[1] and len(set(rows[0])) > 1


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or name.upper() for name in "ab"}
    returned, seconds = take_turns(calls, "cpu", 3)
    assert order[-6:] == list("ababab") and returned == {"a": "A", "b": "B"}
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_shares_of_a_known_device(monkeypatch):
    monkeypatch.setattr(throughput, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    args = ThroughputArguments(**TINY | {"dtype": "bfloat16"})
    tiny = setting(dtype=torch.bfloat16)
    models = {"plain": build_model("plain", tiny)}
    (row,) = measure_training(args, tiny, models)
    flops = training_flops_per_token(tiny.config("plain"), 16) * row["tokens_per_second"]
    assert row["mfu_percent"] == pytest.approx(100 * flops / 989e12)
    (row,) = measure_decode(args, tiny, models, 2)
    matrices, head, cache = 12 * 128 * 128, 128 * 128, 2 * 2 * 128 * (4 + 3)
    moved = 2 * (matrices + head + cache) * row["tokens_per_second"] / 2
    assert row["bandwidth_percent"] == pytest.approx(100 * moved / 3.35e12)
    assert models["plain"].dtype == torch.bfloat16
    exact = setting()
    (row,) = measure_training(args, exact, {"plain": build_model("plain", exact)})
    assert row["mfu_percent"] is None  # the peak is bfloat16's


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", (989e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756e12, 2.0e12)),
        ("NVIDIA H200", (989e12, 4.8e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 2.0e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 1.555e12)),
        ("NVIDIA L40S", (362e12, 864e9)),
        ("NVIDIA GeForce RTX 4090", (165.2e12, 1.01e12)),
        ("AMD Instinct MI300X", (1.3074e15, 5.3e12)),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (None, None)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (None, None)),
        ("NVIDIA RTX A4000", (None, None)),
        ("NVIDIA L40", (None, None)),
        ("NVIDIA GH200 480GB", (None, None)),
        ("AMD EPYC", (None, None)),
    ],
)
def test_peaks_are_of_the_very_device_or_unknown(name, peaks):
    assert device_peaks(name) == peaks


@pytest.mark.slow
def test_peak_memory_is_of_training_alone():
    large = setting(vocab_size=65536)
    weights = 4 * sum(p.numel() for p in build_model("plain", large).parameters())
    ballast = torch.ones(2**28)  # what the measuring process holds is none of the candidate's
    before, most = peak_memory("plain eager", large, torch.zeros(1, 8, dtype=torch.long))
    assert before > weights
    assert weights < most - before < 4 * weights  # gradients of all weights, and little beside
    assert most < ballast.nbytes + weights < resident_bytes("VmHWM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["plain", "llama"]}, "'llama' is not one of transformers, plain, turbo"),
        ({"depths": [4, 0]}, r"depths is \[4, 0\]; it must be at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
        ({"train_batch_size": -1}, "train_batch_size is -1; it must be at least 0"),
        ({"dtype": "float16"}, "--dtype: invalid choice: 'float16'"),
        ({"device": "tpu"}, "--device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_settings_are_told_before_the_first_model_is_built(run, monkeypatch, changes, message):
    monkeypatch.setattr(throughput, "build_model", None)
    with pytest.raises(UserError, match=message):
        run(**changes)
