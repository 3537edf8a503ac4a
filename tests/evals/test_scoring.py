import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MistralConfig

import evals.scoring
from evals.scoring import Scorer, context_of, logits_at, within_memory
from evals.token_trees import Row, Tree, trees_of

VOCABULARY = 500
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
FOREIGN = {
    "gpt2": GPT2Config(**SIZES, n_head=4, n_positions=256),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=12),
    "mamba": MambaConfig(**SIZES, pad_token_id=0),
}


def foreign_model(name, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FOREIGN[name], **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def any_model(name):
    return random_model(name) if name in ("plain", "turbo") else foreign_model(name)


def ids(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def choices(prompt, *lengths):
    """The rows of a question whose choices have these lengths."""
    return [Row(prompt + ids(length, 10 + i), len(prompt)) for i, length in enumerate(lengths)]


def contexts(prompt, *lengths):
    """The rows of a question with another context for each option and the same end, which is scored."""
    return [Row(prompt + ids(length, 20 + i) + ids(6, 9), len(prompt) + length) for i, length in enumerate(lengths)]


def questions():
    """Questions of every kind, with beginnings of different lengths."""
    found = []
    for number, length in enumerate((50, 37, 5, 60)):
        prompt = ids(length, number)
        found += [choices(prompt, 3, 1, 7), contexts(prompt, 2, 4), [Row(prompt, length - 3)]]
    return found + [choices(prompt, 1, 1), [Row(prompt, 60)], [Row([7], 1), Row([7, 8], 1)]]


def alone(model, row):
    """Mean loss and most likely tokens of a row by an ordinary forward pass of the whole row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()[row.start - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(row.target)).item(), logits.argmax(-1).tolist()


def tokens_fed(model, monkeypatch, questions, **options):
    """How many tokens the model reads to score the questions, those of trying it out not counted."""
    fed, scorer = [], Scorer(model, **options)
    assert scorer.shares in (True, False)
    forward = model.forward

    def counting(*args, **inputs):
        fed.append(inputs["input_ids"].numel())
        return forward(*args, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", counting)
        scorer.scores(questions)
    return sum(fed)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("name", ["plain", "turbo", *FOREIGN])
def test_scores_are_those_of_whole_rows_one_at_a_time(name, batch_size):
    model, asked = any_model(name), questions()
    for rows, scores in zip(asked, Scorer(model, batch_size).scores(asked), strict=True):
        for row, score in zip(rows, scores, strict=True):
            if row.target:
                loss, predicted = alone(model, row)
                assert score.loss == pytest.approx(loss, abs=1e-5) and score.predicted == predicted
            else:
                assert math.isnan(score.loss) and score.predicted == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_both_kernels_that_take_any_mask_share_beginnings(name, attention):
    model, rows = foreign_model(name, attn_implementation=attention), choices(ids(50), 3, 1, 7)
    scorer = Scorer(model)
    assert scorer.shares
    losses = [score.loss for score in scorer.scores([rows])[0]]
    assert losses == pytest.approx([alone(model, row)[0] for row in rows], abs=1e-5)


def test_what_options_share_is_read_once(either_model, monkeypatch):
    rows = choices(ids(100), 3, 3, 3, 3)
    assert tokens_fed(either_model, monkeypatch, [rows], batch_size=1) == 4 * 102
    assert tokens_fed(either_model, monkeypatch, [rows]) == 100 + 4 * 2
    letters = choices(ids(100), 1, 1, 1, 1)
    assert tokens_fed(either_model, monkeypatch, [letters], batch_size=1) == 4 * 100
    assert tokens_fed(either_model, monkeypatch, [letters]) == 100  # only logits differ
    assert tokens_fed(either_model, monkeypatch, [contexts(ids(100), 5, 5)]) == 100 + 2 * 10


@pytest.mark.parametrize("name", ["plain", "turbo"])
def test_the_pass_that_fills_the_cache_ends_there(name):
    model, read = any_model(name), []
    scorer, layer = Scorer(model), model.model.layers[-1]
    assert scorer.shares
    layer.mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    scorer.scores([choices(ids(100), 3, 3)])
    assert read == [1 + 2 * 2]  # the last common token, and each option without its last one


def test_a_model_without_a_cache_of_keys_and_values_reads_whole_rows(monkeypatch):
    model, rows = foreign_model("mamba"), choices(ids(60), 2, 2)
    assert not Scorer(model).shares and context_of(model) > 10**9
    assert tokens_fed(model, monkeypatch, [rows]) == 2 * 61


def test_a_model_that_ignores_the_mask_or_raises_reads_whole_rows(monkeypatch):
    model = foreign_model("gpt2")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda attention_mask=None, **inputs: forward(**inputs))
    assert not Scorer(model).shares
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache=False: forward(input_ids=input_ids))
    scorer, rows = Scorer(model), choices(ids(60), 2, 3)
    assert not scorer.shares
    assert [score.loss for score in scorer.scores([rows])[0]] == pytest.approx([alone(model, row)[0] for row in rows])


def test_a_model_is_tried_only_when_a_question_shares_enough(monkeypatch):
    monkeypatch.setattr(evals.scoring, "can_share", lambda model: pytest.fail("tried"))
    Scorer(any_model("gpt2")).scores([choices(ids(8), 2, 2), [Row(ids(40), 30)]])


def test_equal_options_tie_exactly(either_model):
    rows = [*choices(ids(50), 4, 6), Row([*ids(50), *ids(4, 10)], 50)]
    scores = Scorer(either_model).scores([rows, [Row(ids(20), 12)]])[0]
    assert scores[0].loss == scores[2].loss != scores[1].loss


def test_progress_counts_the_scored_rows(either_model):
    counted, asked = [], questions()
    Scorer(either_model).scores(asked, counted.append)
    assert sum(counted) == sum(bool(row.target) for rows in asked for row in rows)


def test_batches_are_split_by_their_logits_and_score_the_same(either_model, monkeypatch):
    asked = [choices(ids(40 + number, number), 5, 5) for number in range(6)]
    whole = Scorer(either_model).scores(asked)
    monkeypatch.setattr(evals.scoring, "MAX_LOGITS", VOCABULARY * 25)
    trees = [tree for number, rows in enumerate(asked) for tree in trees_of(dict(enumerate(rows, 2 * number)), True)]
    assert [len(part) for part in within_memory(trees, VOCABULARY)] == [1, 2, 1, 2]
    parts = Scorer(either_model).scores(asked)
    losses = [[score.loss for scores in of_both for score in scores] for of_both in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_head_runs_only_where_logits_are_asked_for(either_model):
    batch, seen = torch.tensor([ids(9), ids(9, 1)]), []
    head = either_model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:-1])))
    logits = logits_at(either_model, [(1, 8), (0, 3)], input_ids=batch)
    expected = either_model(input_ids=batch).logits
    torch.testing.assert_close(logits, torch.stack([expected[1, 8], expected[0, 3]]))
    assert seen[0] in ((2, 9), (1, 2)) and len(head._forward_pre_hooks) == 1


def test_losses_that_are_not_finite_are_returned_as_such(either_model):
    with torch.no_grad():
        either_model.get_output_embeddings().weight[3] = math.inf
    scores = Scorer(either_model).scores([choices(ids(50), 2, 2), [Row(ids(9), 4)]])
    assert not any(score.is_finite for of_one in scores for score in of_one)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=4), st.data())
def test_a_tree_reads_each_row_and_predicts_its_tokens_where_the_row_would(sequences, data):
    rows = {i: Row(one, data.draw(st.integers(1, len(one) - 1))) for i, one in enumerate(sequences)}
    fed = {row.fed for row in rows.values()}
    most = min([len(one) for one in fed] + [row.start for row in rows.values()])
    shared = next(n for n in range(most, -1, -1) if len({one[:n] for one in fed}) == 1)
    trees = [Tree(rows, min(fed)[:shared])] if shared and (len(fed) == 1 or shared > 1) else trees_of(rows, False)
    for tree in trees:
        read, positions, owners = list(tree.read_last), tree.positions, tree.owners
        assert len(read) == len(positions) == len(owners) and tree.size == len(tree.read_first) + len(read)
        for row in tree.rows.values():
            own = tree.branches.index(tree.branch(row))
            line = dict(enumerate(tree.read_first))
            line |= {p: t for t, p, owner in zip(read, positions, owners, strict=True) if owner in (own, -1)}
            assert [line[p] for p in sorted(line)] == list(row.fed)
            assert [positions[column] for column in tree.columns(row)] == list(range(row.start - 1, len(row.ids) - 1))
