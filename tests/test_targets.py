"""Pooled targets: the mean over a pool is exact, scatters less, and teaches the same."""

import pytest
import torch

from ddmlib import networks, schedules, targets
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import EmpiricalDenoiser, NetworkDenoiser, denoising_loss


def levels(r, x):
    """Return (alpha, sigma) of variance-preserving noise at sigma/alpha = r, for states of x."""
    alpha = torch.tensor(1 / (1 + r * r) ** 0.5, dtype=x.dtype).reshape((1,) * x.ndim)
    return alpha, r * alpha


@pytest.mark.parametrize("r", [0.3, 1.0, 30.0])
def test_means_are_those_of_the_exact_denoiser_of_the_pool(generator, r):
    generator = generator()
    pool = torch.randn(200, 5, 3, generator=generator, dtype=torch.float64)
    x_t = torch.randn(4, 6, 5, 3, generator=generator, dtype=torch.float64)
    alpha, sigma = levels(r, x_t)
    exact = EmpiricalDenoiser(pool.flatten(1))
    expected = exact.denoise(x_t.flatten(2), alpha[..., 0], sigma[..., 0])
    found = targets.pooled_means(x_t, alpha, sigma, pool)
    torch.testing.assert_close(found.flatten(2), expected)


def test_at_low_noise_only_the_trajectory_itself_counts(generator):
    generator = generator()
    pool = torch.randn(100, 6, 2, generator=generator)
    x_0 = pool[:7]
    alpha, sigma = levels(0.01, x_0)
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator)
    torch.testing.assert_close(targets.pooled_means(x_t, alpha, sigma, pool), x_0)


@pytest.mark.parametrize("size", [2, 64])
def test_the_regression_on_pooled_targets_is_the_posterior_mean(generator, size):
    """On N(0, 1), for pools of any size: slope alpha/(alpha² + sigma²), and less scatter."""
    generator = generator()
    number, r = 4000, 1.0
    pools = torch.randn(number, size, 1, generator=generator, dtype=torch.float64)
    alpha, sigma = levels(r, pools[0, 0])
    x_t = alpha * pools[:, 0] + sigma * torch.randn(number, 1, generator=generator)
    means = torch.stack(
        [
            targets.pooled_means(x[None], alpha, sigma, pool)[0]
            for x, pool in zip(x_t, pools, strict=True)
        ]
    )
    slope = float((x_t * means).sum() / x_t.square().sum())
    scatter = float((means - slope * x_t).std())
    error = scatter / float(x_t.square().sum()) ** 0.5
    assert abs(slope - float(alpha)) < 4 * error  # alpha² + sigma² = 1
    assert scatter < (0.9 if size == 2 else 0.3) * float(sigma)  # of x_0 itself: sigma


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    network = networks.TrajectoryUNet(2, [8, 8], 1, 3, 8)
    with torch.no_grad():  # gates start near zero; make it a network that answers
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return NetworkDenoiser(network, schedules.LogLinear(0.01, 100.0), Standardizer.identity(2))


def gradient(denoiser, loss):
    denoiser.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])


def test_a_pool_of_one_gives_the_usual_loss_and_a_pool_a_smaller_one(denoiser, generator):
    generator = generator()
    pool = torch.randn(512, 8, 2, generator=generator)
    pool = pool.cumsum(1) / 3  # correlated, so that noise does not tell the trajectories apart
    x_0, t = pool[:16].unflatten(0, (4, 4)), torch.linspace(0.3, 0.9, 4)[:, None]
    eps = torch.randn(x_0.shape, generator=generator)
    usual = denoising_loss(denoiser, x_0[:1, :1], t[:1], eps[:1, :1])
    alone = targets.pooled_loss(denoiser, x_0[0, :1], x_0[:1, :1], t[:1], eps[:1, :1])
    torch.testing.assert_close(alone, usual)
    assert targets.pooled_loss(denoiser, pool, x_0, t, eps) < denoising_loss(denoiser, x_0, t, eps)


def test_gradients_scatter_less_about_the_same_mean(denoiser, generator):
    generator = generator()
    data = torch.randn(4096, 8, 2, generator=generator).cumsum(1) / 3
    t, found = torch.full((1, 1), 0.6), {"usual": [], "pooled": []}
    for _ in range(200):
        pool = data[torch.randint(len(data), (256,), generator=generator)]
        x_0 = pool[None, :4]
        eps = torch.randn(x_0.shape, generator=generator)
        found["usual"].append(gradient(denoiser, denoising_loss(denoiser, x_0, t, eps)))
        found["pooled"].append(gradient(denoiser, targets.pooled_loss(denoiser, pool, x_0, t, eps)))
    usual, pooled = (torch.stack(found[key]) for key in ("usual", "pooled"))
    assert pooled.var(0).sum() < 0.7 * usual.var(0).sum()
    away = (usual - pooled).mean(0) / (usual - pooled).std(0).clamp(min=1e-9) * 200**0.5
    assert float(away.square().mean()) < 2  # a mean of squares of standard normal numbers


def test_weights_keep_all_digits_where_the_network_has_eight_bits(generator):
    generator = generator()
    pool = torch.randn(64, 5, 3, generator=generator)
    x_t = torch.randn(9, 5, 3, generator=generator)
    alpha, sigma = levels(1.0, x_t)
    expected = targets.pooled_means(x_t, alpha, sigma, pool)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(targets.pooled_means(x_t, alpha, sigma, pool), expected)


def test_bad_input_is_named(denoiser):
    x = torch.zeros(2, 8, 2)
    with pytest.raises(ValueError, match="pool must hold samples of the shape"):
        targets.pooled_means(x, *levels(1.0, x), torch.zeros(5, 8, 3))
    denoiser.head = "noise"
    with pytest.raises(ValueError, match="head"):
        targets.pooled_loss(denoiser, torch.zeros(4, 8, 2), x, 0.5, x)


def test_the_farthest_become_the_share_of_the_draws_that_was_asked_for(generator):
    data = torch.randn(20_000, 6, 2, generator=generator())
    far = targets.Far.of(data, tail=0.05, share=0.4)
    counts = far(data)
    beyond = data.abs().amax((1, 2)) > far.edge
    assert float(beyond.float().mean()) == pytest.approx(0.05, abs=1e-3)
    share = float(counts[beyond].sum() / counts.sum())
    assert 0.25 < share < 0.4  # the edge is soft, and no gap lies there
    assert 1 <= float(counts.min()) < float(counts.max()) <= 1 + far.boost
    for tail, share in ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="tail and share must satisfy"):
            targets.Far.of(data, tail, share)


def test_samples_drawn_more_often_weigh_less_in_the_mean(generator):
    generator = generator()
    pool = torch.randn(30, 5, 3, generator=generator)
    often = torch.randint(1, 4, (30,), generator=generator)
    x_t = torch.randn(9, 5, 3, generator=generator)
    alpha, sigma = levels(1.0, x_t)
    expected = targets.pooled_means(x_t, alpha, sigma, pool)
    drawn, counts = pool.repeat_interleave(often, 0), often.repeat_interleave(often)
    found = targets.pooled_means(x_t, alpha, sigma, drawn, counts.float())
    torch.testing.assert_close(found, expected)


def test_drawing_what_is_far_more_often_leaves_the_mean_gradient(denoiser, generator):
    generator = generator()
    data = torch.randn(4096, 8, 2, generator=generator).cumsum(1) / 3
    far = targets.Far.of(data, tail=0.1, share=0.5)
    counts = far(data)
    drawn = {"alike": None, "far": counts / counts.mean()}
    t, found = torch.full((1, 1), 0.4), {"alike": [], "far": []}
    for _ in range(300):
        for key, often in drawn.items():
            p = torch.ones(4096) if often is None else often
            index = torch.multinomial(p, 256, replacement=True, generator=generator)
            pool, x_0 = data[index], data[index][None, :8]
            eps = torch.randn(x_0.shape, generator=generator)
            often = None if often is None else often[index]
            loss = targets.pooled_loss(denoiser, pool, x_0, t, eps, often, far)
            found[key].append(gradient(denoiser, loss))
    alike, often = (torch.stack(found[key]) for key in ("alike", "far"))
    error = ((alike.var(0) + often.var(0)) / 300).sqrt().clamp(min=1e-9)
    away = (alike - often).mean(0) / error
    assert float(away.square().mean()) < 2
    # without the division the far ones would count twice over
    without = alike.mean(0) - torch.stack(found["far"]).mean(0) * float(counts.mean())
    assert float((without / error).square().mean()) > 2


@pytest.fixture
def batch(generator):
    """Return a pool, its first samples, their pseudo-time and their noise."""
    generator = generator()
    pool = torch.randn(16, 8, 2, generator=generator)
    x_0, t = pool[None, :4], torch.full((1, 1), 0.4)
    return pool, x_0, t, torch.randn(x_0.shape, generator=generator)


def test_components_count_as_asked_by_what_the_network_sees(denoiser, batch):
    pool, x_0, t, eps = batch
    usual = targets.pooled_loss(denoiser, pool, x_0, t, eps)
    alike = targets.pooled_loss(denoiser, pool, x_0, t, eps, each=lambda u: torch.full_like(u, 7.0))
    torch.testing.assert_close(alike, usual)  # weights are taken by their mean
    first = targets.pooled_loss(denoiser, pool, x_0, t, eps, each=lambda u: 1.0 * (u > 0))
    alpha, sigma = denoiser.levels(x_0, t)
    x_t = alpha * x_0 + sigma * eps
    f, u, c, s = denoiser.output(x_t, alpha, sigma)
    wanted = c * (u - c * targets.pooled_means(x_t, alpha, sigma, pool)) / s
    wanted = wanted - s * targets.pooled_means(x_t, alpha, sigma, pool)
    torch.testing.assert_close(first, (f - wanted).square()[u > 0].mean())


def test_the_error_along_a_gradient_counts_as_asked(denoiser, batch):
    pool, x_0, t, eps = batch
    usual = targets.pooled_loss(denoiser, pool, x_0, t, eps)
    alpha, sigma = denoiser.levels(x_0, t)
    f, u, c, s = denoiser.output(alpha * x_0 + sigma * eps, alpha, sigma)
    mean = targets.pooled_means(alpha * x_0 + sigma * eps, alpha, sigma, pool)
    error = f - (c * u - mean) / s

    def top(x):  # of the first component, of trajectories (*batch, 8, 2)
        return x[..., 0].square().amax(-1)

    at = (c * u - s * f)[..., 0].square().argmax(-1, keepdim=True)
    slope = 2 * torch.gather((c * u - s * f)[..., 0], -1, at)
    along = (slope * torch.gather(error[..., 0], -1, at)).square().mean() / slope.square().mean()
    for weight in (0.5, 3.0):
        loss = targets.pooled_loss(denoiser, pool, x_0, t, eps, functional=top, weight=weight)
        torch.testing.assert_close(loss, usual + weight * along)


class Exact:
    """The velocity E[v | x_t] of draws of some points, plus a number for each component."""

    head = "velocity"

    def __init__(self, points):
        self.points, self.change = points, torch.zeros_like(points[0], requires_grad=True)

    def levels(self, x, t):
        return levels(t, x)

    def output(self, x_t, alpha, sigma):
        x_hat = targets.pooled_means(x_t, alpha, sigma, self.points)
        return (alpha * x_t - x_hat) / sigma + self.change, x_t, alpha, sigma


def test_the_error_along_a_gradient_leaves_the_best_answer(generator):
    """E[velocity | x_t] stays stationary, whatever the functional; another answer is not."""
    generator = generator()
    points = torch.randn(3, 4, 1, generator=generator, dtype=torch.float64)
    x_0 = points[torch.randint(3, (400, 1, 64), generator=generator)]
    eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    exact = Exact(points)

    def away(functional):
        found = []
        for x, e in zip(x_0, eps, strict=True):
            # x_0 is known only as one of the pool
            loss = targets.pooled_loss(exact, x[0], x, 1.0, e, functional=functional, weight=9.0)
            found.append(torch.autograd.grad(loss, exact.change)[0])
        g = torch.stack(found)
        return float((g.mean(0) / (g.std(0) / len(g) ** 0.5)).abs().amax())

    for functional in (lambda x: x.amax((-2, -1)), lambda x: x.square().sum((-2, -1))):
        exact.change = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
        assert away(functional) < 4
        exact.change = torch.full((4, 1), 0.2, dtype=torch.float64, requires_grad=True)
        assert away(functional) > 8


def test_a_function_of_the_noisy_sample_leaves_the_best_answer(generator):
    """Of two points, E[x_0 | x_t] stays the least-squares answer where large x_t count tenfold."""
    generator = generator()
    points = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    x_0 = points[torch.randint(2, (400_000,), generator=generator)]
    x_t = x_0 + torch.randn(len(x_0), generator=generator, dtype=torch.float64)
    exact = EmpiricalDenoiser(points[:, None]).denoise(
        x_t[:, None], *(torch.ones(1, 1, dtype=torch.float64) for _ in range(2))
    )[:, 0]
    counts = torch.where(x_t > 1, 10.0, 1.0)
    for basis in (torch.ones_like(x_t), x_t, x_t.sign()):  # the gradient of a loss, by parameters
        slope = counts * (exact - x_0) * basis
        assert abs(float(slope.mean())) < 4 * float(slope.std()) / len(x_0) ** 0.5
