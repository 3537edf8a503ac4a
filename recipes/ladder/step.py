"""One command of the ladder, and its markers in the run folder."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.errors import UserError
from recipes.training.checkpoint.folders import checkpoint_folders

from .arguments import word_of


@dataclass
class Step:
    """One command of the ladder: its name, the script with its launcher, its YAML, its arguments.

    `<run>/started/<name>.json` records that the run started it and with which settings, `<run>/finished/<name>.json`
    that it completed.
    """

    name: str
    program: list[str]
    config: Path | None
    arguments: list[str]

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def command(self) -> list[str]:
        config = ["--config", os.path.relpath(self.config)] if self.config else []
        return [*self.program, *config, *self.arguments]

    @property
    def settings(self) -> dict[str, list[str]]:
        """The arguments as flag -> values; the last one wins if a flag is repeated, as on a command line."""
        settings: dict[str, list[str]] = {}
        for word in self.arguments:
            if word.startswith("--"):
                settings[word[2:]] = []
            else:
                settings[list(settings)[-1]].append(word)
        return settings

    @property
    def result(self) -> Path | None:
        """The step's output file or folder."""
        if self.name == "report":
            return Path(self.settings["run_dir"][0], "report.md")
        path = self.settings.get("output_dir") or self.settings.get("output_file")
        return Path(path[0]) if path else None

    @property
    def makes_folder(self) -> bool:
        return "output_dir" in self.settings

    @property
    def is_measurement(self) -> bool:
        """Whether the step evaluates or reports: it is cheap, and the log shows one line instead of its tables."""
        return self.name.endswith(".eval") or self.name == "report"

    @property
    def record(self) -> Path | None:
        """The file that the step itself writes last, which proves completion; None if it writes none."""
        if self.makes_folder and self.name != "data":
            return self.result.parent / "stages" / f"{self.result.name}.json"
        return None if self.makes_folder else self.result

    def fingerprint(self, run_dir: Path) -> dict:
        """Everything the result depends on except file contents; independent of where the run folder is."""
        content = read_yaml(self.config) if self.config else {}
        return relocated({"arguments": self.settings, "config": content}, str(run_dir), "{run_dir}")


def relocated(value: Any, folder: str, other: str) -> Any:
    """`value` with paths `folder/x` and `name=folder/x` moved to `other`; also in lists, mappings and JSON."""
    if isinstance(value, dict):
        return {key: relocated(item, folder, other) for key, item in value.items()}
    if isinstance(value, list):
        return [relocated(item, folder, other) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(rf'(?<![^="]){re.escape(folder)}(?=[/"]|$)', lambda _: other, value)


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); every recipe needs it, see recipes/pocket"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a YAML mapping of `key: value` lines")
    return content


def marker(name: str, run_dir: Path, kind: str) -> Path:
    return run_dir / kind / f"{name}.json"


def read_marker(step: Step, run_dir: Path) -> dict:
    """The settings the step was last started with; empty if missing or unreadable, which makes the step run again."""
    for kind in ("started", "finished"):
        try:
            return json.loads(marker(step.name, run_dir, kind).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            break
    return {}


def is_own(name: str, run_dir: Path) -> bool:
    """Whether this run has ever started the step of that name."""
    return any(marker(name, run_dir, kind).exists() for kind in ("started", "finished"))


def is_finished(step: Step, run_dir: Path) -> bool:
    """Whether the result exists and the step completed, by its marker or, if the run was killed, its own record."""
    ended = marker(step.name, run_dir, "finished").exists() or (step.record is not None and step.record.exists())
    return ended and bool(read_marker(step, run_dir)) and (step.result is None or step.result.exists())


def has_checkpoints(name: str, run_dir: Path) -> bool:
    """Whether the step can resume; steps other than training are short and start over."""
    folder = run_dir / "checkpoints" / name
    if name not in STAGES or not folder.is_dir():
        return False
    return bool(checkpoint_folders(folder))


def difference(finished: dict, wanted: dict) -> str:
    """`depth: 4 is now 6` for the first three settings that differ; empty if none do."""
    before, after = effective(finished), effective(wanted)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    changes = [f"{key}: {before.get(key, 'unset')} is now {after.get(key, 'unset')}" for key in changed]
    return ", ".join(changes[:3])


def effective(fingerprint: dict) -> dict[str, str]:
    """The settings of a [`Step.fingerprint`] as words: the command line's, else the YAML's."""
    settings = fingerprint["config"] | fingerprint["arguments"]
    listed = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    return {key: " ".join(map(word_of, values)) for key, values in listed.items() if values != [None]}
