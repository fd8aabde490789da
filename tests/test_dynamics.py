"""Dynamics: the order of the integrator, the laws of the Lorenz attractor, exact exponents."""

import math
from dataclasses import dataclass

import pytest
import torch

from ddmlib import datasets, dynamics

SYSTEM = dynamics.Lorenz63()


@dataclass(frozen=True)
class Linear:
    """dx/dt = x A^T: everything about it is known."""

    matrix: torch.Tensor

    @property
    def dim(self):
        return len(self.matrix)

    def tendency(self, x):
        return x @ self.matrix.mT


@pytest.fixture
def states(device, generator):
    """Draw states around the attractor, float64."""

    def draw(*batch):
        z = torch.randn(*batch, 3, generator=generator(3), dtype=torch.float64)
        scale = torch.tensor([8.0, 9.0, 8.6], dtype=torch.float64)
        return (z * scale + torch.tensor([0.0, 0.0, 24.0], dtype=torch.float64)).to(device)

    return draw


@pytest.fixture(scope="module")
def attractor():
    """Return 2M stationary states, float64."""
    return datasets.lorenz63(1024, 2000, seed=5, dtype=torch.float64)


def tendency_by_hand(x, sigma=10.0, rho=28.0, beta=8 / 3):
    x, y, z = x.unbind(-1)
    return torch.stack((sigma * (y - x), x * (rho - z) - y, x * y - beta * z), dim=-1)


def slope(steps, errors):
    """Return the slope of log error against log step length, by least squares."""
    a = torch.log(torch.tensor(steps, dtype=torch.float64))
    b = -torch.log(torch.tensor(errors, dtype=torch.float64))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tendency_is_the_equation(states, dtype):
    x = states(4, 5).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-3
    assert SYSTEM.tendency(x).dtype == dtype
    torch.testing.assert_close(SYSTEM.tendency(x), tendency_by_hand(x), rtol=1e-6, atol=tolerance)
    other = dynamics.Lorenz63(sigma=7.0, rho=12.0, beta=2.0)
    torch.testing.assert_close(
        other.tendency(x), tendency_by_hand(x, 7.0, 12.0, 2.0), rtol=1e-6, atol=tolerance
    )


def test_tendency_does_not_depend_on_the_memory_layout(states):
    x = states(6, 4)
    expected = SYSTEM.tendency(x)
    for other in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(SYSTEM.tendency(other), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(SYSTEM.tendency(x[2, 1]), expected[2, 1], rtol=0, atol=1e-12)


def test_tendency_flips_with_the_symmetry_of_the_system(states):
    x, flip = states(50), torch.tensor([-1.0, -1.0, 1.0]).to(states(1))
    torch.testing.assert_close(SYSTEM.tendency(x * flip), SYSTEM.tendency(x) * flip)
    paths = dynamics.integrate(SYSTEM, x, dt=0.01, steps=50)
    mirrored = dynamics.integrate(SYSTEM, x * flip, dt=0.01, steps=50)
    torch.testing.assert_close(mirrored, paths * flip, rtol=1e-10, atol=1e-10)


def test_fixed_points_stay(device):
    points = SYSTEM.fixed_points().to(device)
    assert points.shape == (3, 3)
    assert float(SYSTEM.tendency(points).abs().max()) < 1e-12
    paths = dynamics.integrate(SYSTEM, points, dt=0.01, steps=20)
    torch.testing.assert_close(paths, points[:, None].expand(-1, 21, -1), rtol=0, atol=1e-10)
    assert dynamics.Lorenz63(rho=0.5).fixed_points().tolist() == [[0, 0, 0]]


def test_rk4_has_order_four(states):
    x0, length = states(16), 0.64
    exact = dynamics.integrate(SYSTEM, x0, dt=length / 2048, steps=2048, every=2048)[:, -1]
    steps = [32, 64, 128, 256]
    errors = []
    for n in steps:
        ours = dynamics.integrate(SYSTEM, x0, dt=length / n, steps=n, every=n)[:, -1]
        errors.append(float((ours - exact).square().mean().sqrt()))
    assert 3.8 <= slope(steps, errors) < 4.3
    assert errors[-1] < 1e-4


def test_rk4_of_a_linear_system_is_the_fourth_order_taylor_polynomial(device, generator):
    matrix = torch.randn(4, 4, generator=generator(), dtype=torch.float64).to(device)
    x = torch.randn(7, 4, generator=generator(1), dtype=torch.float64).to(device)
    dt, term = 0.3, torch.eye(4, dtype=torch.float64, device=device)
    polynomial = term.clone()
    for k in range(1, 5):
        term = term @ matrix * dt / k
        polynomial = polynomial + term
    ours = dynamics.rk4(Linear(matrix).tendency, x, dt)
    torch.testing.assert_close(ours, x @ polynomial.mT, rtol=1e-12, atol=1e-12)


def test_integrate_is_the_plain_loop(states):
    x0 = states(3)
    path = dynamics.integrate(SYSTEM, x0, dt=0.01, steps=150)  # more than two blocks
    assert torch.equal(path[:, 0], x0)
    x = x0
    for k in range(150):
        x = dynamics.rk4(tendency_by_hand, x, 0.01)
        torch.testing.assert_close(path[:, k + 1], x, rtol=1e-9, atol=1e-9)


def test_every_keeps_each_nth_state(states):
    x0 = states(2, 2)
    path = dynamics.integrate(SYSTEM, x0, dt=0.01, steps=210)
    for every in (1, 3, 70, 210):
        kept = dynamics.integrate(SYSTEM, x0, dt=0.01, steps=210, every=every)
        assert kept.shape == (2, 2, 210 // every + 1, 3)
        assert torch.equal(kept, path[..., ::every, :])
    assert torch.equal(dynamics.integrate(SYSTEM, x0, dt=0.01, steps=0), x0[..., None, :])


def test_integrate_does_not_depend_on_the_batch(states):
    x0 = states(4, 6)
    together = dynamics.integrate(SYSTEM, x0, dt=0.01, steps=100)
    flat = dynamics.integrate(SYSTEM, x0.reshape(-1, 3), dt=0.01, steps=100)
    assert torch.equal(together.reshape(-1, 101, 3), flat)
    alone = dynamics.integrate(SYSTEM, x0[1, 2], dt=0.01, steps=100)
    torch.testing.assert_close(alone, together[1, 2], rtol=1e-8, atol=1e-8)
    strided = dynamics.integrate(SYSTEM, x0.transpose(0, 1), dt=0.01, steps=100)
    torch.testing.assert_close(strided, together.transpose(0, 1), rtol=1e-8, atol=1e-8)


def test_integrate_is_differentiable(states):
    x0 = states(2).requires_grad_()

    def end(x):
        return dynamics.integrate(SYSTEM, x, dt=0.01, steps=6, every=2)[:, -1]

    assert torch.autograd.gradcheck(end, (x0,), atol=1e-6)


def test_stationary_moments_obey_the_exact_identities(attractor):
    x, y, z = attractor.reshape(-1, 3).unbind(-1)
    square = float((x * x).mean())
    assert float((x * y).mean()) == pytest.approx(square, rel=5e-3)
    assert 8 / 3 * float(z.mean()) == pytest.approx(square, rel=5e-3)


def test_stationary_states_have_the_known_climatology(attractor):
    flat = attractor.reshape(-1, 3)
    mean, std = flat.mean(0).tolist(), flat.std(0).tolist()
    assert mean[:2] == pytest.approx([0, 0], abs=0.25)  # the lobes mix slowly
    assert mean[2] == pytest.approx(23.547, abs=0.03)
    assert std == pytest.approx([7.924, 9.012, 8.627], abs=0.03)
    z = datasets.LORENZ63(flat)
    assert z.std(0).tolist() == pytest.approx([1, 1, 1], abs=5e-3)
    assert 2.5 < float(z.abs().max()) < 3.5  # within the box of the histograms


def test_lyapunov_exponents_of_the_lorenz_attractor(attractor):
    x0 = attractor[:, -1]  # 1024 × 20 time units: standard errors 0.003, 0.0013, 0.002
    exponents = dynamics.lyapunov_exponents(SYSTEM, x0, dt=0.01, steps=2000, spin_up=500)
    first, middle, last = exponents.mean(0).tolist()
    assert first == pytest.approx(0.906, rel=0.01)
    assert middle == pytest.approx(0, abs=0.01)
    assert last == pytest.approx(-14.572, rel=0.01)
    assert first + middle + last == pytest.approx(-(10 + 1 + 8 / 3), abs=1e-2)


def test_lyapunov_exponents_of_a_linear_system_are_its_rates(device, generator):
    rates = torch.tensor([0.7, -0.2, -1.5], dtype=torch.float64)
    frame = torch.randn(3, 3, generator=generator(), dtype=torch.float64)
    matrix = (frame @ rates.diag() @ torch.linalg.inv(frame)).to(device)
    x0 = torch.zeros(2, 2, 3, dtype=torch.float64, device=device)
    exponents = dynamics.lyapunov_exponents(
        Linear(matrix), x0, dt=0.05, steps=80, every=4, spin_up=800
    )
    assert exponents.shape == (2, 2, 3)
    # rk4's growth factor is the Taylor polynomial of exp, up to (rate dt)^5 / 120
    torch.testing.assert_close(exponents.cpu(), rates.expand(2, 2, 3), rtol=0, atol=2e-6)


def test_lyapunov_exponents_do_not_depend_on_the_interval_of_orthonormalisation(states):
    x0 = dynamics.integrate(SYSTEM, states(4), dt=0.01, steps=200, every=200)[:, -1]
    one, ten = (
        dynamics.lyapunov_exponents(SYSTEM, x0, dt=0.01, steps=200, every=n, spin_up=100)
        for n in (1, 10)
    )
    torch.testing.assert_close(one, ten, rtol=1e-4, atol=1e-4)


GOOD = {"dt": 0.01, "steps": 10, "every": 1}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x0": torch.zeros(4)}, ValueError, r"x0 .*\(\.\.\., 3\).*\(4,\)"),
        ({"x0": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "x0 .*floating"),
        ({"x0": [0.0, 0.0, 0.0]}, TypeError, "x0 must be a torch.Tensor"),
        ({"x0": torch.full((3,), math.nan)}, ValueError, "x0 must be finite"),
        ({"dt": 0.0}, ValueError, "dt must be positive"),
        ({"dt": math.inf}, ValueError, "dt must be positive"),
        ({"dt": "0.1"}, TypeError, "dt must be a number"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 3}, ValueError, "multiple of every"),
        ({"dt": 0.5, "steps": 100, "every": 100}, ValueError, "diverged"),
    ],
)
def test_integrate_refuses(changes, error, words):
    arguments = {"x0": torch.ones(2, 3)} | GOOD | changes
    with pytest.raises(error, match=words):
        dynamics.integrate(SYSTEM, **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x0": torch.zeros(2)}, "x0"),
        ({"x0": torch.full((3,), math.inf)}, "x0"),
        ({"dt": -1.0}, "dt"),
        ({"steps": 0}, "steps"),
        ({"steps": 15}, "multiples of every"),
        ({"every": 0}, "every"),
        ({"spin_up": -10}, "spin_up"),
    ],
)
def test_lyapunov_exponents_refuse(changes, words):
    arguments = {"x0": torch.ones(2, 3), "dt": 0.01, "steps": 10} | changes
    with pytest.raises(ValueError, match=words):
        dynamics.lyapunov_exponents(SYSTEM, **arguments)


# --- chains --------------------------------------------------------------------------------------

A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)


def test_law_of_a_linear_chain_is_that_of_its_trajectories(generator):
    chain = dynamics.LinearGaussian(A, Q, torch.tensor([1.0, -2.0]).double(), 0.5 * Q)
    mean, covariance = chain.law(4)
    g, n = generator(2), 100_000
    x = dynamics.simulate(chain, chain.initial(n, g), steps=3, generator=g)
    assert float((x.mean(0) - mean).abs().max()) < 0.02
    assert float((torch.cov(x.flatten(1).mT) - covariance).abs().max()) < 0.03
    # the same Gaussian as the product of its transitions
    law = torch.distributions.MultivariateNormal(mean.flatten(), covariance)
    first = torch.distributions.MultivariateNormal(chain.mean, chain.covariance)
    path = x[:50]
    steps = chain.log_transition(path[:, :-1], path[:, 1:]).sum(-1) + first.log_prob(path[:, 0])
    torch.testing.assert_close(law.log_prob(path.flatten(1)), steps)


def test_noisy_lorenz63_is_r23s_chain(states, generator):
    chain, x = dynamics.NoisyLorenz63(), states(20_000)
    following = chain.transition(x, generator(4))
    residual = (following - dynamics.rk4(SYSTEM.tendency, x, 0.025)) / math.sqrt(0.025)
    assert residual.mean(0).tolist() == pytest.approx([0, 0, 0], abs=0.03)
    assert float((torch.cov(residual.mT).cpu() - torch.eye(3)).abs().max()) < 0.04
    law = torch.distributions.Normal(chain.forecast(x), math.sqrt(0.025))
    expected = law.log_prob(following).sum(-1)
    torch.testing.assert_close(chain.log_transition(x, following), expected)


def test_noisy_lorenz63_starts_from_r23s_gaussian(generator):
    chain = dynamics.NoisyLorenz63()
    x = chain.initial(200_000, generator()).double()
    assert x.mean(0).tolist() == pytest.approx([0, 0, 25], abs=0.1)
    assert float((torch.cov(x.mT) - chain.covariance).abs().max()) < 1
    assert torch.equal(chain.noise, 0.025 * torch.eye(3, dtype=torch.float64))


def test_simulate_is_the_plain_loop(states, device, generator):
    chain, x0, g = dynamics.NoisyLorenz63(), states(2, 3), generator(5)
    x = dynamics.simulate(chain, x0, steps=3, generator=generator(5))
    assert x.shape == (2, 3, 4, 3)
    state = x0
    for k in range(1, 4):
        state = chain.transition(state, g)
        torch.testing.assert_close(x[:, :, k], state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x0": torch.zeros(2, 2)}, r"x0 must have shape \(\.\.\., 3\)"),
        ({"x0": torch.full((2, 3), math.nan)}, "x0 must be finite"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"chain": dynamics.NoisyLorenz63(dt=0.5)}, "diverged"),
    ],
)
def test_simulate_refuses(changes, words, generator):
    arguments = {"chain": dynamics.NoisyLorenz63(), "x0": torch.ones(2, 3), "steps": 40} | changes
    with pytest.raises(ValueError, match=words):
        dynamics.simulate(**arguments, generator=generator())


def test_noisy_lorenz63_refuses_a_bad_step():
    with pytest.raises(ValueError, match="dt must be positive"):
        dynamics.NoisyLorenz63(dt=0.0)
