"""The weekly check of what the recipes name on the network, against a Hub on this machine."""

import published
import published_data
import pytest

ADDRESS = "{hub.url}/datasets/me/files/resolve/main/{name}"


@pytest.fixture
def check(hub, monkeypatch, capsys):
    """Runs the check against this Hub, which has everything; returns the exit code and the failures."""
    published.publish(hub, shards=3)
    hub.put("me/files", {"eval_bundle.zip": published.core_bundle(), "words.txt": b"a\naa\n"}, kind="datasets")
    addresses = [ADDRESS.format(hub=hub, name=name) for name in ("eval_bundle.zip", "words.txt")]
    monkeypatch.setattr(published_data, "ADDRESSES", dict(zip(addresses, (b"PK\x03\x04", b"a"), strict=True)))
    monkeypatch.setattr(
        published_data, "VALIDATION_TEXT", ("karpathy/fineweb-edu-100b-shuffle", "shard_00002.parquet")
    )
    monkeypatch.setattr(published_data, "shards_of", lambda content: 3)

    def run():
        with pytest.raises(SystemExit) as ended:
            published_data.main()
        lines = capsys.readouterr().out.splitlines()
        return bool(ended.value.code), [line for line in lines if line.startswith("FAILED")], lines

    return run


def test_all_that_the_recipes_name_is_found_where_it_is_published(check):
    failed, failures, lines = check()
    assert not failed and failures == []
    for name in ("text karpathy/climbmix", "HuggingFaceTB/smol-smoltalk:test", "cais/mmlu:all:auxiliary_train"):
        assert any(name in line for line in lines)
    assert {f"ok: task {name}" for name in ("mmlu", "humaneval", "arc_challenge")} <= set(lines)
    assert "ok: problems openai/gsm8k:main:test" in lines


def test_what_was_renamed_changed_or_shortened_fails_by_name_and_the_others_are_still_checked(check, hub):
    del hub.repositories["datasets", "openai/openai_humaneval"]
    published.put_splits(hub, "allenai/ai2_arc", {"ARC-Easy": {"test": published.arc}}, 10)
    published.put_splits(hub, "openai/gsm8k", {"main": dict.fromkeys(("train", "test"), published.text)}, 10)
    hub.put("me/files", {"eval_bundle.zip": b"moved", "words.txt": b"a\naa\n"}, kind="datasets")
    text = hub.repositories["datasets", "karpathy/climbmix-400b-shuffle"].files
    del text["shard_00001.parquet"]
    failed, failures, lines = check()
    assert failed and len(lines) > len(failures)
    found = "\n".join(failures)
    for name in ("task humaneval", "ai2_arc:ARC-Easy:train", "gsm8k:main:train", "eval_bundle.zip", "climbmix"):
        assert name in found
    assert "task mmlu" not in found and "fineweb" not in found
