"""Every command in docstrings, READMEs and CONTRIBUTING goes through its script's own parser and does no work."""

import argparse
import ast
import importlib.util
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from trl import TrlParser

from modeling_nanochat.errors import UserError
from recipes.ladder.arguments import LADDER, RunArguments, parse_overrides
from recipes.ladder.commands import RECIPES, steps
from recipes.run import recipe_and_words

ROOT = Path(__file__).parents[2]
ROOMS = ("modeling_nanochat", "tokenizer_train", "evals", "recipes", "space")
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
STARTS = re.compile(rf"^(\$launch|python|accelerate launch|torchrun|{'|'.join(COMMANDS)})\s")
ASSIGNMENT = re.compile(r'^(\w+)="(.*)"$')


def texts():
    """Each document with the text that may hold commands: Markdown, and the docstrings of modules."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]):
        if path.relative_to(ROOT).parts[0] in (*ROOMS, "accelerate_configs") or path.parent == ROOT:
            yield path, path.read_text(encoding="utf-8")
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


def commands(text):
    """The commands of a text: lines of code, and spans of code that are a command with options.

    Variables are filled in, and `...` by the options of the command before.
    """
    variables, before = {}, ""
    lines = text.replace("\\\n", " ").splitlines()
    spans = re.findall(r"`((?:python|nanochat-)[^`\n]* --[^`\n]*)`", text)
    for line in [*map(str.strip, lines), *spans]:
        if found := ASSIGNMENT.match(line):
            variables[f"${found[1]}"] = found[2]
        elif STARTS.match(line) and "`" not in line:
            command = line
            for name, value in variables.items():
                command = command.replace(name, value)
            before = command.replace(" ... ", f" {before.partition('.py ')[2]} ")
            yield before


def documented():
    return [(path, line) for path, text in texts() for line in commands(text)]


def entry_and_words(line):
    """The module and function that a command starts, and what that gets as its arguments; None if it is not ours."""
    words = shlex.split(line, comments=True)
    for position, word in enumerate(words):
        if word == "--config_file":
            assert (ROOT / words[position + 1]).is_file(), f"no {words[position + 1]}"
        if word in COMMANDS:
            return *COMMANDS[word].split(":"), words[position + 1 :]
        if word == "-m" and words[position + 1].startswith(ROOMS):
            return f"{words[position + 1]}.__main__", "main", words[position + 2 :]
        if word.endswith(".py") and words[position - 1] != "-m":
            assert (ROOT / word).is_file(), f"no script {word}"
            module = str(Path(word).with_suffix("")).replace(os.sep, ".")
            return module, "start" if module == "space.app" else "main", words[position + 1 :]
    return None


class Parsed(BaseException):
    """Ends a script as soon as its arguments are read."""


@pytest.fixture
def parse_only(monkeypatch):
    """Runs the entry of a command up to the end of its parser."""

    def ended(parser):
        original = getattr(*parser)

        def parse(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        return parse

    for parser in ((TrlParser, "parse_args_and_config"), (argparse.ArgumentParser, "parse_args")):
        monkeypatch.setattr(*parser, ended(parser))
    monkeypatch.chdir(ROOT)

    def run(module, function, words):
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            getattr(load(module), function)()

    return run


def load(module):
    if not module.startswith(("space.", ".ci.")):
        return importlib.import_module(module)
    words = module.split(".") if module.startswith("space") else [".ci", module.rpartition(".")[2]]
    path = ROOT.joinpath(*words).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"script_{words[-1]}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def stands_for_a_persons_own(words):
    """Whether a command names a YAML that the reader is to write."""
    return "--config" in words and not words[words.index("--config") + 1].startswith("recipes/")


def test_the_documents_have_commands_of_every_script():
    entries = {entry[0] for _, line in documented() if (entry := entry_and_words(line))}
    scripts = {
        "recipes.run",
        "recipes.pretrain",
        "recipes.midtrain",
        "recipes.sft",
        "recipes.grpo",
        "recipes.pocket.world",
    }
    scripts |= {
        "tokenizer_train.train",
        "evals.evaluate_model",
        "evals.report",
        "space.app",
        "modeling_nanochat.chat.__main__",
    }
    assert scripts <= entries


@pytest.mark.parametrize(("path", "line"), documented(), ids=lambda value: getattr(value, "name", ""))
def test_a_documented_command_has_the_arguments_that_its_script_takes(path, line, parse_only):
    entry = entry_and_words(line)
    if entry is None:
        return
    module, function, words = entry
    if stands_for_a_persons_own(words):  # its keys fill in what the command leaves out: stands in for it
        position = words.index("--config")
        shipped = {"recipes.run": "run", "recipes.pretrain": "pretrain"}[module]
        words = [*words[:position], "--config", f"recipes/pocket/{shipped}.yaml", *words[position + 2 :]]
    parse_only(module, function, words)


def runs_of_recipes():
    return [line for _, line in documented() if "recipes/run.py" in line]


@pytest.mark.parametrize("line", runs_of_recipes())
def test_the_steps_of_a_documented_run_have_the_arguments_that_their_scripts_take(line, parse_only):
    _, rest = recipe_and_words(entry_and_words(line)[2])
    overrides = parse_overrides(settings(rest))
    args = RunArguments(run_dir="runs/pocket", accelerate_config="accelerate_configs/cpu.yaml")
    for stage in LADDER:
        for step in steps(stage, RECIPES / "pocket", args, overrides):
            parse_only(*entry_and_words(shlex.join(step.command)))


def settings(words):
    """The words after `--set`."""
    after = words[words.index("--set") + 1 :] if "--set" in words else []
    return after[: next((n for n, word in enumerate(after) if word.startswith("--")), len(after))]


def test_a_command_with_unknown_arguments_or_without_its_yaml_is_found_out(parse_only):
    for line in (
        "python recipes/pocket/world.py --config recipes/pocket/world.yaml --conversations 4000",
        "python recipes/pocket/world.py --config recipes/pocket/worlds.yaml",
    ):
        with pytest.raises(UserError):
            parse_only(*entry_and_words(line))
    with pytest.raises(AssertionError, match="no script"):
        entry_and_words("python recipes/nowhere.py")
