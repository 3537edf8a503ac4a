"""The measurements of the engine, at toy size."""

import json

from recipes.benchmarks.engine_speed import EngineSpeedArguments, our_engine, ours, rollout_speed


def test_both_ways_of_rollouts_are_timed_on_equal_completions(toy_model_folder, tmp_path):
    lines = [json.dumps({"question": f"What is {n}+7?", "answer": f"#### {n + 7}"}) + "\n" for n in range(16)]
    (tmp_path / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    args = EngineSpeedArguments(model=str(toy_model_folder), problems=str(tmp_path / "problems.jsonl"), turns=1)
    figures = rollout_speed(args)
    assert figures["equal completions, %"] == 100
    assert all(figures[f"{way}, completions/s"] > 0 for way in ("engine", "TRL"))


def test_a_measured_generation_has_as_many_tokens_as_asked():
    args = EngineSpeedArguments(depth=1, vocab_size=300, new_tokens=5)
    ours(our_engine(args), args)(7, 3)
