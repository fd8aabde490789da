"""Metrics against closed forms, brute force, and the laws their docstrings state."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from ddmlib import metrics
from ddmlib.metrics import distances, ensembles, histograms


@pytest.fixture
def normal(device, generator):
    """Draw standard normal numbers, the same on every device; each call goes on in the stream."""
    g = generator(1)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g, dtype=dtype).to(device)

    return draw


@pytest.fixture
def uniform(device, generator):
    g = generator(2)

    def draw(*shape):
        return torch.rand(*shape, generator=g).to(device)

    return draw


def phi(x):
    return scipy.stats.norm.cdf(x)


# --- histograms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
def test_histogram_counts_like_numpy(normal, monkeypatch, d):
    monkeypatch.setattr(histograms, "CHUNK", 1000)  # several chunks, the last one not full
    x = normal(10, 457, d)
    x.view(-1, d)[0] = 1.5  # the upper edge belongs to the last cell
    x.view(-1, d)[1] = -1.5
    counts = metrics.histogram(x, bins=6, limit=1.5)
    expected, _ = np.histogramdd(x.reshape(-1, d).cpu().numpy(), bins=6, range=[(-1.5, 1.5)] * d)
    assert counts[:-1].tolist() == expected.flatten().tolist()
    assert counts.sum() == 4570  # none is forgotten
    parts = [metrics.histogram(part, bins=6, limit=1.5) for part in x.split(3)]
    assert torch.equal(sum(parts), counts)


def test_hellinger_of_counts_obeys_its_definition(uniform):
    a, b = (uniform(2, 1000) * 20).long()
    p, q = a.double() / a.sum(), b.double() / b.sum()
    h = metrics.hellinger_counts(a, b)
    assert h == pytest.approx(math.sqrt(1 - float((p * q).sqrt().sum())), abs=1e-12)
    assert metrics.hellinger_counts(b, a) == h
    assert metrics.hellinger_counts(7 * a, b) == pytest.approx(h, abs=1e-12)
    assert metrics.hellinger_counts(a, 3 * a) < 1e-15
    apart = torch.zeros_like(a)
    apart[a == 0] = 1
    assert metrics.hellinger_counts(a, apart) == pytest.approx(1)


def test_hellinger_of_gaussians_is_the_closed_form(normal):
    mean, std, n = 0.7, 1.4, 500_000
    affinity = math.sqrt(2 * std / (1 + std**2)) * math.exp(-(mean**2) / (4 * (1 + std**2)))
    for d, bins in ((1, 140), (2, 70)):
        a, b = normal(n, d), mean + std * normal(n, d)
        h = metrics.hellinger(a, b, bins=bins, limit=7.0)
        assert h == pytest.approx(math.sqrt(1 - affinity**d), abs=0.003)


def test_mass_outside_the_range_is_lost_but_equal_laws_are_not_apart(normal):
    inside = normal(1000, 2).clamp(-1, 1)
    half_gone = inside.clone()
    half_gone[::2] += 100
    assert metrics.hellinger(inside, inside + 100) == 1
    assert metrics.hellinger(half_gone, half_gone) == 0
    shared = metrics.hellinger(torch.cat([inside, inside + 100]), inside)
    assert shared == pytest.approx(math.sqrt(1 - math.sqrt(0.5)))


def test_total_variation_of_gaussians_is_the_closed_form(normal):
    n, shift = 1_000_000, 0.5
    tv = metrics.total_variation(normal(n), normal(n) + shift, bins=64)
    assert tv == pytest.approx(2 * phi(shift / 2) - 1, abs=0.004)


def test_total_variation_counts_what_lies_outside_and_on_the_edges(device):
    a = torch.tensor([0.0, 1.0, 1.0, 5.0], device=device)
    b = torch.tensor([0.0, 1.0, -5.0, -9.0], device=device)
    assert metrics.total_variation(a, b, bins=2, limits=(0.0, 1.0)) == 0.5
    assert metrics.total_variation(a, a, bins=2, limits=(0.0, 1.0)) == 0
    high, below_high, above = (torch.tensor([x], device=device) for x in (1.0, 0.9, 1.1))
    for sign in (1, -1):
        edge, options = sign * high, {"bins": 2, "limits": (-1.0, 1.0)}
        assert metrics.total_variation(edge, sign * below_high, **options) == 0
        assert metrics.total_variation(edge, sign * above, **options) == 1
    assert metrics.total_variation(a[:1], b[:1]) == 0  # a range without width
    assert metrics.total_variation(a, b + 100) == 1


# --- floors -------------------------------------------------------------------------------------


def test_total_variation_floor_follows_its_law(uniform, generator):
    n, m, bins = 2000, 6000, 128
    found = metrics.floor(
        lambda a, b: metrics.total_variation(a, b, bins, (0.0, 1.0)),
        uniform(n + m),
        n,
        repeats=30,
        generator=generator(),
    )
    p = 1 / bins
    law = bins * math.sqrt(p * (1 - p) * (1 / n + 1 / m) / (2 * math.pi))
    assert found.mean == pytest.approx(law, rel=0.03)
    assert 0 < found.std < 0.1 * law


def test_hellinger_floor_follows_its_law_and_fresh_samples(uniform, generator):
    n, size, cells = 10_000, 100_000, 400
    squared_law = (cells - 1) / 8 * (1 / n + 1 / size)
    reference = 2 * uniform(size, 2) - 1
    options = {"bins": 20, "limit": 1.0}
    found = metrics.hellinger_floor(reference, n, generator=generator(), **options)
    assert found == pytest.approx(math.sqrt(squared_law), rel=0.02)
    fresh = [metrics.hellinger(2 * uniform(n, 2) - 1, reference, **options) for _ in range(10)]
    assert found == pytest.approx(sum(fresh) / 10, rel=0.03)
    split = metrics.floor(
        lambda a, b: metrics.hellinger(a, b, **options),
        reference,
        n,
        independent=2 * uniform(2 * n, 2) - 1,
        generator=generator(),
    )
    assert split.mean == pytest.approx(found, rel=0.03)


def test_hellinger_floor_sees_that_states_of_a_trajectory_are_not_independent(uniform, generator):
    n, trajectories, length, cells = 20_000, 4000, 25, 50
    still = (2 * uniform(trajectories, 1, 1) - 1).expand(-1, length, -1)  # nothing moves
    options = {"bins": cells, "limit": 1.0, "generator": generator(), "repeats": 16}
    by_trajectory = metrics.hellinger_floor(still, n, **options)
    by_state = metrics.hellinger_floor(still.reshape(-1, 1), n, **options)
    law = (cells - 1) / 8 * (1 / n + 1 / trajectories)
    assert by_trajectory == pytest.approx(math.sqrt(law), rel=0.1)
    assert by_state < 0.5 * by_trajectory


def test_excess_removes_the_floor():
    assert metrics.excess(0.05, 0.03) == pytest.approx(0.04)
    assert metrics.excess(0.03, 0.05) == 0


def test_floor_draws_disjoint_samples_of_the_sizes_asked_for(device, generator):
    seen = []

    def overlap(a, b):
        seen.append((len(a), len(b)))
        return float(torch.isin(a, b).sum())

    rows = torch.arange(20.0, device=device)
    assert metrics.floor(overlap, rows, 5, repeats=3, generator=generator()).mean == 0
    assert metrics.floor(overlap, rows, 5, 8, repeats=3, generator=generator()).mean == 0
    once = metrics.floor(overlap, rows, 5, independent=rows[:6] + 50, repeats=1)
    assert once.mean == 0
    assert math.isnan(once.std)
    assert seen == [(5, 15)] * 3 + [(5, 8)] * 3 + [(5, 20)]


# --- distances ----------------------------------------------------------------------------------


def test_frechet_of_gaussians_is_the_closed_form(normal):
    k = 6
    (mean_a, mean_b), roots = normal(2, k, dtype=torch.float64), normal(2, k, k).double()
    a, b = (root @ root.T for root in roots)
    cross = scipy.linalg.sqrtm((a @ b).cpu().numpy()).real
    expected = float((mean_a - mean_b).square().sum() + (a + b).trace()) - 2 * np.trace(cross)
    found = metrics.frechet(metrics.Moments(mean_a, a, 9), metrics.Moments(mean_b, b, 9))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_of_samples_that_are_shifted_stretched_or_few(normal):
    x, shift = normal(500, 4).double(), torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert metrics.frechet(x, x + shift.to(x)) == pytest.approx(5.25, rel=1e-9)
    trace = float(x.var(0).sum())  # (1 − 3)² of it: the roots differ by a factor
    assert metrics.frechet(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(4 * trace, rel=1e-9)
    few = normal(5, 40)  # rank-deficient
    assert metrics.frechet(few, few) < 1e-6


def test_frechet_floor_follows_its_law(normal, generator):
    k, n = 5, 1000
    law = (k + k * (k + 1) / 4) * 2 / n  # means and, to first order, covariances
    found = metrics.floor(
        metrics.frechet, normal(20 * n, k), n, n, repeats=40, generator=generator()
    )
    assert found.mean == pytest.approx(law, rel=0.1)


def test_moments_stream_without_cancellation(normal):
    x = normal(1000, 3, dtype=torch.float64) + 1e7
    batches = metrics.moments(iter(x.split([1, 499, 17, 483])))
    together = metrics.moments(x.view(10, 100, 3))
    for found in (batches, together):
        assert found.size == 1000
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-6)


def test_nearest_neighbours_equal_brute_force(normal, generator):
    a, b = normal(4, 50, 3), normal(300, 3)
    nearest = torch.cdist(a.view(-1, 3).double(), b.double()).min(1).values
    squared = float(nearest.square().mean())
    assert metrics.nearest_neighbour_distance(a, b) == pytest.approx(squared, rel=1e-9)
    plain = metrics.nearest_neighbour_distance(a, b, squared=False)
    assert plain == pytest.approx(float(nearest.mean()), rel=1e-9)
    one = metrics.nearest_neighbour_distance(a, b, queries=1, squared=False, generator=generator())
    assert float((nearest - one).abs().min()) < 1e-9  # some state of a
    every = metrics.nearest_neighbour_distance(a, b, queries=200, generator=generator())
    assert every == pytest.approx(squared, rel=1e-9)
    assert metrics.nearest_neighbour_distance(b[:20], b) == 0


def test_nearest_neighbour_distance_in_the_plane_is_that_of_a_poisson_process(uniform):
    n = 20_000
    inner = 0.1 + 0.8 * uniform(10_000, 2)  # away from the rim
    found = metrics.nearest_neighbour_distance(inner, uniform(n, 2))
    assert found == pytest.approx(1 / (math.pi * n), rel=0.04)


def test_extremes_of_a_reference_against_itself_are_its_quantiles(normal):
    x = normal(50, 140, 3)
    tails, total = metrics.extremes(x, x, quantile=0.01)
    assert tails.tolist() == [[0.01] * 3] * 2
    assert total == pytest.approx(0.02)


def test_extremes_of_a_shifted_gaussian_are_the_closed_form(normal):
    n, shift = 400_000, torch.tensor([0.0, 0.5])
    tails, total = metrics.extremes(normal(n, 2) + shift.to(normal(1)), normal(n, 2))
    edge = scipy.stats.norm.ppf(0.99)
    expected = [[0.01, phi(-edge - 0.5)], [0.01, phi(-edge + 0.5)]]
    np.testing.assert_allclose(tails.cpu(), expected, atol=1e-3)
    assert total == pytest.approx(float(tails.sum()) / 2)


def test_extremes_take_references_beyond_the_limit_of_torch_quantile(device):
    reference = torch.arange(2**24 + 2, device=device).double()[:, None]
    tails, _ = metrics.extremes(reference[::16], reference, quantile=0.25)
    assert tails.flatten().tolist() == pytest.approx([0.25, 0.25], abs=1e-6)


def test_wasserstein_of_a_shift_is_its_length(normal):
    a, shift = normal(200, 5, 3), normal(5, 3)
    found = metrics.wasserstein1(a[torch.arange(199, -1, -1)], a + shift)
    assert found == pytest.approx(float(shift.norm()), rel=1e-6)


def test_wasserstein_equals_brute_force_and_sorting(normal):
    a, b = normal(6, 2), normal(6, 2)
    cost = torch.cdist(a.double(), b.double()).cpu()
    best = min(cost[range(6), order].mean() for order in itertools.permutations(range(6)))
    assert metrics.wasserstein1(a, b) == pytest.approx(float(best), rel=1e-9)
    x, y = normal(500), 2 * normal(500) + 1
    scalar = metrics.wasserstein1(x, y)
    assert scalar == pytest.approx(scipy.stats.wasserstein_distance(x.cpu(), y.cpu()), rel=1e-6)
    in_the_plane = [torch.stack([z, torch.zeros_like(z)], 1) for z in (x, y)]
    assert metrics.wasserstein1(*in_the_plane) == pytest.approx(scalar, rel=1e-6)


def test_energy_distance_equals_brute_force_in_any_blocks(normal, monkeypatch):
    a, b = (1e6 + normal(n, 2, 3, dtype=torch.float64) for n in (37, 53))  # far from the origin
    x, y = (z.double().flatten(1) for z in (a, b))

    def mean(x, y, pairs):
        return float((x[:, None] - y).norm(dim=-1).sum()) / pairs

    expected = 2 * mean(x, y, 37 * 53) - mean(x, x, 37 * 36) - mean(y, y, 53 * 52)
    assert metrics.energy_distance(a, b) == pytest.approx(expected, rel=1e-8)
    monkeypatch.setattr(distances, "PAIRS", 400)
    assert metrics.energy_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.energy_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_energy_distance_of_gaussians_is_the_closed_form(normal):
    shift = 1.0  # E|N(shift, 2)| is that of a folded normal law
    folded = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4)
    folded += shift * (1 - 2 * phi(-shift / math.sqrt(2)))
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    found = [metrics.energy_distance(normal(500), normal(500) + shift) for _ in range(100)]
    assert sum(found) / 100 == pytest.approx(expected, rel=0.03)


def test_energy_distance_is_unbiased(normal):
    found = np.array([metrics.energy_distance(normal(20, 3), normal(30, 3)) for _ in range(400)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 3 * error
    biased = 4 / math.sqrt(math.pi) * (1 / 20 + 1 / 30)  # about what the V-statistic would add
    assert error < biased / 20


# --- ensembles ----------------------------------------------------------------------------------


def test_rmse_is_the_root_of_the_mean_square(device):
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]], device=device)
    truth, scale = torch.zeros_like(a), torch.tensor([1.0, 2.0])
    assert float(metrics.rmse(a, truth)) == pytest.approx(math.sqrt(25 / 8))
    assert metrics.rmse(a, truth, dim=0).tolist() == [1.5, 2.0]
    assert metrics.rmse(a, truth, dim=0, scale=scale).tolist() == [1.5, 1.0]
    assert float(metrics.rmse(a + 1e4, truth + 1e4)) == pytest.approx(math.sqrt(25 / 8))


def test_spread_ratio_is_pooled_and_ignores_the_mean(normal):
    x = normal(100, 4, 3)
    assert metrics.spread_ratio(0.5 * x + 7, x) == pytest.approx(0.5, rel=1e-5)
    wide = torch.tensor([3.0, 4.0, 0.0], device=x.device)
    ours, reference = torch.stack([-wide, wide]), torch.stack([-wide, wide]).roll(1, 1) * 2
    assert metrics.spread_ratio(ours, reference) == pytest.approx(0.5)


@pytest.mark.parametrize("fair", [True, False])
def test_crps_equals_its_definition_in_any_chunks(normal, monkeypatch, fair):
    ensemble, truth = normal(3, 5, 7, 2), normal(3, 5, 2)
    x = ensemble.double()
    pairs = (x[..., :, None, :] - x[..., None, :, :]).abs().sum((-2, -3))
    error = (x - truth[..., None, :].double()).abs().mean(-2)
    expected = error - pairs / (2 * (7 * 6 if fair else 49))
    for chunk in (2**22, 40):
        monkeypatch.setattr(ensembles, "CHUNK", chunk)
        found = metrics.crps(ensemble, truth, fair=fair)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_crps_of_gaussian_ensembles_is_the_closed_form(normal):
    members, y = 3, 0.8
    density = scipy.stats.norm.pdf(y)
    exact = y * (2 * phi(y) - 1) + 2 * density - 1 / math.sqrt(math.pi)
    ensemble = normal(200_000, members, 1)
    truth = torch.full_like(ensemble[:, 0], y)
    fair = metrics.crps(ensemble, truth).mean()
    plain = metrics.crps(ensemble, truth, fair=False).mean()
    assert float(fair) == pytest.approx(exact, abs=0.004)
    assert float(plain) == pytest.approx(exact + 1 / (members * math.sqrt(math.pi)), abs=0.004)
    single = metrics.crps(ensemble[:, :1], truth, fair=False)
    torch.testing.assert_close(single, (ensemble[:, 0].double() - truth).abs())


def chi_square(counts):
    return [scipy.stats.chisquare(column).pvalue for column in counts.T.cpu().numpy()]


def test_ranks_of_a_calibrated_ensemble_are_flat_with_ties_as_well(normal, generator):
    draws = normal(20_000, 10, 2)
    for values in (draws, draws.round(), torch.zeros_like(draws)):
        counts = metrics.rank_histogram(values[:, 1:], values[:, 0], generator=generator())
        assert counts.shape == (10, 2)
        assert counts.sum(0).tolist() == [20_000] * 2
        assert min(chi_square(counts)) > 0.01


def test_ranks_show_bias_and_spread(normal):
    draws = normal(20_000, 10, 1)
    truth, members = draws[:, 0], draws[:, 1:]
    above = metrics.rank_histogram(members - 1, truth)[:, 0]
    assert above[-1] > 3 * above[:5].max()
    narrow = metrics.rank_histogram(members / 2, truth)[:, 0]
    assert min(narrow[0], narrow[-1]) > 2 * narrow[1:-1].max()
    assert max(chi_square(torch.stack([above, narrow], 1))) < 1e-6
    assert metrics.rank_histogram(members + 100, truth)[0] == 20_000


@pytest.mark.parametrize(
    ("members", "level"), [(19, 0.9), (20, 0.9), (50, 0.9), (3, 0.5), (7, 0.6), (8, 0.15)]
)
def test_coverage_of_a_calibrated_ensemble_is_the_level(normal, members, level):
    n = 20_000
    draws = normal(n, members + 1, 2)
    found = metrics.coverage(draws[:, 1:], draws[:, 0], level)
    error = math.sqrt(level * (1 - level) / n)
    np.testing.assert_allclose(found.cpu(), level, atol=3.5 * error)


def test_coverage_of_a_narrow_ensemble_falls_short(normal):
    draws = normal(20_000, 51, 1)
    found = metrics.coverage(draws[:, 1:] / 2, draws[:, 0])
    assert float(found) == pytest.approx(2 * phi(1.645 / 2) - 1, abs=0.03)
    shaped = metrics.coverage(draws[:, 1:].view(100, 200, 50, 1) / 2, draws[:, 0].view(100, 200, 1))
    torch.testing.assert_close(shaped, found)


# --- bootstrap ----------------------------------------------------------------------------------


def test_bootstrap_of_independent_values_has_the_width_of_the_mean(normal, generator):
    x = normal(400)
    found = metrics.block_bootstrap(x, torch.mean, block=1, replicates=2000, generator=generator())
    assert float(found.estimate) == pytest.approx(float(x.mean()), abs=1e-6)
    width = 2 * 1.96 * float(x.std(unbiased=False)) / math.sqrt(400)
    assert float(found.high - found.low) == pytest.approx(width, rel=0.06)
    assert found.low < x.mean() < found.high


def test_bootstrap_covers_the_mean_of_a_correlated_series_only_with_blocks(generator):
    n, runs, memory = 600, 100, 0.8
    noise = torch.randn(n + 100, runs, generator=generator())
    series = torch.zeros(n + 100, runs)
    for i in range(1, n + 100):
        series[i] = memory * series[i - 1] + noise[i]
    hits = {}
    for block in (1, 40):
        inside = 0
        for x in series[100:].T:
            interval = metrics.block_bootstrap(
                x, torch.mean, block=block, replicates=100, level=0.9, generator=generator(3)
            )
            inside += bool(interval.low <= 0 <= interval.high)
        hits[block] = inside / runs
    assert hits[40] == pytest.approx(0.87, abs=0.09)  # somewhat short of 0.9, as blocks are finite
    assert hits[1] < 0.6


def test_bootstrap_takes_statistics_with_axes_and_keeps_blocks_together(device, generator):
    ramp = torch.arange(12.0, device=device)[:, None].expand(-1, 2)
    jumps = []

    def statistic(x):
        assert len(x) == 12
        jumps.append(int(((x[1:, 0] - x[:-1, 0]) % 12 != 1).sum()))
        return x.mean(0)

    found = metrics.block_bootstrap(ramp, statistic, block=5, replicates=50, generator=generator())
    assert found.low.shape == found.high.shape == found.estimate.shape == (2,)
    assert max(jumps) == 2  # three blocks of five, the last one cut, wrapping round


def test_one_seed_gives_one_result(normal, generator):
    x, y = normal(300, 5, 2).round(), normal(300, 2).round()
    draws = [
        (
            metrics.rank_histogram(x, y, generator=generator(5)).tolist(),
            metrics.hellinger_floor(x, 50, bins=5, generator=generator(5)),
            metrics.block_bootstrap(y, torch.mean, block=7, generator=generator(5)).low.tolist(),
            metrics.nearest_neighbour_distance(x, y, queries=9, generator=generator(5)),
        )
        for _ in range(2)
    ]
    assert draws[0] == draws[1]


# --- bad input ----------------------------------------------------------------------------------

X = torch.zeros(8, 3)
NAN = torch.full((8, 3), math.nan)
SETS = ["hellinger", "frechet", "nearest_neighbour_distance", "extremes", "wasserstein1"]
SETS += ["energy_distance", "spread_ratio"]
SCORES = ["crps", "rank_histogram", "coverage"]
ENSEMBLE = torch.zeros(8, 20, 3)


@pytest.mark.parametrize("name", SETS)
def test_sets_of_samples_refuse_bad_input(name):
    metric = getattr(metrics, name)
    for bad in (NAN, X / 0, X[:0]):
        with pytest.raises(ValueError, match=r"finite|empty"):
            metric(bad, X)
        with pytest.raises(ValueError, match=r"finite|empty"):
            metric(X, bad)
    with pytest.raises(ValueError, match="components"):
        metric(X, X[:, :2])
    for bad in (X.long(), X.numpy()):
        with pytest.raises(TypeError, match=r"tensor|Tensor"):
            metric(X, bad)


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_ensembles_refuse_bad_input(name):
    score = getattr(metrics, name)
    for bad in (X, ENSEMBLE[:, :, :2], ENSEMBLE[:5], ENSEMBLE[:, :0], ENSEMBLE + math.inf):
        with pytest.raises(ValueError, match="ensemble"):
            score(bad, X)
    with pytest.raises(ValueError, match="truth"):
        score(ENSEMBLE, NAN)
    with pytest.raises(ValueError, match="truth"):
        score(ENSEMBLE[:0], X[:0])
    with pytest.raises(TypeError, match="truth"):
        score(ENSEMBLE, X.long())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.histogram(X, bins=0), "bins"),
        (lambda: metrics.histogram(X, limit=-1.0), "limit"),
        (lambda: metrics.histogram(torch.zeros(4, 6)), "bins"),
        (lambda: metrics.histogram(torch.zeros(4)), "x must have shape"),
        (lambda: metrics.hellinger_counts(X[:, 0], X[:, 0]), "a must hold"),
        (lambda: metrics.hellinger_counts(torch.ones(3), torch.ones(4)), "cells"),
        (lambda: metrics.hellinger_counts(torch.ones(3), torch.ones(3, 1)), "b must have shape"),
        (lambda: metrics.hellinger_floor(X[:1], 5), "reference"),
        (lambda: metrics.hellinger_floor(X, 0), "n must"),
        (lambda: metrics.total_variation(X, X), "a must have shape"),
        (lambda: metrics.total_variation(X[0], X[0], limits=(1.0, 1.0)), "limits"),
        (lambda: metrics.excess(-0.1, 0.1), "distance"),
        (lambda: metrics.excess(0.1, math.nan), "floor"),
        (lambda: metrics.floor(metrics.frechet, X, 8), "reference"),
        (lambda: metrics.floor(metrics.frechet, X, 5, 4), "reference"),
        (lambda: metrics.floor(metrics.frechet, X, 9, independent=X), "independent"),
        (lambda: metrics.moments([]), "batches"),
        (lambda: metrics.moments([X, X[:, :2]]), "batches"),
        (lambda: metrics.nearest_neighbour_distance(X, X, queries=9), "queries"),
        (lambda: metrics.extremes(X, X, quantile=0.5), "quantile"),
        (lambda: metrics.wasserstein1(X, X[:4]), "equally many"),
        (
            lambda: metrics.wasserstein1(torch.zeros(2**14 + 1, 2), torch.zeros(2**14 + 1, 2)),
            "most",
        ),
        (lambda: metrics.energy_distance(X[:1], X), "a must"),
        (lambda: metrics.rmse(X, X[:4]), "one shape"),
        (lambda: metrics.rmse(X, X, scale=torch.zeros(3)), "scale"),
        (lambda: metrics.rmse(X, X, scale=torch.ones(2)), "scale"),
        (lambda: metrics.spread_ratio(X + 1, X), "reference"),
        (lambda: metrics.crps(ENSEMBLE[:, :1], X), "members"),
        (lambda: metrics.coverage(ENSEMBLE, X, level=0.95), "at least 39 members"),
        (lambda: metrics.coverage(ENSEMBLE, X, level=0.01), "level"),
        (lambda: metrics.coverage(ENSEMBLE, X, level=1.0), "level"),
        (lambda: metrics.block_bootstrap(X, torch.mean, block=9), "block"),
        (lambda: metrics.block_bootstrap(X, torch.mean, block=2, replicates=1), "replicates"),
        (lambda: metrics.block_bootstrap(NAN, torch.mean, block=2), "series"),
    ],
)
def test_bad_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_metrics_import_scipy_only_where_it_is_needed():
    for path in Path(metrics.__file__).parent.glob("*.py"):
        assert not re.search(r"^(import|from) scipy", path.read_text(encoding="utf-8"), re.M), path
