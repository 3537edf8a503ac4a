"""Measures how CORE scores examples: all options of many together, and one prompt at a time; compares both."""

from functools import partial

import torch
from transformers import PreTrainedModel

from evals.scoring import Scorer
from evals.speed.candidates import fill_weights
from evals.speed.timing import median_seconds
from evals.token_trees import Row
from modeling_nanochat import ARCHITECTURES

from . import Report, Setting, free
from .runs import make_config

DEPTH = 20
LEAST_SPEEDUP = 5.0  # over one prompt at a time
MOST_ERROR = 1e-3  # of a mean loss in float32, in nats


def check_core(setting: Setting, report: Report) -> None:
    torch.set_float32_matmul_precision("highest")
    questions = make_questions(setting)
    for architecture in ("plain", "turbo"):
        layers = {} if setting.on_gpu else {"layers": 4}
        config = make_config(setting, architecture, DEPTH, max_position_embeddings=2048, **layers)
        with torch.device(setting.device):
            model = ARCHITECTURES[architecture][1](config)
        model = fill_weights(model).eval()
        few = questions[:8]
        alone, together = (losses(Scorer(model, size), few) for size in (1, len(few)))
        error = max(abs(one - other) for one, other in zip(alone, together, strict=True))
        report.at_most(f"{architecture}: difference of losses in float32, nats", error, MOST_ERROR)
        check_speed(setting, report, architecture, model.to(setting.dtype), questions)
        del model
        free()


def check_speed(
    setting: Setting, report: Report, architecture: str, model: PreTrainedModel, questions: list[list[Row]]
) -> None:
    seconds = {}
    for way, size, repeats in (("alone", 1, 1), ("together", 32, 3)):
        score = partial(losses, Scorer(model, size), questions)
        seconds[way] = median_seconds(score, setting.device, repeats)
        report.figure(f"{architecture} {way}: prompts/s", sum(map(len, questions)) / seconds[way])
    report.holds(f"{architecture}: what options share is read once", Scorer(model).shares)
    name, speedup = f"{architecture}: times faster than one prompt at a time", seconds["alone"] / seconds["together"]
    if setting.on_gpu:
        report.at_least(name, speedup, LEAST_SPEEDUP)
    else:
        report.figure(name, speedup)


def losses(scorer: Scorer, questions: list[list[Row]]) -> list[float]:
    return [score.loss for scores in scorer.scores(questions) for score in scores]


def make_questions(setting: Setting) -> list[list[Row]]:
    """As in CORE: questions with four choices after ten others, and texts to continue, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    count, longest, vocabulary = (64, 900, 32768) if setting.on_gpu else (3, 60, 512)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    questions = []
    for number in range(count):
        prompt = some(longest // 2, longest)
        options = 4 if number % 2 else 1
        questions.append([Row(prompt + some(2, 12), len(prompt)) for _ in range(options)])
    return questions
