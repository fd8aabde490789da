"""Data sets: standardisation, splits, windows, the reader's arrays, seeded simulation."""

import math

import numpy as np
import pytest
import torch

from ddmlib import datasets, dynamics
from ddmlib.datasets import Standardizer


@pytest.fixture
def x(device, generator):
    """Return a data set (7, 11, 3) of given dtype whose components have different scales."""

    def make(dtype=torch.float64):
        z = torch.randn(7, 11, 3, generator=generator(1), dtype=torch.float64)
        scale = torch.tensor([1e-3, 5.0, 300.0], dtype=torch.float64)
        return (z * scale + torch.tensor([4.0, 0.0, -1e3], dtype=torch.float64)).to(device, dtype)

    return make


def test_standardizer_from_data_gives_zero_mean_and_unit_variance(x):
    data = x()
    standardizer = Standardizer.from_data(data)
    z = standardizer(data).reshape(-1, 3)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.square().mean(0), torch.ones_like(z[0]), rtol=0, atol=1e-9)
    assert standardizer.mean.shape == standardizer.std.shape == (3,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_standardizer_inverse(x, dtype, tolerance):
    data = x(dtype)
    standardizer = Standardizer.from_data(data)
    z = standardizer(data)
    assert z.dtype == dtype
    assert z.device == data.device
    torch.testing.assert_close(standardizer.inverse(z), data, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(standardizer(standardizer.inverse(z)), z, rtol=0.1, atol=0.1)
    torch.testing.assert_close(
        standardizer(data[0, 0]),
        (data[0, 0] - standardizer.mean.to(data)) / standardizer.std.to(data),
    )


def test_identity_changes_nothing(x):
    data = x()
    assert torch.equal(Standardizer.identity(3)(data), data)
    assert torch.equal(Standardizer.identity(3).inverse(data), data)


@pytest.mark.parametrize(
    ("mean", "std", "error", "words"),
    [
        (torch.zeros(3), torch.ones(2), ValueError, "one shape"),
        (torch.zeros(2, 2), torch.ones(2, 2), ValueError, "one shape"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), ValueError, "std must be positive"),
        (torch.zeros(2), torch.tensor([1.0, -1.0]), ValueError, "std must be positive"),
        (torch.tensor([math.nan]), torch.ones(1), ValueError, "mean must be finite"),
        (torch.zeros(1), torch.tensor([math.inf]), ValueError, "std must be finite"),
        ([0.0], torch.ones(1), TypeError, "mean must be a torch.Tensor"),
    ],
)
def test_standardizer_refuses(mean, std, error, words):
    with pytest.raises(error, match=words):
        Standardizer(mean, std)


def test_standardizer_refuses_other_data():
    for call in (datasets.LORENZ63, datasets.LORENZ63.inverse):
        with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
            call(torch.zeros(5, 2))
        with pytest.raises(TypeError, match="floating"):
            call(torch.zeros(5, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="constant"):
        Standardizer.from_data(torch.ones(5, 4, 3))
    with pytest.raises(ValueError, match="finite"):
        Standardizer.from_data(torch.full((5, 3), math.nan))


def test_split_is_by_trajectory_in_order(x):
    data = x()[:, :, :1].expand(7, 11, 4)
    parts = datasets.split(data, (0.5, 0.25, 0.25))
    assert torch.equal(torch.cat(parts), data)  # nothing lost, nothing twice, order kept
    assert sum(len(p) for p in parts) == 7
    assert all(p.data_ptr() >= data.data_ptr() for p in parts)  # views
    whole, none = datasets.split(data, (1.0, 0.0))
    assert len(whole) == 7
    assert len(none) == 0
    sizes = [len(p) for p in datasets.split(torch.zeros(1000, 2, 1))]
    assert sizes == [800, 100, 100]


@pytest.mark.parametrize(
    ("shape", "fractions", "words"),
    [
        ((10, 3), (0.5, 0.5), "trajectories, length, d"),
        ((10, 4, 3), (0.5, 0.4), "sum to one"),
        ((10, 4, 3), (1.5, -0.5), "non-negative"),
        ((3, 4, 3), (0.8, 0.1, 0.1), "too few"),
    ],
)
def test_split_refuses(shape, fractions, words):
    with pytest.raises(ValueError, match=words):
        datasets.split(torch.zeros(shape), fractions)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 1), (4, 3), (11, 1), (5, 20)])
def test_windows_hold_the_right_states(x, length, stride):
    data = x()
    ours = datasets.windows(data, length, stride)
    starts = range(0, 11 - length + 1, stride)
    expected = torch.stack([data[:, s : s + length] for s in starts], dim=1)
    assert torch.equal(ours, expected)
    assert ours.data_ptr() == data.data_ptr()  # a view


@pytest.mark.parametrize(
    ("shape", "length", "stride", "words"),
    [
        ((5, 3), 2, 1, "trajectories, total, d"),
        ((2, 5, 3), 6, 1, "total >= length=6"),
        ((2, 5, 3), 0, 1, "length must be at least 1"),
        ((2, 5, 3), 2, 0, "stride must be at least 1"),
    ],
)
def test_windows_refuse(shape, length, stride, words):
    with pytest.raises(ValueError, match=words):
        datasets.windows(torch.zeros(shape), length, stride)


def test_from_arrays_takes_what_readers_have():
    a = np.arange(24.0).reshape(2, 4, 3)
    expected = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
    assert torch.equal(datasets.from_arrays(a), expected)
    assert torch.equal(datasets.from_arrays(list(a)), expected)
    assert torch.equal(datasets.from_arrays((torch.as_tensor(a[0]), a[1])), expected)
    assert torch.equal(datasets.from_arrays(a[0]), expected[:1])
    assert torch.equal(datasets.from_arrays(a.astype(np.int16)), expected)
    assert torch.equal(datasets.from_arrays(a.tolist()), expected)
    assert torch.equal(datasets.from_arrays(np.asfortranarray(a)), expected)
    assert datasets.from_arrays(a, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([], "one or more"),
        ([np.zeros((4, 3)), np.zeros((5, 3))], r"one shape, got \[\(4, 3\), \(5, 3\)\]"),
        (np.zeros(4), "trajectories, length, d"),
        (np.zeros((2, 3, 4, 5)), "trajectories, length, d"),
        (np.zeros((2, 0, 3)), "trajectories, length, d"),
        (np.full((2, 4, 3), np.nan), "finite"),
        ([np.full((4, 3), np.inf)], "finite"),
    ],
)
def test_from_arrays_refuses(arrays, words):
    with pytest.raises(ValueError, match=words):
        datasets.from_arrays(arrays)


def test_lorenz63_is_reproducible(device):
    arguments = {"burn_in": 0.5, "device": device}
    a = datasets.lorenz63(4, 6, seed=1, **arguments)
    assert a.shape == (4, 6, 3)
    assert a.dtype == torch.float32
    assert torch.equal(a, datasets.lorenz63(4, 6, seed=1, **arguments))
    assert not torch.equal(a, datasets.lorenz63(4, 6, seed=2, **arguments))
    on_cpu = datasets.lorenz63(4, 6, seed=1, burn_in=0.5)
    torch.testing.assert_close(a.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_lorenz63_is_one_trajectory_of_the_system(device):
    x = datasets.lorenz63(3, 5, every=4, dt=0.005, burn_in=1.0, device=device, dtype=torch.float64)
    again = dynamics.integrate(dynamics.Lorenz63(), x[:, 0], dt=0.005, steps=16, every=4)
    torch.testing.assert_close(x, again, rtol=1e-9, atol=1e-9)
    longer = datasets.lorenz63(3, 7, every=4, dt=0.005, burn_in=1.0, device=device, dtype=x.dtype)
    assert torch.equal(longer[:, :5], x)


def test_lorenz63_starts_from_the_stated_gaussian():
    x0 = datasets.lorenz63(200_000, 1, burn_in=0.0)[:, 0].double()
    assert x0.mean(0).tolist() == pytest.approx([0, 0, 25], abs=0.1)
    assert x0.var(0).tolist() == pytest.approx([64, 81, 75], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectories": 0}, "trajectories"),
        ({"length": 0}, "length"),
        ({"every": 0}, "every"),
        ({"dt": 0.0}, "dt"),
        ({"dt": 0.5, "burn_in": 50.0}, "diverged"),
        ({"burn_in": -1.0}, "burn_in"),
    ],
)
def test_lorenz63_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        datasets.lorenz63(**({"trajectories": 2, "length": 3} | changes))


def test_noisy_lorenz63_is_reproducible_and_one_chain(device):
    x = datasets.noisy_lorenz63(4, 6, burn_in=3, seed=1, device=device)
    assert x.shape == (4, 6, 3)
    assert x.dtype == torch.float32
    assert torch.equal(x, datasets.noisy_lorenz63(4, 6, burn_in=3, seed=1, device=device))
    assert not torch.equal(x, datasets.noisy_lorenz63(4, 6, burn_in=3, seed=2, device=device))
    earlier = datasets.noisy_lorenz63(4, 4, burn_in=5, seed=1, device=device)
    torch.testing.assert_close(earlier, x[:, 2:])


def test_noisy_lorenz63_is_stationary_and_standardised_by_r23s_constants():
    z = datasets.NOISY_LORENZ63(datasets.noisy_lorenz63(256, 64, burn_in=600)).double()
    assert float(z.mean((0, 1)).abs().max()) < 0.15
    assert z.std((0, 1)).tolist() == pytest.approx([1, 1, 1], abs=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectories": 0}, "trajectories"),
        ({"length": 0}, "length"),
        ({"burn_in": -1}, "burn_in"),
    ],
)
def test_noisy_lorenz63_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        datasets.noisy_lorenz63(**({"trajectories": 2, "length": 3} | changes))
