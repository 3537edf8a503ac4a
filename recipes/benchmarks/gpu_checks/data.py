"""Measures the data loader alone, with its background process as in pretraining."""

from pathlib import Path

from transformers import AutoTokenizer

from evals.speed.timing import seconds_of
from modeling_nanochat.text.texts import text_source
from recipes.benchmarks.loader_speed import read
from recipes.training.data.loader import Loader
from recipes.training.data.streams import TextStreams

from . import Report, Setting
from .stages import make_world

LEAST_TOKENS_PER_SECOND = 150_000.0  # training speed of one H100 at d20


def check_data(setting: Setting, report: Report) -> None:
    world = make_world(setting)
    tokenizer = AutoTokenizer.from_pretrained(Path(world, "tokenizer"))
    rows, length, seconds = (32, 2048, 5.0) if setting.on_gpu else (4, 64, 0.2)
    texts = text_source([str(world / "train.parquet")], what="train_files")
    loader = Loader(TextStreams(texts, tokenizer, length), batch_size=rows)
    batches = []
    report.figure("seconds until the first batch", seconds_of(lambda: batches.append(next(loader)), "cpu"))
    speed, _ = read(loader, seconds)
    loader.close()
    ids = batches[0]["input_ids"]
    in_range = ids.shape == (rows, length + 1) and int(ids.max()) < len(tokenizer)
    report.figure("tokens/s", speed)
    report.figure("vocabulary", len(tokenizer))
    report.holds("batches are whole rows of tokens", in_range)
    report.holds("every row begins with a document", bool((ids[:, 0] == tokenizer.bos_token_id).all()))
    if setting.on_gpu:
        report.at_least("tokens/s of one loader", speed, LEAST_TOKENS_PER_SECOND)
