"""Units for long tails: affine near the centre, logarithmic far from it, and back again."""

import pytest
import torch

from ddmlib import datasets, pretrained, recipes
from ddmlib.tails import AsinhStandardizer

MEAN, STD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
UNITS = AsinhStandardizer(MEAN, STD)


def test_there_and_back(generator):
    generator = generator()
    x = MEAN + STD * 30 * torch.randn(64, 7, 2, generator=generator)
    torch.testing.assert_close(UNITS.inverse(UNITS(x)), x, rtol=1e-5, atol=1e-5)
    assert UNITS(x.double()).dtype == torch.float64


def test_affine_near_the_centre_and_logarithmic_far_away():
    affine = datasets.Standardizer(MEAN, STD)
    near, far = MEAN + 1e-3 * STD, MEAN + 1e4 * STD
    torch.testing.assert_close(UNITS(near), affine(near), rtol=1e-3, atol=0)
    torch.testing.assert_close(UNITS(far), torch.log(2 * affine(far)), rtol=1e-5, atol=0)
    torch.testing.assert_close(UNITS(2 * MEAN - far), -UNITS(far))


def test_its_slope_is_the_factor_of_densities():
    x = torch.tensor([[3.0, -9.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(UNITS(x).sum(), x)
    away = x.detach() - MEAN
    torch.testing.assert_close(slope, 1 / torch.sqrt(away**2 + STD.double() ** 2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x must have shape"):
        UNITS(torch.zeros(3))
    with pytest.raises(ValueError, match="z must have shape"):
        UNITS.inverse(torch.zeros(3))
    with pytest.raises(ValueError, match="std must be positive"):
        AsinhStandardizer(MEAN, torch.zeros(2))


@pytest.mark.parametrize("name", ["fitzhugh-nagumo-trajectories", "double-pendulum-trajectories"])
def test_a_card_names_the_units(name):
    model = recipes.RECIPES[name].model
    built = pretrained.build(model)
    assert model["tails"] == "asinh"
    assert isinstance(built.standardizer, AsinhStandardizer)
    assert "tails" not in recipes.RECIPES["lorenz63-trajectories"].model
