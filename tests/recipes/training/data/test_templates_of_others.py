"""Any chat template: the ids are the template's, the mask is what a model writes after its generation prompts."""

import numpy as np
import pytest
import trl.chat_template_utils as trl_templates
from other_models import CHATML, SMOL, chatml_tokenizer
from training import render

from modeling_nanochat.checks.chat_templates import limit_chat_template
from modeling_nanochat.errors import UserError
from recipes.training.data.chat_templates import end_of_turn, rendering_of

CHAT = [
    {"role": "user", "content": "Grüße! Who?"},
    {"role": "assistant", "content": "I am a café."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "\n A lamp 🙂"},
]
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "12*7"}}}
WITH_CALL = [
    {"role": "user", "content": "12*7?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "name": "python", "content": "84"},
    {"role": "assistant", "content": "84."},
]
BLOCKS = CHATML.replace(
    "{{ message.content }}<|im_end|>\n",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}",
)
# As some authors have it: the blocks begin with the header, which the generation prompt writes, and leave out the end
WRONG_BLOCKS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ message.content }}{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def limited(template, **options):
    tokenizer = chatml_tokenizer(template, **options)
    limit_chat_template(tokenizer, "me/other")
    return tokenizer


def written(tokenizer, ids, mask):
    """The marked texts, with special tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [CHATML, SMOL, BLOCKS, WRONG_BLOCKS, trl_templates.qwen2_5_chat_template])
def test_the_mask_is_each_answer_with_the_token_that_ends_it(template):
    tokenizer = limited(template)
    ((ids, mask),) = render([{"messages": CHAT}], tokenizer, 512)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert written(tokenizer, ids, mask) == ["I am a café.<|im_end|>", "\n A lamp 🙂<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, SMOL, WRONG_BLOCKS])
def test_what_is_marked_follows_the_prompt_that_a_model_is_given(template):
    tokenizer = limited(template)
    ((ids, mask),) = render([{"messages": CHAT[:2]}], tokenizer, 512)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt and mask.argmax() == len(prompt)


def test_qwen3_is_rendered_as_trl_trains_it_and_its_own_template_stays():
    tokenizer = limited(trl_templates.qwen3_chat_template)
    ((ids, mask),) = render([{"messages": CHAT}], tokenizer, 512)
    thought = "<think>\n\n</think>\n\n"
    assert written(tokenizer, ids, mask) == [f"{thought}I am a café.<|im_end|>", f"{thought} A lamp 🙂<|im_end|>"]
    assert tokenizer.chat_template == trl_templates.qwen3_chat_template


def test_a_thought_with_which_prompts_begin_is_not_trained_on():
    tokenizer = limited(trl_templates.qwen3_5_nothink_chat_template)
    ((ids, mask),) = render([{"messages": CHAT}], tokenizer, 512)
    assert written(tokenizer, ids, mask) == ["I am a café.<|im_end|>", "A lamp 🙂<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5_chat_template", "qwen3_chat_template"])
def test_calls_are_trained_on_and_their_results_are_not(name):
    tokenizer = limited(getattr(trl_templates, name))
    ((ids, mask),) = render([{"messages": WITH_CALL}], tokenizer, 1024)
    call, answer = written(tokenizer, ids, mask)
    assert '"code": "12*7"' in call and call.startswith(("Let me see.", "<think>"))
    assert call.endswith("</tool_call><|im_end|>") and answer.endswith("84.<|im_end|>") and "84" not in call


@pytest.mark.parametrize("extra", [{"tool_calls": [CALL]}, {}])
def test_calls_and_tools_that_a_template_would_drop_are_refused_by_row(extra):
    messages = [WITH_CALL[0], {"role": "assistant", "content": "Let me see.", **extra}]
    chat = {"messages": messages + WITH_CALL[2:] if extra else messages}
    chat |= {} if extra else {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}
    with pytest.raises(UserError, match=r"^chats:1: the chat template writes no tool calls; leave the row out"):
        render([chat], limited(SMOL), 512)
    assert render([chat, {"messages": CHAT}], limited(SMOL), 512, on_bad_row="skip")[0] is None


def test_a_row_without_an_answer_is_refused():
    with pytest.raises(UserError, match="chats:1: no answer of the assistant to train on"):
        render([{"messages": CHAT[:1]}], limited(SMOL), 512)


def test_a_row_that_the_template_refuses_is_named():
    tokenizer = limited("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    with pytest.raises(
        UserError, match=r"chats:2: me/other: its chat template cannot render a conversation: .*no system"
    ):
        render([{"messages": CHAT}, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}], tokenizer, 512)


UNSTABLE = CHATML.replace("{{ message.content }}", "{{ message.content if loop.last else message.content[:4] }}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (UNSTABLE, "renders turns of the assistant otherwise"),
        (CHATML.replace("<|im_end|>", ""), "ends them with no special token"),
        ("{{ messages[-1].content }}", "cannot be trained on"),
        ("{% for message in messages %}<|im_start|>{{ message.role }}<|im_end|>{% endfor %}", "cannot be trained on"),
        ("{{ nobody.knows }}", "cannot be trained on"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_by_name(template, reason):
    tokenizer = limited(template)
    tokenizer.name_or_path = "me/other"
    with pytest.raises(UserError, match=f"^me/other: .*{reason}") as error:
        rendering_of(tokenizer)
    assert "\n" not in str(error.value)


def test_answers_of_weight_zero_are_not_trained_on():
    silent = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    tokenizer = limited(SMOL)
    ((ids, mask),) = render([{"messages": silent}], tokenizer, 512)
    assert written(tokenizer, ids, mask) == ["\n A lamp 🙂<|im_end|>"]


def test_the_token_that_ends_a_turn_is_the_template_s_not_the_tokenizer_s(toy_model_and_tokenizer):
    other = limited(CHATML, eos_token="<|endoftext|>")
    assert end_of_turn(rendering_of(other)) == other.convert_tokens_to_ids("<|im_end|>")
    ours = toy_model_and_tokenizer[1]
    assert end_of_turn(rendering_of(ours)) == ours.convert_tokens_to_ids("<|assistant_end|>")
