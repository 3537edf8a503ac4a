import warnings

import pytest


def warn(module: str, category: type[Warning]) -> None:
    warnings.warn_explicit("`past_key_values` is deprecated", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, UserWarning])
@pytest.mark.parametrize(
    "module", ["modeling_nanochat.chat.engine", "recipes.grpo", "evals.tasks.task_files", "transformers_modules.turbo"]
)
def test_a_warning_about_our_own_code_fails_the_test_that_meets_it(module, category):
    with pytest.raises(category, match="past_key_values"):
        warn(module, category)


def test_a_deprecation_between_two_libraries_does_not():
    warn("trl.trainer", DeprecationWarning)
