import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from modeling_nanochat.errors import UserError
from recipes.benchmarks import beside_original, gpu_check, gpu_checks
from recipes.benchmarks.gpu_check import GPUCheckArguments, run_check, summary
from recipes.benchmarks.gpu_checks import CHECKS, Check, Report, Setting, Skipped, right
from recipes.benchmarks.gpu_checks.decode import compare
from recipes.benchmarks.gpu_checks.profiles import idle_share, kind_of, longest, milliseconds_by_kind
from recipes.benchmarks.gpu_checks.runs import make_batch

ROOT = Path(__file__).parents[3]
# An original of the smallest kind: the interface that the check calls, none of its code.
ORIGINAL = """
import dataclasses, torch

@dataclasses.dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)
    def init_weights(self):
        self.table.to(dtype=torch.bfloat16)  # as the launch version has it
    def setup_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1)]
    def forward(self, ids, targets):
        return torch.nn.functional.cross_entropy(self.head(self.table(ids)).flatten(0, 1), targets.flatten())
"""
ENGINE = """
class Engine:
    def __init__(self, model, tokenizer):
        pass
    def generate(self, prompt, num_samples, max_tokens, temperature):
        yield from ([0] * num_samples for _ in range(max_tokens))
"""


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting("cpu", str(tmp_path))


@pytest.fixture
def check(setting):
    """A check in this process: its report."""

    def check(name: str, **changes) -> Report:
        report = Report(lambda kind, content: json.dumps(content))
        CHECKS[name].load()(replace(setting, **changes), report)
        return report

    return check


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command in this process: what it prints."""

    def run(*words: str) -> str:
        arguments = ["gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "out" / "checks.jsonl"), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        gpu_check.main()
        return capsys.readouterr().out

    return run


def register(monkeypatch, tmp_path, body: str, prepare: str = "pass", **more) -> None:
    """A check `probe` with this body and preparation, in a module that its process finds."""
    code = f"def check(setting, report):\n    {body}\ndef prepare(setting):\n    {prepare}\n"
    start = f"from recipes.benchmarks import gpu_checks\n{code}"
    (tmp_path / "sitecustomize.py").write_text(
        "import recipes.benchmarks.gpu_checks as g, types, sys\n"
        f"m = types.ModuleType(g.__name__ + '.probe'); exec({start!r}, m.__dict__); sys.modules[m.__name__] = m\n"
        "g.CHECKS['probe'] = g.Check('probe', 'probe:check', 1, 60, prepare=('probe:prepare',))\n"
    )
    monkeypatch.setitem(CHECKS, "probe", Check("probe", "probe:check", 1, 60, **more))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def outcome(setting: Setting, tmp_path: Path, limit: float = 60) -> dict:
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        return run_check("probe", setting, limit, log)


@pytest.mark.slow
def test_the_command_runs_checks_in_their_own_processes_and_ends_in_a_table(tmp_path):
    output = tmp_path / "new" / "checks.jsonl"
    command = [sys.executable, "recipes/benchmarks/gpu_check.py", "--device", "cpu", "--only", "g1", "g0", "g3_whole"]
    done = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.loads(line) for line in done.stdout.splitlines()[:3]] == results
    assert [(one["check"], one["status"]) for one in results] == [
        ("g0", "passed"),
        ("g1", "passed"),
        ("g3_whole", "skipped"),
    ]
    assert results[0]["figures"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results[0]["figures"]["matmul_tflops"] > 0 and results[2]["reason"] == "needs a GPU"
    assert "g1" in done.stdout.splitlines()[-2] and "===== g0" in output.with_suffix(".log").read_text()


def test_figures_gates_and_errors_of_a_check_are_told(monkeypatch, setting, tmp_path):
    body = "report.figure('f', 1 / 3); report.at_most('a', 2.0, 1); print('by the way'); raise ValueError('no\\nmore')"
    register(monkeypatch, tmp_path, body)
    result = outcome(setting, tmp_path)
    assert result["status"] == "error" and result["reason"] == "ValueError: no"
    assert result["figures"] == {"f": 0.33333}
    assert result["gates"] == [{"gate": "a", "value": 2.0, "limit": "<= 1", "passed": False}]
    assert "by the way" in (tmp_path / "log").read_text() and "Traceback" in (tmp_path / "log").read_text()


def test_a_gate_that_fails_makes_the_check_fail(monkeypatch, setting, tmp_path):
    register(monkeypatch, tmp_path, "report.holds('x', True); report.at_least('y', float('nan'), 1)")
    result = outcome(setting, tmp_path)
    assert result["status"] == "failed" and [gate["passed"] for gate in result["gates"]] == [True, False]
    assert "NO" in summary([result]).splitlines()[-1]


@pytest.mark.slow
def test_a_check_over_its_limit_is_ended_with_its_children_and_keeps_its_figures(monkeypatch, setting, tmp_path):
    child = tmp_path / "child"
    body = (
        "import subprocess, time; report.figure('early', 1); "
        f"subprocess.Popen('sleep 4; touch {child}', shell=True); time.sleep(60)"
    )
    register(monkeypatch, tmp_path, body)
    started = time.monotonic()
    result = outcome(setting, tmp_path, limit=3.5)
    assert time.monotonic() - started < 20
    assert result["status"] == "timed out" and result["figures"] in ({"early": 1}, {})
    assert "stopped after 4 s" in result["reason"]
    time.sleep(max(0.0, started + 8.5 - time.monotonic()))
    assert not child.exists()


def test_a_process_that_dies_is_an_error(monkeypatch, setting, tmp_path):
    register(monkeypatch, tmp_path, "import os; os._exit(7)")
    assert outcome(setting, tmp_path)["reason"] == "the process ended with code 7"


def test_what_cannot_run_is_skipped_by_name(monkeypatch, setting, tmp_path):
    monkeypatch.setitem(CHECKS, "probe", Check("probe", "probe:check", 1, 60, needs=("torch", "no_such_library")))
    assert outcome(setting, tmp_path)["reason"] == "no_such_library is not installed"
    assert outcome(setting, tmp_path, limit=0.5)["reason"] == "no time left"


def test_what_a_gpu_can_compile_for_the_timed_checks_is_compiled_beside_the_others(monkeypatch, setting):
    monkeypatch.setattr(gpu_check, "missing", lambda name: ["torchao"] if name == "g5" else [])
    on_gpu = replace(setting, device="cuda")
    assert gpu_check.compiling(["g0", "g3", "g5", "g4"], on_gpu) == [
        "train:prepare_plain", "original:prepare_original", "original:prepare_plain"
    ]  # fmt: skip
    assert gpu_check.compiling(["g3"], setting) == []
    functions = [function for check in CHECKS.values() for function in check.prepare]
    assert all(callable(gpu_checks.load(function)) for function in functions)
    assert all(check.timed for check in CHECKS.values() if check.prepare)


def test_checks_that_measure_no_time_run_first_and_beside_each_other(monkeypatch, setting):
    running, most, order = set(), [], []

    def run_check(name, *_):
        running.add(name)
        time.sleep(0.3 if not CHECKS[name].timed else 0.0)
        most.append(len(running))
        running.remove(name)
        order.append(name)
        return {"check": name}

    monkeypatch.setattr(gpu_check, "run_check", run_check)
    monkeypatch.setattr(gpu_check, "compiling", lambda names, setting: [])
    args = GPUCheckArguments(device="cpu", only=["g0", "g1", "g2", "g6"], jobs=4)
    args.check()
    found = [result["check"] for result in gpu_check.run_checks(args, setting, None)]
    assert sorted(found[:3]) == ["g2", "g2_documents", "g6"] and found[3:] == order[3:] == ["g0", "g1"]
    assert max(most[:3]) == 3 and most[3:] == [1, 1]


def test_what_compiles_ends_with_its_time_and_leaves_no_process(monkeypatch, setting, tmp_path):
    ready = tmp_path / "ready"
    body = f"import os, time; open('{ready}', 'w').write(str(os.getpid())); time.sleep(60)"
    register(monkeypatch, tmp_path, "pass", body)
    processes = []
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        gpu_check.prepare("probe:prepare", setting, 20, log, processes)
    assert ready.exists() and not processes and not psutil.pid_exists(int(ready.read_text()))


def test_an_interrupt_ends_what_runs_beside(monkeypatch, setting, tmp_path):
    register(monkeypatch, tmp_path, "import time; time.sleep(60)")
    ended = []
    monkeypatch.setattr(gpu_check, "as_completed", interrupt)
    monkeypatch.setattr(gpu_check, "kill", lambda process: ended.append(process) or process.kill())
    monkeypatch.setitem(CHECKS, "probe", Check("probe", "probe:check", 1, 60, timed=False))
    args = GPUCheckArguments(device="cpu", only=["probe"])
    args.check()
    with open(tmp_path / "log", "w", encoding="utf-8") as log, pytest.raises(KeyboardInterrupt):
        list(gpu_check.run_checks(args, setting, log))
    assert ended and all(process.poll() is not None for process in ended)


def interrupt(futures):
    time.sleep(2)
    raise KeyboardInterrupt
    yield


def test_failed_gates_end_the_command_with_an_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "run_check", lambda name, *_: {
        "check": name, "title": "t", "status": "failed" if name == "g1" else "passed", "reason": None, "seconds": 0.0,
        "figures": {}, "gates": [],
    })  # fmt: skip
    with pytest.raises(UserError, match=r"^g1: failed; .*checks.jsonl has the figures"):
        run("--only", "g0", "g1")
    assert run("--only", "g3").count('"check": "g3') == len([name for name in CHECKS if name.startswith("g3")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "g0", "g99"], "only: 'g99' is not one of g0, g2, "),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--original", "no/such/folder"], "original: no/such/folder is not a folder"),
        (["--limit", "0"], "limit is 0; it must be at least 1"),
        (["--output", "/dev/null/x"], "output: .* cannot be written"),
    ],
)
def test_wrong_settings_are_told_before_the_first_check(run, monkeypatch, words, message):
    monkeypatch.setattr(gpu_check, "run_check", None)
    with pytest.raises(UserError, match=message):
        run(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(run):
    with pytest.raises(UserError, match="device cuda: torch sees no GPU"):
        run("--device", "cuda")


def test_without_trl_the_command_line_is_read_all_the_same(run, monkeypatch):
    found = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    assert "trl is not installed" in run("--only", "g9")


def test_right(check):
    report = check("g2")
    gates = {gate["gate"]: gate["passed"] for gate in report.gates}
    for architecture in ("plain", "turbo"):
        assert report.figures[f"{architecture}: dtype of the loss"] == "torch.float32"
        assert gates[f"{architecture} eager: gradients, relative"] and gates[f"{architecture}: graphs"]
        assert gates[f"{architecture} padded to 16: gradients, relative"]
        assert gates[f"{architecture} float32: greedy ids, padded = alone"]


def test_gradients_of_scales_are_judged_by_how_far_rounding_moves_them(setting):
    config = right.small_config(setting, "turbo")
    model = right.model_on("cpu", config).train()
    batches = [make_batch(setting, config, 2, 48, seed) for seed in range(4)]
    rounding = right.rounding_of_scales(model, batches, torch.bfloat16)
    assert rounding.keys() == {
        f"model.{name}" for name in ("backout_lambda", "resid_lambdas", "smear_lambda", "x0_lambdas")
    }
    exact, rounded = (right.reference_pass(model, batches[0], dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    wrong = {key: gradient * 1.5 if key == "model.x0_lambdas" else gradient for key, gradient in exact.items()}
    found = Report(lambda *_: None)
    for gradients in (rounded, wrong):
        right.check_scales(found, "turbo", gradients, exact, rounding)
    assert [gate["passed"] for gate in found.gates] == [True, False]
    assert found.figures["turbo: worst scale"] == "model.x0_lambdas"


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training(check, architecture):
    report = check("g3" if architecture == "plain" else "g3_turbo")
    depth = 20 if architecture == "plain" else 24
    few, more = (report.figures[f"{layers} layers"]["pass_ms"] for layers in (1, 2))
    whole = report.figures[f"extrapolated to {depth} layers"]["pass_ms"]
    assert whole == pytest.approx(few + (depth - 1) * (more - few), rel=1e-2)
    assert sum(report.figures["pass, ms by kind"].values()) > 0 and report.figures["optimizer, kernels launched"] > 0


def test_attention_and_decoding(check):
    assert check("g1").figures["causal"]["ms"] > 0
    report = check("g10")
    assert all(gate["passed"] for gate in report.gates) and report.figures["3 rows eager"]["steps_per_second"] > 0
    assert 0 < report.figures["3 rows eager: logits after the same tokens"]["largest"] < 1e-3


def test_logits_count_where_the_first_choice_leads_by_more_than_rounding_moves_it():
    right = torch.tensor([[[3.0, 1.0, 0.0], [2.0, 1.9, 0.0]]])
    rounding = torch.full_like(right, 0.1)
    close = right + torch.tensor([0.0, 0.15, 0.0])  # turns the second choice, which is too close to be sure of
    assert compare(close, right, rounding) == {
        "largest": pytest.approx(0.15),
        "relative": pytest.approx(0.15 * 2**0.5 / 0.1 / 6**0.5),
        "decided": 0.5,
        "equal": 1.0,
    }
    assert compare(right.flip(-1), right, rounding)["equal"] == 0.0


def test_memory_and_data(check):
    memory = check("g7")
    assert [gate["passed"] for gate in memory.gates] == [True]
    (found,) = memory.figures.values()
    assert found["rows"] == 8 and found["predicted_gib"] > 0
    data = check("g11")
    assert len(data.gates) == 2 and all(gate["passed"] for gate in data.gates)
    assert data.figures["tokens/s"] > 100 and data.figures["vocabulary"] == 400


def test_core(check):
    report = check("g13")
    assert len(report.gates) == 4 and all(gate["passed"] for gate in report.gates)
    assert report.figures["plain together: prompts/s"] > 0


def write_original(folder: Path) -> None:
    for name, text in (("__init__.py", ""), ("gpt.py", ORIGINAL), ("engine.py", ENGINE)):
        path = folder / "classic" / "nanochat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.long
def test_compiled_steps_beside_the_original_s(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_original(tmp_path)
    words = "--version classic --depth 1 --vocab_size 64 --rows 2 --length 16 --turns 3".split()
    monkeypatch.setattr(sys, "argv", ["beside_original.py", "--original", str(tmp_path), *words])
    beside_original.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = [f"{name} {what}" for name in ("ours", "original") for what in ("pass", "step")]
    assert {name: len(times) for name, times in found["seconds"].items()} == dict.fromkeys(parts, 3)
    for what, ratio in found["ratios"].items():
        ours, original = (statistics.median(found["seconds"][f"{name} {what}"]) for name in ("ours", "original"))
        assert ratio == pytest.approx(original / ours)
    monkeypatch.setattr(sys, "argv", ["beside_original.py", "--original", str(tmp_path), "--version", "current"])
    with pytest.raises(UserError, match="original: no current version"):
        beside_original.main()


def test_decoding_beside_the_original_s(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_original(tmp_path)
    words = "--version classic --what decoding --torch_compile false --depth 1 --vocab_size 300 --rows 3 --length 7"
    words += f" --new_tokens 5 --turns 1 --original {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["beside_original.py", *words.split()])
    beside_original.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"].keys() == {"ours decoding", "original decoding"} and found["ratios"]["decoding"] > 0


@pytest.mark.slow
def test_the_original_beside_ours(check, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Skipped, match="give --original"):
        check("g4")
    write_original(tmp_path)
    report = check("g4", original=str(tmp_path))
    assert report.figures["pass: our speed / the original's"] != 0
    with pytest.raises(Skipped, match="no current version"):
        check("g4_current", original=str(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", ["g6", "g8", "g9"])
def test_stages(check, name):
    report = check(name)
    assert report.gates and all(gate["passed"] for gate in report.gates), report


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path):
    """Minutes; the gates about speed are an H100's."""
    arguments = GPUCheckArguments(device="cuda", output=str(tmp_path / "checks.jsonl"))
    setting = Setting("cuda", str(tmp_path))
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        results = [run_check(name, setting, CHECKS[name].limit, log) for name in arguments.names()]
    assert not [result for result in results if result["status"] == "error"]


def test_kernels_are_told_apart():
    names = {
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "gemm",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "gemm",
        "triton_red_fused__to_copy_exp_mul_sub_sum_tanh_12": "loss",
        "triton_poi_fused_mul_relu_7": "triton",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "aten",
    }
    assert {name: kind_of(name) for name in names} == names
    spans = [(0.0, 4.0, "nvjet_a"), (2.0, 5.0, "triton_b"), (6.0, 10.0, "nvjet_a")]
    assert idle_share(spans) == pytest.approx(0.1) and idle_share([]) == 0
    assert milliseconds_by_kind(spans)["gemm"] == 8 and longest(spans) == {"nvjet_a": 8.0, "triton_b": 3.0}
