"""Twisted sequential Monte Carlo: exact in the limit, unbiased before, on Gaussians."""

import math
from itertools import pairwise

import pytest
import torch

from ddmlib import assimilation as da
from ddmlib import sampling, schedules, smc
from ddmlib.denoisers import GaussianDenoiser
from ddmlib.dynamics import LinearGaussian
from ddmlib.guidance import DPS, MMPS, GaussianLikelihood, PiGDM
from ddmlib.trajectories import GaussianTrajectoryDenoiser

DOUBLE = torch.float64
MEAN = torch.tensor([0.3, -0.2], dtype=DOUBLE)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=DOUBLE)
SCHEDULE = schedules.LogLinear(1e-3, 1e3)
STEPS, Y, STD = 12, 1.5, 0.5
RULES = {
    "r23": lambda d, o: GaussianLikelihood(d, o, gamma=0.1),
    "pigdm": PiGDM,
    "mmps": MMPS,
    "dps": DPS,
}


def first(x):
    return x[..., :1]


def prior():
    return GaussianDenoiser(MEAN, COVARIANCE, SCHEDULE)


def seen(device):
    return da.Observation(torch.tensor([Y], dtype=DOUBLE, device=device), first, STD)


def sampler_law(denoiser, d, steps, shape):
    """Return mean and covariance of the ancestral sampler itself, step by step: it is affine."""
    grid = sampling.times_for(denoiser, steps)
    levels = [tuple(v.reshape(1) for v in denoiser.schedule(t)) for t in grid]
    basis = torch.cat((torch.zeros(1, d), torch.eye(d))).double()
    mean, covariance = torch.zeros(d).double(), torch.eye(d).double()
    covariance = covariance * sum(float(v) ** 2 for v in levels[0])
    for k, (level_t, level_s) in enumerate(pairwise(levels)):
        x = basis.reshape(-1, *shape)
        x_0 = denoiser.denoise(x, *level_t)
        out, std = sampling.ancestral_step(x, x_0, level_t, level_s)
        out, std = (x_0, torch.zeros(1)) if k + 1 == steps else (out, std)
        out = out.reshape(-1, d)
        shift, matrix = out[0], (out[1:] - out[0]).mT
        mean = matrix @ mean + shift
        covariance = matrix @ covariance @ matrix.mT + float(std) ** 2 * torch.eye(d).double()
    return mean, covariance


def posterior(mean, covariance, h, y, std):
    """Return mean and covariance given y = h x + noise, and log p(y)."""
    spread = h @ covariance @ h.mT + std**2 * torch.eye(len(h)).double()
    gain = torch.linalg.solve(spread, h @ covariance).mT
    evidence = torch.distributions.MultivariateNormal(h @ mean, spread).log_prob(y)
    return mean + gain @ (y - h @ mean), covariance - gain @ h @ covariance, float(evidence)


def exact():
    law = sampler_law(prior(), 2, STEPS, (2,))
    return posterior(*law, torch.tensor([[1.0, 0.0]]).double(), torch.tensor([Y]).double(), STD)


def run(rule, shape, device, generator, **changes):
    settings = {"steps": STEPS, "generator": generator, "device": device, "dtype": DOUBLE}
    return smc.twisted(RULES[rule](prior(), seen(device)), shape, **(settings | changes))


@pytest.mark.parametrize("rule", RULES)
def test_bias_falls_as_particles_grow(rule, device, generator):
    """Twelve steps are few: nothing but the weights can make up for them."""
    mean, covariance, _ = exact()
    errors = []
    for particles in (1, 4, 32, 256):
        x = run(rule, (16384 // particles, particles, 2), device, generator(1)).samples.cpu()
        x = x.reshape(-1, 2)
        off = (x.mean(0) - mean) / covariance.diag().sqrt()
        spread = (torch.cov(x.mT) - covariance) / covariance.diag().mean()
        errors.append(float(off.norm() + spread.norm()))
    # a floor of sampling error: 16384 samples, correlated within a population
    assert errors[-1] < max(0.08, 0.35 * errors[0]), errors
    if rule in ("r23", "dps"):  # poor guidance: each step of the scan helps
        assert errors[0] > 1, errors
        assert all(b < a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("rule", RULES)
def test_evidence_is_unbiased(rule, device, generator):
    _, _, evidence = exact()
    found = run(rule, (4000, 8, 2), device, generator(2)).log_evidence.cpu()
    ratio = (found - evidence).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert error < 0.1


def test_good_guidance_needs_few_particles(device, generator):
    shares = {rule: run(rule, (200, 32, 2), device, generator(3)).effective for rule in RULES}
    worst = {rule: float(share.mean(-1).min()) / 32 for rule, share in shares.items()}
    assert worst["mmps"] > 1.2 * max(worst["r23"], worst["dps"]), worst
    finer = run("mmps", (200, 32, 2), device, generator(3), steps=48).effective
    assert float(finer.mean(-1).min()) / 32 > 1.2 * worst["mmps"]  # what is left is the steps'
    assert shares["mmps"].shape == (STEPS + 1, 200)


def test_trajectories_of_a_chain(device, generator):
    chain = LinearGaussian.stationary(
        torch.tensor([[0.8]], dtype=DOUBLE), torch.tensor([[0.36]], dtype=DOUBLE)
    )
    length = 5
    inner = GaussianTrajectoryDenoiser(*chain.law(length), SCHEDULE)
    y = torch.tensor([[1.0], [-0.5], [0.3]], dtype=DOUBLE, device=device)
    guided = PiGDM(inner, da.Observation(y, first, 0.4, every=2))
    found = smc.twisted(
        guided, (32, 256, length, 1), steps=19, generator=generator(4), device=device, dtype=DOUBLE
    )
    h = torch.eye(length).double()[::2]
    law = sampler_law(inner, length, 19, (length, 1))
    mean, covariance, evidence = posterior(*law, h, y[:, 0].cpu(), 0.4)
    x = found.samples.reshape(-1, length).cpu()
    assert float(((x.mean(0) - mean) / covariance.diag().sqrt()).abs().max()) < 0.1
    assert float((torch.cov(x.mT) - covariance).abs().max()) < 0.1 * float(covariance.max())
    assert float(torch.logsumexp(found.log_evidence, 0)) - math.log(32) == pytest.approx(
        evidence, abs=0.1
    )


def test_seeds_fix_samples(device, generator):
    a, b, c = (run("r23", (3, 8, 2), device, generator(k)).samples for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_without_resampling_weights_carry_all(device, generator):
    _, _, evidence = exact()
    found = run("pigdm", (4000, 8, 2), device, generator(5), threshold=0.0)
    ratio = (found.log_evidence.cpu() - evidence).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * float(ratio.std()) / 4000**0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (8, 3)}, r"shape must be \(\*batch, particles, 2\)"),
        ({"shape": (2,)}, "shape must be"),
        ({"shape": (0, 2)}, "shape must be"),
        ({"threshold": 1.5}, "threshold must lie"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guided": "two of them"}, "y must have no axis of particles"),
        ({"guided": "nested"}, "guided must wrap a denoiser that is not guided"),
    ],
)
def test_twisted_refuses(changes, words, device):
    guided = PiGDM(prior(), seen(device))
    if changes.get("guided") == "nested":
        changes = {"guided": PiGDM(guided, seen(device))}
    elif changes.get("guided"):
        two = da.Observation(torch.ones(2, 1, dtype=DOUBLE, device=device), first, STD)
        changes = {"guided": PiGDM(prior(), two), "shape": (2, 2, 2)}
    with pytest.raises(ValueError, match=words):
        smc.twisted(**({"guided": guided, "shape": (8, 2)} | changes))


def test_each_population_may_have_its_own_observation(device, generator):
    y = torch.tensor([[[-3.0]], [[3.0]]], dtype=DOUBLE, device=device)  # (populations, 1, m)
    guided = MMPS(prior(), da.Observation(y, first, STD))
    found = smc.twisted(guided, (2, 500, 2), steps=STEPS, generator=generator(), dtype=DOUBLE)
    assert float(found.samples[0, :, 0].mean()) < -1.5
    assert float(found.samples[1, :, 0].mean()) > 1.5
