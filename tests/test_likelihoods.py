"""Log-densities of the probability flow, exact on the Gaussian."""

import math

import pytest
import torch

from ddmlib import likelihoods, schedules
from ddmlib.denoisers import Denoiser, GaussianDenoiser

MEAN = torch.zeros(3, dtype=torch.float64)  # as standardised data have
FACTOR = torch.tensor([[0.9, 0, 0], [0.4, 0.7, 0], [-0.3, 0.2, 0.5]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.mT
RATIOS = (1e-2, 80.0)


class Flattened(Denoiser):
    """A Gaussian of trajectories (2, 3), as the denoiser of states sees it with six components."""

    def __init__(self, inner):
        self.inner, self.schedule = inner, inner.schedule
        self.standardizer = inner.standardizer.identity(3)

    def denoise(self, x_t, alpha_t, sigma_t):
        flat = x_t.flatten(-2)
        return self.inner.denoise(flat, alpha_t, sigma_t).reshape(x_t.shape)


def exact(z, covariance=COVARIANCE, mean=MEAN):
    """The density of the data with noise of the lowest level."""
    noisy = covariance + RATIOS[0] ** 2 * torch.eye(len(mean), dtype=torch.float64)
    return torch.distributions.MultivariateNormal(mean, noisy).log_prob(z)


def points(generator, *batch):
    z = torch.randn(*batch, 3, generator=generator(2), dtype=torch.float64)
    return MEAN + z @ FACTOR.mT


@pytest.mark.parametrize(
    "schedule",
    [schedules.Cosine(), schedules.VarianceExploding(), schedules.SubVariancePreserving()],
    ids=repr,
)
def test_the_density_of_a_gaussian_is_exact(schedule, generator, device):
    denoiser = GaussianDenoiser(MEAN, COVARIANCE, schedule)
    z = points(generator, 2, 5).to(device)
    found = likelihoods.log_density(denoiser, z, ratios=RATIOS)
    assert found.value.shape == (2, 5)
    torch.testing.assert_close(found.value.cpu(), exact(z.cpu()), rtol=0, atol=2e-3)
    assert float(found.standard_error.abs().max()) == 0


def test_the_error_falls_with_the_fourth_power_of_the_step(generator):
    # against many steps, not the formula: the prior at the highest level has a small error too
    denoiser, z = GaussianDenoiser(MEAN, COVARIANCE), points(generator, 4)
    best = likelihoods.log_density(denoiser, z, ratios=RATIOS, steps=128).value
    errors = [
        float(
            (likelihoods.log_density(denoiser, z, ratios=RATIOS, steps=n).value - best).abs().max()
        )
        for n in (16, 32)
    ]
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_hutchinsons_estimate_agrees_within_its_error(generator):
    denoiser, z = GaussianDenoiser(MEAN, COVARIANCE), points(generator, 40)
    options = {"ratios": RATIOS, "steps": 24}
    whole = likelihoods.log_density(denoiser, z, **options).value
    found = likelihoods.log_density(denoiser, z, probes=16, generator=generator(), **options)
    assert found.standard_error.shape == (40,)
    assert float(found.standard_error.min()) > 0
    scores = (found.value - whole) / found.standard_error
    assert float(scores.abs().median()) == pytest.approx(0.69, abs=0.3)  # Student's t, 15 degrees
    assert float(scores.abs().max()) < 5


def test_trajectories_are_samples_of_two_axes(generator):
    covariance = torch.block_diag(COVARIANCE, 2 * COVARIANCE)
    mean = torch.cat((MEAN, -MEAN))
    denoiser = Flattened(GaussianDenoiser(mean, covariance))
    z = torch.stack((points(generator, 4), -points(generator, 4)), -2)  # (4, 2, 3)
    found = likelihoods.log_density(denoiser, z, axes=2, ratios=RATIOS)
    assert found.value.shape == (4,)
    reference = exact(z.flatten(-2), covariance, mean)
    torch.testing.assert_close(found.value, reference, rtol=0, atol=4e-3)
    assert likelihoods.log_density(denoiser, z[0], axes=2, ratios=RATIOS, steps=8).value.ndim == 0
    denoiser.event = 2  # as a denoiser of trajectories says of itself
    assert torch.equal(likelihoods.log_density(denoiser, z, ratios=RATIOS).value, found.value)
    with pytest.raises(ValueError, match="axes must be at least 2"):
        likelihoods.log_density(denoiser, z, axes=1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": torch.zeros(4)}, ValueError, "z must have shape"),
        ({"z": torch.full((3,), math.nan)}, ValueError, "z must be finite"),
        ({"z": torch.zeros(3, dtype=torch.long)}, TypeError, "z .*floating"),
        ({"axes": 3}, ValueError, "z must have 3 axes"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"probes": 1}, ValueError, "probes must be at least 2"),
        ({"ratios": (2.0, 1.0)}, ValueError, "ratio_max must exceed"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        likelihoods.log_density(
            GaussianDenoiser(MEAN, COVARIANCE), **({"z": torch.zeros(2, 3)} | arguments)
        )
