"""Templates of other origin: rendered in another process, with the same results, within limits."""

import copy
import pickle
import time

import pytest

from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.chat.turn import chat_codec
from modeling_nanochat.checks import chat_templates
from modeling_nanochat.checks.chat_templates import OWN_TEMPLATE, LimitedTemplate, limit_chat_template
from modeling_nanochat.errors import UserError

OWN = OWN_TEMPLATE.read_text(encoding="utf-8")
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}
CONVERSATION = [
    {"role": "user", "content": "<|bos|> Add, é 🦙!"},
    {"role": "assistant", "content": "So:", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def add(number: int) -> int:
    """Add one.

    Args:
        number: The number.
    """
    return number + 1


@pytest.fixture(scope="module")
def process():
    """One process for all tests of this module: starting it takes seconds."""
    return chat_templates.RenderProcess()


@pytest.fixture
def foreign(toy_model_and_tokenizer, process):
    """The toy tokenizer with our template, which is not byte-equal to it."""
    tokenizer = copy.deepcopy(toy_model_and_tokenizer[1])
    tokenizer.chat_template = OWN + "{#- someone's -#}"
    limit_chat_template(tokenizer, "me/toy")
    tokenizer.apply_chat_template.process = process
    return tokenizer


@pytest.mark.parametrize("template", [OWN, None])
def test_our_own_template_is_rendered_as_ever(toy_model_and_tokenizer, template):
    tokenizer = copy.deepcopy(toy_model_and_tokenizer[1])
    tokenizer.chat_template = template
    limit_chat_template(tokenizer, "me/toy")
    assert "apply_chat_template" not in vars(tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenize": False},
        {"return_dict": False, "tokenizer_kwargs": {"verbose": False}},
        {"add_generation_prompt": True, "return_tensors": "pt"},
        {"return_assistant_tokens_mask": True},
        {"tools": [add]},
        {"tools": [{"type": "function", "function": {"name": "look_up"}}]},
        {"enable_thinking": True},
        {"truncation": True, "max_length": 5},
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_results_are_those_of_the_library(foreign, toy_model_and_tokenizer, options):
    expected = toy_model_and_tokenizer[1].apply_chat_template(CONVERSATION, **options)
    assert str(foreign.apply_chat_template(CONVERSATION, **options)) == str(expected)


def test_a_batch_is_rendered_as_by_the_library(foreign, toy_model_and_tokenizer):
    options = {"padding": True, "return_assistant_tokens_mask": True}
    batch = [CONVERSATION, CONVERSATION[:1]]
    expected = toy_model_and_tokenizer[1].apply_chat_template(batch, **options)
    assert foreign.apply_chat_template(batch, **options).data == expected.data


def test_a_copy_has_limits_too(foreign):
    twin = pickle.loads(pickle.dumps(foreign))
    assert isinstance(twin.apply_chat_template, LimitedTemplate)
    assert twin.apply_chat_template.tokenizer is twin
    assert twin.apply_chat_template.process.process is None


def refusal(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        tokenizer.apply_chat_template(CONVERSATION)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("me/toy: its chat template cannot render a conversation: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**10 }}", "256 MB"),
        ("{{ [0] * 10**10 }}", "256 MB"),
        ("{{ 'a'|center(10**10) }}", "256 MB"),
        ("{{ 'a'.ljust(10**10) }}", "256 MB"),
        ("{{ '%10000000000d' % 1 }}", "256 MB"),
        ("{{ messages|tojson(indent=10**10) }}", "256 MB"),
        ("{% set o = namespace(s='aaaaa') %}{% for i in range(90) %}{% set o.s = o.s ~ o.s %}{% endfor %}", "256 MB"),
        ("{{ 'a' * 10**7 }}", "4,194,304 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ nobody.knows }}", "UndefinedError"),
        ("{{ raise_exception('two\nlines') }}", "TemplateError: two lines"),
        ("{% include 'config.json' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_grows_or_fails_is_one_line(foreign, template, reason):
    assert reason in refusal(foreign, template)


@pytest.mark.parametrize("name", ["check_renderings", "chat_codec"])
def test_chat_and_training_report_it(foreign, name):
    foreign.chat_template = "{{ nobody.knows }}"
    with pytest.raises(UserError, match="UndefinedError"):
        check_renderings(foreign) if name == "check_renderings" else chat_codec(foreign).prompt(CONVERSATION)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set x = range(99999)|join('aaaa') %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_template_that_takes_forever_is_stopped(foreign, template):
    started = time.monotonic()
    assert "took more than 3 s" in refusal(foreign, template)
    assert time.monotonic() - started < 20  # with the start of the process


def test_after_a_kill_the_next_conversation_is_rendered(foreign, toy_model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.1)
    assert "took more than 0.1 s" in refusal(foreign, NESTED)
    monkeypatch.undo()
    foreign.chat_template = OWN + " "
    expected = toy_model_and_tokenizer[1].apply_chat_template(CONVERSATION)
    assert (
        foreign.apply_chat_template(CONVERSATION)["input_ids"][: len(expected["input_ids"])] == expected["input_ids"]
    )


def test_a_template_that_is_no_text_is_refused(toy_model_and_tokenizer):
    tokenizer = copy.deepcopy(toy_model_and_tokenizer[1])
    tokenizer.chat_template = {"default": 5}
    with pytest.raises(UserError, match="not text"):
        limit_chat_template(tokenizer, "me/toy")
