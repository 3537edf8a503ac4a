"""The loader at the pace of d20 on eight H100s, from a Hub that is slow or fails now and then.

python -m pytest -m long -s tests/recipes/benchmarks/test_loader_speed.py

prints rows of a table: Hub, seconds until the first batch, tokens/s, tokens/s needed, % of the time waited at that
pace, retries.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hub import Fault, Hub

from tokenizer_train.bpe import train_tokenizer

SCRIPT = Path(__file__).parents[3] / "recipes" / "benchmarks" / "loader_speed.py"
FILES, DOCUMENTS, WORDS = 96, 1024, 600  # words of a document of about 4 kB, as on the web
ALWAYS = float("inf")
GET = r"GET .*parquet"
FAULTS = {
    "none": [],
    "every answer 1 s late": [Fault(GET, ALWAYS, delay=1)],
    "every 5th answer 5 s late": [Fault(GET, ALWAYS, delay=5, every=5)],
    "every 5th answer status 429, 3 s": [Fault(GET, ALWAYS, status=429, headers={"Retry-After": "3"}, every=5)],
    "every 5th answer status 500": [Fault(GET, ALWAYS, status=500, every=5)],
    "every 5th answer cut off": [Fault(GET, ALWAYS, keep=1000, breaks=True, every=5)],
    "every 8th request unanswered": [Fault(GET, ALWAYS, silent=True, every=8)],
}
FIGURES = r"after ([\d.]+) s, then ([\d,]+) tokens/s.* needs ([\d,]+) tokens/s, and waits for ([\d.]+) %"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and a parquet file of web-like documents."""
    folder = tmp_path_factory.mktemp("speed")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(WORDS // 2, 3 * WORDS // 2))) for _ in range(DOCUMENTS)]
    Dataset.from_dict({"text": texts}).to_parquet(folder / "train.parquet")
    train_tokenizer(texts[:200], 8192, model_max_length=2048).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_slow_or_failing_hub_does_not_starve_one_of_eight_processes(folder, tmp_path, fault):
    command = [sys.executable, SCRIPT, "--tokenizer", folder / "tokenizer", "--train_files", "me/corpus"]
    command = list(map(str, [*command, "--processes", 8, "--seconds", 15]))
    with Hub().serving() as hub:
        content = (folder / "train.parquet").read_bytes()
        hub.put("me/corpus", {f"train-{i:02}.parquet": content for i in range(FILES)}, kind="datasets")
        hub.faults += FAULTS[fault]
        env = os.environ | hub.environment(tmp_path)
        ran = subprocess.run(command, env=env, text=True, capture_output=True, check=True)
    retries = re.findall(r"Retrying in|before retry|; retry \d", ran.stdout + ran.stderr)
    first, speed, needed, waited = re.search(FIGURES, ran.stdout).groups()
    print(f"\n| {fault} | {first} | {speed} | {needed} | {waited} | {len(retries)} |")
    assert float(waited) < 3
