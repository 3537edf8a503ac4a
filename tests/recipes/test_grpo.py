import json

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from evals.full_python import check_full_python
from modeling_nanochat.chat.python_tool import python
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import NanoChatGRPOTrainer, read_problems
from recipes.training.data.bad_rows import BadRows
from recipes.training.trl.rewards import exact_answer
from recipes.training.trl.rollouts import fitting, rollouts
from recipes.training.trl.settings import GRPOSettings


def test_reward_is_for_the_exact_answer_in_the_last_message():
    call = {"role": "assistant", "content": "#### 5", "tool_calls": [{}]}
    tool = {"role": "tool", "content": "#### 19"}
    completions = [
        [{"role": "assistant", "content": "19 apples.\n#### 19"}],
        [call, tool, {"role": "assistant", "content": "#### 19"}],
        [{"role": "assistant", "content": "#### 19.0."}],
        [{"role": "assistant", "content": "#### 19/2"}],
        [call, tool],
        [{"role": "assistant", "content": "19"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    problem = {"question": "Apples?", "answer": "12 + 7 = <<12+7=19>>19\n#### 19"}
    rewards = exact_answer(completions, [problem] * 8)
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_reward_is_for_all_words_of_the_answer_and_no_rival_in_a_turn_that_ended():
    call, tool = {"role": "assistant", "content": "Mira ", "tool_calls": [{}]}, {"role": "tool", "content": "a kite"}
    completions = [
        [{"role": "assistant", "content": "The story was about Mira and a kite."}],
        [call, tool, {"role": "assistant", "content": "and a kite"}],
        [{"role": "assistant", "content": "The story was about Mira and a kitesurfer."}],
        [{"role": "assistant", "content": "The story was about Mira, a drum and a kite."}],
        [{"role": "assistant", "content": "Mira and a kite"}, tool],
        [],
    ]
    problem = {"question": "The story?", "answer": ["Mira", "kite"], "rivals": ["drum"]}
    rewards = exact_answer(completions, [problem] * 6)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_problems_of_both_kinds_are_read_into_the_same_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    history = [{"role": "user", "content": "I am Mira."}, {"role": "assistant", "content": "Hello, Mira!"}]
    record = {"history": history, "question": "Who am I?", "answer": "Mira", "rivals": ["Tom"]}
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    first, second = read_problems([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], BadRows())
    assert first["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert json.loads(first["problem"]) == {"question": "1+1?", "answer": "#### 2"}
    assert second["prompt"] == [*history, {"role": "user", "content": "Who am I?"}]
    assert json.loads(second["problem"]) == record


def test_a_function_is_rewarded_if_its_tests_pass(tmp_path):
    record = {"prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one"}
    record["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    try:
        check_full_python()
    except UserError as error:  # not of the problems: a record that is refused must fail this test
        pytest.skip(str(error))
    (problem,) = read_problems([str(tmp_path / "a.jsonl")], BadRows())
    assert problem["prompt"] == [{"role": "user", "content": "def one():\n"}]
    replies = [[{"role": "assistant", "content": f"def one(): return {number}"}] for number in (1, 2)]
    assert exact_answer(replies, [json.loads(problem["problem"])] * 2) == [1.0, 0.0]


def test_a_record_that_is_not_answered_in_words_is_refused(tmp_path):
    record = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a.jsonl:1: a record of mmlu; only replies to match, gsm8k, humaneval can be rewarded"
    ):
        read_problems([str(tmp_path / "a.jsonl")], BadRows())


@pytest.fixture
def trainer(toy_model_folder, tmp_path):
    """Of eight completions of two problems."""
    lines = [json.dumps({"question": f"What is {n}+7?", "answer": f"#### {n + 7}"}) + "\n" for n in (12, 30)]
    (tmp_path / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, dtype=torch.float32, device="cpu")
    args = GRPOSettings(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        max_completion_length=20,
        max_steps=1, temperature=0.9, top_k=40, min_p=0.01, bf16=False, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return NanoChatGRPOTrainer(
        model=model,
        args=args,
        train_dataset=read_problems([str(tmp_path / "problems.jsonl")], BadRows()),
        processing_class=tokenizer,
        reward_funcs=exact_answer,
        muon_rates={"matrix_lr": 0.0, "embedding_lr": 0.0, "unembedding_lr": 0.0},
    )


def test_completions_come_from_the_engine_with_a_mask_of_what_the_model_chose(trainer, monkeypatch):
    engine = trainer.engine
    call = engine.codec.tokenizer("<|python_start|>12+7<|python_end|>", add_special_tokens=False).input_ids
    script = iter([*call, *[0] * 4, *[7] * 99])
    monkeypatch.setattr(engine, "sampler", lambda seed: lambda logits, *_: torch.tensor([next(script)] * len(logits)))
    found = rollouts([trainer.train_dataset[0]["prompt"]] * 4, trainer)
    assert found["prompt_ids"] == [engine.codec.prompt(trainer.train_dataset[0]["prompt"])] * 4
    forced = [engine.codec.output_start, *engine.codec.encode("19"), engine.codec.output_end]
    for ids, mask, reply in zip(found["completion_ids"], found["env_mask"], found["reply"], strict=True):
        assert len(ids) == len(mask) == 20
        assert [token for token, chosen in zip(ids, mask, strict=True) if not chosen] == forced
        assert [message["role"] for message in reply] == ["assistant", "tool", "assistant"]
    assert trainer._metrics["train"]["tools/call_frequency"] == [1.0]
    assert trainer.sampling == SamplingOptions(0.9, 40, 1.0, 0.01)


def test_completions_follow_torch_s_global_seed(trainer):
    prompts = [problem["prompt"] for problem in trainer.train_dataset for _ in range(4)]
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(rollouts(prompts, trainer)["completion_ids"])
    assert drawn[0] == drawn[1] != drawn[2] and len({tuple(ids) for ids in drawn[0]}) > 4


def test_greedy_completions_are_those_of_trl_s_own_loop(trainer, toy_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "sampling", SamplingOptions(temperature=0))
    prompts = [problem["prompt"] for problem in trainer.train_dataset for _ in range(4)]
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, dtype=torch.float32, device="cpu")
    args = GRPOSettings(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=20,
        max_tool_calling_iterations=8, top_k=1, bf16=False, use_cpu=True, report_to="none",
    )  # fmt: skip
    theirs = GRPOTrainer(
        model, exact_answer, args=args, train_dataset=trainer.train_dataset, processing_class=tokenizer, tools=[python]
    )
    # As TRL does before generating, in a method that also computes the reference model's logits
    theirs._sync_tool_dicts, theirs._async_tool_dicts = [{"python": python}] * len(prompts), [{}] * len(prompts)
    assert list(rollouts(prompts, trainer)["completion_ids"]) == theirs._generate(prompts)[1]


def test_problems_without_room_for_a_completion_are_refused_or_counted(trainer, capsys):
    rows = [{"prompt": [{"role": "user", "content": "lamp " * n}], "where": f"a.jsonl:{n}"} for n in (1, 900)]
    problems, most = Dataset.from_list(rows), (trainer.engine.codec, 256, trainer.args)
    with pytest.raises(
        UserError, match=r"^a.jsonl:900: more than 236 tokens leave no room .* set on_bad_row to skip$"
    ):
        fitting(problems, *most, BadRows())
    assert len(fitting(problems, *most, BadRows("skip"))) == 1
    assert "left out: 1 rows, first a.jsonl:900: more than 236 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="more than 236 tokens .* nor do any of the others"):
        fitting(problems.select([1]), *most, BadRows("skip"))


def test_records_that_are_no_problems_are_counted_if_bad_rows_are_skipped(tmp_path, capsys):
    records = [{"question": "Which?", "choices": ["red", "blue"], "answer": 0}, {"text": "no question"}]
    records.append({"question": "1+1?", "answer": "#### 2"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bad = BadRows("skip")
    assert len(read_problems([str(tmp_path / "a.jsonl")], bad)) == 1 and len(bad) == 2
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(UserError, match="a.jsonl: no record is a problem; left out: 1 rows, first .*a record of mmlu"):
        read_problems([str(tmp_path / "a.jsonl")], BadRows("skip"))


@pytest.mark.parametrize("spread", [True, False])
def test_weights_move_only_where_rewards_differ_within_a_group(toy_model_folder, tmp_path, spread):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, dtype=torch.float32, device="cpu")
    before = {name: p.clone() for name, p in model.named_parameters() if "layers" in name}
    args = GRPOSettings(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_completion_length=6,
        max_steps=1, beta=0.0, scale_rewards="none", loss_type="bnpo", bf16=False, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip

    def reward(completions, **kwargs):
        return [float(i % 2) if spread else 1.0 for i in range(len(completions))]

    rates = {"matrix_lr": 0.02, "embedding_lr": 0.0, "unembedding_lr": 0.0}
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 12+7?"}]}] * 4)
    trainer = NanoChatGRPOTrainer(
        model=model,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        reward_funcs=reward,
        muon_rates=rates,
    )
    trainer.train()
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert moved == spread
