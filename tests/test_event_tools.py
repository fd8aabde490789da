"""The tools behind the long results of the chapters on events judge and choose as they say."""

import brute_force
import event_samples
import events_scan
import pytest
import torch

from ddmlib import events


def test_thresholds_are_chosen_where_the_truth_is_near_the_targets():
    at = [round(0.1 * k, 6) for k in range(-20, 61)]
    counts = [int(10**8 * 10 ** (-1 - c)) for c in at]  # P(C > c) = 0.1 · 10^-c
    found = events_scan.chosen({"thresholds": at, "counts": counts, "number": 10**8})
    assert found == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]


def test_numbers_that_json_does_not_know_become_none():
    assert events_scan.finite([float("-inf"), 1 / 3, "x", 2]) == [None, 0.333333, "x", 2]
    assert events_scan.finite(float("nan")) is None


def test_an_event_above_a_threshold_is_the_same_function_lowered():
    event = events.spike()
    x = torch.randn(20, *event.shape, generator=torch.Generator().manual_seed(0))
    raised = event_samples.above(event, 1.5)
    torch.testing.assert_close(raised.margin(x), event.margin(x) - 1.5)


def test_the_judge_sees_what_is_outside_and_what_is_distorted():
    event = events.Constraint(lambda x: x[..., 0].amax(-1), (5, 2))
    draw = torch.randn(8000, 5, 2, generator=torch.Generator().manual_seed(0))
    inside = draw[event.holds(draw)]
    judge = event_samples.Judge(event, inside[:4000])
    fresh, enforced = judge.score(inside[4000:6000]), inside[4000:6000].clone()
    assert judge.floor["inside"] == fresh["inside"] == 1
    assert fresh["total_variation"] == pytest.approx(judge.floor["total_variation"], abs=0.04)
    assert max(fresh["states"]) < 0.1
    enforced[..., 0] = enforced[..., 0].clamp(max=0.01)  # all inside, at the border
    assert judge.score(enforced)["total_variation"] > 0.9
    assert judge.score(draw[:2000])["inside"] < 0.99


def test_systems_are_those_of_the_truth():
    assert {case for _, case, _ in events_scan.SYSTEMS.values()} <= set(brute_force.CASES)
    assert set(event_samples.SYSTEMS) <= set(brute_force.CASES)
