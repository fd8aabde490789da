"""Trajectories: the fast composition against a loop, its error on a chain whose score is known."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from ddmlib import datasets, networks, sampling, schedules, trajectories
from ddmlib.denoisers import GaussianDenoiser, NetworkDenoiser
from ddmlib.dynamics import LinearGaussian
from ddmlib.trajectories import GaussianTrajectoryDenoiser, TrajectoryDenoiser

DOUBLE = torch.float64
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=DOUBLE)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)
CHAIN = LinearGaussian.stationary(A, Q)
LENGTH = 15


def exact(length=LENGTH, **changes):
    return GaussianTrajectoryDenoiser(*CHAIN.law(length), **changes)


def network(device, make, head="velocity", schedule=None):
    """Return a denoiser of trajectories of three components with open gates, float64."""
    torch.manual_seed(0)
    net = make().to(device, DOUBLE)
    for name, parameter in net.named_parameters():
        if name.endswith("gate"):
            nn.init.normal_(parameter)
    standardizer = datasets.NOISY_LORENZ63
    return NetworkDenoiser(net, schedule or schedules.Cosine(), standardizer, head)


def window_mlp():
    return networks.WindowMLP(window=5, width=16, blocks=2, embedding=8)


def conv_net():
    return networks.ConvNet(width=8, blocks=1, embedding=8)


@pytest.fixture
def draw(generator, device):
    g = generator(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE).to(device)

    return draw


def loop(denoiser, window, x, t):
    """Return x̂ of trajectories (n, length, d) by a loop over windows, as R23 has it."""
    k, length = window // 2, x.shape[1]
    out = torch.zeros_like(x)
    for i in range(length):
        start = min(max(i - k, 0), length - window)
        out[:, i] = denoiser(x[:, start : start + window], t)[:, i - start]
    return out


def test_gaussian_trajectory_is_the_gaussian_of_the_flat_vector(draw):
    mean, covariance = CHAIN.law(4)
    x, t = draw(5, 4, 2), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    flat = GaussianDenoiser(mean.flatten(), covariance)
    ours = exact(4)(x, t)
    torch.testing.assert_close(ours, flat(x.flatten(1), t).reshape(x.shape))
    assert exact(4)(x[0], 0.3).shape == (4, 2)


@pytest.mark.parametrize("head", ["velocity", "noise", "state"])
@pytest.mark.parametrize("length", [5, 6, 12])
def test_fast_composition_equals_the_loop_over_windows(head, length, device, draw):
    denoiser, x = network(device, window_mlp, head), draw(3, length, 3)
    whole = TrajectoryDenoiser(denoiser)
    for t in (0.4, torch.tensor([0.1, 0.5, 0.9])):
        torch.testing.assert_close(whole(x, t), loop(denoiser, 5, x, t))


@pytest.mark.parametrize("length", [5, 6, 12])
def test_the_fast_composition_has_the_derivatives_of_the_loop(length, device, draw):
    denoiser, x, v = network(device, window_mlp), draw(3, length, 3), draw(3, length, 3)
    whole = TrajectoryDenoiser(denoiser)
    x.requires_grad_()
    for t in (0.4, torch.tensor([0.1, 0.5, 0.9])):
        found = []
        for out in (whole(x, t), loop(denoiser, 5, x, t)):
            (once,) = torch.autograd.grad(out, x, v, create_graph=True)
            (twice,) = torch.autograd.grad(once.square().sum(), x)
            found.append((once, twice))
        torch.testing.assert_close(*found)
        assert float(found[0][1].abs().max()) > 1e-6


def dilated():
    return networks.ConvNet(width=8, blocks=2, embedding=8, dilations=(1, 3))


@pytest.mark.parametrize(
    ("make", "window", "length"),
    [(conv_net, 9, 9), (conv_net, 9, 11), (conv_net, 9, 20), (dilated, 21, 21), (dilated, 21, 30)],
)
def test_a_convolution_is_its_own_composition(make, window, length, device, draw):
    denoiser, x = network(device, make), draw(3, length, 3)
    t = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(denoiser(x, t), loop(denoiser, window, x, t))
    torch.testing.assert_close(TrajectoryDenoiser(denoiser)(x, t), denoiser(x, t))


def test_exact_windows_compose_by_the_loop_too(device, draw):
    denoiser, x = exact(5), draw(3, 11, 2)
    for t in (0.4, torch.tensor([0.1, 0.5, 0.9])):
        torch.testing.assert_close(TrajectoryDenoiser(denoiser)(x, t), loop(denoiser, 5, x, t))


def test_one_window_is_the_whole_trajectory(draw):
    x = draw(4, LENGTH, 2)
    torch.testing.assert_close(TrajectoryDenoiser(exact())(x, 0.4), exact()(x, 0.4))


def blanket_error(window, ratio, x_0, noise):
    """Return the root-mean-square difference of composed and exact x̂."""
    schedule = schedules.LogLinear(1e-3, 1e3)
    t = float(schedule.time(ratio))
    alpha, sigma = (float(v) for v in schedule(t))
    x_t = alpha * x_0 + sigma * noise
    composed = TrajectoryDenoiser(exact(window, schedule=schedule))
    return float((composed(x_t, t) - exact(schedule=schedule)(x_t, t)).square().mean().sqrt())


def test_error_of_the_composition_falls_with_the_window_and_the_noise_level(draw, generator):
    _, covariance = CHAIN.law(LENGTH)
    root = torch.linalg.cholesky(covariance)
    z = torch.randn(500, 2 * LENGTH, generator=generator(4), dtype=DOUBLE)
    x_0 = (z @ root.mT).reshape(500, LENGTH, 2)
    noise = torch.randn(500, LENGTH, 2, generator=generator(5), dtype=DOUBLE)
    errors = {
        ratio: [blanket_error(w, ratio, x_0, noise) for w in (3, 5, 7, 9)]
        for ratio in (0.03, 0.3, 1.0)
    }
    for row in errors.values():
        assert all(b < 0.8 * a for a, b in pairwise(row)), errors
    assert errors[0.03][0] < 0.01 * errors[1.0][0]  # little noise: neighbours tell nothing more
    assert errors[1.0][0] > 0.05
    assert blanket_error(LENGTH, 1.0, x_0, noise) < 1e-12


def test_samples_of_composed_windows_approach_the_chain_as_windows_grow(device):
    """A deterministic sampler of an affine denoiser is an affine map: its law needs no samples."""
    _, covariance = CHAIN.law(LENGTH)
    basis = torch.eye(2 * LENGTH, dtype=DOUBLE, device=device).reshape(-1, LENGTH, 2)
    errors = []
    for window in (3, 5, 9, LENGTH):
        denoiser = TrajectoryDenoiser(exact(window, schedule=schedules.LogLinear(1e-3, 1e3)))
        grid = sampling.times(denoiser.schedule, 80, spacing="log-ratio", ratios=(2e-3, 200.0))
        out = sampling.reverse(denoiser, basis, grid, method="heun", clean=True).cpu().flatten(1)
        errors.append(float((out.mT @ out - covariance).norm() / covariance.norm()))
    assert all(b < 0.8 * a for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.01, errors
    assert errors[0] > 0.1, errors


def test_composed_denoisers_pass_on_what_samplers_ask_for(device):
    inner = network(device, window_mlp)
    whole = TrajectoryDenoiser(inner)
    assert (whole.event, whole.ratios, whole.device) == (2, inner.ratios, inner.device)
    assert whole.schedule is inner.schedule
    assert whole.standardizer is inner.standardizer
    assert inner.event == network(device, conv_net).event == 2


def test_composed_denoisers_are_differentiable(device, draw):
    whole = TrajectoryDenoiser(network(device, window_mlp))
    x = draw(2, 8, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: whole(v, 0.5), x, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda d, x: TrajectoryDenoiser(d)(x[:, :4], 0.5), ValueError, "length >= 5"),
        (lambda d, x: TrajectoryDenoiser(d)(x, x[..., 0] * 0 + 0.5), ValueError, "same for all"),
        (lambda d, x: exact(4)(x[..., :2], 0.5), ValueError, r"x_t must have shape \(\*batch, 4"),
        (
            lambda d, x: TrajectoryDenoiser(exact(7))(x[..., :2], x[..., 0] * 0 + 0.5),
            ValueError,
            "alpha_t must be the same",
        ),
        (lambda d, x: TrajectoryDenoiser(exact(4)), ValueError, "odd length, got 4"),
        (
            lambda d, x: TrajectoryDenoiser(GaussianDenoiser(x[0, 0], torch.eye(3).to(x))),
            TypeError,
            "denoiser must be one of windows",
        ),
        (
            lambda d, x: GaussianTrajectoryDenoiser(x[0, 0], torch.eye(3).to(x)),
            ValueError,
            r"mean must have shape \(length, d\)",
        ),
    ],
)
def test_trajectories_refuse(call, error, words, device, draw):
    with pytest.raises(error, match=words):
        call(network(device, window_mlp), draw(2, 8, 3))


def test_compose_takes_centres_and_ends(draw):
    windows = draw(2, 6, 5, 3)
    out = trajectories.compose(windows)
    assert out.shape == (2, 10, 3)
    assert torch.equal(out[:, :2], windows[:, 0, :2])
    assert torch.equal(out[:, 2:8], windows[:, :, 2])
    assert torch.equal(out[:, 8:], windows[:, -1, 3:])
