"""Published files that are not on the Hub, downloaded once into the Hugging Face cache."""

import hashlib
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from filelock import FileLock
from huggingface_hub import constants

from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.folders import atomic_directory

SECONDS_TO_ANSWER = 30.0
MAX_DOWNLOAD = 2**30  # bytes


def downloaded(address: str, task: str, keep: Callable[[IO[bytes], Path], None]) -> Path:
    """Return the folder in the cache into which `keep` has once put what is at `address`.

    Args:
        address: Where it is published, http or https.
        task: Who needs it, for errors.
        keep: Gets the complete download and a new folder; nothing is kept if it raises [`UserError`].

    Raises:
        UserError: No network, or the download is incomplete, too large, or another than that of an earlier time.
    """
    folder = Path(constants.HF_HOME) / "nanochat" / f"{task}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several processes, or several evaluations
        if not folder.is_dir():
            check_online(task)
            print(f"{task}: downloading {address}", flush=True)
            with tempfile.TemporaryFile(dir=folder.parent) as file:
                try:
                    fetch(address, file)
                except (OSError, ValueError) as error:  # http.client's and urllib's errors are among them
                    raise UserError(
                        f"{task}: {address} could not be downloaded ({one_line(error)}); check the network, or give "
                        f"{task}=SOURCE"
                    ) from error
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                check_unchanged(first := folder.with_suffix(".sha256"), digest, address, task)
                file.seek(0)
                with atomic_directory(folder) as unfinished:
                    keep(file, unfinished)
                first.write_text(digest)
    return folder


def check_unchanged(path: Path, digest: str, address: str, task: str) -> None:
    """Raise [`UserError`] if the first download, whose SHA-256 is in the file `path`, was another."""
    if path.is_file() and (first := path.read_text().strip()) != digest:
        raise UserError(
            f"{task}: {address} has SHA-256 {digest}, and had {first} when it was first downloaded; delete {path} to "
            "accept the new one"
        )


def check_online(task: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{task}: HF_HUB_OFFLINE forbids downloading its data; unset the variable, or give {task}=SOURCE"
        )


def fetch(address: str, file: IO[bytes]) -> None:
    """Write what is at `address` into `file`; raise OSError if it is incomplete or too large."""
    with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER) as response:
        announced = int(response.headers.get("Content-Length") or 0)
        if announced > MAX_DOWNLOAD:
            raise OSError(f"{announced:,} bytes, at most {MAX_DOWNLOAD:,} are read")
        while chunk := response.read(2**20):
            file.write(chunk)
            if file.tell() > MAX_DOWNLOAD:
                raise OSError(f"more than {MAX_DOWNLOAD:,} bytes")
        if file.tell() < announced:
            raise OSError(f"ended after {file.tell():,} of {announced:,} bytes")
