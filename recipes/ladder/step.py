"""One command of the ladder, and the record that the run folder keeps of it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from modeling_nanochat.errors import UserError

# How a stage with checkpoints goes on; the others are short and start over.
RESUME = {"base": "--resume", "mid": "--resume", "sft": "--resume_from_checkpoint", "rl": "--resume_from_checkpoint"}


@dataclass
class Step:
    """One command of the ladder: its name, the script with its launcher, its YAML, its arguments.

    `<run>/started/<name>.json` says that the run has begun it and with what settings, `<run>/finished/<name>.json` that
    it also saw its end.
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
        """The arguments as flag -> values; of a flag given twice the last one holds, as on a command line."""
        settings: dict[str, list[str]] = {}
        for word in self.arguments:
            if word.startswith("--"):
                settings[word[2:]] = []
            else:
                settings[list(settings)[-1]].append(word)
        return settings

    @property
    def result(self) -> Path | None:
        """What the step leaves."""
        if self.name == "report":
            return Path(self.settings["run_dir"][0], "report.md")
        path = self.settings.get("output_dir") or self.settings.get("output_file")
        return Path(path[0]) if path else None

    @property
    def makes_folder(self) -> bool:
        return "output_dir" in self.settings

    @property
    def is_measurement(self) -> bool:
        """Whether the step makes figures and no model: it is cheap, and the ladder's log has a line for its tables."""
        return self.name.endswith(".eval") or self.name == "report"

    @property
    def record(self) -> Path | None:
        """The file that the step itself writes last, and so the sign that it is finished; None if it has none."""
        if self.makes_folder and self.name != "data":
            return self.result.parent / "stages" / f"{self.result.name}.json"
        return None if self.makes_folder else self.result

    def fingerprint(self, run_dir: Path) -> dict:
        """What the result depends on apart from the files' content; the run folder itself may be moved or copied."""
        arguments = {
            key: [word.replace(str(run_dir), "{run_dir}") for word in words] for key, words in self.settings.items()
        }
        return {"arguments": arguments, "config": read_yaml(self.config) if self.config else {}}


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); every recipe needs it, as recipes/pocket has it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error


def marker(name: str, run_dir: Path, kind: str) -> Path:
    return run_dir / kind / f"{name}.json"


def read_marker(step: Step, run_dir: Path) -> dict:
    """The settings that the step was last begun with; empty if there are none, or none to be read: it is done again."""
    for kind in ("started", "finished"):
        try:
            return json.loads(marker(step.name, run_dir, kind).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            break
    return {}


def is_own(name: str, run_dir: Path) -> bool:
    """Whether this run has begun the step of that name at some time."""
    return any(marker(name, run_dir, kind).exists() for kind in ("started", "finished"))


def is_finished(step: Step, run_dir: Path) -> bool:
    """Whether what the step leaves is there, and the run saw its end, or was killed before but the step wrote its record."""
    ended = marker(step.name, run_dir, "finished").exists() or (step.record is not None and step.record.exists())
    return ended and bool(read_marker(step, run_dir)) and (step.result is None or step.result.exists())


def has_checkpoints(name: str, run_dir: Path) -> bool:
    return name in RESUME and any((run_dir / "checkpoints" / name).glob("*-*"))


def difference(finished: dict, wanted: dict) -> str:
    """`base.depth: 4 is now 6` for the first settings that differ; empty if none does."""
    changes = []
    for part in ("config", "arguments"):
        before, after = finished[part], wanted[part]
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        changes += [f"{key}: {shown_setting(before.get(key))} is now {shown_setting(after.get(key))}" for key in changed]
    return ", ".join(changes[:3])


def shown_setting(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "unset" if value is None else str(value)
