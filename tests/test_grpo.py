import pytest
import torch
from datasets import Dataset

from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import NanoChatGRPOTrainer, exact_answer
from recipes.trl_settings import GRPOSettings


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
    rewards = exact_answer([None] * 7, completions, ["12 + 7 = <<12+7=19>>19\n#### 19"] * 7)
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("spread", [True, False])
def test_weights_move_only_where_rewards_differ_within_a_group(toy_model_folder, tmp_path, spread):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, dtype=torch.float32, device="cpu")
    before = {name: p.clone() for name, p in model.named_parameters() if "layers" in name}
    args = GRPOSettings(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=4, max_completion_length=6, max_steps=1,
        beta=0.0, scale_rewards="none", loss_type="bnpo", bf16=False, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip

    def reward(completions, **kwargs):
        return [float(i % 2) if spread else 1.0 for i in range(len(completions))]

    rates = {"matrix_lr": 0.02, "embedding_lr": 0.0, "unembedding_lr": 0.0}
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 12+7?"}]}] * 4)
    trainer = NanoChatGRPOTrainer(
        model=model, args=args, train_dataset=prompts, processing_class=tokenizer, reward_funcs=reward, muon_rates=rates
    )
    trainer.train()
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert moved == spread
