"""CORE's evaluation bundle, downloaded once into the Hugging Face cache: a zip file with the layout of `core.yaml`."""

import hashlib
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock
from huggingface_hub import constants

from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.folders import atomic_directory

from .tasks import load_core

PUBLISHED_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SECONDS_TO_ANSWER = 30.0
MAX_DOWNLOAD, MAX_UNPACKED = 2**30, 2**33  # bytes; the published one has 162 MB


def core_folder(source: str | None) -> Path:
    """Return the folder with CORE's tasks: `source` itself, or the unpacked bundle of an address.

    Args:
        source: A folder, or the http(s) address of a bundle; None: the published address.

    Raises:
        UserError: The bundle cannot be downloaded, or is not one. Nothing of it is kept then.
    """
    address = source or PUBLISHED_BUNDLE
    if not address.startswith(("http://", "https://")):
        return Path(address)
    folder = Path(constants.HF_HOME) / "nanochat" / f"core-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several processes, or several evaluations
        if not folder.is_dir():
            download(address, folder)
    return table_folder(folder)


def download(address: str, folder: Path) -> None:
    """Download, unpack and read the bundle; `folder` appears once all of this has succeeded."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "core: HF_HUB_OFFLINE forbids downloading its tasks; unset the variable, or give core=FOLDER with them"
        )
    print(f"core: downloading {address}", flush=True)
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        try:
            fetch(address, file)
        except (OSError, ValueError) as error:  # http.client's and urllib's errors are among them
            raise UserError(
                f"core: {address} could not be downloaded ({one_line(error)}); check the network, or give core=FOLDER"
            ) from error
        try:
            with atomic_directory(folder) as unfinished:
                unpack(file, unfinished)
                load_core(table_folder(unfinished))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise UserError(f"core: {address} is no intact zip file ({one_line(error)}); try again") from error


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


def unpack(file: IO[bytes], folder: Path) -> None:
    """Unpack a zip file, whose checksums are verified, into `folder`.

    Raises:
        UserError: A name leads out of the folder, or the content is too large.
    """
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if (size := sum(entry.file_size for entry in entries)) > MAX_UNPACKED:
            raise UserError(f"core: the bundle unpacks to {size:,} bytes, at most {MAX_UNPACKED:,} are written")
        for entry in entries:
            path = PurePosixPath(entry.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
                raise UserError(f"core: the bundle has the file {entry.filename!r}, which leads out of its folder")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as copy:  # no more than `file_size`
                shutil.copyfileobj(source, copy)


def table_folder(folder: Path) -> Path:
    """Return the folder inside of an unpacked bundle that holds the table of tasks."""
    tables = sorted(folder.rglob("core.yaml"), key=lambda path: len(path.parts))
    if not tables:
        raise UserError("core: the bundle has no core.yaml; give core=FOLDER")
    return tables[0].parent
