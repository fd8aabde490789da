"""What is promised on a Gaussian half-space holds in the stored results, and anew."""

import json
import math

import pytest
import scipy.stats
import torch
from half_space import CASES, OUT, accuracy, coverage, sampler_law

HALF_SPACES = {"half-space 0.1": 0.1, "half-space 1e-4": 1e-4}


@pytest.fixture(scope="module")
def stored():
    return json.loads(OUT.read_text("utf-8"))


def test_stored_guided_samples_have_the_conditional_law(stored):
    assert [entry["probability"] for entry in stored["conditional"]] == [0.1, 1e-4]
    for entry in stored["conditional"]:
        assert entry["inside"] > 0.98
        assert entry["mean"] == pytest.approx(entry["mean_exact"], rel=0.02)
        assert entry["variance"] == pytest.approx(entry["variance_exact"], rel=0.02)


@pytest.mark.parametrize("name", HALF_SPACES)
def test_stored_probabilities_are_exact_to_two_hundredths(name, stored):
    entry = stored["accuracy"][name]
    assert entry["exact"] == pytest.approx(math.log(HALF_SPACES[name]), abs=1e-4)
    assert abs(entry["log_probability"] - entry["exact"]) < 0.02
    assert entry["warning"] == ""


@pytest.mark.parametrize("name", CASES)
def test_stored_intervals_cover_or_are_marked(name, stored):
    for entry in stored["coverage"][name]:
        n = entry["repetitions"]
        assert n >= 200
        assert abs(entry["ratio"] - 1) < 4 * entry["ratio_error"]  # unbiased
        if name in HALF_SPACES:
            assert 0.91 <= entry["covered"] <= 0.98
            assert entry["trusted"] > 0.9 * n
        # neither covering nor marked
        assert entry["trusted"] * (1 - entry["trusted_covered"]) <= 0.09 * n


@pytest.mark.parametrize("name", CASES)
def test_probabilities_of_the_cases_are_those_of_the_law(name):
    """By counting standard Gaussian samples of the prior, and of the sampler's own law."""
    case = CASES[name]()
    mean, covariance = sampler_law(case.denoiser, 24)
    white = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hits = int(case.event.holds(mean + white @ torch.linalg.cholesky(covariance).mT).sum())
    expected = math.exp(case.log_probability(mean, covariance))
    assert scipy.stats.binomtest(hits, len(white), expected).pvalue > 0.001


def test_the_tool_measures_anew():
    found = coverage("half-space 0.1", repetitions=20, samples=128, steps=8, pilot=16)
    assert found["repetitions"] == 20
    assert found["covered"] >= 0.75  # of 20: less has probability 0.0003 at 95 %
    assert abs(found["ratio"] - 1) < 4 * found["ratio_error"]
    once = accuracy("two sides", samples=512, steps=32)
    assert once["exact"] == pytest.approx(math.log(2 * scipy.stats.norm.sf(3)), abs=1e-9)
    assert once["log_probability"] == pytest.approx(once["of_the_sampler"], abs=0.6)
