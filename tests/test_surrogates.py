"""Surrogates: ridge against direct solves, features against their definitions, roll-outs."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from ddmlib import (
    datasets,
    denoisers,
    dynamics,
    networks,
    pretrained,
    schedules,
    surrogates,
    training,
)

STATES, DIM = 5000, 3


@pytest.fixture(scope="module")
def pairs():
    """Standardised states of the attractor and their increments over 0.1 time units, float32."""
    x = datasets.lorenz63(250, 30, every=10, seed=3)
    z = datasets.LORENZ63(x)
    start, end = z[:, :20].reshape(-1, DIM), z[:, 1:21].reshape(-1, DIM)
    return start, end - start


@pytest.fixture(scope="module")
def features():
    denoiser, _ = pretrained.load("lorenz63-states", device="cpu")
    return surrogates.DenoiserFeatures(denoiser)


def direct(f, y, penalty):
    """Return predictions of the ridge by an orthogonal solve: no covariance is ever formed."""
    f, y = f.double(), y.double()
    centre, scale, mean = f.mean(0), f.std(0, correction=0), y.mean(0)
    z = (f - centre) / scale
    rows = torch.cat((z, math.sqrt(len(z) * penalty) * torch.eye(z.shape[1], dtype=z.dtype)))
    right = torch.cat((y - mean, torch.zeros(z.shape[1], y.shape[1], dtype=z.dtype)))
    q, r = torch.linalg.qr(rows)
    return z @ torch.linalg.solve_triangular(r, q.mT @ right, upper=True) + mean


# ---- features


def test_denoiser_features_are_the_last_hidden_layers(device, generator):
    torch.manual_seed(0)
    network = networks.ResidualMLP(width=16, blocks=2, embedding=8)
    for block in network.blocks:
        nn.init.normal_(block.gate)
    denoiser = denoisers.NetworkDenoiser(
        network, schedules.Cosine(), datasets.LORENZ63, ratios=(2e-3, 40.0)
    ).to(device)
    times = (0.0, 0.2, 0.9)
    features = surrogates.DenoiserFeatures(denoiser, times)
    x = torch.randn(4, 5, 3, generator=generator()).to(device)
    expected = torch.cat([denoiser.hidden(x, t) for t in times], dim=-1)
    torch.testing.assert_close(features(x), expected, rtol=1e-5, atol=1e-5)
    # t = 0 is below the trained range, whose lower end the network is told
    lowest = denoiser.network.hidden(x, torch.tensor(math.log(2e-3), device=device))
    torch.testing.assert_close(features(x)[..., :16], lowest, rtol=1e-5, atol=1e-5)


def test_denoiser_features_compute_film_once_per_time(features):
    rows = []
    hook = features.network.blocks[0].film.register_forward_hook(
        lambda m, a, out: rows.append(out.numel())
    )
    features(torch.zeros(1000, 3))
    hook.remove()
    assert rows == [2 * 128] * 6


def test_denoiser_features_are_frozen_and_a_copy(pairs):
    denoiser, _ = pretrained.load("lorenz63-states", device="cpu")
    features = surrogates.DenoiserFeatures(denoiser, (0.4,))
    before = features(pairs[0][:9])
    assert not any(p.requires_grad for p in features.parameters())
    nn.init.zeros_(denoiser.network.first.weight)
    assert torch.equal(features(pairs[0][:9]), before)


def test_random_fourier_features_approximate_the_gaussian_kernel(device, generator):
    length = 0.7
    x = torch.randn(40, 3, generator=generator(1), dtype=torch.float64).to(device)
    kernel = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * length**2))
    sizes, errors = [16, 64, 256, 1024, 4096], []
    for number in sizes:
        squares = []
        for seed in range(20):
            phi = surrogates.RandomFourier(3, number, length=length, generator=generator(seed))
            f = phi.to(device)(x)
            squares.append((f @ f.mT - kernel).square().mean())
        errors.append(float(torch.stack(squares).mean().sqrt()))
    slope = torch.tensor(errors).log().diff() / torch.tensor(sizes).log().diff()
    assert errors[-1] < 0.03
    assert abs(float(slope.mean()) + 0.5) < 0.03, "the error falls as 1/sqrt(number)"


@pytest.mark.parametrize(("d", "degree"), [(3, 4), (2, 3), (1, 5)])
def test_polynomials_are_all_monomials_once(d, degree, device):
    features = surrogates.Polynomials(d, degree)
    primes = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64, device=device)[:d]
    values = sorted(features(primes).tolist())  # each product of primes names its monomial
    powers = [
        float(torch.prod(primes ** torch.tensor(e, device=device)))
        for e in torch.cartesian_prod(*[torch.arange(degree + 1)] * d).reshape(-1, d).tolist()
        if 1 <= sum(e) <= degree
    ]
    assert values == sorted(powers)
    assert len(values) == math.comb(d + degree, degree) - 1


# ---- ridge


@pytest.mark.parametrize("penalty", [1e-4, 1e-8])
def test_ridge_equals_a_direct_solve_on_the_denoiser_features(pairs, features, penalty):
    x, y = pairs
    assert len(x) == STATES
    with torch.no_grad():
        f = features(x)
    system = torch.corrcoef(f.double().T)
    assert torch.linalg.cond(system) > 1e10, "the features should be collinear"
    head = surrogates.ridge(surrogates.moments(surrogates.featured(features, x, y)), penalty)
    torch.testing.assert_close(head(f), direct(f, y, penalty), rtol=0, atol=1e-6)


def test_ridge_recovers_an_exactly_linear_map(device, generator):
    g = generator(2)
    f = (torch.randn(500, 6, generator=g, dtype=torch.float64) * 3 + 100).to(device)
    weight = torch.randn(6, 2, generator=g, dtype=torch.float64).to(device)
    y = f @ weight + 7
    head = surrogates.ridge(surrogates.moments([(f, y)]), 1e-12)
    torch.testing.assert_close(head(f), y, rtol=0, atol=1e-8)
    torch.testing.assert_close(head.weight, weight, rtol=0, atol=1e-8)


def test_ridge_by_hand_in_one_dimension():
    f = torch.tensor([[0.0], [2.0], [4.0]])
    y = torch.tensor([[1.0], [3.0], [8.0]])
    # var 8/3, covariance 14/3: slope 14/8 without penalty, shrunk by 1/(1 + 0.25)
    head = surrogates.ridge(surrogates.moments([(f, y)]), 0.25)
    assert float(head.weight) == pytest.approx(1.75 / 1.25)
    assert float(head(torch.tensor([2.0]))) == pytest.approx(4.0)  # the mean, not shrunk


def test_moments_do_not_depend_on_order_or_batches(pairs, generator):
    x, y = pairs
    f = surrogates.Polynomials(3, 2)(x) + 1e3  # a mean that would spoil naive sums
    whole = surrogates.moments([(f, y)])
    expected = torch.cat((f, y), 1).double()
    torch.testing.assert_close(whole.mean, expected.mean(0), rtol=1e-12, atol=1e-12)
    covariance = expected.T.cov(correction=0) * len(x)
    torch.testing.assert_close(whole.scatter, covariance, rtol=1e-9, atol=1e-6)
    order = torch.randperm(len(x), generator=generator())
    for index, chunk in ((torch.arange(len(x)), 7), (order, 999), (y[:, 0].argsort(), 64)):
        parts = surrogates.moments(zip(f[index].split(chunk), y[index].split(chunk), strict=True))
        assert (parts.size, parts.targets) == (len(x), 3)
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-9, atol=1e-6)


def test_intercept_is_free_and_scale_of_features_does_not_matter(pairs):
    x, y = pairs
    f = surrogates.Polynomials(3, 3)(x).double()

    def predict(f, y):
        return surrogates.ridge(surrogates.moments([(f, y)]), 0.1)(f)

    base = predict(f, y)
    torch.testing.assert_close(base.mean(0), y.double().mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(predict(f, y.double() + 5) - 5, base, rtol=0, atol=1e-9)
    scales = torch.logspace(-3, 3, f.shape[1], dtype=torch.float64)
    torch.testing.assert_close(predict(f * scales + 2, y), base, rtol=0, atol=1e-7)


def test_penalty_shrinks_the_weights_and_raises_the_training_error(pairs):
    x, y = pairs
    features = surrogates.Polynomials(3, 4)
    total = surrogates.moments(surrogates.featured(features, x, y))
    heads = [surrogates.ridge(total, penalty) for penalty in (1e-6, 1e-3, 1.0, 1e6)]
    std = features(x).double().std(0)
    sizes = [float((h.weight * std[:, None]).norm()) for h in heads]
    errors = [float((h(features(x)) - y).square().mean()) for h in heads]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    torch.testing.assert_close(heads[-1](features(x)), y.double().mean(0).expand(STATES, 3),
                               rtol=0, atol=1e-3)  # fmt: skip


def test_constant_features_are_left_out(pairs):
    x, y = pairs
    wide = torch.cat((x, torch.full((STATES, 1), 0.3), torch.zeros(STATES, 1)), 1)
    head = surrogates.ridge(surrogates.moments([(wide, y)]))
    assert float(head.weight[3:].abs().max()) < 1e-9
    plain = surrogates.ridge(surrogates.moments([(x, y)]))
    torch.testing.assert_close(head(wide), plain(x), rtol=0, atol=1e-9)


def test_degree_four_is_exact_for_a_polynomial_of_degree_four(generator):
    x = torch.randn(2000, 3, generator=generator(), dtype=torch.float64)

    def target(x):
        a, b, c = x.unbind(-1)
        return torch.stack((a**4 - b * c + 1, a * b * c * c, b**3), dim=-1)

    features = surrogates.Polynomials(3, 4)
    head = surrogates.ridge(
        surrogates.moments(surrogates.featured(features, x, target(x), chunk=300)), 1e-13
    )
    fresh = torch.randn(100, 3, generator=generator(9), dtype=torch.float64)
    torch.testing.assert_close(head(features(fresh)), target(fresh), rtol=0, atol=1e-8)
    short = surrogates.Polynomials(3, 3)
    head = surrogates.ridge(surrogates.moments(surrogates.featured(short, x, target(x))), 1e-13)
    assert (head(short(fresh)) - target(fresh)).abs().max() > 0.1


def test_memory_does_not_grow_with_the_number_of_states():
    """The whole feature matrix of the larger case would take 512 MB in float64."""
    code = (
        "import resource, torch\n"
        "from ddmlib import surrogates\n"
        "g = torch.Generator().manual_seed(0)\n"
        "features = surrogates.RandomFourier(3, 64, length=1.0, generator=g)\n"
        "def batches(n):\n"
        "    for _ in range(n // 5000):\n"
        "        x = torch.randn(5000, 3, generator=g)\n"
        "        yield features(x), x\n"
        "peaks = []\n"
        "for n in (100_000, 1_000_000):\n"
        "    total = surrogates.moments(batches(n))\n"
        "    assert total.size == n and total.scatter.shape == (67, 67)\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
        "print(peaks[1] - peaks[0])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 40, f"grew by {run.stdout.strip()} MB"


# ---- heads that are trained


def test_scaled_head_standardises_both_ends(generator):
    g = generator(4)
    f, y = torch.randn(400, 5, generator=g) * 20 + 50, torch.randn(400, 2, generator=g) * 1e-3 + 3
    head = surrogates.ScaledHead(nn.Identity(), surrogates.moments([(f, f)]))
    torch.testing.assert_close(head(f), f, rtol=1e-5, atol=1e-4)  # equal scales in and out cancel
    torch.manual_seed(0)
    mlp = surrogates.mlp_head(surrogates.moments([(f, y)]), width=8)
    inner = mlp.network((f - f.mean(0)) / f.std(0, correction=0))
    expected = y.mean(0) + y.std(0, correction=0) * inner
    torch.testing.assert_close(mlp(f), expected, rtol=1e-4, atol=1e-6)


def test_an_mlp_head_is_trained_and_the_features_are_not(pairs, features):
    x, y = (part[:2000] for part in pairs)
    total = surrogates.moments(surrogates.featured(features, x, y))
    torch.manual_seed(0)
    model = surrogates.Surrogate(features, surrogates.mlp_head(total, width=32))
    before = [p.clone() for p in features.parameters()]
    loss = surrogates.regression_batches(model, x, y, batch=128)
    *_, last = training.fit(
        model, loss, steps=60, lr=3e-3, generator=torch.Generator().manual_seed(0)
    )
    assert last.loss < 0.1  # of the variance
    for old, new in zip(before, features.parameters(), strict=True):
        assert torch.equal(old, new)


def test_regression_loss_is_the_share_of_variance(pairs, generator):
    x, y = pairs
    loss = surrogates.regression_batches(lambda x: y.mean(0).expand(len(x), 3), x, y, batch=20_000)
    assert float(loss(generator())) == pytest.approx(1, abs=0.05)


# ---- forecasts


class Exact(nn.Module):
    """The increment of Lorenz 63 over ``steps`` Runge-Kutta steps, in standardised units."""

    def __init__(self, steps=10):
        super().__init__()
        self.steps, self.system = steps, dynamics.Lorenz63()

    def forward(self, z):
        x = start = datasets.LORENZ63.inverse(z)
        for _ in range(self.steps):
            x = dynamics.rk4(self.system.tendency, x, 0.01)
        return (x - start) / datasets.LORENZ63.std.to(z)


def test_rollout_of_the_exact_map_is_the_integration(pairs, device):
    z = pairs[0][:12].double().reshape(3, 4, 3).to(device)
    states = surrogates.rollout(Exact(), z, 8)
    assert states.shape == (3, 4, 9, 3)
    assert torch.equal(states[..., 0, :], z)
    truth = dynamics.integrate(
        dynamics.Lorenz63(), datasets.LORENZ63.inverse(z), dt=0.01, steps=80, every=10
    )
    torch.testing.assert_close(datasets.LORENZ63.inverse(states), truth, rtol=0, atol=1e-9)


def test_a_diverging_rollout_is_returned(device):
    states = surrogates.rollout(lambda x: x * 1e30, torch.ones(2, 3, device=device), 4)
    assert bool(torch.isinf(states[:, -1]).all())


def test_surrogate_keeps_shape_and_dtype_and_is_differentiable(pairs, features):
    x, y = pairs
    head = surrogates.ridge(surrogates.moments(surrogates.featured(features, x, y)))
    model = surrogates.Surrogate(features, head)
    out = model(x[:6].reshape(2, 3, 3))
    assert out.shape == (2, 3, 3)
    assert out.dtype == torch.float32
    model = surrogates.Surrogate(copy.deepcopy(features).double(), head)
    z = x[:1].double().requires_grad_()
    gradient = torch.autograd.grad(model(z)[0, 0], z)[0][0]
    for i in range(3):
        h = 1e-5 * torch.eye(3, dtype=torch.float64)[i]
        with torch.no_grad():
            slope = (model(z + h) - model(z - h))[0, 0] / 2e-5
        assert float(gradient[i]) == pytest.approx(float(slope), abs=1e-4)


def test_lyapunov_exponents_of_a_linear_map_are_its_eigenvalues(device, generator):
    # triangular, so that the eigenvalues stand on the diagonal
    matrix = torch.tensor([[1.3, 0.4, -0.2], [0.0, 0.9, 0.3], [0.0, 0.0, 0.5]]).double().to(device)
    x0 = torch.randn(4, 2, 3, generator=generator(), dtype=torch.float64).to(device)
    found = surrogates.lyapunov_exponents(
        lambda x: x @ (matrix - torch.eye(3).to(matrix)).mT, x0, interval=0.5, steps=60, spin_up=80
    )
    expected = torch.tensor([1.3, 0.9, 0.5]).to(found).log() / 0.5
    torch.testing.assert_close(found, expected.expand(4, 2, 3), rtol=0, atol=1e-5)


def test_lyapunov_exponents_of_the_exact_map_sum_to_the_divergence(pairs):
    found = surrogates.lyapunov_exponents(
        Exact(), pairs[0][:300:20].double(), interval=0.1, steps=40
    )
    # the trace of Lorenz 63's Jacobian is constant, so the sum holds on every trajectory
    divergence = torch.full((15,), -(10 + 1 + 8 / 3), dtype=torch.float64)
    torch.testing.assert_close(found.sum(-1), divergence, rtol=0, atol=2e-3)
    assert bool((found[:, 0] > found[:, 2]).all())


def test_lyapunov_exponents_of_a_diverged_trajectory_are_nan():
    x0 = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = surrogates.lyapunov_exponents(lambda x: 1e9 * x**3, x0, interval=1.0, steps=20)
    assert bool(found[0].isnan().all())
    torch.testing.assert_close(found[1], torch.zeros(2, dtype=torch.float64))


# ---- bad input


X, Y = torch.zeros(4, 3), torch.zeros(4, 3)
NAN = torch.full((4, 3), torch.nan)


def moments_of(*batches):
    return surrogates.moments(batches)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: moments_of((NAN, Y)), ValueError, "features must be finite"),
        (lambda: moments_of((X, NAN)), ValueError, "targets must be finite"),
        (lambda: moments_of((X, Y[:3])), ValueError, r"features and targets must have shapes"),
        (lambda: moments_of((X, Y), (X[:, :2], Y)), ValueError, "must all have 3 features"),
        (lambda: moments_of(), ValueError, "at least two states"),
        (lambda: moments_of((X[:1], Y[:1])), ValueError, "at least two states"),
        (lambda: moments_of((X.long(), Y)), TypeError, "features must be a floating"),
        (lambda: surrogates.ridge(moments_of((X, Y)), 0.0), ValueError, "penalty must be posit"),
        (lambda: surrogates.ridge(moments_of((X, Y)), -1.0), ValueError, "penalty must be posit"),
        (lambda: list(surrogates.featured(nn.Identity(), X, Y[:2])), ValueError, "x and y must"),
        (lambda: surrogates.regression_batches(nn.Identity(), X, Y[:2]), ValueError, "x and y"),
        (lambda: surrogates.regression_batches(nn.Identity(), NAN, Y), ValueError, "x must be fin"),
        (
            lambda: surrogates.regression_batches(nn.Identity(), X, Y, batch=0),
            ValueError,
            "batch must be at least 1",
        ),
        (lambda: surrogates.RandomFourier(3, 7, length=1.0), ValueError, "number must be even"),
        (lambda: surrogates.RandomFourier(3, 8, length=0.0), ValueError, "length must be positive"),
        (lambda: surrogates.Polynomials(3, 0), ValueError, "degree must be at least 1"),
        (lambda: surrogates.Polynomials(3)(torch.zeros(4, 2)), ValueError, "x must have shape"),
        (lambda: surrogates.rollout(nn.Identity(), NAN, 3), ValueError, "x0 must be finite"),
        (lambda: surrogates.rollout(nn.Identity(), X, 0), ValueError, "steps must be at least 1"),
        (lambda: surrogates.rollout(lambda x: x[:2], X, 3), ValueError, "increment must keep"),
        (
            lambda: surrogates.lyapunov_exponents(nn.Identity(), X, interval=0.0, steps=3),
            ValueError,
            "interval must be positive",
        ),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("times", [(), (0.1, 1.5), (-0.1,), ((0.1, 0.2), (0.3, 0.4))])
def test_bad_times_are_named(times):
    denoiser, _ = pretrained.load("lorenz63-states", device="cpu")
    with pytest.raises(ValueError, match="times must be"):
        surrogates.DenoiserFeatures(denoiser, times)
