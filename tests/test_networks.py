"""Networks: every way of giving the noise level is one function; blocks start as the identity."""

import pytest
import torch
from torch import nn

from ddmlib import networks


@pytest.fixture
def net(device):
    """Return a float64 network whose gates are open, so that every part matters."""
    torch.manual_seed(0)
    net = networks.ResidualMLP(dim=3, width=16, blocks=2, embedding=8).to(device, torch.float64)
    for block in net.blocks:
        nn.init.normal_(block.gate)
    return net


@pytest.fixture
def draw(device, generator):
    g = generator(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    return draw


def test_shared_level_equals_a_level_per_sample(net, draw):
    x, level = draw(10, 3), draw(1)
    shared = net(x, level[0])
    torch.testing.assert_close(net(x, level.expand(10)), shared, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, level), shared, rtol=0, atol=1e-12)
    assert (net(x, level[0] + 1) - shared).abs().max() > 1e-3  # the level matters


def test_grouped_levels_equal_a_level_per_sample(net, draw):
    x, level = draw(4, 6, 3), draw(4, 1)
    grouped = net(x, level)
    each = net(x.reshape(-1, 3), level.expand(4, 6).reshape(-1)).reshape(x.shape)
    torch.testing.assert_close(grouped, each, rtol=0, atol=1e-12)
    one_by_one = torch.stack([net(x[i, j], level[i, 0]) for i in range(4) for j in range(6)])
    torch.testing.assert_close(grouped.reshape(-1, 3), one_by_one, rtol=0, atol=1e-12)


def test_film_is_computed_once_per_level(net, draw):
    rows = []
    hook = net.blocks[0].film.register_forward_hook(lambda m, a, out: rows.append(out.numel()))
    net(draw(4, 100, 3), draw(4, 1))
    net(draw(400, 3), draw(1)[0])
    hook.remove()
    assert rows == [4 * 32, 32]


def test_blocks_start_as_the_identity(device, draw):
    torch.manual_seed(0)
    net = networks.ResidualMLP(width=16, blocks=3, embedding=8).to(device, torch.float64)
    x = draw(20, 3)
    torch.testing.assert_close(net.hidden(x, draw(20)), net.first(x), rtol=0, atol=1e-4)
    assert not torch.equal(net.hidden(x, draw(20)), net.first(x))  # but gradients flow


def test_residual_block_by_hand(net, draw):
    block, x, e = net.blocks[1], draw(5, 16), draw(5, 8)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    film = e @ block.film.weight.mT + block.film.bias
    h = normal * (1 + film[:, :16]) + film[:, 16:]
    h = h @ block.inner.weight.mT + block.inner.bias
    h = (h * torch.sigmoid(h)) @ block.outer.weight.mT + block.outer.bias
    torch.testing.assert_close(block(x, e), x + block.gate * h, rtol=1e-10, atol=1e-10)


def test_last_of_hidden_is_the_output(net, draw):
    x, level = draw(4, 5, 3), draw(4, 1)
    assert net.hidden(x, level).shape == (4, 5, 16)
    assert torch.equal(net.last(net.hidden(x, level)), net(x, level))
    dense = networks.Dense(inputs=3, outputs=2, width=7, layers=3).to(x)
    assert dense.hidden(x).shape == (4, 5, 7)
    assert torch.equal(dense.last(dense.hidden(x)), dense(x))


def test_embedding_is_sines_and_cosines_of_the_stated_frequencies(device):
    embedding = networks.NoiseEmbedding(6, lowest=0.5, highest=8.0).to(device)
    level = torch.tensor([[-1.0, 0.3]], device=device)
    angle = level[..., None] * torch.tensor([0.5, 2.0, 8.0], device=device)
    expected = torch.cat((angle.sin(), angle.cos()), dim=-1)
    torch.testing.assert_close(embedding(level), expected, rtol=1e-5, atol=1e-5)
    assert not embedding.state_dict()  # made from settings, not stored


def test_dense_by_hand(draw):
    x = draw(9, 3)
    dense = networks.Dense(width=8, layers=2, activation="relu").to(x)
    first, second = dense.body[0], dense.body[2]
    h = (x @ first.weight.mT + first.bias).clamp(min=0)
    h = (h @ second.weight.mT + second.bias).clamp(min=0)
    torch.testing.assert_close(dense(x), h @ dense.last.weight.mT + dense.last.bias)
    assert len([m for m in dense.body if isinstance(m, nn.Linear)]) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.ResidualMLP(dim=2, width=9, blocks=1, embedding=4, activation="relu"),
        lambda: networks.Dense(inputs=4, outputs=1, width=5, layers=3, activation="silu"),
        lambda: networks.WindowMLP(dim=2, window=3, width=9, blocks=1, embedding=4),
        lambda: networks.ConvNet(dim=2, width=9, blocks=1, embedding=4),
        lambda: networks.ConvNet(2, 9, 2, 4, dilations=(1, 2), shortest=5),
    ],
)
def test_settings_rebuild_the_network(make, draw):
    net = make()
    again = networks.from_settings(net.kind, net.settings)
    again.load_state_dict(net.state_dict())
    again, net = again.to(draw(1)), net.to(draw(1))
    if isinstance(net, networks.Dense):
        x = draw(6, 4)
        assert torch.equal(again(x), net(x))
    else:
        length = getattr(net, "window", 0)
        x = draw(6, length, 2) if length else draw(6, 2)
        level = draw(6, 1) if length else draw(6)
        assert torch.equal(again(x, level), net(x, level))
    assert again.settings == net.settings


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: networks.ResidualMLP(width=0), ValueError, "width must be at least 1"),
        (lambda: networks.ResidualMLP(blocks=1.5), TypeError, "blocks must be an integer"),
        (lambda: networks.ResidualMLP(embedding=7), ValueError, "embedding must be an even"),
        (lambda: networks.ResidualMLP(activation="tanh"), ValueError, "activation must be one"),
        (lambda: networks.Dense(inputs=-1), ValueError, "inputs must be at least 1"),
        (lambda: networks.Dense(activation="x"), ValueError, "activation must be one"),
        (
            lambda: networks.from_settings("UNet", {}),
            ValueError,
            "network must be one of ConvNet, Dense",
        ),
    ],
)
def test_bad_settings_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- trajectories --------------------------------------------------------------------------------


def opened(net, device):
    """Return the network in float64 with open gates, so that every part matters."""
    net = net.to(device, torch.float64)
    for name, parameter in net.named_parameters():
        if name.endswith("gate"):
            nn.init.normal_(parameter)
    return net


@pytest.fixture
def window_net(device):
    torch.manual_seed(0)
    return opened(networks.WindowMLP(window=5, width=16, blocks=2, embedding=8), device)


@pytest.fixture
def conv(device):
    torch.manual_seed(0)
    return opened(networks.ConvNet(width=12, blocks=1, embedding=8), device)  # radius 4, window 9


def composed(net, x, level):
    """Return the outputs of a window's network along x (n, length, d), by a loop over windows."""
    k = net.window // 2
    outputs = [net(x[:, i : i + net.window], level) for i in range(x.shape[1] - 2 * k)]
    centres = torch.stack([out[:, k] for out in outputs], 1)
    return torch.cat((outputs[0][:, :k], centres, outputs[-1][:, k + 1 :]), 1)


def test_window_network_is_the_mlp_of_the_flattened_window(window_net, draw):
    x, level = draw(6, 5, 3), draw(6, 1)
    expected = window_net.body(x.flatten(1), level[:, 0]).reshape(6, 5, 3)
    torch.testing.assert_close(window_net(x, level), expected)
    shared = window_net(x, level[0, 0])
    torch.testing.assert_close(shared[0], expected[0])


@pytest.mark.parametrize("length", [5, 6, 13])
def test_fast_composition_is_the_loop_over_windows(window_net, draw, length):
    x = draw(4, length, 3)
    for level in (draw(4, 1), draw(1)[0]):
        expected = composed(window_net, x, level)
        torch.testing.assert_close(window_net.along(x, level), expected)


@pytest.mark.parametrize("length", [9, 10, 25])
def test_no_position_of_a_convolution_sees_padding_that_a_window_has_not(conv, draw, length):
    """Any trajectory's outputs are those of its windows of 2 radius + 1 states: there is no
    configuration of padding beyond those that training on such windows shows."""
    x, level = draw(4, length, 3), draw(4, 1)
    torch.testing.assert_close(conv(x, level), composed(conv, x, level))


def test_convolution_depends_on_the_states_within_its_radius(conv, draw):
    x, level = draw(1, 25, 3).requires_grad_(), draw(1, 1)
    conv(x, level)[0, 12].square().sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.nonzero()[:, 0].tolist() == list(range(12 - conv.radius, 13 + conv.radius))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "dilation"), [((), 1), ((4,), 1), ((2, 3), 2)])
def test_convolution_by_hand(batch, dilation, dtype, device, draw):
    torch.manual_seed(0)
    layer = networks.Convolution(5, 6, dilation).to(device, dtype)
    x, v, gate = draw(*batch, 7, 5).to(dtype), draw(*batch, 7, 6).to(dtype), draw(6).to(dtype)
    x.requires_grad_()
    before, now, after = layer.weight.split(5, dim=1)
    rows = [
        sum(
            x[..., i + j, :] @ part.mT
            for j, part in ((-dilation, before), (0, now), (dilation, after))
            if 0 <= i + j < 7
        )
        for i in range(7)
    ]
    expected = torch.stack(rows, -2) + layer.bias
    for found, wanted in ((layer(x), expected), (layer(x, gate), gate * expected)):
        torch.testing.assert_close(found, wanted)
        arguments = (x, layer.weight, layer.bias)
        torch.testing.assert_close(
            torch.autograd.grad(found, arguments, v),
            torch.autograd.grad(wanted, arguments, v, retain_graph=True),
        )


def test_a_level_per_trajectory_equals_one_at_a_time(conv, window_net, draw):
    x, level = draw(3, 9, 3), draw(3, 1)
    for net in (conv, window_net.along):
        single = torch.cat([net(x[k : k + 1], level[k, 0]) for k in range(3)])
        torch.testing.assert_close(net(x, level), single)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, c, x: w(x, x[0, 0, 0]), r"x must have shape \(..., 5, 3\)"),
        (lambda w, c, x: w(x[:, :5], x[:, :5, 0]), "same for all states"),
        (lambda w, c, x: w.along(x[:, :4], x[:, :1, 0]), "length >= 5"),
        (lambda w, c, x: c(x[:, :8], x[:, :1, 0]), "length >= 9"),
        (lambda w, c, x: networks.WindowMLP(window=4), "window must be an odd"),
        (lambda w, c, x: networks.WindowMLP(window=1), "window must be at least 3"),
        (lambda w, c, x: networks.ConvNet(blocks=0), "blocks must be at least 1"),
        (lambda w, c, x: networks.ConvNet(blocks=3, dilations=(1, 2)), "dilations must be 3"),
        (lambda w, c, x: networks.ConvNet(blocks=1, dilations=(0,)), "dilations must be at least"),
        (lambda w, c, x: networks.ConvNet(shortest=0), "shortest must be at least 1"),
    ],
)
def test_networks_of_trajectories_refuse(call, words, window_net, conv, draw):
    with pytest.raises(ValueError, match=words):
        call(window_net, conv, draw(2, 9, 3))
