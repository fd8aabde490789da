"""Guidance: on Gaussians, where the posterior is known and every rule is an affine map."""

import math
from itertools import pairwise

import pytest
import torch

from ddmlib import assimilation as da
from ddmlib import guidance, sampling, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import Denoiser, GaussianDenoiser
from ddmlib.dynamics import LinearGaussian, simulate
from ddmlib.guidance import DPS, MMPS, GaussianLikelihood, MeasuredVariance, PiGDM
from ddmlib.trajectories import GaussianTrajectoryDenoiser

DOUBLE = torch.float64
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=DOUBLE)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)
CHAIN = LinearGaussian.stationary(A, Q)
LENGTH, D = 9, 18
SCHEDULE = schedules.LogLinear(1e-3, 1e3)
UNITS = Standardizer(
    torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.tensor([2.0, 0.5], dtype=DOUBLE)
)
T = [float(SCHEDULE.time(r)) for r in (0.01, 0.3, 1.0, 10.0)]


def first(x):
    return x[..., :1]


def both(x):
    return torch.stack((x[..., 0] + x[..., 1], 3 * x[..., 1]), -1)


def curved(x):
    return torch.stack((torch.atan(x[..., 0]), x[..., 0] * x[..., 1] / 4), -1)


def prior(units=None):
    return GaussianTrajectoryDenoiser(*CHAIN.law(LENGTH), SCHEDULE, units)


@pytest.fixture
def draw(generator, device):
    g = generator(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE).to(device)

    return draw


@pytest.fixture
def seen(generator, device):
    """Return a maker of observations of one trajectory of the chain."""

    def make(operator=first, std=0.4, every=4):
        g = generator(8)
        truth = simulate(CHAIN, CHAIN.initial(1, g), steps=LENGTH - 1, generator=g)[0].to(device)
        return da.observe(truth, operator, std, every=every, generator=g)

    return make


def posterior(observation, operator=first, units=None):
    """Return mean (length, d) and covariance (D, D) of a trajectory given a linear observation."""
    mean, covariance = CHAIN.law(LENGTH)
    units = units or Standardizer.identity(2)
    eye = torch.eye(D, dtype=DOUBLE).reshape(D, LENGTH, 2)

    def predict(z):
        return operator(units.inverse(z)[..., :: observation.every, :]).flatten(-2)

    zero = predict(torch.zeros(LENGTH, 2, dtype=DOUBLE))
    h = (predict(eye) - zero).mT
    std = torch.as_tensor(observation.std, dtype=DOUBLE).cpu().expand(observation.y.shape[-1])
    r = std.repeat(len(h) // len(std)).square().diag()
    gain = torch.linalg.solve(h @ covariance @ h.mT + r, h @ covariance).mT
    innovation = observation.y.cpu().flatten() - zero - h @ mean.flatten()
    shifted = mean.flatten() + gain @ innovation
    return shifted.reshape(LENGTH, 2), covariance - gain @ h @ covariance


def sampled(denoiser, device, steps=60, method="heun", spacing="log-ratio"):
    """Return mean (length, d) and covariance (D, D) of a deterministic sampler, an affine map."""
    grid = sampling.times(denoiser.schedule, steps, spacing=spacing, ratios=(2e-3, 200.0))
    basis = torch.cat((torch.zeros(1, D, dtype=DOUBLE), torch.eye(D, dtype=DOUBLE)))
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    start = math.hypot(alpha, sigma) * basis.reshape(-1, LENGTH, 2).to(device)
    out = sampling.reverse(denoiser, start, grid, method=method, clean=True).cpu()
    matrix = (out[1:] - out[0]).flatten(1).mT
    return out[0], matrix @ matrix.mT


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [first, both])
@pytest.mark.parametrize("units", [None, UNITS])
def test_mmps_is_the_denoiser_of_the_posterior(operator, units, seen, draw):
    """On a Gaussian E[x_0 | x_t, y] is the denoiser of the law of x_0 given y."""
    observation = seen(operator, torch.tensor([0.4, 0.7])[: 1 if operator is first else 2].double())
    guided = MMPS(prior(units), observation)
    exact = GaussianTrajectoryDenoiser(*posterior(observation, operator, units), SCHEDULE)
    x = draw(7, LENGTH, 2)
    for t in T:
        torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-6, atol=1e-6)
    t = torch.tensor([*T, 0.1, 0.5, 0.7])
    torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-6, atol=1e-6)


def test_posterior_of_this_test_is_that_of_the_smoother(seen):
    observation = seen()
    mean, covariance = posterior(observation)
    exact = da.rts_smoother(CHAIN, da.Observation(observation.y.cpu(), first, 0.4, 4), LENGTH)
    torch.testing.assert_close(mean, exact.mean)
    blocks = covariance.reshape(LENGTH, 2, LENGTH, 2).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(blocks, exact.covariance)


def test_samples_with_mmps_have_the_smoothers_mean_and_covariance(seen, device):
    observation = seen()
    mean, covariance = posterior(observation)
    ours, spread = sampled(MMPS(prior(), observation), device)
    assert float((ours - mean).norm() / mean.norm()) < 0.01
    assert float((spread - covariance).norm() / covariance.norm()) < 0.05


def test_stochastic_samples_with_mmps_have_the_smoothers_mean_and_covariance(
    seen, device, generator
):
    observation = seen()
    mean, covariance = posterior(observation)
    x = sampling.sample(
        MMPS(prior(), observation), (2000, LENGTH, 2), steps=40, method="multistep", eta=1.0,
        dtype=DOUBLE, generator=generator(1), device=device,
    ).cpu()  # fmt: skip
    std = covariance.diag().sqrt()
    # 2000 samples: a standard error of 0.022
    assert float(((x.mean(0) - mean).flatten() / std).abs().max()) < 0.09
    spread = torch.cov(x.flatten(1).mT)
    assert float(((spread - covariance) / std / std[:, None]).abs().max()) < 0.13


def test_few_products_approach_the_exact_solution(seen, draw):
    observation = seen(std=0.1, every=1)
    x, exact = draw(20, LENGTH, 2), MMPS(prior(), observation)
    for t in T[1:]:
        errors = []
        for products in (1, 2, 4, 8, 9):
            few = MMPS(prior(), observation, products=products)
            errors.append(float((few(x, t) - exact(x, t)).norm() / exact(x, t).norm()))
        assert errors[-1] < 1e-9, errors
        assert all(b < a for a, b in pairwise(errors)), errors
        assert errors[2] < 0.25 * errors[0], errors
        assert errors[3] < 0.01, errors


def test_one_product_suffices_for_one_observation_or_a_scaled_identity(seen, draw):
    """Then the Krylov space of the residual is invariant: a rank of one, or one eigenvalue."""
    white = GaussianTrajectoryDenoiser(
        torch.zeros(LENGTH, 2).double(), torch.eye(D).double(), SCHEDULE
    )
    x = draw(5, LENGTH, 2)
    for inner, observation in ((prior(), seen(every=LENGTH)), (white, seen(every=1))):
        few, exact = MMPS(inner, observation, products=1), MMPS(inner, observation)
        for t in T:
            torch.testing.assert_close(few(x, t), exact(x, t), rtol=1e-7, atol=1e-7)


def test_the_preconditioner_evens_out_accuracies(seen, draw):
    """White prior, two accuracies: two eigenvalues, yet one product is enough."""
    white = GaussianTrajectoryDenoiser(
        torch.zeros(LENGTH, 2).double(), torch.eye(D).double(), SCHEDULE
    )
    observation = seen(da.identity, torch.tensor([0.01, 1.0]).double(), every=1)
    x = draw(5, LENGTH, 2)
    few, exact = MMPS(white, observation, products=1), MMPS(white, observation)
    torch.testing.assert_close(few(x, T[2]), exact(x, T[2]), rtol=1e-7, atol=1e-7)


class Wrong(Denoiser):
    """A denoiser whose Jacobian is no covariance: asymmetric, with negative eigenvalues."""

    event, schedule, standardizer = 2, SCHEDULE, Standardizer.identity(2)

    def __init__(self, matrix):
        self.matrix = matrix

    def denoise(self, x_t, alpha_t, sigma_t):
        return (x_t.flatten(-2) @ self.matrix.to(x_t).mT).reshape(x_t.shape)


@pytest.mark.parametrize("products", [1, 2, 5, None])
def test_the_solve_cannot_diverge(products, seen, draw):
    """|u| <= |residual| whatever the Jacobian, so the shift is at most that of R alone."""
    observation = seen(std=1e-3, every=1)
    m = 5 * draw(D, D)
    guided, x = MMPS(Wrong(m), observation, products=products), draw(6, LENGTH, 2)
    for t in T:
        out = guided.evaluate(x, *guided.levels(x, t))
        alpha, sigma = (float(v) for v in SCHEDULE(t))
        h = torch.eye(D).to(m)[::2] / 1e-3
        residual = observation.y[:, 0] / 1e-3 - out.free.flatten(1) @ h.mT
        bound = sigma**2 / alpha * torch.linalg.matrix_norm(h @ m, 2) * residual.norm(dim=1)
        assert ((out.guided - out.free).flatten(1).norm(dim=1) <= 1.0001 * bound).all()
    negative = MMPS(Wrong(-torch.eye(D).to(m)), observation, products=products)
    out = negative.evaluate(x, *negative.levels(x, T[2]))
    alpha, sigma = (float(v) for v in SCHEDULE(T[2]))
    residual = observation.y[:, 0] - out.free[..., 0]
    expected = -(sigma**2) / alpha * residual / 1e-3**2  # u is the residual itself
    torch.testing.assert_close((out.guided - out.free)[..., 0], expected)


@pytest.mark.parametrize("rule", [MMPS, PiGDM])
def test_states_are_guided_like_trajectories(rule, draw, device):
    """A white prior, or the exact rule: the posterior of a single state."""
    p = (
        torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=DOUBLE)
        if rule is MMPS
        else torch.eye(2).double()
    )
    m = torch.tensor([0.3, -0.2], dtype=DOUBLE)
    h, y, std = torch.tensor([[1.0, 0.0]], dtype=DOUBLE), 1.3, 0.5
    gain = p @ h.mT / (h @ p @ h.mT + std**2)
    exact = GaussianDenoiser(m + gain[:, 0] * (y - m[0]), p - gain @ h @ p, SCHEDULE)
    inner, x = GaussianDenoiser(m, p, SCHEDULE), draw(6, 2)
    guided = rule(inner, da.Observation(torch.tensor([y], dtype=DOUBLE, device=device), first, std))
    for t in (*T, torch.tensor([0.1, 0.3, 0.4, 0.5, 0.6, 0.7])):
        torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-7, atol=1e-7)


def test_observations_of_each_sample_equal_one_at_a_time(draw, seen):
    observation, x = seen(), draw(4, LENGTH, 2)
    y = observation.y + draw(4, 3, 1)
    for rule in (GaussianLikelihood, PiGDM, DPS, MMPS):
        together = rule(prior(), da.Observation(y, first, 0.4, 4))(x, T[2])
        for k in range(4):
            alone = rule(prior(), da.Observation(y[k], first, 0.4, 4))(x[k : k + 1], T[2])
            torch.testing.assert_close(together[k : k + 1], alone)


def test_guidance_of_the_guided_is_guidance_by_both(seen, draw):
    """Two observations in turn are the two at once, where each step is exact."""
    odd = seen(both, 0.7, every=2)
    even = seen(first, 0.3, every=4)
    nested = MMPS(MMPS(prior(), even), odd)
    mean, covariance = posterior(even)
    between = GaussianTrajectoryDenoiser(mean, covariance, SCHEDULE)
    x = draw(4, LENGTH, 2)
    for t in T:
        torch.testing.assert_close(nested(x, t), MMPS(between, odd)(x, t), rtol=1e-6, atol=1e-6)


# --- the other rules -----------------------------------------------------------------------------


def test_r23s_rule_by_hand(seen, draw):
    """log N(y; x̂, std² + gamma (sigma/alpha)²) of a standardised component, by autograd."""
    observation = da.Observation(seen().y * 2 + 1, first, 0.8, 4)  # physical: standardised 0.4
    guided = GaussianLikelihood(prior(UNITS), observation, gamma=3e-2)
    x = draw(5, LENGTH, 2).requires_grad_()
    for t in T:
        alpha, sigma = (float(v) for v in SCHEDULE(t))
        variance = 0.4**2 + 3e-2 * (sigma / alpha) ** 2
        free = prior(UNITS)(x, t)
        law = torch.distributions.Normal(free[:, ::4, :1], variance**0.5)
        (score,) = torch.autograd.grad(law.log_prob(seen().y).sum(), x)
        expected = free + sigma**2 / alpha * score
        torch.testing.assert_close(guided(x.detach(), t), expected.detach())


def test_pigdm_is_exact_for_a_white_prior(seen, draw):
    white = GaussianTrajectoryDenoiser(
        torch.zeros(LENGTH, 2).double(), torch.eye(D).double(), SCHEDULE
    )
    x, observation = draw(5, LENGTH, 2), seen()
    for t in T:
        a, b = PiGDM(white, observation)(x, t), MMPS(white, observation)(x, t)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_dps_is_the_gradient_of_the_distance(seen, draw):
    observation, x = seen(every=2), draw(5, LENGTH, 2).requires_grad_()
    guided = DPS(prior(), observation, zeta=0.7)
    alpha, sigma = (float(v) for v in SCHEDULE(T[1]))
    free = prior()(x, T[1])
    misfit = (observation.y - free[:, ::2, :1]).square().sum((1, 2))
    (slope,) = torch.autograd.grad(misfit.sum(), x)
    score = -0.7 * slope / misfit.sqrt()[:, None, None]
    expected = free + sigma**2 / alpha * score
    torch.testing.assert_close(guided(x.detach(), T[1]), expected.detach())


@pytest.mark.parametrize("rule", [GaussianLikelihood, PiGDM, DPS, MMPS])
def test_guidance_is_the_gradient_of_its_likelihood(rule, seen, draw):
    """For a linear operator and a Gaussian prior no covariance depends on x_t."""
    guided = rule(prior(), seen())
    x = draw(3, LENGTH, 2).requires_grad_()
    for t in T[:3]:
        alpha, sigma = guided.levels(x, t)
        out = guided.evaluate(x, alpha, sigma)
        (score,) = torch.autograd.grad(out.log_likelihood.sum(), x)
        shift = (out.guided - out.free).detach()
        torch.testing.assert_close(sigma**2 / alpha * score, shift, rtol=1e-6, atol=1e-8)


def test_likelihood_of_mmps_is_exact(seen, draw):
    """log p(y | x_t) of a Gaussian chain: what Bayes' rule gives from the laws of x_t."""
    observation, x, t = seen(), draw(4, LENGTH, 2), T[2]
    alpha, sigma = (float(v) for v in SCHEDULE(t))

    def marginal(mean, covariance):
        eye = torch.eye(D, dtype=DOUBLE)
        law = torch.distributions.MultivariateNormal(
            alpha * mean.flatten(), alpha**2 * covariance + sigma**2 * eye
        )
        return law.log_prob(x.cpu().flatten(1))

    evidence = da.kalman_filter(
        CHAIN, da.Observation(observation.y.cpu(), first, 0.4, 4), LENGTH
    ).log_evidence
    expected = marginal(*posterior(observation)) - marginal(*CHAIN.law(LENGTH)) + evidence
    guided = MMPS(prior(), observation)
    ours = guided.evaluate(x, *guided.levels(x, t)).log_likelihood
    torch.testing.assert_close(ours.cpu(), expected)


def test_nonlinear_operators_are_linearised_at_the_estimate(draw):
    x, y = draw(3, LENGTH, 2), draw(3, 5, 2)
    guided = MMPS(prior(), da.Observation(y, curved, 0.3, 2))
    alpha, sigma = (float(v) for v in SCHEDULE(T[2]))

    def of(v):
        return curved(prior()(v, T[2])[..., ::2, :]).flatten(-2)

    free = prior()(x, T[2])
    for k in range(3):
        b = torch.autograd.functional.jacobian(of, x[k]).reshape(10, D)
        h = torch.autograd.functional.jacobian(lambda v: curved(v[::2]).flatten(), free[k]).reshape(
            10, D
        )
        matrix = 0.09 * torch.eye(10).to(b) + sigma**2 / alpha * b @ h.mT
        u = torch.linalg.solve(matrix, y[k].flatten() - of(x[k]))
        expected = free[k] + (sigma**2 / alpha * u @ b).reshape(LENGTH, 2)
        torch.testing.assert_close(guided(x, T[2])[k], expected, rtol=1e-6, atol=1e-6)


def test_error_variance_is_the_posterior_variance_of_a_gaussian(generator, device):
    mean, covariance = CHAIN.law(LENGTH)
    g = generator(5)
    z = torch.randn(4000, D, generator=g, dtype=DOUBLE) @ torch.linalg.cholesky(covariance).mT
    x_0 = (z + mean.flatten()).reshape(-1, LENGTH, 2).to(device)
    ratios = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=DOUBLE)
    found = guidance.error_variance(prior(), x_0, ratios, generator=g)
    eye = torch.eye(D, dtype=DOUBLE)
    for ratio, row in zip(ratios.tolist(), found.variances.cpu(), strict=True):
        exact = torch.linalg.inv(torch.linalg.inv(covariance) + eye / ratio**2)
        expected = exact.diag().reshape(LENGTH, 2).mean(0)
        torch.testing.assert_close(row, expected, rtol=0.05, atol=0)


def test_measured_variance_meets_its_table_and_its_limits(seen):
    ratios = torch.tensor([0.1, 1.0, 10.0], dtype=DOUBLE)
    variances = torch.tensor([[0.01, 0.02], [0.3, 0.5], [0.9, 1.1]], dtype=DOUBLE)
    rule = MeasuredVariance(prior(), seen(), guidance.ErrorVariance(ratios, variances))

    def at(*ratio):
        value = torch.tensor(ratio, dtype=DOUBLE)[:, None]
        return rule.variance(torch.ones_like(value), value)

    torch.testing.assert_close(at(0.1, 1.0, 10.0), variances)
    torch.testing.assert_close(at(0.01), variances[:1] / 100)
    torch.testing.assert_close(at(1000.0), variances[2:])
    torch.testing.assert_close(at(10**-0.5), (variances[:1] * variances[1:2]).sqrt())


def biases(rule, seen, device):
    """Return the relative error of the mean and the ratio of the total spread to the smoother's."""
    observation = seen()
    mean, covariance = posterior(observation)
    ours, spread = sampled(rule(observation), device)
    error = (ours - mean).flatten() / covariance.diag().sqrt()
    return float(error.square().mean().sqrt()), float(spread.trace() / covariance.trace())


def test_biases_of_the_rules_on_the_chain(seen, device, generator):
    """(error of the mean in posterior std, total variance over the smoother's), as measured: MMPS
    (0.007, 1.01), MeasuredVariance (0.11, 0.92), PiGDM (0.15, 0.96), R23 with gamma = 0.01
    (0.42, 0.62).  An average of the error variance misses its correlations, a constant gamma its
    size as well: the posterior is too narrow, and pulled too far."""
    _, covariance = CHAIN.law(LENGTH)
    g = generator(5)
    z = torch.randn(4000, D, generator=g, dtype=DOUBLE) @ torch.linalg.cholesky(covariance).mT
    errors = guidance.error_variance(
        prior(), z.reshape(-1, LENGTH, 2), torch.logspace(-2, 2, 9, dtype=DOUBLE), generator=g
    )
    rules = {
        "mmps": lambda o: MMPS(prior(), o),
        "measured": lambda o: MeasuredVariance(prior(), o, errors),
        "pigdm": lambda o: PiGDM(prior(), o),
        "r23": lambda o: GaussianLikelihood(prior(), o),
    }
    off, spread = {}, {}
    for name, rule in rules.items():
        off[name], spread[name] = biases(rule, seen, device)
    assert off["mmps"] < 0.01
    assert spread["mmps"] == pytest.approx(1, abs=0.02)
    for name in ("measured", "pigdm"):
        assert 0.05 < off[name] < 0.25
        assert 0.85 < spread[name] < 0.98
    assert off["r23"] > 0.3
    assert spread["r23"] < 0.75


def test_dps_knows_no_std(seen, device, generator):
    """Twice the std, the same samples.  With zeta = 1 their spread at the observed states happens
    to suit a std of 0.4 (0.89 to 1.07 of the smoother's, as measured), not one of 0.8."""
    narrow = seen(std=0.4)
    wide = da.Observation(narrow.y, first, 0.8, 4)
    settings = {"steps": 40, "dtype": DOUBLE, "device": device}
    a, b = (
        sampling.sample(DPS(prior(), o), (400, LENGTH, 2), generator=generator(2), **settings)
        for o in (wide, narrow)
    )
    torch.testing.assert_close(a, b)
    variance = posterior(wide)[1].diag().reshape(LENGTH, 2)[::4, 0]
    assert float((a[:, ::4, 0].var(0).cpu() / variance).max()) < 0.7


# --- bounds, refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("distance", [0.0, 10.0])
@pytest.mark.parametrize("rule", [GaussianLikelihood, PiGDM, DPS, MMPS])
def test_guidance_ends_in_finite_samples_or_a_clear_error(rule, std, distance, device, generator):
    y = torch.full((3, 1), distance, device=device)
    posterior = rule(prior(), da.Observation(y, first, std, every=4))
    settings = {"steps": 16, "corrections": 1, "generator": generator(1), "device": device}
    message, x = "", torch.zeros(1)
    try:
        x = sampling.sample(posterior, (4, LENGTH, 2), **settings)
    except RuntimeError as error:
        message = str(error)
    assert not message or "left the finite numbers" in message
    assert torch.isfinite(x).all()
    if rule in (PiGDM, MMPS):
        assert not message


def test_mmps_meets_an_observation_far_outside(device, generator):
    y = torch.full((3, 1), 30.0, dtype=DOUBLE, device=device)
    posterior = MMPS(prior(), da.Observation(y, first, 1e-3, every=4))
    settings = {"steps": 40, "generator": generator(1), "device": device, "dtype": DOUBLE}
    x = sampling.sample(posterior, (4, LENGTH, 2), method="multistep", eta=1.0, **settings)
    torch.testing.assert_close(x[:, ::4, :1], y.expand(4, 3, 1), rtol=0, atol=0.05)


def test_guided_denoisers_pass_on_what_samplers_ask_for(seen):
    inner = prior(UNITS)
    guided = MMPS(inner, seen())
    assert (guided.event, guided.ratios, guided.device) == (2, inner.ratios, inner.device)
    assert guided.standardizer is UNITS
    assert guided.with_schedule(schedules.Cosine()).denoiser is inner


def test_results_carry_no_graph_unless_asked(seen, draw):
    guided = MMPS(prior(), seen())
    x = draw(2, LENGTH, 2)
    assert not guided(x, 0.5).requires_grad
    assert guided(x.requires_grad_(), 0.5).requires_grad
    with torch.no_grad():
        assert not guided(x, 0.5).requires_grad


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda o, x: MMPS(prior(), da.Observation(o.y[:, 0], first)), ValueError, "y must have"),
        (lambda o, x: MMPS(prior(), o)(x[:, :6], 0.5), ValueError, "x_t must have shape"),
        (
            lambda o, x: MMPS(prior(), da.Observation(o.y, first, 1.0, 2))(x, 0.5),
            ValueError,
            r"y must have shape \(\*batch, n, m\).*9 states",
        ),
        (
            lambda o, x: MMPS(prior(), da.Observation(o.y, da.identity, 1.0, 4))(x, 0.5),
            ValueError,
            "operator must map",
        ),
        (
            lambda o, x: MMPS(GaussianDenoiser(x[0, 0], torch.eye(2).to(x)), o),
            ValueError,
            "every must be 1",
        ),
        (lambda o, x: MMPS(prior(), o, products=0), ValueError, "products must be at least 1"),
        (lambda o, x: GaussianLikelihood(prior(), o, gamma=0.0), ValueError, "gamma must be"),
        (lambda o, x: DPS(prior(), o, zeta=-1.0), ValueError, "zeta must be positive"),
        (
            lambda o, x: MeasuredVariance(
                prior(), o, guidance.ErrorVariance(torch.ones(2), torch.ones(2, 3))
            ),
            ValueError,
            r"errors must hold variances of shape \(2, 2\)",
        ),
        (
            lambda o, x: guidance.error_variance(prior(), x, torch.tensor([1.0, 0.5])),
            ValueError,
            "ratios must be positive and ascend",
        ),
        (lambda o, x: guidance.Guided(prior(), o), TypeError, "abstract"),
    ],
)
def test_guidance_refuses(make, error, words, seen, draw):
    with pytest.raises(error, match=words):
        make(seen(), draw(2, LENGTH, 2))
