"""Benchmarks: each baseline is checked against ours, and every row comes out."""

import json
import math

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import assimilate, events


def test_assimilation_benchmarks_check_their_baselines_and_give_their_rows(tmp_path):
    stored = tmp_path / "results.json"
    benchmarks.main(["assimilate", "--small", "--folder", str(tmp_path), "--json", str(stored)])
    rows = json.loads(stored.read_text())["rows"]
    quantities = [row["quantity"].partition(",")[0] for row in rows]
    assert quantities.count("composition of windows") == 4
    assert quantities.count("guided evaluation") == 4
    assert len(rows) == 12
    for row in rows:
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("ours", "baseline", "ratio"))


def test_event_benchmarks_check_their_baselines_and_say_which_weights_are_missing(tmp_path):
    stored = tmp_path / "results.json"
    benchmarks.main(["events", "steps", "--small", "--json", str(stored)])
    simulated, timed, *counted = json.loads(stored.read_text())["rows"]
    for row in (simulated, timed):
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("ours", "baseline", "ratio"))
    names = [target.name for target in (events.CELLS, events.LORENZ63)]
    assert [row["quantity"].split()[0] for row in counted] == names
    for row in counted:
        assert {tried["guidance"] for tried in row["settings"]["tried"]} >= {"guided"}
        assert row["ours"] is None or row["ours"] in events.BUDGETS
    benchmarks.main(["steps", "--folder", str(tmp_path), "--json", str(stored)])
    for row, name in zip(json.loads(stored.read_text())["rows"], names, strict=True):
        assert row["ours"] is None
        assert name in row["note"]


def test_evaluations_count_products_with_the_jacobian():
    assert assimilate.R23_COST == 2 * (256 + 4 * 255)  # no correction where no noise is


@pytest.mark.parametrize("name", [assimilate.WINDOWS, assimilate.CONVOLUTION])
def test_operations_are_those_of_the_weights(name):
    denoiser = assimilate.denoiser_of(name)
    if name == assimilate.WINDOWS:  # 15-128, five blocks of 128-128 twice; 128-3 for each state
        expected = 61 * (15 * 128 + 10 * 128**2) + 65 * 3 * 128
        network = denoiser.denoiser.network
    else:
        expected = 65 * 3 * (4 * 64 + 12 * 64**2 + 64 * 3)
        network = denoiser.network
    assert assimilate.operations(network) == 2 * expected
