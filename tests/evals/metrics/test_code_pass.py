import math
from itertools import combinations

import pytest

from evals.metrics.code_pass.estimate import pass_at_k


def test_pass_at_k_is_the_share_of_draws_of_k_samples_with_a_right_one():
    samples = [True, False, False, True, False]
    for k in range(1, 6):
        draws = list(combinations(samples, k))
        assert pass_at_k([samples], k) == (pytest.approx(sum(map(any, draws)) / len(draws)), 0.0)


def test_with_one_sample_it_is_the_accuracy_and_its_binomial_error():
    value, error = pass_at_k([[True]] * 21 + [[False]] * 4)
    assert (value, error) == (pytest.approx(0.84), pytest.approx(math.sqrt(0.84 * 0.16 / 25)))


def test_samples_of_one_question_do_not_count_as_questions_of_their_own():
    """Whether four samples agree or there is only one, the standard error is that of two questions."""
    assert pass_at_k([[True] * 4, [False] * 4]) == pass_at_k([[True], [False]]) == (0.5, pytest.approx(0.5**1.5))


@pytest.mark.parametrize(
    ("grades", "k"), [([], 1), ([[True]], 2), ([[True, False], [True]], 2), ([[True]], 0), ([[]], 1)]
)
def test_too_few_questions_or_samples_are_an_error(grades, k):
    with pytest.raises(ValueError, match="at least one question"):
        pass_at_k(grades, k)
