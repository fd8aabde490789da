"""Samplers: orders, laws and equivalences on the Gaussian, where everything is known.

On a Gaussian every step is affine, x_s = A x_t + b (+ noise of a given std), so mean and covariance
are carried through a sampler exactly, from its action on zero and the unit vectors.
"""

import itertools
import math
from itertools import pairwise

import pytest
import scipy.stats
import torch

from ddmlib import datasets, denoisers, grids, sampling, schedules
from ddmlib.denoisers import Denoiser, EmpiricalDenoiser, GaussianDenoiser
from ddmlib.steps import balanced_langevin_step, langevin_step

MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def gaussian(schedule=None):
    return GaussianDenoiser(MEAN, COVARIANCE, schedule)


def law(schedule, t):
    """Return mean and covariance of x_t."""
    alpha, sigma = (float(v) for v in schedule(t))
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE


def constant_noise(monkeypatch, value):
    monkeypatch.setattr(
        sampling.noise, "normal_like", lambda x, generator=None: torch.full_like(x, value)
    )


def propagate(schedule, grid, method, monkeypatch):
    """Return mean, covariance and dx_end/dx_start of `reverse`, from the exact law at its start."""
    denoiser = gaussian(schedule)
    mean, covariance = law(schedule, grid[0])
    basis, total = torch.cat((torch.zeros(1, 2, dtype=torch.float64), EYE)), EYE
    pairs = torch.stack((grid[:-1], grid[1:]), 1) if method == "ddpm" else [grid]
    for part in pairs:  # the noise of each stochastic step adds to the covariance
        constant_noise(monkeypatch, 0.0)
        out = sampling.reverse(denoiser, basis, part, method=method)
        shift, matrix = out[0], (out[1:] - out[0]).mT
        constant_noise(monkeypatch, 1.0)
        std = (sampling.reverse(denoiser, basis, part, method=method) - out)[0]
        mean, total = matrix @ mean + shift, matrix @ total
        covariance = matrix @ covariance @ matrix.mT + (std**2).diag()
    return mean, covariance, total


def exact_matrix(schedule, grid, method):
    """Return dx_end/dx_start of the flow, or of E[x_end | x_start] for the stochastic sampler."""
    (_, start), (_, end) = law(schedule, grid[0]), law(schedule, grid[-1])
    if method == "ddpm":
        (alpha_t, _), (alpha_s, _) = schedule(grid[0]), schedule(grid[-1])
        return alpha_t / alpha_s * end @ torch.linalg.inv(start)
    a, axes = torch.linalg.eigh(start)  # both have the eigenvectors of P
    b = (axes.mT @ end @ axes).diag()
    return axes @ (b / a).sqrt().diag() @ axes.mT


def slope(steps, errors):
    x = torch.tensor([math.log(n) for n in steps])
    y = -torch.tensor([math.log(e) for e in errors])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# --- orders --------------------------------------------------------------------------------------

SMOOTH = {  # sigma/alpha is a smooth function of t within (0, 1)
    "VariancePreserving": schedules.VariancePreserving(),
    "Straight": schedules.Straight(),
    "VarianceExploding": schedules.VarianceExploding(),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("spacing", grids.SPACINGS)
@pytest.mark.parametrize(
    ("method", "order"), [("ddim", 0.9), ("ddpm", 0.9), ("heun", 1.8), ("multistep", 1.8)]
)
def test_error_falls_with_the_order(method, order, spacing, name, monkeypatch):
    schedule = SMOOTH[name]
    start, end = (float(schedule.time(r)) for r in (20.0, 0.01))
    steps, matrix_errors, errors = [32, 64, 128, 256], [], []
    for n in steps:
        if spacing == "time":
            grid = torch.linspace(start, end, n + 1, dtype=torch.float64)
        else:  # the last step, to zero noise, does not shrink with the others
            grid = sampling.times(schedule, n + 1, spacing=spacing, start=start, ratios=(0.01, 80))
            grid = grid[:-1]
        mean, covariance, matrix = propagate(schedule, grid, method, monkeypatch)
        exact_mean, exact_covariance = law(schedule, grid[-1])
        # every sampler keeps the mean of a Gaussian: its score vanishes there
        torch.testing.assert_close(mean, exact_mean, rtol=0, atol=1e-10)
        errors.append(float((covariance - exact_covariance).norm()))
        exact = exact_matrix(schedule, grid, method)
        matrix_errors.append(float((matrix - exact).norm() / exact.norm()))
    assert slope(steps, errors) >= order
    # how an offset of the mean is carried: an ancestral step returns E[x_s | x_t] itself
    if method == "ddpm":
        assert max(matrix_errors) < 1e-10
    else:
        assert slope(steps, matrix_errors) >= order
    assert errors[-1] < (0.1 if order < 1 else 0.01)


@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.Linear()], ids=repr)
@pytest.mark.parametrize(
    ("method", "order"), [("ddim", 0.9), ("ddpm", 0.9), ("heun", 1.8), ("multistep", 1.8)]
)
def test_order_down_to_clean_data_on_the_schedules_of_f24(method, order, schedule, monkeypatch):
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        grid = sampling.times(schedule, n, spacing="log-ratio", start=0.9, ratios=(1e-5, 80))
        _, covariance, _ = propagate(schedule, grid, method, monkeypatch)
        errors.append(float((covariance - COVARIANCE).norm()))
    assert slope(steps, errors) >= order


def propagate_with_memory(schedule, grid, monkeypatch):
    """Return dx_end/dx_start and the covariance of x_end, for the stochastic multistep rule.

    It remembers the estimate of the step before, so the noise of each step is carried to the end on
    its own: row 0 of the batch is the origin, rows 1-2 the unit vectors, then a pair of rows for
    each step, in which only that step has noise.
    """
    steps, calls = len(grid) - 1, []
    x = torch.zeros(3 + 2 * steps, 2, dtype=torch.float64)
    x[1:3] = EYE

    def one_step_only(like, generator=None):
        out = torch.zeros_like(like)
        out[3 + 2 * len(calls) : 5 + 2 * len(calls)] = EYE
        calls.append(like)
        return out

    monkeypatch.setattr(sampling.noise, "normal_like", one_step_only)
    out = sampling.reverse(gaussian(schedule), x, grid, method="multistep", eta=1.0)
    assert len(calls) == steps
    matrix, noises = (out[1:3] - out[0]).mT, (out[3:] - out[0]).mT
    _, start = law(schedule, grid[0])
    return matrix, matrix @ start @ matrix.mT + noises @ noises.mT


@pytest.mark.parametrize("name", SMOOTH)
def test_stochastic_multistep_is_of_second_order_in_law(name, monkeypatch):
    schedule = SMOOTH[name]
    start, steps, errors, ancestral = float(schedule.time(20.0)), (32, 64, 128), [], []
    for n in steps:
        grid = sampling.times(schedule, n + 1, spacing="log-ratio", start=start, ratios=(0.01, 80))
        grid = grid[:-1]  # the last step, to zero noise, does not shrink with the others
        exact = exact_matrix(schedule, grid, "ddpm")
        _, exact_covariance = law(schedule, grid[-1])
        matrix, covariance = propagate_with_memory(schedule, grid, monkeypatch)
        # x̂ is a martingale along the reverse process, so extrapolation leaves the mean exact
        torch.testing.assert_close(matrix, exact, rtol=0, atol=1e-10)
        errors.append(float((covariance - exact_covariance).norm()))
        _, covariance, _ = propagate(schedule, grid, "ddpm", monkeypatch)
        ancestral.append(float((covariance - exact_covariance).norm()))
    assert slope(steps, errors) >= 1.8
    assert all(e < a / 5 for e, a in zip(errors, ancestral, strict=True))


# --- equivalences --------------------------------------------------------------------------------


@pytest.fixture
def draw(device, generator):
    g = generator(1)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=g, dtype=dtype).to(device)

    return draw


def levels(schedule, t, s, device):
    return tuple(tuple(v.to(device) for v in schedule(w)) for w in (t, s))


EVERY = [
    schedules.Cosine(),
    schedules.VarianceExploding(),
    schedules.Straight(),
    schedules.SubVariancePreserving(),
    schedules.CosineSquared(),
]
every_schedule = pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)


@every_schedule
def test_ddim_is_the_exponential_euler_step(schedule, draw, device):
    x, x_0 = draw(20, 2), draw(20, 2)
    level_t, level_s = levels(schedule, 0.7, 0.6, device)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_s
    eps = (x - alpha_t * x_0) / sigma_t
    ratio = alpha_s / alpha_t
    expected = ratio * x + (sigma_s - ratio * sigma_t) * eps
    ours = sampling.ddim_step(x, x_0, level_t, level_s)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_schedule
def test_ddim_is_an_euler_step_of_the_probability_flow(schedule, draw, device):
    x, x_0 = draw(20, 2), draw(20, 2)
    level_t, level_s = levels(schedule, 0.7, 0.6, device)
    y, r, r_s = x / level_t[0], level_t[1] / level_t[0], level_s[1] / level_s[0]
    expected = level_s[0] * (y + (r_s - r) * (y - x_0) / r)
    ours = sampling.ddim_step(x, x_0, level_t, level_s)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_schedule
def test_ancestral_without_noise_is_ddim(schedule, draw, device):
    x, x_0 = draw(20, 2), draw(20, 2)
    level = levels(schedule, 0.7, 0.6, device)
    mean, std = sampling.ancestral_step(x, x_0, *level, eta=0.0)
    torch.testing.assert_close(mean, sampling.ddim_step(x, x_0, *level), rtol=1e-12, atol=1e-12)
    assert float(std) == 0


@every_schedule
def test_ancestral_is_the_posterior_by_bayes(schedule, draw, device):
    """Product of x_s|x_0 and of x_t|x_s, by precisions."""
    x, x_0 = draw(20, 2), draw(20, 2)
    level_t, level_s = levels(schedule, 0.7, 0.6, device)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_s
    factor = alpha_t / alpha_s
    forward = sigma_t**2 - factor**2 * sigma_s**2
    precision = 1 / sigma_s**2 + factor**2 / forward
    expected = (alpha_s * x_0 / sigma_s**2 + factor * x / forward) / precision
    mean, std = sampling.ancestral_step(x, x_0, level_t, level_s)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, precision**-0.5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_keeps_the_marginal_for_any_eta(eta, device):
    """With the true x_0 a step maps N(alpha_t x_0, sigma_t²) to N(alpha_s x_0, sigma_s²)."""
    level = levels(schedules.Cosine(), 0.7, 0.4, device)
    x_0 = torch.zeros(1, device=device, dtype=torch.float64)
    one, std = sampling.ancestral_step(x_0 + 1, x_0, *level, eta=eta)
    total = (one * level[0][1]) ** 2 + std**2
    torch.testing.assert_close(total, level[1][1][None] ** 2, rtol=1e-10, atol=0)


def test_first_multistep_step_and_steps_to_clean_data_are_ddim(draw, device):
    x, x_0, before = draw(20, 2), draw(20, 2), draw(20, 2)
    level_b, level_t = levels(schedules.Cosine(), 0.8, 0.7, device)
    level_s, clean = levels(schedules.Cosine(), 0.6, 0.0, device)
    first = sampling.multistep_step(x, x_0, level_t, level_s, None)
    assert torch.equal(first, sampling.ddim_step(x, x_0, level_t, level_s))
    last = sampling.multistep_step(x, x_0, level_t, clean, (before, level_b))
    assert torch.equal(last, sampling.ddim_step(x, x_0, level_t, clean))
    torch.testing.assert_close(last, x_0)


def test_multistep_is_dpm_solver_pp_2m(draw, device):
    """Lu et al. (2022), algorithm 2, in its own symbols."""
    x, x_0, before = draw(20, 2), draw(20, 2), draw(20, 2)
    schedule = schedules.VariancePreserving()
    level_b, level_t = levels(schedule, 0.8, 0.7, device)
    level_s = levels(schedule, 0.6, 0.6, device)[0]
    lam = [torch.log(a / s) for a, s in (level_b, level_t, level_s)]
    h = lam[2] - lam[1]
    r = (lam[1] - lam[0]) / h
    d = (1 + 1 / (2 * r)) * x_0 - before / (2 * r)
    expected = level_s[1] / level_t[1] * x - level_s[0] * torch.expm1(-h) * d
    ours = sampling.multistep_step(x, x_0, level_t, level_s, (before, level_b))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_reverse_is_a_loop_over_the_steps(draw, device):
    denoiser, grid = gaussian(schedules.Cosine()), torch.tensor([0.9, 0.7, 0.5, 0.2, 0.0]).double()
    start = draw(10, 2)
    x, y, z, before = start, start, start, None
    for t, s in pairwise(grid):
        level = levels(denoiser.schedule, float(t), float(s), device)
        x = sampling.ddim_step(x, denoiser(x, t), *level)
        y = sampling.heun_step(y, denoiser(y, t), *level, denoiser)
        z_0 = denoiser(z, t)
        z, before = sampling.multistep_step(z, z_0, *level, before), (z_0, level[0])
    for method, expected in (("ddim", x), ("heun", y), ("multistep", z)):
        ours = sampling.reverse(denoiser, start, grid, method=method)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("spacing", ["log-ratio", "karras", "central"])
def test_samples_do_not_depend_on_the_schedule(method, spacing, device, generator):
    """On a grid of sigma/alpha two schedules take the same steps in x/alpha."""
    samples = [
        sampling.sample(
            gaussian(schedule),
            (50, 2),
            steps=12,
            method=method,
            spacing=spacing,
            ratios=(0.02, 40.0),
            generator=generator(3),
            device=device,
            dtype=torch.float64,
        )
        for schedule in (
            schedules.Cosine(),
            schedules.VarianceExploding(),
            schedules.Straight(),
            schedules.VariancePreserving(),
        )
    ]
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=1e-6, atol=1e-6)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.VarianceExploding()], ids=repr)
def test_samples_of_the_gaussian_pass_kolmogorov_smirnov(method, schedule, device, generator):
    x = sampling.sample(
        gaussian(schedule),
        (3000, 2),
        steps={"ddpm": 1000, "ddim": 400}.get(method, 60),  # an error of about 1 % in variance
        method=method,
        generator=generator(8),
        device=device,
    ).cpu()
    white = (x.double() - MEAN) @ torch.linalg.inv(torch.linalg.cholesky(COVARIANCE)).mT
    directions = {"first": white[:, 0], "second": white[:, 1], "sum": white.sum(1) / 2**0.5}
    for values in directions.values():
        assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 0.01
    assert scipy.stats.kstest(white.square().sum(1).numpy(), "chi2", args=(2,)).pvalue > 0.01


@pytest.mark.parametrize(("method", "steps"), [("ddpm", 200), ("ddim", 100), ("heun", 40)])
@pytest.mark.parametrize("t", [0.13, 0.5])
def test_resample_follows_the_law_of_partial_diffusion(method, steps, t, device, generator):
    """Diffusing z and drawing from p(x_0|x_t), or following the flow: both Gaussian, known."""
    denoiser, z = gaussian(), torch.tensor([[1.5, 0.2], [-0.5, -1.0]], dtype=torch.float64)
    alpha, sigma = (float(v) for v in denoiser.schedule(t))
    marginal = alpha**2 * COVARIANCE + sigma**2 * EYE
    if method == "ddpm":
        gain = alpha * COVARIANCE @ torch.linalg.inv(marginal)
        left = COVARIANCE - alpha * gain @ COVARIANCE
    else:  # along each eigenvector of P the flow scales by the ratio of the standard deviations
        variances, axes = torch.linalg.eigh(COVARIANCE)
        gain = axes @ (variances / (alpha**2 * variances + sigma**2)).sqrt().diag() @ axes.mT
        left = torch.zeros(2, 2, dtype=torch.float64)
    mean = MEAN + alpha * (z - MEAN) @ gain.mT
    covariance = sigma**2 * gain @ gain.mT + left
    n = 20_000
    ens = sampling.resample(
        denoiser, z.to(device), t=t, members=n, steps=steps, method=method, generator=generator(2)
    ).cpu()
    assert ens.shape == (2, n, 2)
    std = covariance.diag().sqrt()
    for k in range(2):
        assert ((ens[k].mean(0) - mean[k]).abs() < (4 / n**0.5 + 0.01) * std).all()
        ours = torch.cov(ens[k].mT)
        assert ((ours - covariance).abs() < 0.05 * std[:, None] * std).all()


def test_resample_goes_from_the_state_itself_to_free_samples(device, generator):
    denoiser, z = gaussian(), torch.tensor([[3.0, 1.0]], dtype=torch.float64, device=device)
    arguments = {"members": 4000, "steps": 300, "generator": generator(1)}
    near = sampling.resample(denoiser, z, t=0.002, **arguments)
    assert float((near - z[:, None]).abs().max()) < 0.1
    free = sampling.resample(denoiser, z, t=1.0, **arguments)[0].cpu()
    assert free.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=0.07)
    assert torch.cov(free.mT).flatten().tolist() == pytest.approx(
        COVARIANCE.flatten().tolist(), abs=0.08
    )


class Paths(Denoiser):
    """A Gaussian over trajectories of three states, from one over six numbers."""

    event = 2

    def __init__(self, flat):
        self.flat, self.schedule = flat, flat.schedule
        self.standardizer = datasets.Standardizer.identity(2)

    def denoise(self, x_t, alpha_t, sigma_t):
        return self.flat.denoise(x_t.flatten(-2), alpha_t, sigma_t).reshape(x_t.shape)


def test_resample_takes_trajectories(generator):
    """One noise level for a whole trajectory, members before its axes: as for flat vectors."""
    factor = torch.randn(6, 6, generator=generator(5), dtype=torch.float64) / 2
    flat = GaussianDenoiser(torch.zeros(6, dtype=torch.float64), factor @ factor.mT)
    z = torch.randn(4, 3, 2, generator=generator(6), dtype=torch.float64)
    options = {"t": 0.4, "members": 5, "steps": 4}
    found = sampling.resample(Paths(flat), z, generator=generator(1), **options)
    expected = sampling.resample(flat, z.flatten(-2), generator=generator(1), **options)
    assert found.shape == (4, 5, 3, 2)
    torch.testing.assert_close(found.flatten(-2), expected)
    alone = sampling.resample(Paths(flat), z[0], generator=generator(1), **options)
    assert alone.shape == (5, 3, 2)
    with pytest.raises(ValueError, match=r"z must hold trajectories .* got \(2,\)"):
        sampling.resample(Paths(flat), z[0, 0], **options)


def test_samples_of_the_empirical_denoiser_are_its_data(device, generator):
    data = torch.randn(20, 2, generator=generator(1)).to(device)
    x = sampling.sample(
        EmpiricalDenoiser(data), (200, 2), method="heun", generator=generator(2), device=device
    )
    distance = torch.cdist(x, data).amin(1)
    assert float((distance < 1e-2).float().mean()) > 0.97  # it memorises


# --- Langevin corrections ------------------------------------------------------------------------


def white(event=1):
    """Return the denoiser of N(0, I): x_t is white at every level of a schedule that keeps it."""
    denoiser = GaussianDenoiser(torch.zeros(400), torch.eye(400))
    denoiser.event = event
    return denoiser


def test_langevin_step_by_hand(draw, device, generator):
    x, x_0 = draw(4, 5, 2), draw(4, 5, 2)
    alpha, sigma = levels(schedules.Cosine(), 0.7, 0.6, device)[0]
    eps = (x - alpha * x_0) / sigma
    z = torch.randn(4, 5, 2, generator=generator(7), dtype=torch.float64).to(device)
    for event in (1, 2):
        delta = 0.3 / eps.square().mean((-2, -1) if event == 2 else -1, keepdim=True)
        expected = x - (delta * eps + (2 * delta).sqrt() * z) * sigma
        ours = langevin_step(x, x_0, (alpha, sigma), 0.3, event=event, generator=generator(7))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tau", [0.25, 0.5])
def test_langevin_steps_inflate_white_noise_as_stated(tau, device, generator):
    denoiser, g = white(), generator(4)
    x = torch.randn(200, 400, generator=g).to(device)
    level = tuple(v.to(x) for v in denoiser.schedule(torch.tensor([0.6], dtype=torch.float64)))
    for _ in range(40):
        x = langevin_step(x, denoiser.denoise(x, *level), level, tau, generator=g)
    # 80 000 values: a relative standard error of 0.5 %
    assert float(x.square().mean()) == pytest.approx(1 + tau / 2, rel=0.02)


def test_short_corrections_lead_to_the_law_of_the_denoiser(device, generator):
    """From a wrong law, Langevin steps at one level find its mean and variances; many components,
    for the length of a step is set by the sample itself."""
    variances = torch.linspace(0.5, 2.0, 200, dtype=torch.float64)
    denoiser = GaussianDenoiser(torch.ones_like(variances), variances.diag())
    level = tuple(v.to(device) for v in denoiser.schedule(torch.tensor([0.3]).double()))
    g, x = generator(5), torch.full((500, 200), 3.0, dtype=torch.float64, device=device)
    for _ in range(200):
        x = langevin_step(x, denoiser.denoise(x, *level), level, 0.05, generator=g)
    alpha, sigma = (float(v) for v in level)
    exact = alpha**2 * variances.to(x) + sigma**2
    assert float(x.mean()) == pytest.approx(alpha, abs=0.01)
    # inflated by about tau/2, and 500 samples of 200 components
    assert float((x.var(0) / exact).mean()) == pytest.approx(1.02, abs=0.02)
    assert float((x.var(0) / exact).std()) < 0.1


def after_balanced_step(variance, tau, monkeypatch):
    """Return the variance after one step from the exact law, relative to it."""
    denoiser = GaussianDenoiser(torch.zeros(1).double(), torch.full((1, 1), variance).double())
    level = tuple(v[None] for v in denoiser.schedule(torch.tensor(0.4).double()))
    rows = []
    for x, z in ((1.0, 0.0), (0.0, 1.0)):
        monkeypatch.setattr("ddmlib.noise.normal_like", lambda x, generator=None, z=z: z + 0 * x)
        rows.append(
            float(balanced_langevin_step(torch.full((1,), x).double(), level, tau, denoiser)[0])
        )
    alpha, sigma = (float(v) for v in level)
    exact = alpha**2 * variance + sigma**2
    return (rows[0] ** 2 * exact + rows[1] ** 2) / exact


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0])
def test_balanced_langevin_steps_keep_the_law_to_second_order(variance, monkeypatch):
    error = [abs(after_balanced_step(variance, tau, monkeypatch) - 1) for tau in (0.2, 0.1, 0.05)]
    assert 0 < error[0] < 1e-3
    for coarse, fine in pairwise(error):
        assert 2.6 < math.log2(coarse / fine) < 3.4  # the error of one step is of third order


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.9])
def test_balanced_langevin_steps_keep_white_noise_exactly(tau, monkeypatch):
    assert after_balanced_step(1e-14, tau, monkeypatch) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("method", ["ddpm", "multistep"])
def test_balanced_corrections_do_not_widen(method, device, generator):
    """Components of all kinds of variance; R23's corrections leave a tenth too much of it."""
    variances = torch.logspace(-3, 1, 200, dtype=torch.float64)
    denoiser = GaussianDenoiser(torch.zeros_like(variances), variances.diag())
    options = {"steps": 60, "method": method, "eta": 1.0, "corrections": 2, "tau": 0.5}
    ratio = {}
    for corrector in sampling.CORRECTORS:
        x = sampling.sample(
            denoiser, (400, 200), corrector=corrector, generator=generator(9), device=device,
            dtype=torch.float64, ratios=(0.01, 80.0), **options,
        )  # fmt: skip
        ratio[corrector] = float((x.var(0) / variances.to(x)).mean())
    assert ratio["balanced"] == pytest.approx(1, abs=0.05)
    assert ratio["langevin"] > 1.1


def exact_variance(variance, monkeypatch, **options):
    """Return the variance of a sampler's result over that of the Gaussian data, without any sample.

    A sampler of Gaussian data is linear in its noises: run on unit vectors in place of them, one
    more at each draw, it returns its coefficients.
    """
    denoiser = GaussianDenoiser(torch.zeros(1).double(), torch.full((1, 1), variance).double())
    drawn = itertools.count()

    def unit(shape, **_):
        return torch.nn.functional.one_hot(torch.tensor(next(drawn)), shape[0])[:, None].double()

    monkeypatch.setattr("ddmlib.noise.normal", unit)
    monkeypatch.setattr("ddmlib.noise.normal_like", lambda x, generator=None: unit(x.shape))
    x = sampling.sample(denoiser, (1000, 1), dtype=torch.float64, **options)
    return float(x.square().sum()) / variance


@pytest.mark.parametrize("variance", [0.01, 1.0, 10.0])
def test_the_stochastic_multistep_rule_is_of_second_order(variance, monkeypatch):
    options = {"method": "multistep", "eta": 1.0, "ratios": (1e-3, 1e3)}
    error = [
        abs(exact_variance(variance, monkeypatch, steps=steps, **options) - 1)
        for steps in (51, 101, 201)
    ]
    for coarse, fine in pairwise(error):
        assert 1.7 < math.log2(coarse / fine) < 2.3


@pytest.mark.parametrize("variance", [0.01, 0.1, 1.0, 10.0])
def test_multistep_slopes_survive_balanced_corrections(variance, monkeypatch):
    """They end at the corrections' lower level: credited to that of the step they would be too
    long, and the variance three per cent too large."""
    options = {"steps": 72, "method": "multistep", "eta": 1.0, "ratios": (3e-3, 60.0)}
    corrections = {"corrections": 2, "tau": 0.5, "corrector": "balanced"}
    for corrected in [(0.0, math.inf), (0.1, 1.0)]:
        ratio = exact_variance(variance, monkeypatch, **options, **corrections, corrected=corrected)
        assert ratio == pytest.approx(1, abs=0.01)


def test_correctors_are_named_and_bounded():
    with pytest.raises(ValueError, match="corrector must be"):
        sampling.sample(gaussian(), (3, 2), steps=4, corrections=1, corrector="best")
    with pytest.raises(ValueError, match="tau must be below 2"):
        sampling.sample(gaussian(), (3, 2), steps=4, corrections=1, corrector="balanced", tau=2.0)


@pytest.mark.parametrize("method", sampling.METHODS)
def test_corrections_are_counted_and_none_follows_the_last_step(method):
    denoiser = Counting(MEAN, COVARIANCE)
    sampling.sample(denoiser, (3, 2), steps=5, method=method, corrections=3)
    assert denoiser.calls == sampling.evaluations(method, 5, corrections=3)


def test_corrections_may_be_kept_to_a_range_of_levels():
    denoiser = Counting(MEAN, COVARIANCE)
    options = {"steps": 12, "spacing": "log-ratio", "ratios": (0.01, 10.0)}
    sampling.sample(denoiser, (3, 2), corrections=2, corrected=(0.1, 2.0), **options)
    ratios = denoiser.schedule.ratio(sampling.times(denoiser.schedule, **options)[1:-1])
    inside = int(((ratios >= 0.1) & (ratios <= 2.0)).sum())
    assert 0 < inside < 11
    assert denoiser.calls == 12 + 2 * inside
    with pytest.raises(ValueError, match="corrected must satisfy"):
        sampling.sample(denoiser, (3, 2), corrections=1, corrected=(2.0, 0.1), **options)


def test_corrections_repair_an_ensemble_of_too_little_spread(device, generator):
    """Few DDIM steps leave too little variance; corrections bring it to the stated inflation."""
    variance = {}
    for corrections in (0, 3):
        x = sampling.sample(
            white(), (200, 400), steps=6, ratios=(0.1, 80.0), corrections=corrections,
            generator=generator(6), device=device,
        )  # fmt: skip
        variance[corrections] = float(x.square().mean())
    assert variance[0] < 0.8
    assert 0.95 < variance[3] < 1.15


def test_the_length_is_set_by_a_sample_of_the_denoisers_event(device, generator):
    """Trajectories of event 2 share one length, states of event 1 have their own."""
    x = torch.randn(3, 7, 400, generator=generator(1)).to(device)
    x[:, 0] *= 10
    grid = torch.tensor([0.6, 0.5], dtype=torch.float64)
    plain = sampling.reverse(white(), x, grid)
    level = tuple(v.to(x) for v in white().schedule(grid[1:]))
    for event in (1, 2):
        ours = sampling.reverse(white(event), x, grid, corrections=1, generator=generator(2))
        x_0 = white().denoise(plain, *level)
        by_hand = langevin_step(
            plain, x_0, level, 0.25, event=event, generator=generator(2)
        )  # fmt: skip
        torch.testing.assert_close(ours, by_hand)


# --- reproducibility -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", sampling.METHODS)
def test_seeds_fix_samples(method, device, generator):
    def draw(seed, where=device):
        settings = {"steps": 8, "method": method, "generator": generator(seed)}
        return sampling.sample(gaussian(), (30, 2), device=where, **settings)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.testing.assert_close(draw(1).cpu(), draw(1, "cpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "heun", "multistep"])
@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_chunks_do_not_change_samples(method, chunk, device, generator):
    def draw(**changes):
        settings = {"steps": 6, "method": method, "generator": generator(1), "device": device}
        return sampling.sample(gaussian(), (30, 4, 2), dtype=torch.float64, **settings, **changes)

    torch.testing.assert_close(draw(chunk=chunk), draw(), rtol=1e-10, atol=1e-10)


def test_chunks_keep_the_law_of_stochastic_samples(device, generator):
    settings = {"steps": 30, "method": "ddpm", "device": device}
    a, b = (
        sampling.sample(gaussian(), (4000, 2), generator=generator(k), chunk=chunk, **settings)
        for k, chunk in ((1, 1500), (2, None))
    )
    assert a.mean(0).tolist() == pytest.approx(b.mean(0).tolist(), abs=0.08)
    assert torch.cov(a.mT).flatten().tolist() == pytest.approx(
        torch.cov(b.mT).flatten().tolist(), abs=0.1
    )


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("spacing", grids.SPACINGS)
def test_samples_are_finite_and_of_the_asked_kind(method, schedule, spacing, device, generator):
    for dtype in (torch.float32, torch.float64):
        x = sampling.sample(
            gaussian(schedule),
            (5, 3, 2),
            steps=10,
            method=method,
            spacing=spacing,
            generator=generator(),
            device=device,
            dtype=dtype,
        )
        assert x.shape == (5, 3, 2)
        assert x.dtype == dtype
        assert x.device.type == device.type
        assert torch.isfinite(x).all()
        if spacing != "time":  # few even steps in t are coarse where sigma/alpha is large
            assert float(x.abs().max()) < 6
        assert not x.requires_grad


@pytest.mark.parametrize(
    ("trained", "event", "expected"),
    [
        ((0.01, 30.0), 1, (0.01, 30.0)),
        ((1e-4, 1e4), 1, (2e-3, 80.0)),
        ((1e-4, 1e4), 2, (2e-3, 400.0)),
        ((2e-3, 100.0), 2, (2e-3, 100.0)),
    ],
)
def test_default_noise_levels_are_those_a_network_was_trained_on(trained, event, expected):
    net = torch.nn.Linear(2, 2)
    identity = datasets.Standardizer.identity(2)
    denoiser = denoisers.NetworkDenoiser(net, schedules.Cosine(), identity, "state", trained)
    denoiser.event = event
    assert grids.noise_levels(denoiser) == expected
    reached = denoiser.schedule.ratio(sampling.times_for(denoiser, 4))
    assert float(reached[0]) == pytest.approx(expected[1], rel=1e-6)
    assert float(reached[-2]) == pytest.approx(expected[0], rel=1e-6)


class Counting(GaussianDenoiser):
    """Counts its evaluations."""

    calls = 0

    def denoise(self, x_t, alpha_t, sigma_t):
        self.calls += 1
        return super().denoise(x_t, alpha_t, sigma_t)


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_evaluations_are_counted_right(method, steps):
    denoiser = Counting(MEAN, COVARIANCE)
    sampling.sample(denoiser, (3, 2), steps=steps, method=method)
    assert denoiser.calls == sampling.evaluations(method, steps)


# --- grids ---------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("spacing", grids.SPACINGS)
@pytest.mark.parametrize("start", [1.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_times_decrease_from_the_start_to_zero(schedule, spacing, start, steps):
    grid = sampling.times(schedule, steps, spacing=spacing, start=start, ratios=(2e-3, 1e9))
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert float(grid[0]) == pytest.approx(start, abs=1e-6)
    assert float(grid[-1]) == 0
    assert (grid.diff() < 0).all()


def test_times_are_even_in_what_they_say():
    schedule = schedules.Cosine()
    steps = sampling.times(schedule, 20, spacing="time", start=0.8).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -0.04))
    ratio = schedule.ratio(sampling.times(schedule, 20, ratios=(0.01, 50.0), spacing="log-ratio"))
    assert ratio[[0, 19]].tolist() == pytest.approx([50.0, 0.01])
    logs = ratio[:-1].log().diff()
    torch.testing.assert_close(logs, torch.full_like(logs, -math.log(5000) / 19))
    ratio = schedule.ratio(sampling.times(schedule, 20, ratios=(0.01, 50.0), spacing="karras"))
    assert ratio[[0, 19]].tolist() == pytest.approx([50.0, 0.01])
    # Karras et al. (2022), eq. 5
    i, n, rho = 7, 20, 7
    expected = (50 ** (1 / rho) + i / (n - 1) * (0.01 ** (1 / rho) - 50 ** (1 / rho))) ** rho
    assert float(ratio[i]) == pytest.approx(expected)
    ratio = schedule.ratio(sampling.times(schedule, 21, ratios=(0.01, 50.0), spacing="central"))
    assert ratio[[0, 20]].tolist() == pytest.approx([50.0, 0.01])
    assert float(ratio[10]) == pytest.approx(math.sqrt(0.5))
    steps = torch.asinh((ratio[:-1] / math.sqrt(0.5)).log()).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -math.asinh(math.log(5000) / 2) / 10))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"shape": (5, 3)}, ValueError, r"shape must be \(\*batch, 2\)"),
        ({"shape": (2,)}, ValueError, "shape must be"),
        ({"shape": (0, 2)}, ValueError, "positive sizes"),
        ({"method": "euler"}, ValueError, "method must be one of ddim"),
        ({"spacing": "even"}, ValueError, "spacing must be one of"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"ratios": (5.0, 1.0)}, ValueError, "ratios must satisfy"),
        ({"ratios": (0.0, 1.0), "schedule": schedules.Straight()}, ValueError, "ratios must"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
    ],
)
def test_sample_refuses(changes, error, words):
    arguments = {"shape": (4, 2), "steps": 3} | changes
    denoiser = gaussian(arguments.pop("schedule", None))
    with pytest.raises(error, match=words):
        sampling.sample(denoiser, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"z": torch.zeros(4, 3)}, ValueError, r"z must have shape \(\.\.\., 2\)"),
        ({"z": torch.full((4, 2), math.nan)}, ValueError, "z must be finite"),
        ({"z": torch.zeros(4, 2, dtype=torch.long)}, TypeError, "z must be a floating"),
        ({"z": [[0.0, 0.0]]}, TypeError, "z must be a torch.Tensor"),
        ({"t": 0.0}, ValueError, r"t must lie in \(0, 1\]"),
        ({"t": 1.2}, ValueError, r"t must lie in \(0, 1\]"),
        ({"members": 0}, ValueError, "members must be at least 1"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"method": "euler"}, ValueError, "method must be one of"),
        ({"spacing": "even"}, ValueError, "spacing must be one of"),
    ],
)
def test_resample_refuses(changes, error, words):
    arguments = {"z": torch.zeros(4, 2), "t": 0.1, "members": 2, "steps": 3} | changes
    with pytest.raises(error, match=words):
        sampling.resample(gaussian(), **arguments)


@pytest.mark.parametrize(
    "grid", [[0.5], [0.1, 0.5], [0.5, 0.5, 0.0], [[0.5, 0.0]], [1.5, 0.0], [0.5, -0.1]]
)
def test_reverse_refuses_grids(grid):
    with pytest.raises(ValueError, match="grid must be"):
        sampling.reverse(gaussian(), torch.zeros(3, 2), torch.tensor(grid))


def test_reverse_refuses_states():
    grid = torch.tensor([0.5, 0.0])
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 2\)"):
        sampling.reverse(gaussian(), torch.zeros(3, 1), grid)
    with pytest.raises(TypeError, match="x must be"):
        sampling.reverse(gaussian(), None, grid)


# --- fresh noise ---------------------------------------------------------------------------------


def test_eta_interpolates_between_the_samplers(draw, generator):
    grid = sampling.times(schedules.Cosine(), 6)

    def run(method, eta=None):
        return sampling.reverse(
            gaussian(),
            torch.ones(9, 2).double(),
            grid,
            method=method,
            eta=eta,
            generator=generator(),
        )

    assert torch.equal(run("ddpm", 0.0), run("ddim"))
    assert torch.equal(run("ddim", 1.0), run("ddpm"))
    assert torch.equal(run("multistep", 0.0), run("multistep"))
    assert not torch.equal(run("multistep", 0.5), run("multistep"))


@pytest.mark.parametrize(
    ("method", "eta"), [("ddim", -0.1), ("ddpm", 1.1), ("heun", 0.5), ("ddim", math.nan)]
)
def test_eta_is_refused(method, eta):
    with pytest.raises(ValueError, match="eta must lie"):
        sampling.sample(gaussian(), (3, 2), steps=3, method=method, eta=eta)


def test_smoothing_moves_gaussian_samples_as_the_exact_mean_does(device, generator):
    denoiser, r = gaussian(), 0.3
    z = torch.randn(50, 2, dtype=torch.float64, generator=generator(1)).to(device)
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + r**2 * EYE)
    for draws in (1, 3):  # noise of both signs cancels where a denoiser is affine
        found = sampling.smoothed(denoiser, z, ratio=r, draws=draws, generator=generator(2)).cpu()
        torch.testing.assert_close(found, MEAN + (z.cpu() - MEAN) @ gain.mT)


class Rough(Denoiser):
    """The identity, with an error that is other with other noise."""

    def __init__(self, size):
        self.schedule, self.size = schedules.Cosine(), size
        self.standardizer = datasets.Standardizer.identity(2)

    def denoise(self, x_t, alpha_t, sigma_t):
        return x_t + self.size * torch.sin(1e5 * x_t)


def test_smoothing_averages_the_errors_that_noise_decides(generator):
    z = torch.randn(4000, 2, dtype=torch.float64, generator=generator(1))
    errors = []
    for draws in (1, 4, 16):
        found = sampling.smoothed(Rough(0.1), z, ratio=0.01, draws=draws, generator=generator(2))
        errors.append(float((found - z).std()))
    once = 0.1 / 2**0.5  # of one evaluation
    assert errors == pytest.approx([once / (2 * n) ** 0.5 for n in (1, 4, 16)], rel=0.05)
    parts = sampling.smoothed(
        Rough(0.1), z, ratio=0.01, draws=16, chunk=999, generator=generator(2)
    )
    torch.testing.assert_close(parts, found)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"draws": 0}, "draws"),
        ({"chunk": 0}, "chunk"),
        ({"z": torch.zeros(3, 5)}, "z must"),
        ({"z": torch.zeros(2)}, "z must be a batch"),
        ({"z": torch.full((3, 2), float("inf"))}, "z"),
    ],
)
def test_smoothing_refuses_what_it_cannot_use(change, match):
    with pytest.raises(ValueError, match=match):
        sampling.smoothed(gaussian(), **({"z": torch.zeros(3, 2), "ratio": 0.1} | change))
