"""FitzHugh-Nagumo and the double pendulum against their equations, and Z23's ensembles."""

import pytest
import torch

from ddmlib import dynamics, ensembles
from ddmlib.oscillators import DoublePendulum, FitzHughNagumo

CELLS, PENDULUM = FitzHughNagumo(), DoublePendulum()


def states(n, generator, scale=1.0):
    return scale * torch.randn(n, 4, generator=generator, dtype=torch.float64)


def test_the_cells_follow_their_equations(generator):
    x = states(6, generator())
    for row, rate in zip(x.tolist(), CELLS.tendency(x).tolist(), strict=True):
        x_1, x_2, y_1, y_2 = row
        a, k = -0.025794, 0.128
        assert rate == pytest.approx(
            [
                x_1 * (a - x_1) * (x_1 - 1) - y_1 + k * (x_2 - x_1),
                x_2 * (a - x_2) * (x_2 - 1) - y_2 + k * (x_1 - x_2),
                0.0065 * x_1 - 0.02 * y_1,
                0.0135 * x_2 - 0.02 * y_2,
            ],
            abs=1e-14,
        )


def test_equal_cells_may_be_exchanged(generator):
    x, swap = states(5, generator()), [1, 0, 3, 2]
    cells = FitzHughNagumo(b=(0.01, 0.01))
    torch.testing.assert_close(cells.tendency(x[:, swap]), cells.tendency(x)[:, swap])
    assert not torch.allclose(CELLS.tendency(x[:, swap]), CELLS.tendency(x)[:, swap])


@pytest.mark.parametrize("system", [CELLS, PENDULUM], ids=["cells", "pendulum"])
def test_tendency_takes_any_batch_and_memory_layout(system, generator, device):
    x = states(6, generator()).to(device)
    expected = system.tendency(x)
    assert expected.device.type == device.type
    for other in (x.mT.contiguous().mT, x.reshape(2, 3, 4)):
        found = system.tendency(other).reshape(6, 4)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(system.tendency(x[0]), expected[0], rtol=0, atol=1e-14)


def hamiltonian(theta, p):
    """The energy as a function of angles and momenta, with the inverse of the mass matrix."""
    c = torch.cos(theta[:, 0] - theta[:, 1])
    two = torch.full_like(c, 2)
    mass = torch.stack((two, c, c, two / 2), -1).reshape(-1, 2, 2)
    kinetic = 0.5 * (p * torch.linalg.solve(mass, p)).sum(-1)
    return kinetic - 2 * torch.cos(theta[:, 0]) - torch.cos(theta[:, 1])


def test_the_pendulum_follows_hamiltons_equations(generator):
    draw = states(20, generator(), 1.5)
    theta = draw[:, :2].clone().requires_grad_()
    p = draw[:, 2:].clone().requires_grad_()
    energy = hamiltonian(theta, p)
    by_theta, by_p = torch.autograd.grad(energy.sum(), (theta, p))
    x = PENDULUM.state(theta.detach(), p.detach())
    torch.testing.assert_close(PENDULUM.energy(x), energy.detach())
    torch.testing.assert_close(PENDULUM.momenta(x), p.detach())
    torch.testing.assert_close(x[:, 2:], by_p)  # dθ/dt = ∂H/∂p
    rate = PENDULUM.tendency(x)
    torch.testing.assert_close(rate[:, :2], x[:, 2:], rtol=0, atol=0)
    _, momentum_rate = torch.autograd.functional.jvp(PENDULUM.momenta, x, rate)
    torch.testing.assert_close(momentum_rate, -by_theta)  # dp/dt = -∂H/∂θ


def test_small_swings_have_the_frequencies_of_the_linear_pendulum():
    # (2 ± √2) are the squared frequencies for unit masses, lengths and gravity
    x0 = 1e-4 * torch.tensor([[1.0, 2**0.5, 0, 0], [1.0, -(2**0.5), 0, 0]], dtype=torch.float64)
    path = dynamics.integrate(PENDULUM, x0, dt=0.01, steps=300)
    t = 0.01 * torch.arange(301, dtype=torch.float64)
    for k, square in enumerate((2 - 2**0.5, 2 + 2**0.5)):
        exact = 1e-4 * torch.cos(square**0.5 * t)
        torch.testing.assert_close(path[k, :, 0], exact, rtol=0, atol=1e-9)


def test_the_ensemble_of_pendulums_keeps_its_energy():
    x = ensembles.double_pendulum(64, dtype=torch.float64, seed=3)
    energy = PENDULUM.energy(x)
    assert float((energy - energy[:, :1]).abs().max()) < 1e-5


def test_pendulums_start_as_published(device):
    n = 20_000
    x = ensembles.double_pendulum(n, 1, seed=1, device=device)[:, 0].cpu()
    assert float(x[:, :2].abs().max()) <= torch.pi
    p = PENDULUM.momenta(x)
    # a standard normal cut at ±π has std 0.9890; standard errors are std/√(2n)
    assert x[:, :2].std(0).tolist() == pytest.approx([0.989, 0.989], abs=0.02)
    assert p.std(0).tolist() == pytest.approx([0.2, 0.3], abs=0.006)
    torch.testing.assert_close(p.mean(0), torch.zeros(2), rtol=0, atol=0.01)


def test_turns_are_counted_from_states_on_the_circle():
    x = ensembles.double_pendulum(512, seed=4)
    circle = PENDULUM.on_circle(x)
    assert circle.shape == (512, 60, 6)
    assert float(x[..., :2].abs().max()) > 4 * torch.pi  # some have turned more than once
    torch.testing.assert_close(PENDULUM.unwound(circle, 0.5), x, rtol=0, atol=2e-5)
    rule = (x[:, 1:, 2:] + x[:, :-1, 2:]) / 4
    assert float((x[..., :2].diff(dim=1) - rule).abs().max()) < 0.5  # as documented
    turned = x + torch.tensor([2 * torch.pi, -4 * torch.pi, 0, 0])
    torch.testing.assert_close(PENDULUM.on_circle(turned), circle, rtol=0, atol=1e-5)
    longer = circle * torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 1])
    torch.testing.assert_close(PENDULUM.unwound(longer, 0.5), x, rtol=0, atol=2e-5)


def test_an_angle_follows_its_sine_and_cosine():
    x = torch.tensor([[0.3, 3.0, 0.0, 0.1], [0.2, 3.3, 0.0, 0.1]], dtype=torch.float64)
    circle = PENDULUM.on_circle(x).requires_grad_()
    theta = PENDULUM.unwound(circle, 0.5)[1, 1]
    (slope,) = torch.autograd.grad(theta, circle)
    expected = torch.zeros(2, 6, dtype=torch.float64)
    expected[1, 1], expected[1, 3] = torch.cos(x[1, 1]), -torch.sin(x[1, 1])
    torch.testing.assert_close(slope, expected)


def test_states_on_the_circle_are_refused_by_name():
    with pytest.raises(ValueError, match="x must have shape"):
        PENDULUM.on_circle(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="circle must have shape"):
        PENDULUM.unwound(torch.zeros(5, 4), 0.5)
    with pytest.raises(ValueError, match="circle must hold trajectories"):
        PENDULUM.unwound(torch.zeros(6), 0.5)
    with pytest.raises(ValueError, match="interval must be positive"):
        PENDULUM.unwound(torch.zeros(5, 6), 0.0)


@pytest.mark.parametrize(
    ("make", "d", "interval", "system"),
    [
        (ensembles.lorenz63, 3, 0.1, dynamics.Lorenz63()),
        (ensembles.fitzhugh_nagumo, 4, 6.0, CELLS),
        (ensembles.double_pendulum, 4, 0.5, PENDULUM),
    ],
)
def test_ensembles_are_seeded_and_obey_their_systems(make, d, interval, system):
    short = {} if make is ensembles.double_pendulum else {"burn_in": 2 * interval}
    x = make(5, 4, seed=7, dtype=torch.float64, **short)
    assert x.shape == (5, 4, d)
    assert torch.equal(x, make(5, 4, seed=7, dtype=torch.float64, **short))
    assert not torch.equal(x, make(5, 4, seed=8, dtype=torch.float64, **short))
    fine = dynamics.integrate(system, x[:, 0], dt=interval / 120, steps=360, every=120)
    torch.testing.assert_close(x, fine, rtol=0, atol=2e-3 * float(x.abs().max()))
    assert make(2, 3, **short).dtype == torch.float32
    if short:  # the burn-in is a longer trajectory whose beginning is thrown away
        whole = make(5, 6, seed=7, dtype=torch.float64, burn_in=0.0)
        torch.testing.assert_close(x, whole[:, 2:], rtol=1e-9, atol=1e-9)


def test_a_generator_goes_on_where_it_was(generator):
    first = generator(4)
    a, b = (ensembles.double_pendulum(3, 1, seed=first) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(a, ensembles.double_pendulum(3, 1, seed=generator(4)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"trajectories": 0}, "trajectories must be at least 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"burn_in": -3.0}, "burn_in must be a multiple of 0.1"),
        ({"burn_in": 0.25}, "burn_in must be a multiple of 0.1"),
    ],
)
def test_ensembles_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        ensembles.lorenz63(**({"trajectories": 2, "burn_in": 0.0} | arguments))
