"""Units for long tails: affine near the centre, logarithmic far from it, and back again."""

import pytest
import torch

from ddmlib import datasets, pretrained, recipes
from ddmlib.tails import AsinhStandardizer

MEAN, STD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
KNEE = 2.5
UNITS = AsinhStandardizer(MEAN, STD, KNEE)


def test_there_and_back(generator):
    generator = generator()
    x = MEAN + STD * 30 * torch.randn(64, 7, 2, generator=generator)
    torch.testing.assert_close(UNITS.inverse(UNITS(x)), x, rtol=1e-5, atol=1e-5)
    assert UNITS(x.double()).dtype == torch.float64


def test_the_knee_says_how_far_it_is_affine():
    affine, x = datasets.Standardizer(MEAN, STD), MEAN + 3 * STD
    away = [
        float((AsinhStandardizer(MEAN, STD, k)(x) - affine(x)).abs().max()) for k in (1, 10, 99)
    ]
    assert away[0] > 1
    assert 0.01 < away[1] < 0.05
    assert away[2] < 1e-3


def test_affine_near_the_centre_and_logarithmic_far_away():
    affine = datasets.Standardizer(MEAN, STD)
    near, far = MEAN + 1e-3 * STD, MEAN + 1e4 * STD
    torch.testing.assert_close(UNITS(near), affine(near), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        UNITS(far), KNEE * torch.log(2 * affine(far) / KNEE), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(UNITS(2 * MEAN - far), -UNITS(far))


def test_its_slope_is_the_factor_of_densities():
    x = torch.tensor([[3.0, -9.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(UNITS(x).sum(), x)
    away = x.detach() - MEAN
    torch.testing.assert_close(slope, 1 / torch.sqrt((away / KNEE) ** 2 + STD.double() ** 2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x must have shape"):
        UNITS(torch.zeros(3))
    with pytest.raises(ValueError, match="z must have shape"):
        UNITS.inverse(torch.zeros(3))
    with pytest.raises(ValueError, match="std must be positive"):
        AsinhStandardizer(MEAN, torch.zeros(2))
    with pytest.raises(ValueError, match="knee must be positive"):
        AsinhStandardizer(MEAN, STD, 0.0)


def test_a_card_names_the_units():
    model = recipes.RECIPES["fitzhugh-nagumo-trajectories"].model
    built = pretrained.build(model)
    assert model["tails"] == "asinh"
    assert built.standardizer.knee == model["knee"]
    assert isinstance(built.standardizer, AsinhStandardizer)
    for name in ("lorenz63-trajectories", "double-pendulum-trajectories"):
        assert "tails" not in recipes.RECIPES[name].model


def test_stretch_is_the_slope_of_the_inverse():
    z = torch.linspace(-5, 5, 41, dtype=torch.float64)[:, None].expand(-1, 2)
    slope = (UNITS.inverse(z + 1e-5) - UNITS.inverse(z - 1e-5)) / 2e-5 / STD
    torch.testing.assert_close(UNITS.stretch(z), slope, rtol=1e-6, atol=1e-6)
