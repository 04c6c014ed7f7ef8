"""Facts of the loyalty measures."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from midstream.measure.loyalty import label_loyalty, probability_loyalty, rank_correlation, top_overlap


def test_rank_correlation_is_scipys_over_the_entries_in_the_mask() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 9).round(decimals=1), torch.randn(3, 9)
    ours[0, 1] = ours[0, 2] = ours[0, 3]  # ties
    mask = torch.rand(3, 9) > 0.3
    found = rank_correlation(ours, theirs, mask)
    for row in range(3):
        expected = spearmanr(ours[row, mask[row]], theirs[row, mask[row]]).statistic
        assert found[row].item() == pytest.approx(expected, abs=1e-5)


def test_rows_without_an_order_have_no_rank_correlation() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    everything, two = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False]] * 2)
    assert rank_correlation(values, values, everything).isnan().tolist() == [False, True]
    assert rank_correlation(values, values, two).isnan().all()


def test_probability_loyalty_is_one_minus_scipys_distance() -> None:
    p, q = torch.randn(4, 3).softmax(-1), torch.randn(4, 3).softmax(-1)
    for base in (2.0, math.e):
        expected = 1 - torch.tensor([jensenshannon(a, b, base=base) for a, b in zip(p, q, strict=True)])
        torch.testing.assert_close(probability_loyalty(p, q, base), expected.float(), rtol=1e-3, atol=1e-4)


def test_disjoint_distributions_have_probability_loyalty_zero_and_equal_ones_one() -> None:
    sure = torch.eye(2)
    torch.testing.assert_close(probability_loyalty(sure, sure.flip(0)), torch.zeros(2))
    torch.testing.assert_close(probability_loyalty(sure, sure), torch.ones(2))
    assert probability_loyalty(sure, sure.flip(0), math.e)[0].item() == pytest.approx(1 - math.sqrt(math.log(2)))


def test_label_loyalty_counts_agreement_whatever_is_right() -> None:
    ours, theirs = torch.tensor([[2.0, 1], [0, 1], [3, 0]]), torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    assert label_loyalty(ours, theirs) == pytest.approx(2 / 3)


def test_top_overlap_ignores_what_is_masked_and_rows_that_are_too_short() -> None:
    ours = torch.tensor([[9.0, 3, 2, 1, 0], [1, 2, 3, 4, 5]])
    theirs = torch.tensor([[0.0, 1, 3, 2, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    found = top_overlap(ours, theirs, mask, 2)
    assert found[0].item() == pytest.approx(0.5)
    assert found[1].isnan()
