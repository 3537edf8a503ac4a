"""Parquet shards of a text data set on the Hub: downloaded by several threads, and linked into a folder.

The shards are stored in the Hugging Face cache, which resumes and shares them: a second run folder downloads nothing.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from time import sleep
from typing import TypeVar
from urllib.error import HTTPError, URLError

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.hub import SECONDS_TO_ANSWER, hub_failure

ATTEMPTS = 6
LONGEST_PAUSE = 60  # seconds
SECONDS_BETWEEN_LINES = 30
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    """A file of a data set on the Hub."""

    repository: str
    revision: str
    name: str
    size: int  # bytes

    @property
    def cached(self) -> Path | None:
        """Its place in the cache, if it is there."""
        found = try_to_load_from_cache(self.repository, self.name, repo_type="dataset", revision=self.revision)
        return Path(found) if isinstance(found, str) and os.path.getsize(found) == self.size else None


def list_shards(repository: str) -> list[Shard]:
    """The parquet files of a data set, in the order of their names.

    Raises:
        UserError: There is no such data set, no parquet file in it, or no network.
    """
    with reported(f"text {repository}"):
        shards = retried(lambda: listed(repository))
    if not shards:
        raise UserError(f"text {repository}: no parquet files in this data set; give another")
    return sorted(shards, key=lambda shard: shard.name)


def listed(repository: str) -> list[Shard]:
    revision = HfApi().dataset_info(repository, timeout=SECONDS_TO_ANSWER).sha or "main"
    files = HfApi().list_repo_tree(repository, repo_type="dataset", recursive=True, revision=revision)
    found = [file for file in files if isinstance(file, RepoFile) and file.path.endswith(".parquet")]
    return [Shard(repository, revision, file.path, file.size) for file in found]


def choose(shards: Sequence[Shard], train: int | None, val: int) -> tuple[list[Shard], list[Shard]]:
    """The first `train` shards (None: all others) and the last `val`.

    Raises:
        UserError: There are too few.
    """
    train = len(shards) - val if train is None else train
    if train < 0 or train + val > len(shards):
        raise UserError(
            f"text {shards[0].repository}: has {len(shards):,} parquet files, fewer than train_shards {train} + "
            f"val_shards {val}; lower train_shards"
        )
    return list(shards[:train]), list(shards[len(shards) - val :])


def download(shards: Sequence[Shard], workers: int) -> None:
    """Put the shards that are missing into the cache; shows progress and the time left.

    Raises:
        UserError: The disk is too small or full, or the Hub fails for longer than the retries last.
    """
    missing = [shard for shard in shards if shard.cached is None]
    size = sum(shard.size for shard in missing)
    check_space(size, size)
    if not missing:
        return
    disable_progress_bars()  # one per file
    progress, pool = Progress(len(missing), size), ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(download_one, shard, progress) for shard in missing]):
            progress.add(future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.bar.close()


def download_one(shard: Shard, progress: "Progress") -> Shard:
    check_space(shard.size, progress.size - progress.done)
    with reported(f"text {shard.repository}: {shard.name}", progress):
        retried(lambda: hf_hub_download(shard.repository, shard.name, repo_type="dataset", revision=shard.revision))
    if shard.cached is None:
        raise UserError(f"text {shard.repository}: {shard.name} does not have {shard.size:,} bytes; start again")
    return shard


def retried(work: Callable[[], Result]) -> Result:
    """What `work` returns; it is repeated after growing pauses while the network or the Hub fails."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return work()
        except Exception as error:  # the libraries raise many kinds
            if not may_pass(error):
                raise
            pause = min(2**attempt, LONGEST_PAUSE)
            print(f"{hub_failure(error, 'data set') or one_line(error)}: again in {pause} s", flush=True)
            sleep(pause)
    return work()


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network failed, or the server is busy or broken."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    answers += [cause.code for cause in causes if isinstance(cause, HTTPError)]
    if answers:
        return answers[0] in (408, 429) or answers[0] >= 500
    lost = hub_failure(error) is not None or any(isinstance(cause, (URLError, TimeoutError)) for cause in causes)
    return lost and not constants.HF_HUB_OFFLINE


@contextmanager
def reported(where: str, progress: "Progress | None" = None) -> Iterator[None]:
    """Report in one line what the libraries raise on a failing Hub or a full disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        if progress and isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise no_space(progress.size - progress.done) from error
        reason = hub_failure(error, "data set") or one_line(error)
        raise UserError(f"{where}: {reason}") from error


def check_space(wanted: int, remaining: int) -> None:
    """Raise [`UserError`] if fewer than `wanted` bytes are free, with the number that is still to come."""
    if free_bytes() < wanted:
        raise no_space(remaining)


def no_space(remaining: int) -> UserError:
    return UserError(
        f"train_shards: {remaining / 1e9:.1f} GB are still to be downloaded to {constants.HF_HUB_CACHE}, where "
        f"{free_bytes() / 1e9:.1f} GB are free; lower train_shards, or set HF_HOME to a folder on a larger disk"
    )


def free_bytes() -> int:
    folder = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


class Progress:
    """A bar of bytes; without a terminal, a plain line at intervals."""

    def __init__(self, count: int, size: int):
        self.count, self.size, self.finished, self.done = count, size, 0, 0
        self.started = self.written = time.monotonic()
        bar = {"desc": "text", "unit": "B", "unit_scale": True, "leave": False}
        self.bar = tqdm(total=size, disable=None, **bar)  # None: only on a terminal

    def add(self, shard: Shard) -> None:
        self.finished, self.done = self.finished + 1, self.done + shard.size
        self.bar.update(shard.size)
        now = time.monotonic()
        if self.bar.disable and now - self.written >= SECONDS_BETWEEN_LINES:
            self.written = now
            speed = self.done / (now - self.started)
            left = tqdm.format_interval((self.size - self.done) / speed)
            print(
                f"text: {self.finished:,} of {self.count:,} files, {self.done / 1e9:.1f} of {self.size / 1e9:.1f} GB, "
                f"{speed / 1e6:.0f} MB/s, {left} left",
                flush=True,
            )


def link(shards: Sequence[Shard], folder: Path) -> None:
    """Make `folder` hold links to exactly these shards, which are in the cache; files that are no links stay."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {shard.name.replace("/", "-"): shard.cached for shard in shards}
    for old in [path for path in folder.iterdir() if path.is_symlink() and path.name not in wanted]:
        old.unlink()
    for name, cached in wanted.items():
        if cached is not None:
            link_to(cached, folder / name)


def link_to(target: Path, path: Path) -> None:
    """Link `path` to `target`, replacing an older link."""
    if path.exists() and not path.is_symlink():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target.absolute())
    unfinished.replace(path)
