import json

import pytest
import torch
from datasets import Dataset

from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import NanoChatGRPOTrainer, exact_answer, read_problems
from recipes.training.trl.settings import GRPOSettings


def test_reward_is_for_the_exact_answer_in_the_last_message():
    call = {"role": "assistant", "content": "#### 5", "tool_calls": [{}]}
    tool = {"role": "tool", "content": "#### 19"}
    completions = [
        [{"role": "assistant", "content": "19 apples.\n#### 19"}],
        [call, tool, {"role": "assistant", "content": "#### 19"}],
        [{"role": "assistant", "content": "#### 19."}],
        [call, tool],
        [{"role": "assistant", "content": "19"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    problem = json.dumps({"question": "Apples?", "answer": "12 + 7 = <<12+7=19>>19\n#### 19"})
    rewards = exact_answer([None] * 7, completions, [problem] * 7)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


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
    problem = json.dumps({"question": "The story?", "answer": ["Mira", "kite"], "rivals": ["drum"]})
    rewards = exact_answer([None] * 6, completions, [problem] * 6)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_problems_of_both_kinds_are_read_into_the_same_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    history = [{"role": "user", "content": "I am Mira."}, {"role": "assistant", "content": "Hello, Mira!"}]
    record = {"history": history, "question": "Who am I?", "answer": "Mira", "rivals": ["Tom"]}
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    first, second = read_problems([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert first["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert json.loads(first["problem"]) == {"question": "1+1?", "answer": "#### 2"}
    assert second["prompt"] == [*history, {"role": "user", "content": "Who am I?"}]
    assert json.loads(second["problem"]) == record


def test_a_record_that_is_not_answered_in_words_is_refused(tmp_path):
    record = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a.jsonl:1: a record of mmlu; only replies to match and gsm8k can be rewarded"
    ):
        read_problems([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize("spread", [True, False])
def test_weights_move_only_where_rewards_differ_within_a_group(toy_model_folder, tmp_path, spread):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, dtype=torch.float32, device="cpu")
    before = {name: p.clone() for name, p in model.named_parameters() if "layers" in name}
    args = GRPOSettings(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=4, max_completion_length=6,
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
