"""The tools behind the long results of the chapters on events judge and choose as they say."""

import brute_force
import event_samples
import events_scan
import plain_samples
import pytest
import results
import torch

from ddmlib import ensembles, events, metrics, pretrained, recipes


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
    raised = event.above(1.5)
    torch.testing.assert_close(raised.margin(x), event.margin(x) - 1.5)


@pytest.mark.parametrize("system", ["lorenz63", "fitzhugh-nagumo", "double-pendulum"])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_events_for_guidance_hold_where_the_events_do(system, c):
    event = plain_samples.EVENTS[system]
    x = 2 * torch.randn(500, *event.shape, generator=torch.Generator().manual_seed(0))
    x[::2] *= 0.1
    if system == "double-pendulum":
        x[::2, :, 2:4] += 1  # cosines of a pendulum near rest
    aim = event_samples.for_guidance(system, event, c)
    assert torch.equal(aim.holds(x), event.value(x) > c)
    assert 0 < int(aim.holds(x).sum()) < 500


def test_a_network_of_pendulums_makes_the_states_that_are_simulated():
    x = ensembles.double_pendulum(256, seed=6)
    circle = recipes.trajectories.ENSEMBLES["double-pendulum"](256, seed=6)
    torch.testing.assert_close(
        plain_samples.states("double-pendulum", circle), x, rtol=0, atol=2e-5
    )
    assert torch.equal(plain_samples.states("lorenz63", x), x)
    for system, case in brute_force.CASES.items():
        if system in plain_samples.EVENTS:
            assert plain_samples.EVENTS[system].name == case.event.name
    ours, known = plain_samples.EVENTS["double-pendulum"], brute_force.CASES["double-pendulum"]
    torch.testing.assert_close(ours.margin(circle), known.event.margin(x), rtol=0, atol=2e-5)


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
    assert judge.score(inside[:4000])["faint"] == pytest.approx(0.02, abs=1e-3)
    fainter = inside[4000:6000][judge.event.margin(inside[4000:6000]) > judge.faint]
    assert fresh["faint"] == pytest.approx(0.02, abs=0.015)
    assert judge.score(fainter)["faint"] == 0


def test_the_judge_knows_how_much_floors_scatter():
    event = events.Constraint(lambda x: x[..., 0].amax(-1), (1, 1))
    floors = []
    for seed in range(40):
        x = torch.randn(8000, 1, 1, generator=torch.Generator().manual_seed(seed)).abs()
        floors.append(event_samples.Judge(event, x).floor)
    seen = torch.tensor([floor["total_variation"] for floor in floors]).std()
    said = torch.tensor([floor["scatter"] for floor in floors]).mean()
    assert float(said) == pytest.approx(float(seen), rel=0.3)


def test_systems_are_those_of_the_truth():
    known = {name.removesuffix("-low") for name in event_samples.SYSTEMS}
    assert {*events_scan.SYSTEMS, *known} <= set(brute_force.CASES)
    for name in set(event_samples.SYSTEMS) - known:  # samplers end no lower than networks know
        low, high = plain_samples.sampler(f"{name.replace('-low', '')}-trajectories-low")["ratios"]
        ratios = pretrained.RECIPES[f"{name.replace('-low', '')}-trajectories-low"].model["ratios"]
        assert ratios[0] <= low < ratios[1] < high
    assert set(plain_samples.SYSTEMS.values()) <= set(brute_force.CASES)


def test_counts_of_plain_samples_go_on_from_where_they_were(tmp_path):
    name = "fitzhugh-nagumo-trajectories"
    network = plain_samples.untrained(name)

    def counted(path, chunks):
        *_, entry = plain_samples.run(name, network, chunks, 8, path)
        return entry

    at_once = counted(tmp_path / "a.json", 2)
    one = counted(tmp_path / "b.json", 1)
    in_two = counted(tmp_path / "b.json", 2)
    assert in_two["limits"] == one["limits"]  # the boxes stay what they were
    assert at_once["samples"] == sum(at_once["cells"]) == 16
    assert in_two["counts"] == at_once["counts"]
    assert at_once["counts"][0] > at_once["counts"][-1]


def test_plain_samples_are_drawn_as_many_at_a_time_as_the_device_takes(tmp_path, monkeypatch):
    name = "fitzhugh-nagumo-trajectories"
    monkeypatch.setitem(plain_samples.DRAWN, plain_samples.untrained(name).device.type, 3)
    network = plain_samples.untrained(name)
    found = [
        (entry["chunks"], entry["samples"], sum(entry["cells"]))
        for entry in plain_samples.run(name, network, 4, 8, tmp_path / "a.json")
    ]
    assert found == [(3, 24, 24), (4, 32, 32)]


def test_results_of_other_weights_or_settings_are_not_gone_on_with(tmp_path):
    path = tmp_path / "a.json"
    made_with = {"sha256": "1", "ratios": (0.01, 80.0)}
    assert results.entry(path, "x", made_with)["ratios"] == [0.01, 80.0]
    results.save({"x": results.entry(path, "x", made_with) | {"counts": [3]}}, path)
    assert results.entry(path, "x", made_with)["counts"] == [3]
    assert "counts" not in results.entry(path, "y", made_with)
    with pytest.raises(SystemExit, match="was made with other sha256: delete"):
        results.entry(path, "x", made_with | {"sha256": "2"})


def test_histograms_of_counts_have_the_distance_of_their_samples():
    a, b = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    b, limits = 1.1 * b + 0.2, (-2.0, 2.0)
    found = plain_samples.distance(*(plain_samples.cells(c, limits) for c in (a, b)))
    known = metrics.total_variation(a, b, bins=plain_samples.BINS, limits=limits)
    assert found == pytest.approx(known, abs=2e-5)


def test_eight_bits_move_a_denoiser_by_less_than_a_fiftieth_of_the_noise():
    exact, rounded = (
        plain_samples.network("lorenz63-trajectories", bfloat16=flag) for flag in (None, 0.0)
    )
    x_0 = exact.standardizer(ensembles.lorenz63(16, burn_in=10.0, seed=1))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = (float(v) for v in exact.schedule(t))
        x_t = alpha * x_0 + sigma * eps
        ratio = float((exact(x_t, t) - rounded(x_t, t)).std()) / sigma
        assert 0 < ratio < 0.02, (t, ratio)


def test_eight_bits_end_at_a_noise_level_where_asked_to():
    exact, partly, rounded = (
        plain_samples.network("fitzhugh-nagumo-trajectories", bfloat16=flag)
        for flag in (None, 0.3, 0.0)
    )
    x = torch.randn(4, 60, 4, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1)
    for ratio, same, other in ((0.29, exact, rounded), (0.31, rounded, exact)):
        found = partly.denoise(x, one, ratio * one)
        assert torch.equal(found, same.denoise(x, one, ratio * one))
        assert not torch.equal(found, other.denoise(x, one, ratio * one))
    assert [plain_samples.as_flag(v) for v in (None, 0.0, 0.3)] == [
        "", " --bfloat16", " --bfloat16 0.3"
    ]  # fmt: skip


def test_only_the_network_for_higher_noise_has_eight_bits():
    name = "fitzhugh-nagumo-trajectories-low"
    exact, rounded = (plain_samples.network(name, small=True, bfloat16=f) for f in (None, 0.0))
    x = torch.randn(4, 60, 4, generator=torch.Generator().manual_seed(0))
    one, below = torch.ones(1, 1, 1), pretrained.RECIPES[name].below
    same, other = (
        torch.equal(*(d.denoise(x, one, r * one) for d in (exact, rounded)))
        for r in (below / 2, below * 2)
    )
    assert same
    assert not other


def test_event_samples_with_a_network_for_low_noise_stand_beside_the_others(tmp_path, monkeypatch):
    out = tmp_path / "event-samples.json"
    for name in ("lorenz63", "lorenz63-low"):
        arguments = ["event_samples.py", name, "--small", "--parts", "guided", "--out", str(out)]
        monkeypatch.setattr("sys.argv", arguments)
        event_samples.main()
    found = results.load(out)
    assert found["lorenz63-low"]["weights"] == "lorenz63-trajectories-low"
    assert found["lorenz63-low"]["ratios"] == [0.02, 100.0]
    assert found["lorenz63"]["ratios"] == [0.04, 100.0]
    assert found["lorenz63-low"]["floor"] == found["lorenz63"]["floor"]
    assert "event_samples.py lorenz63-low --number 16" in found["lorenz63-low"]["command"]


def test_twisted_spikes_are_drawn_without_odds_and_with_them_where_asked(
    tmp_path, monkeypatch, capsys
):
    out, real, seen = tmp_path / "event-samples.json", events.twisted_samples, []

    def noted(*arguments, **settings):
        seen.append((settings.get("fitted"), settings.get("least")))
        return real(*arguments, **settings)

    monkeypatch.setattr(events, "twisted_samples", noted)
    rest = ["--small", "--out", str(out), "--parts"]
    arguments = ["event_samples.py", "fitzhugh-nagumo", *rest, "twisted", "odds"]
    monkeypatch.setattr("sys.argv", arguments)
    event_samples.main()
    entry = results.load(out)["fitzhugh-nagumo"]
    assert seen == [(False, 0.5), (None, None)]
    assert entry["twisted"]["fitted"] is False
    assert entry["twisted"]["least"] == 0.5
    assert "fitted" not in entry["odds"]
    monkeypatch.setattr("sys.argv", ["event_samples.py", "lorenz63", *rest, "odds"])
    with pytest.raises(SystemExit):
        event_samples.main()
    assert "twisted samples of lorenz63 are drawn with fitted odds" in capsys.readouterr().err


def test_event_samples_run_the_parts_that_are_wanted_and_keep_the_others(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "event-samples.json"
    present = set()
    for part in ("guided", "steered", "twisted", "levels", "resolution", "renewed"):
        present |= {part}
        arguments = ["double-pendulum", "--small", "--parts", part, "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["event_samples.py", *arguments])
        event_samples.main()
        entry = results.load(out)["double-pendulum"]
        assert set(event_samples.PARTS) & set(entry) == present
        assert entry["command"].endswith(f"--parts {part}")
        if part not in ("levels", "resolution"):
            assert 0 <= entry[part]["inside"] <= 1
    assert entry["steered"]["excess"] == entry["twisted"]["excess"] == 2
    assert entry["renewed"]["renewals"] == [8.0, 4.0]
    assert entry["renewed"]["inside"] == entry["twisted"]["inside"] == 1
    assert "renewals" not in entry["twisted"]
    assert [row["ratio"] for row in entry["levels"]["rows"]] == [0.02, 0.1, 1.0]
    told = entry["resolution"]["rows"]
    assert [row["ratio"] for row in told] == list(event_samples.RESOLUTION)
    assert all(row[k]["median"] > 0 for row in told for k in ("network", "others"))
    # after a move at the lowest level the states are still where they were, or nearly
    assert entry["levels"]["rows"][0]["total_variation"] < 1
    assert entry["guided"]["command"].endswith("--parts guided")
    assert {entry[part]["bfloat16"] for part in event_samples.USUAL} == {None}
    # what is there is kept, and refused if asked for with other settings
    before = out.read_bytes()
    event_samples.main()
    assert out.read_bytes() == before
    assert "are there" in capsys.readouterr().out
    for other, words in (("--excess 3", "excess"), ("--bfloat16 0.1", "bfloat16")):
        monkeypatch.setattr("sys.argv", ["event_samples.py", *arguments, *other.split()])
        with pytest.raises(SystemExit, match=f"renewed of .* was made with other {words}: delete"):
            event_samples.main()
    assert "excess" not in entry["guided"]
    # renewed samples that go on from those of the same run are those that are drawn alone
    both = ["double-pendulum", "--small", "--parts", "twisted", "renewed", "--out", f"{out}.both"]
    monkeypatch.setattr("sys.argv", ["event_samples.py", *both])
    event_samples.main()
    again = results.load(tmp_path / "event-samples.json.both")["double-pendulum"]
    for part in ("twisted", "renewed"):
        assert again[part] | {"command": ""} == entry[part] | {"command": ""}
