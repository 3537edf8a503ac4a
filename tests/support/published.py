"""Small data sets under the ids, configurations, splits and columns of the published ones that the recipes name."""

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hub import Hub

from evals.core.bundle import PUBLISHED_BUNDLE
from evals.harness.published import PUBLISHED, SPELLING_BEE

WORDS = ["amber", "basket", "candle", "drum", "engine", "feather", "garden", "hammer", "island", "jacket"]
CORE_TASKS = {
    "copa": ("multiple_choice", [{"query": f"The {w} is", "choices": ["here", "there"], "gold": 0} for w in WORDS]),
    "winograd": (
        "schema",
        [{"context_options": [f"The {w}", f"A {w}"], "continuation": "fell.", "gold": 1} for w in WORDS],
    ),
    "lambada_openai": ("language_modeling", [{"context": f"One {w}, two", "continuation": f"{w}s"} for w in WORDS]),
}


def publish(hub: Hub, rows: int = 40, shards: int = 3) -> None:
    """Put everything on the Hub: `rows` per split, `shards` files of text."""
    put_splits(hub, "HuggingFaceTB/smol-smoltalk", {"default": {"train": talk, "test": talk}}, rows)
    knowledge = {"auxiliary_train": mmlu, "test": mmlu, "validation": mmlu, "dev": mmlu}
    put_splits(hub, "cais/mmlu", {"all": knowledge, "astronomy": {"test": mmlu}}, rows)
    science = {split: arc for split in ("train", "validation", "test")}
    put_splits(hub, "allenai/ai2_arc", {"ARC-Challenge": science, "ARC-Easy": science}, rows)
    put_splits(hub, "openai/gsm8k", {"main": {"train": gsm8k, "test": gsm8k}}, rows)
    put_splits(hub, "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval}}, rows)
    for name in ("karpathy/fineweb-edu-100b-shuffle", "karpathy/climbmix-400b-shuffle"):
        files = {f"shard_{n:05d}.parquet": parquet([text(n * 300 + i) for i in range(300)]) for n in range(shards)}
        hub.put(name, files, kind="datasets")


def put_splits(hub: Hub, name: str, configurations: dict[str, dict], rows: int) -> None:
    files, configs = {}, []
    for configuration, splits in configurations.items():
        paths = {split: f"{configuration}/{split}-00000-of-00001.parquet" for split in splits}
        files |= {paths[split]: parquet([make(i) for i in range(rows)]) for split, make in splits.items()}
        listed = [{"split": split, "path": path} for split, path in paths.items()]
        configs.append({"config_name": configuration, "data_files": listed})
    hub.put(name, files | {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n"}, kind="datasets")


def parquet(rows: list[dict]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    return content.getvalue()


def text(number: int) -> dict:
    words = random.Random(number).choices(WORDS, k=120)
    return {"text": f"Story {number}. " + " ".join(words) + "."}


def talk(i: int) -> dict:
    messages = [
        {"role": "user", "content": f"What about the {WORDS[i % 10]}?"},
        {"role": "assistant", "content": f"It is number {i}."},
    ]
    system = [{"role": "system", "content": "Be brief."}] if i % 3 == 0 else []
    return {"messages": [*system, *messages, *messages], "source": "made-up"}


def mmlu(i: int) -> dict:
    return {"question": f"Which is {i}?", "subject": "sums", "choices": ["a", "b", "c", "d"], "answer": i % 4}


def arc(i: int) -> dict:
    choices = {"text": ["a rock", "a cloud", "a fish"], "label": ["A", "B", "C"]}
    return {"id": f"q{i}", "question": f"What swims in lake {i}?", "choices": choices, "answerKey": "C"}


def gsm8k(i: int) -> dict:
    return {"question": f"What is {i} + 2?", "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"}


def humaneval(i: int) -> dict:
    prompt = f'def add_{i}(x):\n    """Add {i}."""\n'
    tests = f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"
    names = {"task_id": f"HumanEval/{i}", "entry_point": f"add_{i}"}
    return names | {"prompt": prompt, "canonical_solution": f"    return x + {i}\n", "test": tests}


def core_files() -> dict[str, str]:
    """The files of a bundle in the published layout, with three small tasks."""
    entries = [
        {"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [0], "icl_task_type": kind}
        for label, (kind, _) in CORE_TASKS.items()
    ]
    baselines = "".join(f"{label},0\n" for label in CORE_TASKS)
    files = {
        "core.yaml": json.dumps({"icl_tasks": entries}),
        "eval_meta_data.csv": f"Eval Task,Random baseline\n{baselines}",
    }
    for label, (_, examples) in CORE_TASKS.items():
        files[f"eval_data/{label}.jsonl"] = "".join(json.dumps(example) + "\n" for example in examples)
    return {f"eval_bundle/{name}": content for name, content in files.items()}


def core_bundle() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text_of_file in core_files().items():
            archive.writestr(name, text_of_file)
    return content.getvalue()


def fill_cache(home: Path) -> None:
    """Put what is published outside of the Hub, CORE's bundle and the words, where an earlier download would be."""
    downloads = {
        ("core", PUBLISHED_BUNDLE): core_files(),
        (SPELLING_BEE, PUBLISHED[SPELLING_BEE].source): {"words.txt": "\n".join(WORDS) + "\n"},
    }
    for (task, address), files in downloads.items():
        folder = home / "nanochat" / f"{task}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
