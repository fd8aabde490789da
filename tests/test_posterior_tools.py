"""The tools behind chapter 08's stored results, on small cases."""

import modes
import posterior
import pytest
import references
import torch

from ddmlib import assimilation as da
from ddmlib import datasets, pretrained


@pytest.fixture(scope="module")
def paths():
    return datasets.noisy_lorenz63(200, references.LENGTH, seed=3)


@pytest.fixture(scope="module")
def problem(paths):
    std = 0.25 * float(references.SCALE.std[0])
    g = torch.Generator().manual_seed(0)
    return references.Case(paths[0], da.observe(paths[0], da.component(0), std, generator=g))


def test_scores_of_the_reference_itself(problem, paths):
    a, b = paths[:100], paths[100:]
    found = posterior.score(problem, a, {"a": a, "b": b})
    assert found["w1"] < 1e-5
    assert found["floor"] > 1
    assert found["spread"] == 1
    assert found["coverage"] == found["coverage_reference"]
    assert found["log_prior"] == found["log_prior_reference"] == pytest.approx(81.7, abs=3)


def test_the_log_likelihood_is_that_of_standardised_observations(problem, paths):
    y = problem.observation.y[:, 0].double() / 8
    x = paths[:5, :, 0].double() / 8
    by_hand = torch.distributions.Normal(x, 0.25).log_prob(y).sum(-1).mean()
    found = references.describe(problem, paths[:5])["log_likelihood"]
    assert found == pytest.approx(float(by_hand), rel=1e-6)


def test_trajectories_far_off_one_observation_are_counted(problem, paths):
    x = paths[:1].repeat(4, 1, 1)
    std = problem.observation.std
    x[:, :, 0] = problem.observation.y[:, 0]
    for row, off in enumerate((0.0, 4.0, 5.0, -5.0)):
        x[row, 20, 0] += off * std
    assert references.describe(problem, x)["missed"] == 0.5


def test_runs_of_one_law_agree_and_others_do_not(paths):
    energy, std = references.agreement(paths[:100], paths[100:])
    assert abs(energy) < 3 * std
    energy, std = references.agreement(paths[:100], paths[100:] + 10.0)
    assert energy > 10 * std


def test_settings_cost_what_is_claimed():
    assert [posterior.r23("any", c).cost(None) for c in (1, 4)] == [1022, 2552]
    model = pretrained.RECIPES["noisy-lorenz63-levels"].model
    costs = {k: v.cost(pretrained.build(model)) for k, v in posterior.OURS.items()}
    assert costs["cheap"] <= 128 < costs["ours"] <= 1024


def test_modes_are_counted_by_where_a_descent_ends():
    x = datasets.noisy_lorenz63(24, modes.LENGTH, seed=4)
    g = torch.Generator().manual_seed(7)
    seen = da.observe(x[0], da.component(2), 0.86, every=modes.EVERY, generator=g)
    found, costs = modes.modes_of(da.weak_4d_var(modes.CHAIN, seen, x))
    assert len(found) >= 2
    assert costs[0] == 0
    assert bool((costs.diff() >= 0).all())
    counted = modes.shares(found, seen, found)  # a mode descends to itself
    assert counted == pytest.approx([1 / len(found)] * len(found) + [0], abs=1e-3)
