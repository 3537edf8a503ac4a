"""CORE's evaluation bundle, downloaded and unpacked once: a zip file with the layout of `core.yaml`."""

import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from evals.harness.downloads import downloaded
from modeling_nanochat.errors import UserError, one_line

from .tasks import load_core

PUBLISHED_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # 162 MB
MAX_UNPACKED = 2**33  # bytes


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
    return table_folder(downloaded(address, "core", unpack))


def unpack(file: IO[bytes], folder: Path) -> None:
    """Unpack a bundle, verifying its checksums, and check that its tasks can be read.

    Raises:
        UserError: It is no intact zip file, too large, or no bundle; or a name leads out of the folder.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            unpack_all(archive, folder)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"core: the download is no intact zip file ({one_line(error)}); try again") from error
    load_core(table_folder(folder))


def unpack_all(archive: zipfile.ZipFile, folder: Path) -> None:
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
