"""Fitted log-odds of an event: what they learn, where they are taken, what they are worth."""

import dataclasses
import math

import pytest
import scipy.stats
import torch
from half_space import sampler_law

from ddmlib import events, noise, sampling
from ddmlib.denoisers import GaussianDenoiser, diffuse
from ddmlib.events import logistic, odds, paths, pilot

DOUBLE = {"dtype": torch.float64}
DENOISER = GaussianDenoiser(torch.zeros(2, **DOUBLE), torch.eye(2, **DOUBLE))
CIRCLE = events.Constraint(lambda x: x.square().sum(-1) - 9.0, (2,))
WALL = events.Constraint(lambda x: torch.tanh(2 * (x[..., 0] - 3)), (2,))
PLANE = events.Constraint(lambda x: x[..., 0] - 3.0, (2,))
GRID = sampling.times(DENOISER.schedule, 32, spacing="log-ratio", ratios=(2e-3, 80.0))
MIDDLE = 14  # a level of noise near 2


def on(generator):
    return {"rule": "multistep", "like": torch.zeros((), **DOUBLE), "generator": generator}


def level(index=MIDDLE):
    return paths.levels(DENOISER, GRID, torch.zeros((), **DOUBLE))[index]


def inside(n, generator):
    """Standard normal points outside the circle: their squared distance is 9 more than usual."""
    x = noise.normal((n, 2), generator=generator, **DOUBLE)
    distance = x.norm(dim=-1, keepdim=True)
    return x / distance * (distance.square() + 9).sqrt()


def exact(x_t, alpha, sigma):
    """log P(|x_0|² > 9 | x_t), from the noncentral chi-squared law."""
    variance = float(sigma**2 / (alpha**2 + sigma**2))
    mean = x_t * alpha / (alpha**2 + sigma**2)
    shift = mean.square().sum(-1) / variance
    return torch.as_tensor(scipy.stats.ncx2.logsf(9 / variance, 2, shift))


@pytest.fixture
def fitted(generator):
    g = generator(1)
    plain = noise.normal((2048, 2), generator=g, **DOUBLE)
    guidance = events.EventGuidance(DENOISER, CIRCLE)
    found = odds.fit(guidance, GRID, plain, inside(2048, g), -4.5, generator=g)
    return guidance, found


def test_regression_finds_the_weights_it_was_made_with(generator):
    g = generator()
    x = 3 * torch.randn(40_000, 2, generator=g, **DOUBLE) + 1
    offset = torch.randn(40_000, generator=g, **DOUBLE)
    true = torch.tensor([-1.0, 0.5, -0.25], **DOUBLE)
    y = torch.rand(40_000, generator=g, **DOUBLE) < torch.sigmoid(true[0] + x @ true[1:] + offset)
    found = logistic.regression(x, y.double(), offset)
    torch.testing.assert_close(found, true, rtol=0, atol=0.06)
    # what parts the two kinds wholly, a column that says nothing, and none at all
    y, column = (x[:, 0] > 0).double(), torch.ones_like(x[:, :1])
    found = logistic.regression(torch.cat((x[:, :1], column), 1), y)
    assert bool(torch.isfinite(found).all())
    assert float(found[1]) > 1
    share = logistic.regression(x[:, :0], y, torch.full((40_000,), -12.0, **DOUBLE))
    assert float(share[0]) - 12 == pytest.approx(math.log(y.mean() / (1 - y.mean())), abs=1e-3)


def test_odds_learn_the_probability_of_the_event(fitted, generator):
    guidance, found = fitted
    better = odds.FittedGuidance(guidance, found)
    alpha, sigma = level()
    x_0 = inside(1024, generator(2))
    x_t = diffuse(x_0, alpha, sigma, noise.normal_like(x_0, generator(3)))
    truth = exact(x_t, alpha, sigma)
    errors = [
        float((g.condition(x_t, alpha, sigma).log_mass - truth).square().mean().sqrt())
        for g in (better, guidance)
    ]
    assert errors[0] < 0.6
    assert errors[1] > 4 * errors[0]


def test_guidance_follows_the_gradient_of_the_odds(fitted, generator):
    better = odds.FittedGuidance(*fitted)
    alpha, sigma = level()
    x_t = torch.randn(5, 2, generator=generator(), **DOUBLE).requires_grad_()
    known = better.condition(x_t, alpha, sigma)
    (slope,) = torch.autograd.grad(known.log_mass.sum(), x_t, retain_graph=True)
    pull = (known.guided - known.x_0) * alpha / sigma**2
    torch.testing.assert_close(pull, slope)
    assert known.guided.requires_grad
    assert not better.condition(x_t.detach(), alpha, sigma).guided.requires_grad


def test_odds_are_taken_from_one_level_on_and_not_where_guidance_is_exact(fitted, generator):
    taken = fitted[1].taken
    assert bool(taken[MIDDLE:].all())
    assert bool((taken.int().diff() >= 0).all())
    for seed in range(4):
        guidance, cost = odds.prepare(DENOISER, PLANE, GRID, 256, **on(generator(seed)))
        assert type(guidance) is events.EventGuidance
        assert cost == 5 * 256
        # the pilot's own guess may be forty times as much
        assert guidance.least == pytest.approx(0.05 * scipy.stats.norm.sf(3), rel=0.4)
    more, _ = odds.prepare(DENOISER, PLANE, GRID, 256, least=0.5, **on(generator(3)))
    assert more.least == pytest.approx(0.5 * scipy.stats.norm.sf(3), rel=0.4)


def test_odds_lessen_the_scatter_and_leave_the_mean(generator):
    """Far from the wall its tanh is flat, and moment matching certain of no."""
    g, scatter = generator(4), []
    _, covariance = sampler_law(DENOISER, 32)
    own = scipy.stats.norm.sf(3 / math.sqrt(float(covariance[0, 0])))
    guidance, _ = odds.prepare(DENOISER, WALL, GRID, 256, **on(g))
    assert isinstance(guidance, odds.FittedGuidance)
    calibration = pilot.calibrate(events.EventGuidance(DENOISER, WALL), GRID, 256, **on(g))
    before = events.EventGuidance(DENOISER, WALL, calibration=calibration)
    for each in (guidance, before):
        found = paths.twisted(each, GRID, 64, 64, defensive=0.1, **on(g)).log_probability.exp()
        error = float(found.std()) / 8
        assert abs(float(found.mean()) - own) < 3 * error
        scatter.append(float(found.std() / found.mean()))
    assert scatter[0] < 0.7 * scatter[1]


def test_the_event_is_decided_between_an_early_and_a_late_share_of_the_rise():
    ratios = torch.tensor([100.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.1])
    known = torch.tensor([-6.9, -7.0, -6.5, -4.0, -1.0, -0.1, 0.0])
    low, high = odds.deciding(ratios.log(), known)
    assert (low, high) == (pytest.approx(0.5, rel=1e-3), pytest.approx(5.0, rel=1e-3))
    # what lies outside without staying there does not count: wider is only dearer
    known[5] = -2.0
    assert odds.deciding(ratios.log(), known)[0] == pytest.approx(0.1, rel=1e-3)
    assert odds.deciding(ratios.log(), torch.zeros(7))[0] == pytest.approx(0.1, rel=1e-3)


def test_thinned_populations_have_the_same_mean_and_cost_less(generator):
    g, runs, n = generator(7), 128, 64
    _, covariance = sampler_law(DENOISER, 32)
    own = scipy.stats.norm.sf(3 / math.sqrt(float(covariance[0, 0])))
    guidance, _ = odds.prepare(DENOISER, WALL, GRID, 256, **on(g))
    low, high = guidance.undecided
    assert 0 < low < high < 80
    settings = {"defensive": 0.1} | on(g)
    thin, full = (paths.twisted(guidance, GRID, n, runs, thin=k, **settings) for k in (4, 1))
    found = thin.log_probability.exp()
    assert abs(float(found.mean()) - own) < 3 * float(found.std()) / runs**0.5
    ratios = [float(s / a) for a, s in paths.levels(DENOISER, GRID, torch.zeros(()))[:-1]]
    many = sum(low <= r <= high for r in ratios)
    assert thin.evaluations == runs * (n * many + n // 4 * (32 - many))
    assert full.evaluations == runs * n * 32
    assert thin.x_0.shape == (runs, n // 4, 2)
    per_evaluation = [
        float(each.log_probability.exp().var()) * each.evaluations for each in (thin, full)
    ]
    assert per_evaluation[0] < per_evaluation[1]


def test_a_gradient_is_believed_as_far_as_it_came_true(fitted, generator):
    g = generator()
    x = torch.randn(40, 500, generator=g, **DOUBLE)
    y = 0.3 * x + torch.randn(40, 500, generator=g, **DOUBLE) - 7
    slope, error = paths.slope_of(y, x)[:, 0]
    assert float(error) == pytest.approx(20_000**-0.5, rel=0.05)
    assert abs(float(slope) - 0.3) < 3 * float(error)
    slopes = torch.tensor([[1.2, 0.9, 0.5, -1.0], [0.1, 0.1, 0.1, 0.0]])
    expected = torch.tensor([1.0, 1.0, 0.8, 0.0, 0.0])
    torch.testing.assert_close(odds.pulls(slopes), expected)
    guidance, found = fitted
    shares = torch.linspace(1, 0.1, 32)
    better = odds.FittedGuidance(guidance, dataclasses.replace(found, pulls=shares))
    shift = torch.tensor([[0.3, 0.4], [30.0, 40.0]], **DOUBLE)
    alpha, sigma = level()
    short = better.restrained(shift, sigma / alpha)
    torch.testing.assert_close(short[0], float(shares[MIDDLE]) * shift[0])
    torch.testing.assert_close(short[1], shift[1] * odds.FARTHEST / 50)
    assert torch.equal(guidance.restrained(shift, sigma / alpha), shift)


def test_the_shares_of_a_linear_event_are_near_one(generator):
    g = generator(3)
    guidance = events.EventGuidance(DENOISER, PLANE)
    done = paths.twisted(guidance, GRID, 512, 8, defensive=0.1, **on(g))
    assert done.slopes.shape == (2, 31)
    felt = done.slopes[1] < 0.1
    assert int(felt.sum()) > 8
    assert float((done.slopes[0][felt] - 1).abs().mean()) < 0.25


@pytest.mark.parametrize("fitted", [True, False])
def test_odds_are_fitted_only_where_they_may_be(fitted, generator, monkeypatch):
    """Where they are not, the estimate is as good on a half-space, and costs the pilot alone."""
    made, real = [], odds.fit
    monkeypatch.setattr(odds, "fit", lambda *a, **k: made.append(1) or real(*a, **k))
    g, chain = generator(4), {"steps": 32, "ratios": (2e-3, 80.0), "fitted": fitted, **DOUBLE}
    _, covariance = sampler_law(DENOISER, 32)
    own = scipy.stats.norm.logsf(3 / math.sqrt(float(covariance[0, 0])))
    found = events.log_probability(
        DENOISER, PLANE, method="smc", samples=8192, runs=32, thin=1, generator=g, **chain
    )
    assert abs(found.log_probability - own) < 3 * found.standard_error < 0.5
    assert found.evaluations == 32 * (8192 + (6 if fitted else 2) * 256)
    x = events.twisted_samples(DENOISER, PLANE, 64, excess=2, generator=g, **chain)
    assert bool(PLANE.holds(x).all())
    assert len(made) == 2 * fitted


def test_no_pilot_and_an_event_out_of_reach(generator):
    guidance, cost = odds.prepare(DENOISER, CIRCLE, GRID, 0, **on(generator()))
    assert cost == 0
    assert guidance.calibration is None
    guidance, cost = odds.prepare(DENOISER, WALL, GRID, 16, fitted=False, **on(generator()))
    assert cost == 16
    assert type(guidance) is events.EventGuidance
    usual = guidance.least
    guidance, _ = odds.prepare(DENOISER, WALL, GRID, 16, fitted=False, least=0.5, **on(generator()))
    assert guidance.least == pytest.approx(50 * usual)
    far = events.Constraint(lambda x: (x[..., 0] - 1e6).clamp(max=1.0), (2,))
    guidance, cost = odds.prepare(DENOISER, far, GRID, 16, **on(generator()))
    assert type(guidance) is events.EventGuidance
    assert cost == 3 * 16
    always = events.Constraint(lambda x: x[..., 0] + 1e6, (2,))
    assert odds.prepare(DENOISER, always, GRID, 16, **on(generator()))[1] == 16


def test_bad_input_is_named(fitted, generator):
    guidance, found = fitted
    with pytest.raises(ValueError, match="least must be positive"):
        odds.prepare(DENOISER, WALL, GRID, 16, least=0.0, **on(generator()))
    with pytest.raises(ValueError, match="one noise level for all samples"):
        found.level(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="plain and inside must have one shape"):
        odds.fit(guidance, GRID, torch.zeros(4, 2), torch.zeros(2, 2), -4.5)
