"""SFT's trainer with a small model, for tests of what it computes."""

from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from training import render
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipes.sft import NanoChatSFTTrainer, token_dataset
from recipes.training.data.packing import Conversation
from recipes.training.trl.settings import SFTSettings
from recipes.training.trl.trainer import RateArguments


def sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rendered: list[Conversation],
    held_out: list[Conversation] | None = None,
    **settings: object,
) -> NanoChatSFTTrainer:
    """A trainer on the CPU that writes nothing, for rendered conversations."""
    folder = TemporaryDirectory()  # the trainer makes its output_dir at once
    quiet = {"output_dir": folder.name, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    quiet |= {"max_length": 256, "logging_steps": 1, "num_train_epochs": 1, "use_cpu": True}
    trainer = NanoChatSFTTrainer(
        model=model,
        args=SFTSettings(**quiet | settings),
        train_dataset=token_dataset(rendered),
        eval_dataset=token_dataset(held_out) if held_out else None,
        processing_class=tokenizer,
        muon_rates=RateArguments(init_lr_fraction=0.1).scaled(),
    )
    trainer.temporary = folder  # deleted with it
    return trainer


def chats(tokenizer: PreTrainedTokenizerFast, count: int) -> list[Conversation]:
    """Conversations of 10 to 40 tokens, some with a call and its result."""
    return render([chat(number) for number in range(count)], tokenizer, 256, show_progress=False)


def chat(number: int) -> dict:
    answer = {"role": "assistant", "content": "It is " * (number % 5) + f"{number + 7}."}
    called = {"function": {"name": "python", "arguments": {"code": f"{number}+7"}}}
    turns = [{"role": "user", "content": f"What is {number}+7?"}]
    if number % 3 == 0:
        turns += [{"role": "assistant", "tool_calls": [called]}, {"role": "tool", "content": f"{number + 7}"}]
    return {"messages": [*turns, answer]}


def conversations_of(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """The conversations of a batch as ids and labels, without padding."""
    found = []
    positions = batch.get("position_ids")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if positions is None:
            found.append((ids[batch["attention_mask"][row].bool()], labels[batch["attention_mask"][row].bool()]))
            continue
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), len(ids)]
        found += [(ids[a:b], labels[a:b]) for a, b in pairwise(starts) if b - a > 1]  # a token of padding is alone
    return [(ids.tolist(), labels.tolist()) for ids, labels in found]


def loss_and_gradients(trainer: NanoChatSFTTrainer) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all batches of the training data, per trained-on token, and its gradients."""
    batches = list(trainer.get_train_dataloader())
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(tokens))
        loss.backward()
        total += loss.item()
    return total, {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
