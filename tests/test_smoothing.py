"""Particle filter and weak-constraint 4D-Var: against the Kalman smoother, which is exact."""

import math

import pytest
import torch

from ddmlib import assimilation as da
from ddmlib.assimilation import particle, variational
from ddmlib.dynamics import LinearGaussian, NoisyLorenz63, simulate

DOUBLE = torch.float64
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=DOUBLE)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)
LENGTH = 12


def first(x):
    return x[..., :1]


def chain(device):
    return LinearGaussian.stationary(A.to(device), Q.to(device))


def seen(system, generator, every=3, std=0.5):
    g = generator(9)
    truth = simulate(system, system.initial(1, g), steps=LENGTH - 1, generator=g)[0]
    return da.observe(truth, first, std, every=every, generator=g)


# --- particle filter -----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_paths_follow_the_smoother(every, device, generator):
    system = chain(device)
    observation = seen(system, generator, every)
    exact = da.rts_smoother(system, observation, LENGTH)
    found = da.bootstrap_filter(
        system, observation, length=LENGTH, particles=2**15, paths=4000, generator=generator(1)
    )
    assert found.paths.shape == (4000, LENGTH, 2)
    std = torch.diagonal(exact.covariance, dim1=-2, dim2=-1).sqrt()
    # 4000 picks, and a few thousand distinct ancestors at the start
    assert float(((found.paths.mean(0) - exact.mean) / std).abs().max()) < 0.1
    centred = found.paths - found.paths.mean(0)
    covariance = torch.einsum("nki,nkj->kij", centred, centred) / len(centred)
    scale = std[:, :, None] * std[:, None, :]
    assert float(((covariance - exact.covariance) / scale).abs().max()) < 0.12
    assert 500 < found.first_states < 2**15


def test_log_evidence_is_that_of_the_kalman_filter(device, generator):
    system = chain(device)
    observation = seen(system, generator)
    exact = float(da.kalman_filter(system, observation, LENGTH).log_evidence)
    runs = torch.tensor(
        [
            da.bootstrap_filter(
                system, observation, length=LENGTH, particles=500, paths=1, generator=generator(k)
            ).log_evidence
            for k in range(40)
        ]
    )
    ratio = (runs.double() - exact).exp()  # unbiased: its mean is one
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1) < 3 * error
    assert error < 0.05


def test_the_tree_keeps_each_path_as_it_was_walked(device, generator):
    """A chain that never forgets: each state says which particle it is."""

    class Numbered(LinearGaussian):
        def initial(self, n, generator=None):
            number = torch.arange(n, dtype=DOUBLE, device=device)
            return torch.stack((number, torch.zeros_like(number)), -1)

        def transition(self, x, generator=None):
            return x + torch.tensor([0.0, 1.0]).to(x)

    system = Numbered(A, Q, A[0], Q)
    y = torch.full((LENGTH, 1), 40.0, dtype=DOUBLE, device=device)
    observation = da.Observation(y, first, 30.0)
    found = da.bootstrap_filter(
        system, observation, length=LENGTH, particles=100, paths=3000, generator=generator(2)
    )
    number, time = found.paths.unbind(-1)
    assert (number == number[:, :1]).all()
    assert (time == torch.arange(LENGTH).to(time)).all()
    # the posterior of the number: twelve observations of it
    law = torch.softmax(-LENGTH * (torch.arange(100.0) - 40) ** 2 / (2 * 30.0**2), 0).double()
    mean = float((law * torch.arange(100)).sum())
    assert float(number[:, 0].mean()) == pytest.approx(mean, abs=2)
    assert found.first_states == len(number[:, 0].unique()) or found.first_states > 30


def test_pruning_bounds_the_tree(device, generator, monkeypatch):
    sizes = []
    prune = particle._prune

    def spy(tree):
        prune(tree)
        sizes.append(sum(g.states.numel() for g in tree))

    monkeypatch.setattr(particle, "_prune", spy)
    system = NoisyLorenz63()
    g = generator(3)
    truth = simulate(system, system.initial(1, g), steps=96, generator=g)[0].to(device)
    observation = da.observe(truth, first, 0.5, every=8, generator=g)
    da.bootstrap_filter(
        system, observation, length=97, particles=2**12, paths=4, generator=generator(4)
    )
    assert len(sizes) > 5
    assert max(sizes) < 0.3 * 97 * 3 * 2**12  # all states would be 97 x 3 x 2^12 numbers


def test_systematic_resampling_is_fair_and_even(device, generator):
    w = torch.tensor([0.0, 0.31, 0.0, 0.475, 0.215, 0.0], dtype=DOUBLE, device=device)
    counts = torch.stack(
        [torch.bincount(particle.systematic(w, 10, generator(k)), minlength=6) for k in range(400)]
    ).double()
    assert (counts >= (10 * w).floor()).all()
    assert (counts <= (10 * w).ceil()).all()
    torch.testing.assert_close(counts.mean(0), 10 * w, rtol=0, atol=0.1)


def test_systematic_resampling_is_a_search_of_even_positions(device, generator):
    draws = torch.rand(5000, generator=generator(1), dtype=DOUBLE) ** 8
    w = draws.masked_fill(torch.arange(5000) % 7 == 6, 0.0).to(device)
    w[-3:] = 0
    for n in (1, 700, 20_000):
        shift = torch.rand(1, generator=generator(2), dtype=DOUBLE).to(device)
        positions = (torch.arange(n, device=device) + shift) / n
        edges = w.cumsum(0) / w.sum()
        expected = torch.searchsorted(edges, positions, right=True)
        found = particle.systematic(w, n, generator(2))
        assert torch.equal(found, expected)
        assert float(w[found].min()) > 0


def test_seeds_fix_paths_and_initial_states_are_used(device, generator):
    system = NoisyLorenz63()
    y = torch.zeros(2, 1, device=device)
    observation = da.Observation(y, first, 5.0, every=4)

    def run(seed, **changes):
        arguments = {"length": 5, "particles": 64, "paths": 32, "generator": generator(seed)}
        return da.particle_filter(system, observation, **(arguments | changes))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert run(1).dtype == torch.float32
    point = torch.tensor([1.0, 2.0, 20.0]).expand(64, 3)
    assert (run(1, initial=point)[:, 0] == point[:32].to(device)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 4}, r"y must have shape \(1, m\)"),
        (
            {"observation": da.Observation(torch.zeros(2), first, 1.0, 4)},
            r"y must have shape \(2, m\)",
        ),
        ({"observation": da.Observation(torch.full((2, 1), 1e6), first, 1e-3, 4)}, "no particle"),
        ({"observation": da.Observation(torch.zeros(2, 2), first, 1.0, 4)}, "operator must map"),
        ({"particles": 1}, "particles must be at least 2"),
        ({"paths": 0}, "paths must be at least 1"),
        ({"initial": torch.zeros(8, 3)}, r"initial must have shape \(16, 3\)"),
        ({"initial": torch.full((16, 3), math.nan)}, "initial must be finite"),
    ],
)
def test_particle_filter_refuses(changes, words, generator):
    arguments = {
        "chain": NoisyLorenz63(),
        "observation": da.Observation(torch.zeros(2, 1), first, 1.0, every=4),
        "length": 5,
        "particles": 16,
        "paths": 4,
        "generator": generator(),
    }
    if words == "no particle":  # far enough for every likelihood to underflow to zero
        arguments["initial"] = torch.full((16, 3), 1e30)
    with pytest.raises(ValueError, match=words):
        da.particle_filter(**(arguments | changes))


# --- weak-constraint 4D-Var ----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_4d_var_of_a_linear_chain_is_the_smoothers_mean_in_one_step(every, device, generator):
    system = chain(device)
    observation = seen(system, generator, every)
    start = torch.randn(3, LENGTH, 2, generator=generator(1), dtype=DOUBLE).to(device)
    exact = da.rts_smoother(system, observation, LENGTH).mean
    once = da.weak_4d_var(system, observation, start, iterations=1)
    torch.testing.assert_close(once.trajectory, exact.expand(3, LENGTH, 2))
    assert not once.converged.any()
    again = da.weak_4d_var(system, observation, start)
    assert again.converged.all()
    torch.testing.assert_close(again.trajectory, once.trajectory)
    mean, covariance = system.law(LENGTH)
    law = torch.distributions.MultivariateNormal(mean.flatten(), covariance)
    other = start.flatten(1)

    def density(x):
        states = x.unflatten(-1, (LENGTH, 2))
        likelihood = observation.log_likelihood(observation.observed(states)).sum(-1)
        return law.log_prob(x) + likelihood

    fall = density(once.trajectory.flatten(1)) - density(other)
    start_cost = da.weak_4d_var(system, observation, start, iterations=1).cost
    unmoved = variational._expand(system, observation, start)[0]
    torch.testing.assert_close(unmoved - start_cost, fall)


def test_4d_var_finds_a_stationary_point_of_the_posterior(device, generator):
    system, g = NoisyLorenz63(), generator(5)
    x = system.initial(4, g).double().to(device)
    for _ in range(100):
        x = system.transition(x, g)
    truth = simulate(system, x, steps=24, generator=g)
    observation = da.observe(truth, lambda s: torch.atan(s[..., :1] / 5), 0.1, every=4, generator=g)
    start = truth + torch.randn(truth.shape, generator=g, dtype=DOUBLE).to(truth)
    mode = da.weak_4d_var(system, observation, start)
    assert mode.converged.all()
    path = mode.trajectory.requires_grad_()
    prior = torch.distributions.MultivariateNormal(system.mean.to(path), system.covariance.to(path))
    log_posterior = prior.log_prob(path[:, 0]).sum()
    log_posterior = log_posterior + system.log_transition(path[:, :-1], path[:, 1:]).sum()
    seen_states = observation.observed(path)
    log_posterior = log_posterior + observation.log_likelihood(seen_states).sum()
    log_posterior.backward()
    assert float(path.grad.abs().max()) < 1e-2  # a unit of error in a state costs about 40
    constant = mode.cost.sum() + log_posterior
    again = variational._expand(system, observation, start)[0].sum()
    other = prior.log_prob(start[:, 0]).sum() + observation.log_likelihood(start[:, ::4]).sum()
    other = other + system.log_transition(start[:, :-1], start[:, 1:]).sum()
    torch.testing.assert_close(again + other, constant)


def test_mirrored_starts_end_in_mirrored_modes(device, generator):
    """Nothing but the third component is seen: (a, b) -> (-a, -b) is a symmetry."""
    system, g = NoisyLorenz63(), generator(6)
    x = system.initial(1, g).double().to(device)
    for _ in range(100):
        x = system.transition(x, g)
    truth = simulate(system, x, steps=16, generator=g)
    observation = da.observe(truth[0], lambda s: s[..., 2:], 0.1, every=4, generator=g)
    mirror = torch.tensor([-1.0, -1.0, 1.0]).to(truth)
    mode = da.weak_4d_var(system, observation, torch.cat((truth, truth * mirror)))
    assert mode.converged.all()
    torch.testing.assert_close(mode.trajectory[1], mode.trajectory[0] * mirror, rtol=0, atol=1e-4)
    torch.testing.assert_close(mode.cost[1], mode.cost[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": torch.zeros(3)}, r"start must have shape \(\*batch, length, d\)"),
        ({"start": torch.zeros(2, 9, 2)}, r"start must have shape \(\.\.\., 3\)"),
        ({"start": torch.zeros(2, 8, 3)}, r"y must have shape \(\*batch, 2, m\)"),
        ({"start": torch.full((2, 9, 3), math.inf)}, "start must be finite"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_4d_var_refuses(changes, words):
    observation = da.Observation(torch.zeros(3, 1), first, 1.0, every=4)
    arguments = {"start": torch.zeros(2, 9, 3)} | changes
    with pytest.raises(ValueError, match=words):
        da.weak_4d_var(NoisyLorenz63(), observation, **arguments)
