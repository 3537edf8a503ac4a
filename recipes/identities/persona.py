"""A persona: who the assistant is, read from a short YAML file."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from modeling_nanochat.errors import UserError


@dataclass(frozen=True)
class Fact:
    """Something the assistant knows about itself: `about` follows "Tell me about", `answer` is in the first person."""

    about: str
    answer: str
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Persona:
    """Who the assistant is. All texts are taken literally, in the persona's language.

    `character` are sentences in the first person. `skills` and the keys of `limits` are verb phrases that follow
    "Can you"; the value of a limit is a sentence that says why not.
    """

    name: str
    maker: str
    character: tuple[str, ...]
    skills: tuple[str, ...]
    limits: dict[str, str]
    facts: tuple[Fact, ...]
    language: str = "English"


def read_persona(file: str) -> Persona:
    """Read the persona in a YAML file; every key but `language` is required.

    Raises:
        UserError: The file is missing or not YAML, or a key is unknown, missing, empty or of the wrong type.
    """
    content = read_mapping(file)
    known = [field.name for field in fields(Persona)]
    check_known(file, content, known)
    if missing := [name for name in known if name not in content and name != "language"]:
        raise UserError(f"{file}: {missing[0]} is missing; add it as in recipes/identity.yaml")
    words = {key: text(file, key, content[key]) for key in ("name", "maker", "language") if key in content}
    lists = {key: texts(file, key, content[key]) for key in ("character", "skills")}
    limits = {
        text(file, "limits", key): text(file, f"limits: {key}", value)
        for key, value in mapping(file, "limits", content["limits"]).items()
    }
    facts = (fact(file, about, value) for about, value in mapping(file, "facts", content["facts"]).items())
    return Persona(limits=limits, facts=tuple(facts), **words, **lists)


def read_mapping(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"persona {file}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    return mapping(file, "the persona", content)


def check_known(file: str, content: dict[str, Any], known: list[str], where: str = "") -> None:
    if unknown := [str(key) for key in content if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
        raise UserError(f"{file}: {where}unknown key {unknown[0]!r}; {meant}")


def fact(file: str, about: Any, value: Any) -> Fact:
    """The fact under the key `about`: a text, or a mapping of `answer` and `questions`."""
    where = f"facts: {text(file, 'facts', about)}"
    if isinstance(value, str):
        return Fact(about, text(file, where, value))
    content = mapping(file, where, value, "text, or a mapping of answer and questions")
    check_known(file, content, ["answer", "questions"], f"{where}: ")
    questions = texts(file, f"{where}: questions", content["questions"]) if "questions" in content else ()
    return Fact(about, text(file, f"{where}: answer", content.get("answer")), questions)


def mapping(file: str, where: str, value: Any, what: str = "a mapping of `key: value` lines") -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: {where} must be {what}, with at least one entry; see recipes/identity.yaml")
    return value


def texts(file: str, where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{file}: {where} must be a list of texts, with at least one entry; see recipes/identity.yaml")
    return tuple(text(file, where, entry) for entry in value)


def text(file: str, where: str, value: Any) -> str:
    if not is_text(value):
        raise UserError(f"{file}: {where} must be text, not {value!r:.40}; put it in quotes, or fill it in")
    return value.strip()


def is_text(value: Any) -> bool:
    """Whether `value` is a string of more than white space, without the lone surrogates that UTF-8 cannot encode."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)
