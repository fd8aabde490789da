"""Fusion: observed components as components with less noise, exact wherever the prior is known."""

import pytest
import torch

from ddmlib import assimilation as da
from ddmlib import networks, sampling, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import EmpiricalDenoiser, GaussianDenoiser, NetworkDenoiser
from ddmlib.dynamics import LinearGaussian, simulate
from ddmlib.guidance import MMPS, Fusion, evaluations, posterior
from ddmlib.guidance.base import Linearised
from ddmlib.tails import AsinhStandardizer
from ddmlib.trajectories import GaussianTrajectoryDenoiser

DOUBLE = torch.float64
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=DOUBLE)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)
CHAIN = LinearGaussian.stationary(A, Q)
LENGTH = 9
SCHEDULE = schedules.LogLinear(1e-3, 1e3)
UNITS = Standardizer(
    torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.tensor([2.0, 0.5], dtype=DOUBLE)
)
TIMES = [float(SCHEDULE.time(r)) for r in (0.01, 0.3, 1.0, 10.0)]


@pytest.fixture
def prior(device):
    mean, covariance = CHAIN.law(LENGTH)
    return GaussianTrajectoryDenoiser(mean.to(device), covariance.to(device), SCHEDULE, UNITS)


@pytest.fixture
def observe(generator, device):
    def observe(operator, std=0.4, every=4):
        g = generator(8)
        x = simulate(CHAIN, CHAIN.initial(1, g), steps=LENGTH - 1, generator=g)[0]
        return da.observe(UNITS.inverse(x).to(device), operator, std, every=every, generator=g)

    return observe


def twice(x):
    """Return the second component, and the first one from two instruments in other units."""
    return torch.stack((x[..., 1], 3 * x[..., 0], -x[..., 0]), -1)


def stretched(prior):
    """Return the prior in units that are no affine map of the physical ones."""
    mean, covariance = CHAIN.law(LENGTH)
    units = AsinhStandardizer(prior.standardizer.mean, prior.standardizer.std)
    return GaussianTrajectoryDenoiser(mean, covariance, SCHEDULE, units)


OPERATORS = [da.component(0), da.component(1, 0), twice]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("every", [1, 4])
def test_fusion_is_the_exact_posterior_mean(operator, every, prior, observe, generator, device):
    observation = observe(operator, every=every)
    x = torch.randn(5, LENGTH, 2, generator=generator(3), dtype=DOUBLE).to(device)
    for t in TIMES:
        exact = MMPS(prior, observation)(x, t)  # exact for Gaussians; tested against the smoother
        torch.testing.assert_close(Fusion(prior, observation)(x, t), exact, rtol=0, atol=1e-9)


def test_observations_have_the_batch_of_the_samples(prior, observe, generator, device):
    one = observe(da.component(0))
    four = da.Observation(one.y.expand(4, *one.y.shape), one.operator, one.std, one.every)
    on = {"steps": 3, "dtype": DOUBLE, "generator": generator()}
    for make in (Fusion, MMPS):
        guided = make(prior, four)
        assert sampling.sample(guided, (4, LENGTH, 2), **on).shape == (4, LENGTH, 2)
        for shape in ((1, LENGTH, 2), (3, LENGTH, 2), (LENGTH, 2)):
            with pytest.raises(ValueError, match="y must broadcast to the batch"):
                guided.denoise(
                    torch.zeros(shape, dtype=DOUBLE, device=device),
                    *(v.reshape(1).to(device) for v in prior.schedule(0.5)),
                )
        with pytest.raises(ValueError, match="chunk cannot divide"):
            sampling.sample(guided, (4, LENGTH, 2), chunk=2, **on)
        assert sampling.sample(make(prior, one), (4, LENGTH, 2), chunk=2, **on).shape[0] == 4


def test_each_value_may_have_its_own_std(prior, observe, generator, device):
    std = torch.tensor([0.2, 0.5, 3.0], dtype=DOUBLE, device=device)
    observation = observe(twice, std=std)
    x = torch.randn(5, LENGTH, 2, generator=generator(3), dtype=DOUBLE).to(device)
    exact = MMPS(prior, observation)(x, TIMES[2])
    torch.testing.assert_close(Fusion(prior, observation)(x, TIMES[2]), exact, rtol=0, atol=1e-9)


def test_samples_have_the_mean_and_covariance_of_the_posterior(prior, observe, generator, device):
    observation = observe(da.component(0))
    z = sampling.sample(
        Fusion(prior, observation),
        (20_000, LENGTH, 2),
        steps=60,
        method="multistep",
        ratios=(1e-3, 1e3),
        generator=generator(0),
        device=device,
        dtype=DOUBLE,
    )
    # at the largest noise level x_t says nothing, so that the denoiser is the posterior's mean
    end = 1 - 1e-9
    mean = Fusion(prior, observation)(torch.zeros(LENGTH, 2, dtype=DOUBLE, device=device), end)
    assert float((z.mean(0) - mean).abs().max()) < 0.03
    covariance = CHAIN.law(LENGTH)[1].to(device)
    h = torch.zeros(3, LENGTH, 2, dtype=DOUBLE, device=device)
    h[[0, 1, 2], [0, 4, 8], 0] = 1.0
    h = h.flatten(1)
    noise = (0.4 / 2.0) ** 2 * torch.eye(3, dtype=DOUBLE, device=device)
    gain = covariance @ h.mT @ torch.linalg.inv(h @ covariance @ h.mT + noise)
    after = covariance - gain @ h @ covariance
    assert float((torch.cov(z.flatten(1).mT) - after).abs().max()) < 0.05 * float(after.max())


def test_states_are_fused_like_trajectories(generator, device):
    covariance = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=DOUBLE, device=device)
    prior = GaussianDenoiser(torch.zeros(2, dtype=DOUBLE, device=device), covariance, SCHEDULE)
    y = torch.tensor([[0.3], [2.0]], dtype=DOUBLE, device=device)  # one for each sample
    observation = da.Observation(y, da.component(1), 0.5)
    x = torch.randn(2, 2, generator=generator(1), dtype=DOUBLE).to(device)
    exact = MMPS(prior, observation)(x, TIMES[1])
    torch.testing.assert_close(Fusion(prior, observation)(x, TIMES[1]), exact, rtol=0, atol=1e-10)


def test_fusing_twice_is_fusing_both(prior, observe, generator, device):
    one, other = observe(da.component(0), every=2), observe(da.component(1), every=4)
    x = torch.randn(5, LENGTH, 2, generator=generator(3), dtype=DOUBLE).to(device)
    chained = Fusion(Fusion(prior, one), other)(x, TIMES[1])
    mixed = MMPS(Fusion(prior, one), other)(x, TIMES[1])
    torch.testing.assert_close(chained, mixed, rtol=0, atol=1e-9)


@pytest.fixture
def network(device):
    torch.manual_seed(0)
    settings = {"width": 8, "blocks": 2, "dilations": (1, 2), "shortest": LENGTH}
    net = networks.ConvNet(2, elementwise=True, **settings)
    for parameter in net.parameters():  # gates start near zero, and would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    return NetworkDenoiser(net, SCHEDULE, UNITS).double().to(device).requires_grad_(False)


def test_a_network_without_observations_takes_one_level(network, generator, device):
    x = torch.randn(3, LENGTH, 2, generator=generator(3), dtype=DOUBLE).to(device)
    alpha, sigma = network.levels(x, TIMES[1])
    whole = network.denoise(x, alpha.expand(x.shape), sigma.expand(x.shape))
    torch.testing.assert_close(network(x, TIMES[1]), whole)
    less = sigma.expand(x.shape).clone()
    less[:, 3, 1] /= 10
    assert float((network.denoise(x, alpha, less) - whole).abs().max()) > 1e-3


def test_fusion_asks_a_network_at_the_fused_levels(network, generator, device):
    x = torch.randn(3, LENGTH, 2, generator=generator(3), dtype=DOUBLE).to(device)
    y = torch.tensor([[1.4], [-0.3], [0.8]], dtype=DOUBLE, device=device)
    observation = da.Observation(y, da.component(1), 0.25, every=4)
    alpha, sigma = network.levels(x, TIMES[1])
    merged, noise = (x / alpha).clone(), (sigma / alpha).expand(x.shape).clone()
    s = 0.25 / 0.5  # in standardised units
    for row, value in zip((0, 4, 8), y[:, 0], strict=True):
        r = noise[:, row, 1].clone()
        noise[:, row, 1] = (r**-2 + s**-2) ** -0.5
        merged[:, row, 1] = (merged[:, row, 1] / r**2 + (value + 2.0) / 0.5 / s**2) * noise[
            :, row, 1
        ] ** 2
    by_hand = network.denoise(merged, torch.ones_like(noise), noise)
    ours = Fusion(network, observation).denoise(x, alpha, sigma)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-9)


def test_posterior_samples_have_the_law_of_the_smoother(prior, observe, generator, device):
    observation = observe(da.component(0))
    settings = {"products": (3, 3), "generator": generator(0), "dtype": DOUBLE}
    z = posterior(prior, observation, (4000, LENGTH, 2), steps=100, corrections=1, **settings)
    standardised = da.Observation((observation.y.cpu() - 1) / 2, da.component(0), 0.2, 4)
    smoother = da.rts_smoother(CHAIN, standardised, LENGTH)
    std = smoother.covariance.diagonal(dim1=1, dim2=2).sqrt().to(device)
    error = (z.mean(0) - smoother.mean.to(device)) / std
    assert float(error.abs().max()) < 0.08  # chance alone: 0.016 each
    ratio = z.var(0) / std**2
    assert 0.95 < float(ratio.mean()) < 1.05
    assert float((ratio - 1).abs().max()) < 0.15


@pytest.mark.parametrize(
    "ranges",
    [
        {"corrections": 0},
        {"corrections": 2},
        {"corrections": 3, "fused": 1.0, "corrected": (0.2, 1.0), "tau": 0.3},
    ],
)
def test_posterior_costs_what_it_says(ranges, prior, observe, monkeypatch, device):
    counts = {"evaluations": 0, "products": 0}
    denoise, pull = type(prior).denoise, Linearised.pull

    def counted(self, *given):
        counts["evaluations"] += 1
        return denoise(self, *given)

    def counted_pull(self, weights):
        counts["products"] += 1
        return pull(self, weights)

    monkeypatch.setattr(type(prior), "denoise", counted)
    monkeypatch.setattr(Linearised, "pull", counted_pull)
    settings = {"steps": 30, "products": (2, 1), **ranges}
    posterior(prior, observe(da.component(0)), (2, LENGTH, 2), dtype=DOUBLE, **settings)
    assert sum(counts.values()) == evaluations(prior, **settings)
    assert counts["products"] > 0


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((LENGTH, 2), {}, "length, 2"),
        ((2, LENGTH, 3), {}, "length, 2"),
        ((2, LENGTH + 4, 2), {}, "4, m"),
        ((2, LENGTH, 2), {"steps": 0}, "steps"),
        ((2, LENGTH, 2), {"products": (0, 1)}, "products"),
        ((2, LENGTH, 2), {"tau": -1.0}, "tau"),
        ((2, LENGTH, 2), {"fused": 0.1}, "fused"),
        ((2, LENGTH, 2), {"corrected": (3.0, 0.1)}, "corrected"),
    ],
)
def test_posterior_refuses(shape, settings, words, prior, observe):
    with pytest.raises(ValueError, match=words):
        posterior(prior, observe(da.component(0)), shape, dtype=DOUBLE, **settings)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p, o: Fusion(EmpiricalDenoiser(torch.zeros(3, 2)), o), TypeError, "elementwise"),
        (lambda p, o: Fusion(stretched(p), o), TypeError, "affine standardizer"),
        (
            lambda p, o: Fusion(p, da.Observation(o.y, lambda x: x.sum(-1, keepdim=True))),
            ValueError,
            "pick components",
        ),
        (
            lambda p, o: Fusion(p, da.Observation(o.y, lambda x: x[..., :1] ** 2)),
            ValueError,
            "linear",
        ),
        (lambda p, o: Fusion(p, da.Observation(o.y[0])), ValueError, "n, m"),
        (lambda p, o: Fusion(p, da.Observation(o.y)), ValueError, "pick components"),
        (
            lambda p, o: Fusion(p, o)(torch.zeros(2, LENGTH + 4, 2, dtype=DOUBLE), 0.5),
            ValueError,
            "4, m",
        ),
    ],
)
def test_fusion_refuses(make, error, words, prior, observe):
    with pytest.raises(error, match=words):
        make(prior, observe(da.component(0)))
