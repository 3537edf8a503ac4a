"""Every YAML in the repository loads into its script's dataclasses, and no room imports one that it must not know."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from evals.evaluate_model import EvaluateArguments
from modeling_nanochat.cli import parse
from recipes.fetch import FetchArguments
from recipes.grpo import GRPOArguments
from recipes.ladder.arguments import RunArguments
from recipes.midtrain import MidtrainArguments, MidtrainLoopArguments
from recipes.miniseries.train import MiniseriesArguments
from recipes.pocket.world import WorldArguments
from recipes.pretrain import PretrainArguments
from recipes.sft import SFTArguments
from recipes.training.arguments import LoopArguments
from recipes.training.batch_size import accumulation_steps
from recipes.training.stage import OutputArguments
from recipes.training.trl.settings import GRPOSettings, SFTSettings
from tokenizer_train.evaluate import TokenizerEvaluateArguments
from tokenizer_train.train import TokenizerArguments

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "world": (WorldArguments,),
    "data": (FetchArguments,),
    "tokenizer": (TokenizerArguments,),
    "tokenizer_eval": (TokenizerEvaluateArguments,),
    "pretrain": (PretrainArguments, LoopArguments, OutputArguments),
    "midtrain": (MidtrainArguments, MidtrainLoopArguments, OutputArguments),
    "sft": (SFTArguments, SFTSettings),
    "grpo": (GRPOArguments, GRPOSettings),
    "eval": (EvaluateArguments,),
    "run": (RunArguments,),
    "chinese": (RunArguments,),
    "d24": (RunArguments,),
    "series": (MiniseriesArguments,),
    "scaling": (MiniseriesArguments,),
}
RECIPE_FILES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_loads_and_is_short(path):
    parsed = parse(*ARGUMENTS[path.stem], args=["--config", str(path)])
    loop = next((one for one in parsed if isinstance(one, LoopArguments)), None)
    if loop is not None and loop.total_batch_size:
        rows = loop.per_device_train_batch_size or 1
        assert accumulation_steps(loop.total_batch_size, rows, loop.max_length, 1) >= 1
    assert len(path.read_text().splitlines()) <= 45


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configuration_loads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
