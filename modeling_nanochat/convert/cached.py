"""Checkpoints of the original under the name of a model: each is converted once and kept in Hugging Face's cache."""

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from ..errors import UserError, one_line
from ..folders import remove
from ..hub import find_folder
from .config import OriginalConfig
from .files import pick_step, read_meta, steps
from .model_folder import tokenizer_place, write_model_folder

CONVERTER = 1  # to be raised when the same checkpoint becomes another folder


def model_folder(name: str) -> Path:
    """The folder `name`, or that of a Hub id; of a checkpoint of the original, its conversion to a model folder.

    Conversions are in `HF_HOME/assets/nanochat`, one of each checkpoint: a newer step, revision or, of a local folder,
    file replaces it. That of a Hub id opens without network, and without the weights that were downloaded for it.

    Raises:
        UserError: No such folder or Hub id, a checkpoint that cannot be converted, or too little space for it.
    """
    folder = find_folder(name)
    if (folder / "config.json").is_file() or not steps(folder):
        return folder
    is_local = Path(name).expanduser().is_dir()
    step = pick_step(folder, None)
    source = f"{folder.resolve().name}-{digest(str(folder.resolve()))}" if is_local else name.replace("/", "--")
    conversions = Path(constants.HF_ASSETS_CACHE) / "nanochat" / source
    version = state_of(folder, step) if is_local else folder.name  # a snapshot's folder has the revision as its name
    target = conversions / f"step-{step:06d}-{digest(json.dumps([CONVERTER, version]))}"
    if not target.is_dir():
        make_folder(conversions)
        with WeakFileLock(conversions / ".lock"):  # the processes of a launcher all ask for the same model
            if not target.is_dir():
                convert_once(name, folder, step, target)
    return target


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made: {one_line(error)}; set HF_HOME to a folder you may write to"
        ) from error


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def state_of(folder: Path, step: int) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files that a local checkpoint's conversion is made from."""
    found = [folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"]
    if place := tokenizer_place(folder):
        found += sorted([*place.glob("tokenizer*"), *place.glob("*.jinja")])
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]


def convert_once(name: str, folder: Path, step: int, target: Path) -> None:
    """Write the conversion to `target`, and remove the older ones of the same checkpoint."""
    size = float32_bytes(read_meta(folder / f"meta_{step:06d}.json"))
    has_weights = (folder / f"model_{step:06d}.pt").is_file()
    check_space(name, {Path(constants.HF_HUB_CACHE): 0 if has_weights else size, target.parent: size})
    todo = "converting" if has_weights else "downloading and converting"
    print(
        f"note: {name} is a checkpoint of the original nanochat; {todo} it once ({size / 1e9:.1f} GB; code in it "
        f"is not run), into {target}",
        file=sys.stderr,
    )
    write_model_folder(name, target, step=step)
    for older in target.parent.iterdir():
        if older.is_dir() and older != target:
            remove(older)


def float32_bytes(sizes: OriginalConfig) -> int:
    """Bytes of the model in float32, scalars and gates aside; without tables as long as an untrusted `n_layer`."""
    width, values = sizes.n_embd, sizes.n_embd // sizes.n_head * sizes.n_kv_head
    layers = sizes.n_layer * (2 * width * width + 2 * width * values + 8 * width * width)
    value_embeds = (sizes.n_layer + 1) // 2 * values if sizes.window_pattern else 0
    return 4 * (layers + sizes.vocab_size * (2 * width + value_embeds))


def check_space(name: str, needed: dict[Path, int]) -> None:
    """Raise [`UserError`] unless the disks of these folders have room for so many bytes in each."""
    on_disk: dict[int, int] = {}
    for folder, size in needed.items():
        place = next(parent for parent in [folder, *folder.parents] if parent.is_dir())
        disk = place.stat().st_dev
        on_disk[disk] = on_disk.get(disk, 0) + size
        free = shutil.disk_usage(place).free
        if free < on_disk[disk]:
            raise UserError(
                f"{name}: its conversion takes {on_disk[disk] / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are "
                "free; free some, or set HF_HOME to a folder on a larger disk"
            )
