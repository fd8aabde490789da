"""Brute-force probabilities: resumable, with honest intervals, and near the known values."""

import brute_force
import pytest
import torch
from brute_force import CASES, count, interval, run, thresholds


def test_counts_fall_with_the_threshold_and_zero_is_among_them():
    for case in CASES.values():
        assert float(thresholds(case).abs().min()) == 0
    case = CASES["lorenz63-burn-in-3"]
    counts, squares = count(case, 200, seed=1)
    assert bool((counts.diff() <= 0).all())
    assert torch.equal(counts, squares)  # one window a trajectory: 0 or 1


def test_windows_of_a_trajectory_are_counted_together(monkeypatch):
    event = CASES["lorenz63"].event
    case = brute_force.Case(
        brute_force.ensembles.lorenz63, {"burn_in": 3.0}, event, (-0.4, 0.4, 0.2), windows=3
    )
    counts, squares = count(case, 50, seed=1)
    x = brute_force.ensembles.lorenz63(50, 180, burn_in=3.0, seed=1)
    parts = torch.stack([event.margin(x[:, k : k + 60]) for k in (0, 60, 120)], 1) > 0
    assert int(counts[2]) == int(parts.sum())
    assert int(squares[2]) == int(parts.sum(1).square().sum())


def test_fused_steps_simulate_the_same_trajectories(tmp_path):
    """Before rounding errors have grown: the compiled loop differs from this one by them alone."""
    settings = {"burn_in": 1.0, "seed": 4}
    theirs = brute_force.fused(brute_force.advance)(64, 4, **settings)
    ours = brute_force.ensembles.lorenz63(64, 4, **settings)
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="not fitzhugh-nagumo"):
        next(run("fitzhugh-nagumo", 100, 50, tmp_path / "c.json", compiled=True))


def test_an_interrupted_run_goes_on_to_the_same_counts(tmp_path):
    name, whole, parts = "lorenz63-burn-in-3", tmp_path / "a.json", tmp_path / "b.json"
    (*_, expected) = run(name, 120, 40, whole)
    next(run(name, 120, 40, parts))  # stopped after the first of three chunks
    found = list(run(name, 120, 40, parts))
    assert len(found) == 2
    assert found[-1]["counts"] == expected["counts"]
    assert found[-1]["trajectories"] == 120
    assert list(run(name, 120, 40, parts)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    with pytest.raises(ValueError, match="chunks of 40"):
        next(run(name, 400, 50, parts))


def test_the_interval_is_that_of_independent_trajectories():
    p, low, high = interval(300, 300, 10_000, 1)
    assert p == 0.03
    assert [low, high] == pytest.approx([0.0268, 0.0336], abs=3e-4)  # binomial: ± 0.00334
    alone = interval(300, 300, 1000, 10)
    together = interval(300, 3000, 1000, 10)  # thirty trajectories with ten windows each
    assert together[0] == alone[0] == 0.03
    assert together[2] > alone[2]
    assert interval(0, 0, 1000, 1) == (0.0, 0.0, pytest.approx(3 / 1000, rel=0.01))


def test_events_are_as_frequent_as_known():
    """Against the values of long runs, five standard errors wide."""
    for name, known, n in (("lorenz63-burn-in-3", 0.195, 4096), ("fitzhugh-nagumo", 0.0345, 2048)):
        counts, _ = count(CASES[name], n, seed=3)
        p = float(counts[thresholds(CASES[name]).abs().argmin()]) / n
        assert abs(p - known) < 5 * (known * (1 - known) / n) ** 0.5, name
