"""Denoisers: the exact ones against brute force, the network one against the exact one."""

import math

import pytest
import torch
from torch import nn

from ddmlib import datasets, denoisers, networks, noise, sampling, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import (
    ByLevel,
    EmpiricalDenoiser,
    GaussianDenoiser,
    NetworkDenoiser,
    Symmetric,
)
from ddmlib.tails import AsinhStandardizer

ALL = [
    schedules.Cosine(),
    schedules.Linear(),
    schedules.LogLinear(),
    schedules.CosineSquared(),
    schedules.VariancePreserving(),
    schedules.SubVariancePreserving(),
    schedules.VarianceExploding(),
    schedules.Straight(),
]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.9, 0, 0], [0.6, 0.5, 0], [-0.2, 0.4, 0.05]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.mT


@pytest.fixture
def draw(device, generator):
    g = generator(1)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=g, dtype=dtype).to(device)

    return draw


def gaussian(schedule=None):
    return GaussianDenoiser(MEAN, COVARIANCE, schedule)


class Oracle(nn.Module):
    """A network that returns the exact target of a head for a Gaussian prior."""

    def __init__(self, head, scale=1.0, shift=0.0):
        super().__init__()
        self.head, self.scale, self.shift = head, scale, shift

    def forward(self, u, level):
        s = torch.sigmoid(2 * level)[..., None].sqrt()  # r / sqrt(1 + r²), r = exp(level)
        c = torch.sigmoid(-2 * level)[..., None].sqrt()
        state = gaussian().denoise(u, c, s)
        eps = (u - c * state) / s
        target = {"state": state, "noise": eps, "velocity": c * eps - s * state}[self.head]
        return self.scale * target + self.shift


def network(schedule, head, ratios=(1e-9, 1e9), **changes):
    return NetworkDenoiser(
        Oracle(head, **changes), schedule, Standardizer.identity(3), head, ratios
    )


# --- the Gaussian --------------------------------------------------------------------------------


@every_schedule
def test_gaussian_equals_the_formula_by_a_direct_solve(schedule, draw, device):
    x = draw(9, 3)
    mean, covariance = MEAN.to(device), COVARIANCE.to(device)
    for t in (0.02, 0.3, 0.77, 0.98):
        alpha, sigma = (float(v) for v in schedule(t))
        system = alpha**2 * covariance + sigma**2 * torch.eye(3).to(x)
        gain = alpha * covariance @ torch.linalg.inv(system)
        expected = mean + (x - alpha * mean) @ gain.mT
        torch.testing.assert_close(gaussian(schedule)(x, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "empirical", "network"])
def test_a_time_per_sample_equals_one_at_a_time(kind, draw, device):
    denoiser = {
        "gaussian": gaussian(),
        "empirical": EmpiricalDenoiser(draw(40, 3)),
        "network": network(schedules.Cosine(), "velocity"),
    }[kind]
    x, t = draw(4, 5, 3), torch.rand(4, 5, device=device)
    each = [denoiser(x[i, j], float(t[i, j])) for i in range(4) for j in range(5)]
    expected = torch.stack(each).reshape(4, 5, 3)
    torch.testing.assert_close(denoiser(x, t), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        denoiser(x, t[:, 0]), denoiser(x, t[:, :1].expand(4, 5)), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(denoiser(x, t[:, :1]), denoiser(x, t[:, 0]), rtol=1e-9, atol=1e-9)


@every_schedule
def test_score_is_the_gradient_of_the_log_density(schedule, draw, device):
    x, t = draw(6, 3).requires_grad_(), 0.4
    alpha, sigma = (float(v) for v in schedule(t))
    covariance = alpha**2 * COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(
        alpha * MEAN.to(device), covariance.to(device), validate_args=False
    )
    (expected,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    denoiser = gaussian(schedule)
    ours = denoiser.score(x, t).detach()
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(-denoiser.noise(x, t).detach() / sigma, ours)


@every_schedule
def test_jacobian_of_the_denoiser_is_the_posterior_covariance(schedule, draw, device):
    t = 0.35
    alpha, sigma = (float(v) for v in schedule(t))
    denoiser, x = gaussian(schedule), draw(3)
    jacobian = torch.autograd.functional.jacobian(lambda v: denoiser(v, t), x)
    precision = torch.linalg.inv(COVARIANCE) + alpha**2 / sigma**2 * torch.eye(3).double()
    expected = torch.linalg.inv(precision).to(device)
    torch.testing.assert_close(sigma**2 / alpha * jacobian, expected, rtol=1e-6, atol=1e-9)


def test_empirical_jacobian_is_the_covariance_of_its_weights(draw):
    data, x, t = draw(30, 3), draw(3), 0.4
    denoiser = EmpiricalDenoiser(data)
    alpha, sigma = (float(v) for v in denoiser.schedule(t))
    jacobian = torch.autograd.functional.jacobian(lambda v: denoiser(v, t), x)
    w = torch.softmax(-(x - alpha * data).square().sum(-1) / (2 * sigma**2), 0)
    mean = w @ data
    covariance = (data - mean).mT @ (w[:, None] * (data - mean))
    torch.testing.assert_close(sigma**2 / alpha * jacobian, covariance, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_is_finite_at_the_ends_and_for_a_degenerate_prior(draw, dtype):
    x = draw(5, 3, dtype=dtype)
    flat = GaussianDenoiser(MEAN, torch.zeros(3, 3))
    for schedule in ALL:
        for t in (0.0, 1.0):
            ours = gaussian(schedule)(x, t)
            assert ours.dtype == dtype
            assert torch.isfinite(ours).all()
            none = flat.with_schedule(schedule)(x, t)
            torch.testing.assert_close(none, MEAN.to(x).expand(5, 3))
    torch.testing.assert_close(gaussian(schedules.Straight())(x, 0.0), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gaussian(schedules.Straight())(x, 1.0), MEAN.to(x).expand(5, 3))


# --- conversions ---------------------------------------------------------------------------------


@every_schedule
def test_heads_and_score_convert_into_each_other(schedule, draw):
    x_0, eps = draw(200, 3), draw(200, 3)
    # away from the ends: sigma/alpha from 0.01 to 100
    t = schedule.time(torch.logspace(-2, 2, 200).to(x_0))
    alpha, sigma = (v[:, None] for v in schedule(t))
    x_t = denoisers.diffuse(x_0, alpha, sigma, eps)
    level = (x_t, alpha, sigma)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(denoisers.noise_from_state(x_0, *level), eps, **close)
    torch.testing.assert_close(denoisers.state_from_noise(eps, *level), x_0, **close)
    score = denoisers.score_from_state(x_0, *level)
    torch.testing.assert_close(-sigma * score, eps, **close)
    torch.testing.assert_close(denoisers.state_from_score(score, *level), x_0, **close)
    if schedule.preserves_variance and not isinstance(schedule, schedules.CosineSquared):
        velocity = denoisers.velocity_from_state(x_0, *level)
        torch.testing.assert_close(velocity, alpha * eps - sigma * x_0, **close)
        torch.testing.assert_close(denoisers.state_from_velocity(velocity, *level), x_0, **close)


def test_methods_are_the_conversions_of_the_state(draw):
    denoiser, x, t = gaussian(), draw(5, 3), 0.3
    level, state = denoiser.levels(x, t), denoiser(x, t)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(
        denoisers.state_from_noise(denoiser.noise(x, t), x, *level), state, **close
    )
    torch.testing.assert_close(
        denoisers.state_from_score(denoiser.score(x, t), x, *level), state, **close
    )
    torch.testing.assert_close(
        denoisers.state_from_velocity(denoiser.velocity(x, t), x, *level), state, **close
    )


@every_schedule
def test_velocity_is_refused_unless_the_variance_is_kept(schedule, draw):
    if schedule.preserves_variance:
        assert gaussian(schedule).velocity(draw(2, 3), 0.5).shape == (2, 3)
    else:
        with pytest.raises(ValueError, match=f"velocity.*{type(schedule).__name__}"):
            gaussian(schedule).velocity(draw(2, 3), 0.5)


def test_with_schedule_is_the_same_denoiser_at_the_same_ratio(draw):
    first = schedules.Cosine()
    for denoiser in (gaussian(), EmpiricalDenoiser(draw(50, 3)), network(first, "noise")):
        for schedule in ALL:
            other = denoiser.with_schedule(schedule)
            assert denoiser.schedule.settings() == first.settings()  # the old one keeps its own
            for ratio in (0.05, 1.0, 20.0):
                t, s = (float(v.time(ratio)) for v in (first, schedule))
                y = draw(4, 3) * math.hypot(1, ratio)  # x / alpha
                ours = other(y * schedule(s)[0].to(y), s)
                torch.testing.assert_close(ours, denoiser(y * first(t)[0].to(y), t))


# --- the data set --------------------------------------------------------------------------------


def brute_force(data, x, alpha, sigma):
    """Return the softmax mean of the data, point by point in float64."""
    data = data.double()
    out = []
    for point in x.double().reshape(-1, x.shape[-1]):
        logits = -(point - alpha * data).square().sum(-1) / (2 * sigma**2)
        weights = torch.exp(logits - logits.max())
        out.append((weights[:, None] * data).sum(0) / weights.sum())
    return torch.stack(out).reshape(x.shape)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empirical_equals_brute_force(schedule, dtype, draw):
    data = draw(300, 3, dtype=dtype)
    denoiser = EmpiricalDenoiser(data, schedule)
    for ratio in (0.01, 0.1, 1.0, 10.0, 60.0):
        alpha, sigma = schedule(float(schedule.time(ratio)))
        x = alpha.to(data) * data[:12].reshape(4, 3, 3) + sigma.to(data) * draw(4, 3, 3).to(data)
        expected = brute_force(data, x, float(alpha), float(sigma))
        ours = denoiser.denoise(x, alpha.to(data)[None], sigma.to(data)[None])
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100, 250, 2**22])
def test_empirical_does_not_depend_on_the_chunk(chunk, draw, device):
    data, x, t = draw(100, 3), draw(6, 4, 3), torch.rand(6, 4, device=device)
    expected = EmpiricalDenoiser(data)(x, t)
    ours = EmpiricalDenoiser(data, chunk=chunk)(x, t)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empirical_limits(draw, dtype):
    data, x = draw(200, 3, dtype=dtype), 3 * draw(40, 3, dtype=dtype)
    one = torch.ones(1).to(x)
    denoiser = EmpiricalDenoiser(data, chunk=1000)
    nearest = data[torch.cdist(x, data).argmin(1)]
    mean = data.mean(0).expand(40, 3)
    for sigma in (1e-4, 0.0):
        torch.testing.assert_close(denoiser.denoise(x, one, sigma * one), nearest)
    torch.testing.assert_close(
        denoiser.denoise(1e5 * x, one, 1e5 * one),  # the noise of this level, then no signal at all
        mean, rtol=0, atol=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(denoiser.denoise(x, 0 * one, one), mean, rtol=0, atol=1e-4)
    for schedule in ALL:
        for t in (0.0, 1.0):
            scale = float(schedule(t)[1].clamp(min=1))
            assert torch.isfinite(denoiser.with_schedule(schedule)(scale * x, t)).all()


def test_denoisers_are_differentiable(draw):
    x, t = draw(3, 3).requires_grad_(), torch.tensor([0.2, 0.5, 0.8])
    for denoiser in (
        gaussian(),
        EmpiricalDenoiser(draw(20, 3), chunk=15),
        network(schedules.Cosine(), "velocity"),
    ):
        assert torch.autograd.gradcheck(lambda v, d=denoiser: d(v, t), (x,))
    data = draw(20, 3)
    on_a_point = data[:1].clone().requires_grad_()
    EmpiricalDenoiser(data)(on_a_point, 0.0).sum().backward()
    assert torch.isfinite(on_a_point.grad).all()


# --- the network ---------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("head", denoisers.HEADS)
def test_an_exact_network_gives_the_exact_denoiser(schedule, head, draw, device):
    t = schedule.time(torch.logspace(-2, 2, 50, dtype=torch.float64)).to(device)
    x = draw(50, 3) * sum(v**2 for v in schedule(t)).sqrt()[:, None]
    ours, exact = network(schedule, head)(x, t), gaussian(schedule)(x, t)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


def karras(f, x, sigma):
    """Return Karras et al.'s D for data of unit variance, their table 1 with sigma_data = 1."""
    skip, out, into = 1 / (sigma**2 + 1), sigma / math.hypot(sigma, 1), 1 / math.hypot(sigma, 1)
    return skip * x + out * f(into * x)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 7.0, 80.0])
def test_velocity_head_is_the_preconditioning_of_karras(sigma, draw, device):
    torch.manual_seed(0)
    net = networks.ResidualMLP(width=8, blocks=1, embedding=4).to(device, torch.float64)
    schedule = schedules.VarianceExploding(1e-3, 300.0)
    denoiser = NetworkDenoiser(net, schedule, Standardizer.identity(3), "velocity")
    t, x_0, eps = float(schedule.time(sigma)), draw(64, 3), draw(64, 3)
    x, level = x_0 + sigma * eps, torch.tensor(math.log(sigma)).to(x_0)
    theirs = karras(lambda u: -net(u, level), x, sigma)
    torch.testing.assert_close(denoiser(x, t), theirs, rtol=1e-6, atol=1e-8)
    weight = (sigma**2 + 1) / sigma**2  # Karras et al.'s lambda
    expected = weight * (theirs - x_0).square().mean()
    loss = denoisers.denoising_loss(denoiser, x_0, t, eps)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("head", denoisers.HEADS)
def test_loss_is_least_for_the_exact_denoiser(head, draw, device):
    root, schedule = ROOT.to(device), schedules.Cosine()
    x_0 = MEAN.to(device) + draw(20_000, 3) @ root.mT
    t, eps = 0.05 + 0.9 * torch.rand(20_000, device=device), draw(20_000, 3)

    def loss(**changes):
        return float(denoisers.denoising_loss(network(schedule, head, **changes), x_0, t, eps))

    best = loss()
    for changes in ({"scale": 0.9}, {"scale": 1.1}, {"shift": 0.1}, {"shift": -0.1}):
        assert loss(**changes) > best
    # the excess is the mean square of the perturbation: E (F - E F|x)² has no cross term
    assert loss(shift=0.3) - best == pytest.approx(0.09, rel=0.1)


@every_schedule
def test_network_is_finite_at_both_ends(schedule, draw, device):
    torch.manual_seed(0)
    net = networks.ResidualMLP(width=8, blocks=1, embedding=4).to(device)
    x = draw(5, 3, dtype=torch.float32)
    for head in denoisers.HEADS:
        denoiser = NetworkDenoiser(net, schedule, Standardizer.identity(3), head, (2e-3, 80.0))
        for t in (0.0, 1.0):
            if head == "noise" and float(schedule(t)[0]) == 0:
                continue  # x̂ = (x - eps)/0 is not defined there
            assert torch.isfinite(denoiser(x, t)).all()


def test_level_is_clamped_to_the_trained_range(device):
    seen = []

    class Spy(nn.Module):
        def forward(self, u, level):
            seen.append(float(level))
            return u

    schedule = schedules.VarianceExploding(1e-3, 300.0)
    denoiser = NetworkDenoiser(Spy(), schedule, Standardizer.identity(3), "state", (0.01, 50.0))
    for ratio in (0.0, 0.005, 0.5, 49.0, 100.0):
        denoiser(torch.zeros(2, 3, device=device), float(schedule.time(ratio)))
    assert [math.exp(v) for v in seen] == pytest.approx([0.01, 0.01, 0.5, 49.0, 50.0], rel=1e-4)


def test_hidden_is_the_representation_behind_the_output(draw, device):
    torch.manual_seed(0)
    net = networks.ResidualMLP(width=8, blocks=1, embedding=4).to(device, torch.float64)
    denoiser = NetworkDenoiser(net, schedules.Cosine(), Standardizer.identity(3), "state")
    x = draw(5, 3)
    torch.testing.assert_close(net.last(denoiser.hidden(x, 0.2)), denoiser(x, 0.2))


def test_with_schedule_shares_the_parameters(device):
    net = networks.ResidualMLP(width=8, blocks=1, embedding=4).to(device)
    denoiser = NetworkDenoiser(net, schedules.Cosine(), Standardizer.identity(3), ratios=(0.1, 9.0))
    other = denoiser.with_schedule(schedules.Linear())
    assert other.network is net
    assert (other.head, other.ratios) == (denoiser.head, denoiser.ratios)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "t", "error", "words"),
    [
        (torch.zeros(4, 3), 1.5, ValueError, "t must lie within"),
        (torch.zeros(4, 3), -0.1, ValueError, "t must lie within"),
        (torch.zeros(4, 3), math.nan, ValueError, "t must lie within"),
        (torch.zeros(4, 3), torch.full((3,), 0.5), ValueError, r"t must.*\(3,\).*\(4, 3\)"),
        (torch.zeros(4, 3), torch.full((4, 3), 0.5), ValueError, "t must be a number or match"),
        (torch.zeros(4, 3, dtype=torch.long), 0.5, TypeError, "x_t must be a floating"),
        ([[0.0, 0.0, 0.0]], 0.5, TypeError, "x_t must be a torch.Tensor"),
        (torch.zeros(4, 2), 0.5, ValueError, r"x_t must have shape \(\.\.\., 3\)"),
    ],
)
def test_denoisers_refuse(x, t, error, words):
    for denoiser in (gaussian(), EmpiricalDenoiser(torch.zeros(5, 3))):
        with pytest.raises(error, match=words):
            denoiser(x, t)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GaussianDenoiser(torch.zeros(2), torch.eye(3)), ValueError, "mean and covariance"),
        (lambda: GaussianDenoiser(torch.zeros(2, 2), torch.eye(2)), ValueError, "mean and cov"),
        (
            lambda: GaussianDenoiser(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            ValueError,
            "symmetric",
        ),
        (lambda: GaussianDenoiser(torch.zeros(2), -torch.eye(2)), ValueError, "semi-definite"),
        (lambda: GaussianDenoiser(torch.zeros(2), torch.eye(2) / 0), ValueError, "finite"),
        (lambda: EmpiricalDenoiser(torch.zeros(0, 3)), ValueError, "n > 0"),
        (lambda: EmpiricalDenoiser(torch.zeros(4, 5, 3)), ValueError, "data must have shape"),
        (lambda: EmpiricalDenoiser(torch.full((2, 3), math.nan)), ValueError, "data must be fin"),
        (lambda: EmpiricalDenoiser(torch.zeros(4, 3), chunk=0), ValueError, "chunk"),
        (lambda: network(schedules.Cosine(), "score"), ValueError, "head must be one of"),
        (lambda: network(schedules.Cosine(), "noise", (0.0, 1.0)), ValueError, "ratio_min"),
        (lambda: network(schedules.Cosine(), "noise", (2.0, 1.0)), ValueError, "ratio_max"),
    ],
)
def test_constructors_refuse(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_noise_depends_on_the_generator_alone(device, generator):
    on_cpu = noise.normal((4, 3), generator=generator(5))
    there = noise.normal((4, 3), generator=generator(5), device=device)
    assert there.device.type == device.type
    assert torch.equal(there.cpu(), on_cpu)
    like = noise.normal_like(torch.zeros(4, 3, device=device), generator(5))
    assert torch.equal(like, there)
    assert noise.normal((2,), device=device, dtype=torch.float64).dtype == torch.float64


def test_by_level_is_each_denoiser_in_its_range(device, generator):
    one, other = (
        GaussianDenoiser(torch.full((2,), m, device=device), torch.eye(2, device=device))
        for m in (0.0, 5.0)
    )
    mixed = ByLevel([(1.0, one), (0.0, other)])
    x = torch.randn(3, 2, generator=generator(0)).to(device)
    t = mixed.schedule.time(torch.tensor([0.2, 1.001, 7.0], dtype=torch.float64))
    for time, expected in zip(t, (other, one, one), strict=True):
        torch.testing.assert_close(mixed(x, float(time)), expected(x, float(time)))
    each = torch.stack([other(x, t)[0], one(x, t)[1], one(x, t)[2]])
    torch.testing.assert_close(mixed(x, t), each)
    assert mixed.event == 1
    assert mixed.device is None


@pytest.mark.parametrize("lowest", [[], [1.0], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0]])
def test_by_level_refuses_parts_that_do_not_descend_to_zero(lowest):
    denoiser = GaussianDenoiser(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="parts must descend"):
        ByLevel([(low, denoiser) for low in lowest])


def test_by_level_refuses_denoisers_of_other_samples():
    one = GaussianDenoiser(torch.zeros(2), torch.eye(2))
    other = GaussianDenoiser(torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="parts must all be"):
        ByLevel([(1.0, one), (0.0, other)])


def test_by_level_reaches_from_the_lowest_of_the_last_to_the_highest_of_the_first():
    parts = [GaussianDenoiser(torch.zeros(2), torch.eye(2)) for _ in range(2)]
    parts[0].ratios, parts[1].ratios = (0.5, 70.0), (3e-3, 0.5)
    mixed = ByLevel([(0.5, parts[0]), (0.0, parts[1])])
    assert sampling.noise_levels(mixed) == (3e-3, 70.0)
    scaled = Standardizer(torch.zeros(2), torch.full((2,), 3.0))
    parts[1].standardizer = scaled
    with pytest.raises(ValueError, match="the same standardizer"):
        ByLevel([(0.5, parts[0]), (0.0, parts[1])])


def test_symmetric_has_the_symmetry_and_leaves_what_has_it(device, generator):
    signs = torch.tensor([-1.0, 1.0], device=device)
    covariance = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device)
    exact, wrong = (
        GaussianDenoiser(torch.tensor([m, 0.5], device=device), covariance) for m in (0.0, 0.4)
    )
    x, t = torch.randn(5, 2, generator=generator(0)).to(device), torch.rand(5)
    mended = Symmetric(wrong, [-1, 1])
    torch.testing.assert_close(mended(signs * x, t), signs * mended(x, t))
    torch.testing.assert_close(mended(x, t), exact(x, t))  # the error is odd: it cancels
    torch.testing.assert_close(Symmetric(exact, [-1, 1])(x, t), exact(x, t))
    assert float((wrong(x, t) - exact(x, t)).abs().max()) > 0.01


def test_samples_of_symmetric_are_on_both_sides_alike(device, generator):
    """Of two points, one has been given too much weight."""
    points = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], device=device)[[0, 0, 1]]
    shares = []
    for denoiser in (EmpiricalDenoiser(points), Symmetric(EmpiricalDenoiser(points), (-1, 1))):
        z = sampling.sample(denoiser, (4000, 2), steps=60, generator=generator(1), device=device)
        shares.append(float((z[:, 0] < 0).double().mean()))
    assert shares[0] == pytest.approx(2 / 3, abs=0.03)
    assert shares[1] == pytest.approx(1 / 2, abs=0.03)


def test_symmetric_mirrors_physical_units_where_standardised_ones_are_off_centre(device):
    """Of N(0, 4) and N(3, 1) in physical units, but units with the means 1 and 0.5."""
    mean, std = torch.tensor([1.0, 0.5]), torch.tensor([2.0, 0.5])
    units = datasets.Standardizer(mean, std)
    centre = units(torch.tensor([0.0, 3.0])).to(device)
    covariance = torch.diag(torch.tensor([1.0, 4.0])).to(device)
    exact = GaussianDenoiser(centre, covariance, standardizer=units)
    wrong = GaussianDenoiser(centre + 0.3 * (centre < 0), covariance, standardizer=units)
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).to(device), torch.rand(5)
    torch.testing.assert_close(Symmetric(exact, [-1, 1])(x, t), exact(x, t))
    torch.testing.assert_close(Symmetric(wrong, [-1, 1])(x, t), exact(x, t))
    assert float((wrong(x, t) - exact(x, t)).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("signs", "mean", "words"),
    [((-1,), 0.0, "2 numbers"), ((-1, 0.5), 0.0, "2 numbers"), ((-1, 1), 1.0, "non-zero mean")],
)
def test_symmetric_refuses(signs, mean, words):
    stretched = AsinhStandardizer(torch.full((2,), mean), torch.ones(2))
    denoiser = EmpiricalDenoiser(torch.zeros(3, 2), standardizer=stretched)
    with pytest.raises(ValueError, match=words):
        Symmetric(denoiser, signs)
