"""Drawing problems: laws of each shift, paired conditions, fields that are out of range."""

import numpy as np
import pytest
import torch

from icprobe.regression.problems import CORRUPTIONS, Prior, Shift
from icprobe.regression.problems import draw as draw_problems

EXACT = {"rtol": 0, "atol": 1e-10}  # all is in float64


def draw(shift, prior=None, M=50, seed=0, N=400):
    prior = prior or Prior(dimension=5, noise=0.1)
    return draw_problems(prior, np.random.default_rng(seed), 8, N, M, shift, K=2)


def tasks_of(problems):
    """Tasks behind the examples and the queries, [8, D] each, of labels without noise."""
    pairs = (problems.x, problems.y), (problems.queries, problems.answers)
    return [torch.linalg.lstsq(x, y[..., None]).solution[..., 0] for x, y in pairs]


def test_the_same_generator_draws_the_same_under_any_shift():
    plain, again = draw(Shift()), draw(Shift())
    for name, part in vars(plain).items():
        assert torch.equal(part, getattr(again, name)), name
    for shift in (Shift(cosine=0.3), Shift(scale=3), Shift(corruption="outlier")):
        other = draw(shift)
        assert torch.equal(other.queries, plain.queries), shift
        assert torch.equal(other.answers, plain.answers), shift
    assert not torch.equal(draw(Shift(), seed=1).x, plain.x)


@pytest.mark.parametrize("cosine", [1, 0.9, 0.25, 0, -0.5, -1])
def test_tasks_are_at_the_cosine(cosine):
    prior = Prior(dimension=5, mean=2.0, noise=1e-30)
    tasks = tasks_of(draw(Shift(cosine=cosine), prior))
    mine, theirs = (w - prior.centre for w in tasks)
    np.testing.assert_allclose(torch.cosine_similarity(mine, theirs), cosine, **EXACT)
    np.testing.assert_allclose(mine.norm(dim=1), theirs.norm(dim=1), **EXACT)


def test_covariates_are_wider():
    assert torch.equal(draw(Shift(scale=3)).x, 3 * draw(Shift()).x)
    assert torch.equal(draw(Shift(scale=3)).base_x, 3 * draw(Shift()).base_x)


def test_means_are_apart():
    found = draw(Shift(offset=2), M=400)
    distance = (found.x.mean(1) - found.queries.mean(1)).norm(dim=1)
    # four standard errors in each of five directions
    np.testing.assert_allclose(distance, 4, atol=4 * np.sqrt(5 * 2 / 400))


@pytest.mark.parametrize("degrees", [0, 30, 85])
def test_planes_have_the_angle(degrees):
    found = draw(Shift(degrees=degrees), M=60)
    for mine, theirs in zip(found.x, found.queries, strict=True):
        bases = [torch.linalg.svd(x, full_matrices=False) for x in (mine, theirs)]
        assert all((s[2:] < 1e-10).all() and s[1] > 1 for _, s, _ in bases)
        cosines = torch.linalg.svdvals(bases[0].Vh[:2] @ bases[1].Vh[:2].T)
        np.testing.assert_allclose(cosines, np.cos(np.deg2rad(degrees)), **EXACT)


def test_far_tasks_are_on_the_other_side():
    prior = Prior(dimension=5, mean=1.0, spread=0.5, noise=1e-30)
    near, far = (tasks_of(draw(shift, prior)) for shift in (Shift(), Shift(far=-1)))
    for one, other in zip(near, far, strict=True):
        np.testing.assert_allclose(other, one - 2 * prior.centre, **EXACT)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_share_of_the_labels_is_corrupted(corruption):
    plain, found = draw(Shift()), draw(Shift(corruption=corruption))
    assert (found.corrupted.sum(1) == 80).all() and not plain.corrupted.any()
    assert len({tuple(row.tolist()) for row in found.corrupted}) == 8
    assert torch.equal(found.y[~found.corrupted], plain.y[~found.corrupted])
    before, after = plain.y[found.corrupted], found.y[found.corrupted]
    if corruption == "flip":
        assert torch.equal(after, -before)
    elif corruption == "outlier":
        spread = plain.y.std(dim=1, keepdim=True).expand(-1, 400)[found.corrupted]
        np.testing.assert_allclose((after - before).abs(), 3.5 * spread, **EXACT)
        assert 0.4 < (after > before).double().mean() < 0.6
    else:
        assert abs(np.corrcoef(before, after)[0, 1]) < 4 / np.sqrt(640)
        assert after.std().item() == pytest.approx(before.std().item(), rel=0.2)


def test_variances_are_those_of_covariates():
    prior = Prior(dimension=2, variances=(4.0, 0.25))
    spread = prior.covariates(np.random.default_rng(0), 20000).std(0)
    np.testing.assert_allclose(spread, [2, 0.5], rtol=0.03)


def test_base_contexts_are_as_long_as_asked():
    problems = draw(Shift())
    assert [x.shape[1] for x, _ in problems.base_contexts(1)] == [1]
    assert [y.shape for _, y in problems.base_contexts(0)] == [(8, 0)]
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"k is {k}.* 0 to 2"):
            list(problems.base_contexts(k))
    assert torch.equal(problems.task(3).x, problems.x[3:4])


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: Prior(dimension=0), "dimension", "0"),
        (lambda: Prior(noise=float("nan")), "noise", "nan"),
        (lambda: Prior(dimension=2, variances=(1.0,)), "variances", "1 numbers, expected 2"),
        (lambda: Shift(cosine=1.1), "cosine", "1.1"),
        (lambda: Shift(corruption="flipped"), "corruption", "'flip', 'random' or 'outlier'"),
        (lambda: Shift(degrees=90), "degrees", "90"),
        (lambda: draw(Shift(corruption="flip"), N=2), "2 examples", "20%"),
        (lambda: draw(Shift(cosine=0.5), Prior(dimension=1)), "cosine", "two dimensions"),
        (lambda: draw(Shift(degrees=10), Prior(dimension=3)), "planes", "the prior has 3"),
    ],
)
def test_what_is_out_of_range_is_an_error(make, field, value):
    with pytest.raises(ValueError, match=f"(?s){field}.*{value}"):
        make()
