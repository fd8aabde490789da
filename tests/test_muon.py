"""Muon: directions of a gradient without their sizes, for hidden convolutions."""

import pytest
import torch
from torch import nn

from ddmlib import muon, networks, training


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 32), (16, 80), (80, 16)])
def test_singular_values_are_near_one_and_directions_kept(shape):
    g = normal(*shape)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    found = muon.orthogonal(1e-3 * g)
    values = torch.linalg.svdvals(found)
    known = s > 0.02 * s[0]
    assert bool((values[known] > 0.65).all())
    assert bool((values < 1.25).all())
    inner = u.mT @ found @ v.mT  # diagonal, where the singular vectors are those of g
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-2
    assert bool(torch.isfinite(muon.orthogonal(torch.zeros(shape))).all())


def test_a_step_is_orthogonal_momentum_in_nesterovs_form():
    p = nn.Parameter(torch.zeros(32, 16, 1))
    optimiser, past = muon.Muon([p], lr=0.1, momentum=0.9), torch.zeros(32, 16)
    expected = torch.zeros(32, 16)
    for k in range(3):
        g = normal(32, 16, seed=k)
        p.grad = g[..., None].clone()
        optimiser.step()
        past = 0.9 * past + 0.1 * g
        expected -= 0.1 * 2**0.5 * muon.orthogonal(0.1 * g + 0.9 * past)
        torch.testing.assert_close(p.detach()[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_hidden_kernels_are_those_between_wide_layers():
    network = networks.TrajectoryUNet(dim=3, widths=(16, 32), blocks=1)
    kernels = muon.hidden_kernels(network)
    names = {n for n, p in network.named_parameters() if any(p is k for k in kernels)}
    assert {"down.0.0.inner.weight", "coarsen.0.weight", "refine.0.weight"} <= names
    assert not {"first.weight", "last.weight", "down.0.0.gate", "down.0.0.film.weight"} & names
    wide = networks.TrajectoryUNet(dim=40, widths=(16, 32), blocks=1)  # many components, still ends
    assert len(muon.hidden_kernels(wide)) == len(kernels)


def test_fit_trains_kernels_by_muon_and_the_rest_by_adamw(tmp_path):
    def module():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(3, 16, 3), nn.SiLU(), nn.Conv1d(16, 16, 3), nn.SiLU(), nn.Conv1d(16, 1, 3)
        )

    x, y = normal(32, 3, 12), normal(32, 1, 6, seed=1)
    ours, theirs, part = module(), module(), module()

    def run(trained, steps=12, stop=None, **settings):
        g = torch.Generator().manual_seed(0)
        records = training.fit(
            trained, lambda _: (trained(x) - y).square().mean(), steps=steps, generator=g, lr=0.01,
            kernel_lr=0.05, report_every=3, checkpoint_every=3, **settings,
        )  # fmt: skip
        for record in records:
            if record.step == stop:
                return

    run(ours)
    kernel = theirs[2].weight
    others = [p for p in theirs.parameters() if p is not kernel]
    optimisers = [torch.optim.AdamW(others, lr=0.01, weight_decay=0), muon.Muon([kernel], 0.05)]
    for k in range(12):
        for optimiser, peak in zip(optimisers, (0.01, 0.05), strict=True):
            optimiser.param_groups[0]["lr"] = training.learning_rate(k, 12, peak, "cosine", 0)
            optimiser.zero_grad()
        (theirs(x) - y).square().mean().backward()
        for optimiser in optimisers:
            optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    run(part, stop=6, checkpoint=tmp_path / "c")  # interrupted
    again = module()
    run(again, checkpoint=tmp_path / "c")
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="momentum must lie in"):
        muon.Muon([nn.Parameter(torch.zeros(2, 2))], momentum=1.0)
    with pytest.raises(ValueError, match="lr must be positive"):
        muon.Muon([nn.Parameter(torch.zeros(2, 2))], lr=0.0)
    with pytest.raises(ValueError, match="params must be matrices"):
        muon.Muon([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="closure must be None"):
        muon.Muon([nn.Parameter(torch.zeros(2, 2))]).step(lambda: 0.0)
    settings = {"steps": 1, "generator": torch.Generator()}
    for lr, words in ((-1.0, "kernel_lr must be positive"), (0.1, "kernel_lr is for modules")):
        with pytest.raises(ValueError, match=words):
            next(training.fit(nn.Linear(2, 1), lambda _: None, kernel_lr=lr, **settings))
