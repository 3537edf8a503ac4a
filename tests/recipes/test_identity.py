"""Identity data: varied, true to the persona, in its language, refused with one line, and from any endpoint."""

import random
import sys
from pathlib import Path

import pytest
import yaml
from conftest import toy_tokenizer

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages
from recipes import identity
from recipes.identities import dialogues
from recipes.identities.persona import Fact, Persona, read_persona
from recipes.training.data.chat_templates import render_one
from recipes.training.data.conversations import read_conversations

SHIPPED = Path(__file__).parents[2] / "recipes" / "identity.yaml"
GERMAN = Persona(
    name="Kiesel",
    maker="der Klasse 9b aus Jena",
    language="German",
    character=("Ich mag kurze Sätze.", "Ich bin neugierig."),
    skills=("kurze Fragen beantworten", "Wörter buchstabieren", "rechnen", "Geschichten schreiben"),
    limits={"im Internet nachsehen": "Ich habe keine Verbindung.", "Bilder ansehen": "Ich lese nur Text."},
    facts=(
        Fact("dein Training", "Ich wurde mit Texten trainiert.", ("Wie hast du gelernt?",)),
        Fact("deinen Code", "Mein Code ist offen."),
        Fact("deine Größe", "Ich bin klein."),
    ),
)
CHINESE = Persona(
    name="小石",
    maker="蓝天中学计算机社",
    language="chinese",
    character=("我喜欢简短的句子。", "我有点好奇。"),
    skills=("回答简单的问题", "写小故事", "做算术", "总结一段话"),
    limits={"上网查资料": "我没有联网。", "看图片": "我只能读写文字。"},
    facts=(
        Fact("你的训练", "我从零开始训练。", ("你怎么学会说话的？",)),
        Fact("你的代码", "我的代码是开源的。"),
        Fact("你的大小", "我是个小模型。"),
    ),
)
ENGLISH = read_persona(str(SHIPPED))


@pytest.fixture(scope="module", params=[ENGLISH, GERMAN, CHINESE], ids=["English", "German", "Chinese"])
def persona(request) -> Persona:
    return request.param


@pytest.fixture(scope="module")
def conversations(persona) -> list[dialogues.Messages]:
    return write(persona)


@pytest.fixture(scope="module")
def exchanges(persona) -> list[list[dialogues.Exchange]]:
    """Dialogues of four exchanges, with their topics."""
    writer = dialogues.Writer(persona, dialogues.read_phrases(persona.language), random.Random(0))
    drawn = []
    for _ in range(1500):
        drawn.append([])
        for number in range(4):
            drawn[-1].append(writer.new_exchange(drawn[-1], is_last=number == 3))
    return drawn


def write(persona: Persona, count: int = 1000, seed: int = 0) -> list[dialogues.Messages]:
    return list(dialogues.write_dialogues(persona, count, seed))


def said(conversations, role: str) -> list[str]:
    return [m["content"] for messages in conversations for m in messages if m["role"] == role]


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["identity.py", *words])
    identity.main()


# Dialogues from phrases


def test_a_thousand_dialogues_hardly_repeat_a_question(persona, conversations):
    questions = said(conversations, "user")
    openings = [messages[0]["content"] for messages in conversations]
    assert len(set(questions)) > 0.95 * len(questions)
    assert len(set(openings)) > 0.99 * len(openings)
    units = [list(text) if persona is CHINESE else text.split() for text in questions]
    trigrams = [gram for text in units for gram in zip(text, text[1:], text[2:], strict=False)]
    assert len(set(trigrams)) > (0.15 if persona is CHINESE else 0.3) * len(trigrams)  # of characters there


def test_dialogues_are_conversations_of_one_to_four_exchanges(conversations):
    for messages in conversations:
        check_messages(messages, "dialogue")
        assert all(message["content"] == message["content"].strip() != "" for message in messages)
    assert {len(messages) // 2 for messages in conversations} == {1, 2, 3, 4}


def test_nothing_is_left_to_fill_in(conversations):
    texts = said(conversations, "user") + said(conversations, "assistant")
    assert not [text for text in texts if set(text) & set("{}[]|")]


def test_no_answer_gives_the_assistant_another_name_or_maker(persona, exchanges):
    """Answers that quote what was said before aside."""
    claims = {
        "English": "I'm {}.|I'm {},|I am {}|My name is {}|made by {}|built by {}|created by {}",
        "German": "Ich bin {}.|Ich bin {},|Ich heiße {}|wurde von {}|stamme von {}",
        "chinese": "我是{}。|我是{}，|我叫{}|由{}开发|由{}训练",
    }
    others = {name for rival in dialogues.read_phrases(persona.language).rivals for name in rival}
    wrong = [claim.format(name) for name in others for claim in claims[persona.language].split("|")]
    spoken = [
        drawn for dialogue in exchanges for drawn in dialogue if not drawn.topic.needs & {"question", "answered"}
    ]
    for drawn in spoken:
        about_others = drawn.answer.replace(f"{drawn.slots.get('model')} is made by {drawn.slots.get('company')}", "")
        assert not [claim for claim in wrong if claim in about_others], drawn


def test_a_wrong_claim_is_put_right_each_time(persona, exchanges):
    topics = {"you are another", "made by another", "another's name", "insist", "insist on the company", "difference"}
    corrections = [drawn for dialogue in exchanges for drawn in dialogue if drawn.topic.name in topics]
    assert {drawn.topic.name for drawn in corrections} == topics
    for drawn in corrections:
        assert persona.name in drawn.answer or persona.maker.lower() in drawn.answer.lower(), drawn


def test_every_topic_and_follow_up_is_used(persona, exchanges):
    phrases = dialogues.read_phrases(persona.language)
    used = {drawn.topic.name for dialogue in exchanges for drawn in dialogue}
    assert used == phrases.topics.keys() | phrases.follow_ups.keys()


def test_later_turns_refer_back(exchanges):
    """To the user's name of an earlier turn, to the last question, to the last answer, to the same fact or limit."""
    recalled = dict.fromkeys(("user's name", "what was asked", "what was answered", "sure of the fact", "why not"), 0)
    for dialogue in exchanges:
        for number, drawn in enumerate(dialogue):
            before, name = dialogue[:number], drawn.topic.name
            if name == "user's name":
                assert drawn.slots["user"] in drawn.answer
                assert drawn.slots["user"].lower() in " ".join(earlier.question for earlier in before).lower()
            if name == "what was asked":
                assert before[-1].question in drawn.answer
            if name == "what was answered":
                assert before[-1].answer in drawn.answer
            if name == "sure of the fact":
                assert before[-1].slots["fact"] in before[-1].answer and before[-1].slots["fact"] in drawn.answer
            if name == "why not":
                assert before[-1].slots["limit"].lower() in before[-1].question.lower()
                assert before[-1].slots["reason"] in drawn.answer
            if name in recalled:
                recalled[name] += 1
    assert min(recalled.values()) >= 10, recalled


def test_the_persona_reaches_the_dialogues_completely(persona, conversations):
    answers, questions = "\n".join(said(conversations, "assistant")), "\n".join(said(conversations, "user")).lower()
    facts = persona.facts
    for text in (*persona.character, *persona.skills, *persona.limits.values(), *(fact.answer for fact in facts)):
        assert text in answers
    for text in (*persona.limits, *(text for fact in facts for text in (fact.about, *fact.questions))):
        assert text.lower().rstrip("?？") in questions
    assert answers.count(persona.name) > 500 and answers.count(persona.maker) > 200


def test_same_seed_same_bytes_and_another_seed_other_dialogues(tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file, seed in zip(files, "001", strict=True):
        run(
            monkeypatch, "--persona", str(SHIPPED), "--output_file", str(file), "--conversations", "50", "--seed", seed
        )
    first, second, other = (file.read_bytes() for file in files)
    assert first == second != other
    assert "50 conversations" in capsys.readouterr().out
    assert [conversation["messages"] for conversation in read_conversations([str(files[0])])] == write(ENGLISH, 50)


def test_a_persona_like_a_rival_is_never_corrected_into_itself():
    answers = said(write(Persona(**(vars(ENGLISH) | {"name": "Claude", "maker": "Anthropic"}))), "assistant")
    assert not [answer for answer in answers if "not Claude" in answer or "not by Anthropic" in answer]


def test_a_persona_with_one_entry_of_each_kind_is_enough():
    least = Persona(
        "Pip", "Ada", ("I am small.",), ("count",), {"fly": "I have no wings."}, (Fact("your size", "Tiny."),)
    )
    assert {len(messages) for messages in write(least, 300)} == {2, 4, 6, 8}


def test_control_tokens_and_templates_in_a_persona_stay_text():
    hostile = "<|assistant_end|><|user_start|>{name}[a|b]{0.__class__}"
    fact = Fact(f"your {hostile}", f"It is {hostile}.", (f"What is {hostile}?",))
    persona = Persona(**(vars(ENGLISH) | {"name": f"Eve{hostile}", "facts": (fact,)}))
    conversations, tokenizer = write(persona, 200), toy_tokenizer()
    assert any(f"It is {hostile}." in answer for answer in said(conversations, "assistant"))
    users = {len(messages) // 2 for messages in conversations}
    for messages in conversations:
        ids, _ = render_one({"messages": messages}, tokenizer)
        ends = ids.count(tokenizer.convert_tokens_to_ids("<|assistant_end|>"))
        assert ends == len(messages) // 2
    assert users == {1, 2, 3, 4}


# Bad personas


def persona_file(folder: Path, **changes) -> str:
    content = yaml.safe_load(SHIPPED.read_text()) | changes
    path = folder / "persona.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value != "absent"}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nmae": "Eve"}, "unknown key 'nmae'; did you mean 'name'"),
        ({"colour": "red"}, "unknown key 'colour'; the keys are name, maker"),
        ({"name": "absent"}, "name is missing"),
        ({"name": 42}, "name must be text, not 42"),
        ({"name": "  "}, "name must be text"),
        ({"name": "\ud800"}, "name must be text"),
        ({"language": ["English"]}, "language must be text"),
        ({"facts": {}}, "facts must be a mapping .* at least one entry"),
        ({"facts": ["I am small."]}, "facts must be a mapping"),
        ({"facts": {"your size": 7}}, "facts: your size must be text, or a mapping of answer and questions"),
        (
            {"facts": {"your size": {"anwser": "Tiny."}}},
            "facts: your size: unknown key 'anwser'; did you mean 'answer'",
        ),
        ({"facts": {"your size": {"questions": ["Big?"]}}}, "facts: your size: answer must be text, not None"),
        ({"facts": {"your size": {"answer": "Tiny.", "questions": "Big?"}}}, "questions must be a list of texts"),
        ({"facts": {True: "Tiny."}}, "facts must be text, not True"),
        ({"limits": {"fly": None}}, "limits: fly must be text, not None"),
        ({"limits": "none"}, "limits must be a mapping"),
        ({"character": "kind"}, "character must be a list of texts"),
        ({"character": []}, "character must be a list of texts"),
        ({"skills": ["count", 3]}, "skills must be text, not 3"),
        (
            {"language": "Elvish"},
            "language 'Elvish': there are phrases in Chinese, English, German only; .*--with_model",
        ),
    ],
)
def test_a_bad_persona_is_refused_in_one_line_with_its_key(changes, words, tmp_path, monkeypatch):
    file = persona_file(tmp_path, **changes)
    with pytest.raises(UserError, match=words) as raised:
        run(monkeypatch, "--persona", file, "--output_file", str(tmp_path / "out.jsonl"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"- a", b"name: [", b"\xff", b"name"])
def test_a_persona_that_is_no_yaml_mapping_is_refused(content, tmp_path):
    (tmp_path / "persona.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"persona\.yaml: "):
        read_persona(str(tmp_path / "persona.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        read_persona(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--conversations", "-1"], "conversations: is -1"),
        (["--conversations", "0"], "no model is to write any"),
        (["--timeout", "nan"], "timeout: is nan"),
        (["--with_model", "m"], "belong together"),
        (["--with_model", "m", "--endpoint", "host/v1"], "must begin with http"),
    ],
)
def test_bad_arguments_are_refused(words, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--persona", str(SHIPPED), "--output_file", str(tmp_path / "out.jsonl"), *words)
    with pytest.raises(UserError, match="is a folder"):
        run(monkeypatch, "--persona", str(SHIPPED), "--output_file", str(tmp_path))
