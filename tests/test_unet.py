"""The trajectory network: shapes, noise levels, reach; and denoisers of trajectories with it."""

import pytest
import torch

from ddmlib import networks, sampling, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import NetworkDenoiser


@pytest.fixture
def network(device):
    """A small network whose gates are open, so that every block counts."""
    torch.manual_seed(0)
    made = networks.TrajectoryUNet(dim=3, widths=(8, 16, 24), blocks=1, kernel=3, embedding=8)
    for name, parameter in made.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.ones_(parameter)
    return made.to(device).double()


@pytest.fixture
def denoiser(network):
    standardizer = Standardizer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    return NetworkDenoiser(network, schedules.Cosine(), standardizer)


def noisy(device, generator, *shape):
    return torch.randn(*shape, generator=generator(1), dtype=torch.float64).to(device)


def test_coarse_blocks_reach_farther(device, generator):
    reach = []
    for coarse in (0, 3):
        torch.manual_seed(0)
        made = networks.TrajectoryUNet(widths=(8, 16), blocks=1, kernel=3, coarse=coarse).to(device)
        assert len(made.down[0]) == 1
        assert len(made.down[1]) == 1 + coarse
        for name, parameter in made.named_parameters():
            if name.endswith("gate"):
                torch.nn.init.ones_(parameter)
        # of a product of convolutions alone: what normalisation sees of all times is left out
        made.eval()
        x = torch.zeros(1, 60, 3, device=device, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "group_norm", lambda h, groups: h)
            (slope,) = torch.autograd.grad(made(x, torch.zeros(1, device=device))[0, 0].sum(), x)
        reach.append(int(slope[0].abs().sum(-1).nonzero().max()))
    assert reach[1] >= reach[0] + 10
    with pytest.raises(ValueError, match="coarse"):
        networks.TrajectoryUNet(coarse=-1)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("length", [3, 7, 60])
def test_shapes(network, device, generator, batch, length):
    x = noisy(device, generator, *batch, length, 3)
    assert network(x, torch.tensor(0.3, device=device)).shape == x.shape
    assert network.hidden(x, torch.zeros(1, device=device)).shape == (*x.shape[:-1], 8)


def test_a_level_shared_by_some_is_the_level_of_each(network, device, generator):
    x = noisy(device, generator, 4, 3, 12, 3)
    level = torch.linspace(-2, 2, 4, dtype=torch.float64, device=device)[:, None, None]
    together = network(x, level)
    expanded = network(x, level.expand(4, 3, 1))
    torch.testing.assert_close(together, expanded, rtol=0, atol=1e-12)
    for k in range(4):
        alone = network(x[k], level[k, 0, 0])
        torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-12)
    along = torch.linspace(-2, 2, 3, dtype=torch.float64, device=device)[None, :, None]
    for k in range(3):
        alone = network(x[:, k], along[0, k])
        torch.testing.assert_close(network(x, along)[:, k], alone, rtol=0, atol=1e-12)


def test_trajectories_do_not_see_each_other_but_a_state_sees_its_whole_trajectory(
    network, device, generator
):
    x = noisy(device, generator, 2, 60, 3).requires_grad_()
    (slope,) = torch.autograd.grad(network(x, torch.zeros(1, device=device))[0, 0].sum(), x)
    assert torch.equal(slope[1], torch.zeros_like(slope[1]))
    assert bool((slope[0].abs().sum(-1) > 0).all())


def test_the_place_in_the_trajectory_matters(network, device):
    x = torch.ones(1, 60, 3, dtype=torch.float64, device=device)
    out = network(x, torch.zeros(1, device=device))[0].detach()
    assert float((out[25] - out[35]).abs().max()) > 1e-3


def test_a_denoiser_takes_one_time_or_one_a_trajectory(denoiser, device, generator):
    x = noisy(device, generator, 3, 20, 3)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = denoiser(x, t)
    assert together.shape == x.shape
    for k in range(3):
        torch.testing.assert_close(together[k], denoiser(x[k], float(t[k])), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            together[k], denoiser(x[k : k + 1], float(t[k]))[0], rtol=0, atol=1e-12
        )


def test_states_of_a_trajectory_share_their_level(denoiser, device, generator):
    x = noisy(device, generator, 3, 20, 3)
    with pytest.raises(ValueError, match="one for a whole trajectory"):
        denoiser(x, torch.full((3, 20), 0.5))


def test_trajectories_can_be_sampled(denoiser, generator, device):
    options = {"steps": 3, "method": "ddpm", "dtype": torch.float64}
    z = sampling.sample(denoiser, (4, 20, 3), generator=generator(), **options)
    assert z.shape == (4, 20, 3)
    assert bool(torch.isfinite(z).all())
    assert z.device.type == device.type


def test_from_settings_makes_the_same_network_again(network):
    again = networks.from_settings("TrajectoryUNet", network.settings)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    assert isinstance(networks.from_settings("Dense", {}), networks.Dense)
    with pytest.raises(ValueError, match="network must be one of"):
        networks.from_settings("Transformer", {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": (10, 16)}, "widths must be multiples of 8"),
        ({"widths": ()}, "widths"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        networks.TrajectoryUNet(**settings)


@pytest.mark.parametrize("shape", [(3,), (5, 20, 2)])
def test_bad_shapes_are_refused(network, device, shape):
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, length, 3\)"):
        network(torch.zeros(*shape, dtype=torch.float64, device=device), torch.zeros(1))


def test_the_first_layer_keeps_all_digits_whatever_the_others_do(network, device):
    network = network.float()
    x, level = 6 + 0.01 * torch.randn(2, 20, 3, device=device), torch.zeros((), device=device)
    seen = []
    network.first.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    network.features(x, level)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = network.features(x, level)
        exact = network.double().features(x.double(), level.double())
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert rounded.dtype == torch.bfloat16  # the others do multiply with eight bits
    assert exact.dtype == torch.float64  # of which autocast knows nothing
