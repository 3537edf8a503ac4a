import json

import pytest

from recipes.training.learning import LearningWatch


def watch(stage, **measured):
    """The watch after a run, step by step, and the new warnings of each step."""
    (steps,) = {len(values) for values in measured.values()}
    watch, new = LearningWatch(stage, steps), {}
    for step in range(1, steps + 1):
        if found := watch.observe(step, **{name: values[step - 1] for name, values in measured.items()}):
            new[step] = found
    return watch, new


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_a_loss_that_does_not_fall_is_reported_at_the_end(stage):
    falling = [3 - 0.05 * step for step in range(20)]
    assert watch(stage, loss=falling)[1] == {}
    seen, new = watch(stage, loss=[2.0] * 20)
    assert list(new) == [20] and new[20] == seen.warnings
    assert seen.warnings[0].startswith("the loss did not fall: 2 over the first 4 steps, 2 over the last 4")


def test_only_the_first_and_the_last_fifth_are_compared():
    assert watch("base", loss=[2.0, 2.0] + [9.0] * 6 + [1.5, 1.5])[1] == {}
    assert watch("base", loss=[2.0, 2.0] + [0.1] * 6 + [2.5, 1.6])[1] != {}


@pytest.mark.parametrize(("last", "falls"), [(1.9, True), (2.0, False)])
def test_the_loss_on_held_out_data_is_judged_where_it_is_measured(last, falls):
    seen = LearningWatch("sft", 20)
    assert seen.observe_held_out(0, 2.0) == []
    for step in range(1, 21):
        assert seen.observe(step, loss=2.0 + 0.1 * (step % 3)) == []
    resumed = LearningWatch("sft", 20)
    resumed.load_state_dict(json.loads(json.dumps(seen.state_dict())))
    found = resumed.observe_held_out(20, last)
    assert found == resumed.warnings and (found == []) == falls
    assert falls or found[0].startswith("the loss on held-out data did not fall: 2 after step 0, 2 after step 20;")


def test_of_a_short_run_and_of_rl_the_loss_says_nothing():
    assert watch("base", loss=[2.0] * 9)[0].warnings == []
    assert watch("rl", loss=[0.0] * 40)[0].warnings == []


@pytest.mark.parametrize(
    ("measured", "nothing", "meaning"),
    [
        ("reward_std", 0.0, "no group of completions differed in reward"),
        ("clipped_ratio", 1.0, "no completion ended by itself"),
        ("grad_norm", 0.0, "all gradients were zero"),
    ],
)
def test_ten_steps_in_a_row_without_anything_to_learn_from_are_reported_once(measured, nothing, meaning):
    seen, new = watch("rl", **{measured: [0.5] * 3 + [nothing] * 15})
    assert list(new) == [13] and new[13][0].startswith(f"{meaning} from step 4 to step 13; ")
    assert len(seen.warnings) == 1 and f"{meaning} from step 4 to step 18; " in seen.warnings[0]
    assert watch("rl", **{measured: ([nothing] * 9 + [0.5]) * 4})[1] == {}


def test_in_a_run_of_fewer_steps_all_of_them_count():
    assert list(watch("rl", reward_std=[0.0] * 4)[1]) == [4]
    assert watch("rl", reward_std=[0.0] * 3 + [0.1])[1] == {}


def test_what_is_measured_at_intervals_counts_for_the_steps_between():
    seen = LearningWatch("base", 100)
    assert seen.observe(1, grad_norm=0.0) == []
    assert [seen.observe(step, loss=1.0) for step in range(2, 10)] == [[]] * 8
    assert "from step 1 to step 10;" in seen.observe(10, grad_norm=0.0)[0]


def test_a_resumed_run_judges_all_of_its_steps():
    before, after = LearningWatch("base", 20), LearningWatch("base", 20)
    for step in range(1, 11):
        before.observe(step, loss=1.0, grad_norm=0.0)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    new = [found for step in range(11, 21) for found in after.observe(step, loss=1.5, grad_norm=0.0)]
    assert [found.split(":")[0] for found in new] == ["the loss did not fall"]  # the other is not new
    assert "from step 1 to step 20" in after.warnings[0]
