"""TRL's packing, `packing: true`: whole conversations share rows of `max_length` tokens, and see only themselves."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from modeling_nanochat.errors import UserError

PROBE_TOKENS = 64  # of each conversation in the test for separation
IGNORED = -100


class RowCollator(DataCollatorForLanguageModeling):
    """Packed rows stay rows, (B, T); TRL joins those of a batch in one, (1, B x T), which is for flash attention.

    Other kernels mask conversations by a matrix over the row, which would grow from B x T^2 to (B x T)^2.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows padded on the right, and `num_tokens` (1,) without the padding, which attends to itself only."""
        rows = [super(RowCollator, self).torch_call([example]) for example in examples]
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        batch = {
            key: pad_sequence([row[key][0] for row in rows], batch_first=True, padding_value=value)
            for key, value in padding.items()
        }
        return batch | {"num_tokens": torch.tensor([sum(len(example["input_ids"]) for example in examples)])}


class Packing(SFTTrainer):
    """Trainer mixin: with `packing`, rows suit the attention implementation, and it keeps conversations apart.

    Raises:
        UserError: It does not.
    """

    args: SFTConfig
    model: PreTrainedModel

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.args.packing:
            return
        collator = self.data_collator
        assert isinstance(collator, DataCollatorForLanguageModeling), "TRL refuses others when packing"
        if not is_flash_attention_requested(self.model.config):
            self.data_collator = RowCollator(
                collator.pad_token_id, padding_free=True, pad_to_multiple_of=collator.pad_to_multiple_of
            )
        if not self.keeps_conversations_apart():
            raise UserError(
                f"packing: with attn_implementation {self.model.config._attn_implementation} this model lets "
                "conversations see those before them in their row; take sdpa, or set packing to false"
            )

    @torch.no_grad()
    def keeps_conversations_apart(self) -> bool:
        """Whether the logits of a conversation are the same behind two different ones."""
        first, other, last = torch.arange(3 * PROBE_TOKENS).fmod(self.model.config.vocab_size).chunk(3)
        rows = [{"input_ids": [*begin.tolist(), *last.tolist()]} for begin in (first, other)]
        batch = self._prepare_inputs(
            self.data_collator([row | {"seq_lengths": [PROBE_TOKENS, PROBE_TOKENS]} for row in rows])
        )
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "num_tokens")}
        self.model.eval()
        with self.accelerator.autocast():
            logits = self.model(**inputs, use_cache=False).logits
        self.model.train()
        one, two = logits.reshape(2, 2 * PROBE_TOKENS, -1)[:, PROBE_TOKENS:].float()
        return not (one - two).abs().max() > 1e-2 * one.abs().max()  # NaN is for the first step to report

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in TRL, which would count the tokens of one row of a batch only."""
        counted, tokens = self._total_train_tokens, inputs.pop("num_tokens", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if tokens is not None:
            self._total_train_tokens = counted + int(self.accelerator.gather(tokens).sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
