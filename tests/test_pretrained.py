"""Shipped weights: what can go wrong on loading, the round trip, and each card against itself."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from ddmlib import __main__ as command_line
from ddmlib import (
    denoisers,
    networks,
    pretrained,
    recipes,
    schedules,
    training,
)

MAIN, FEATURES = "lorenz63-states", "lorenz63-features"
SHIPPED = sorted(path.stem for path in pretrained.WEIGHTS.glob("*.json"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Return a folder with the main weights and the features, trained for seconds."""
    folder = tmp_path_factory.mktemp("weights")
    for name in (MAIN, FEATURES):
        pretrained.train(name, budget="smoke", device="cpu", folder=folder)
    return folder


@pytest.fixture
def folder(smoke, tmp_path):
    """Return a copy of the folder that a test may spoil."""
    return shutil.copytree(smoke, tmp_path / "weights")


def sample_shape(model, n):
    """Return the shape of n states, or of n trajectories, that a card's model takes."""
    if model["network"] == "ConvNet":
        return (n, 65, 3)
    length = model.get("length", model["network_settings"].get("window"))
    return (n, length, len(model["mean"])) if length else (n, 3)


# --- shipped weights -----------------------------------------------------------------------------


def test_the_main_weights_are_shipped():
    assert MAIN in SHIPPED


def test_every_shipped_card_belongs_to_a_recipe_and_to_weights():
    weights = sorted(path.stem for path in pretrained.WEIGHTS.glob("*.safetensors"))
    assert weights == SHIPPED
    assert set(SHIPPED) <= set(pretrained.names())
    assert sum(p.stat().st_size for p in pretrained.WEIGHTS.glob("*")) < 20e6


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_card_says_how_the_weights_were_made(name):
    card, recipe = pretrained.card(name), recipes.RECIPES[name]
    assert card["name"] == name
    first = f"python -m ddmlib train {recipe.start or name} "
    assert card["command"].startswith(first)
    assert f"python -m ddmlib train {name} " in card["command"] + " "
    budget = card["command"].split("--budget ")[1].split()[0]  # the first of them
    assert card["model"] == json.loads(json.dumps(recipe.model_for(budget)))
    assert {"steps", "batch", "seed"} <= card["training"].keys()
    assert {"device", "minutes", "torch", "python"} <= card["made_on"].keys()
    tensors, _ = training.load_tensors(pretrained.WEIGHTS / f"{name}.safetensors")
    assert {value.dtype for value in tensors.values()} == {recipe.stored}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_score_what_their_card_says(name, device):
    """The headline metric, measured anew at the card's small sample size and seeds."""
    metrics = pretrained.card(name)["metrics"]
    stored = metrics["small"]
    ours = pretrained.measure(name, stored["samples"], device=device, brief=True)
    if "hellinger" in stored:
        assert ours["hellinger"] == pytest.approx(stored["hellinger"], abs=0.01)
        assert ours["hellinger_floor"] == pytest.approx(stored["hellinger_floor"], abs=0.01)
        assert ours["hellinger"] > 0.9 * ours["hellinger_floor"]  # nothing beats the floor
        full = metrics["hellinger_excess"]
        # at 16 384 samples the distance is mostly floor: its noise of about 0.002 limits the excess
        noise = math.sqrt(2 * ours["hellinger_floor"] * 0.004)
        assert ours["hellinger_excess"] < full + noise
    elif "denoising_error" in stored:
        assert ours["denoising_error"] == pytest.approx(stored["denoising_error"], rel=0.02)
        assert ours["denoising_error"] == pytest.approx(metrics["denoising_error"], rel=0.3)
    elif "total_variation" in stored:
        assert ours["total_variation"] == pytest.approx(stored["total_variation"], abs=0.02)
        assert ours["total_variation"] < ours["total_variation_floor"] + 0.06
    else:
        assert ours["rmse"] == pytest.approx(stored["rmse"], rel=0.02)
        assert ours["rmse"] < 0.1 * ours["rms_of_the_increment"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_and_are_finite(name, device):
    model, card = pretrained.load(name, device)
    x = torch.randn(*sample_shape(card["model"], 5), generator=torch.Generator().manual_seed(0))
    x = x.to(device)
    if card["model"]["kind"] == "denoiser":
        for t in (0.0, 0.5, 1.0):
            assert torch.isfinite(model(x, t)).all()
    else:
        assert torch.isfinite(model(x)).all()


# --- the round trip ------------------------------------------------------------------------------


def test_train_writes_weights_that_load_gives_back(smoke, device):
    denoiser, card = pretrained.load(MAIN, device, smoke)
    assert isinstance(denoiser, denoisers.NetworkDenoiser)
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert next(denoiser.parameters()).device.type == device.type
    assert card == pretrained.card(MAIN, smoke)
    assert card["training"]["steps"] == recipes.RECIPES[MAIN].budgets["smoke"]["steps"]
    stored, note = training.load_tensors(smoke / f"{MAIN}.safetensors")
    assert note["name"] == MAIN
    for key, value in denoiser.state_dict().items():
        torch.testing.assert_close(value.cpu(), stored[key].float(), rtol=0, atol=0)
    model = card["model"]
    assert denoiser.head == model["head"]
    assert list(denoiser.ratios) == model["ratios"]
    assert isinstance(denoiser.schedule, schedules.by_name(model["schedule"]).__class__)
    assert denoiser.standardizer.mean.tolist() == pytest.approx(model["mean"])
    features, _ = pretrained.load(FEATURES, device, smoke)
    assert isinstance(features, networks.Dense)
    assert sorted(p.name for p in smoke.iterdir()) == sorted(
        f"{name}.{kind}" for name in (MAIN, FEATURES) for kind in ("json", "safetensors")
    )


def same_weights(a, b):
    a, b = (training.load_tensors(folder / f"{MAIN}.safetensors")[0] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_interrupted_training_resumes_to_the_same_weights(smoke, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 7:
            raise Stop

    settings = {"budget": "smoke", "device": "cpu", "folder": tmp_path}
    settings["checkpoint"] = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        pretrained.train(MAIN, report=stop, **settings)
    assert not list(tmp_path.glob(f"{MAIN}.*"))  # nothing half-written
    pretrained.train(MAIN, **settings)
    assert same_weights(smoke, tmp_path)


def test_a_kill_between_the_last_checkpoint_and_the_weights_loses_nothing(smoke, tmp_path):
    settings = {"budget": "smoke", "device": "cpu", "checkpoint": tmp_path / "run.ckpt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrained.train(MAIN, folder=tmp_path, **settings)
    (tmp_path / f"{MAIN}.safetensors").unlink()
    pretrained.train(MAIN, folder=tmp_path, **settings)
    assert same_weights(smoke, tmp_path)
    assert pretrained.card(MAIN, tmp_path)["name"] == MAIN
    note = training.load_tensors(settings["checkpoint"])[1]
    minutes = pretrained.card(MAIN, tmp_path)["made_on"]["minutes"]
    assert minutes == round(note["seconds"] / 60, 1)


@pytest.mark.parametrize("name", pretrained.names())
def test_every_recipe_builds_a_denoiser_or_network(name):
    recipe = recipes.RECIPES[name]
    assert set(recipe.budgets) - set(recipes.CONTINUED) == set(recipes.BUDGETS)
    assert pretrained.build(recipe.model_for("full")) is not None
    model = json.loads(json.dumps(recipe.model))  # as a card stores it
    module = pretrained.build(model)
    if model["kind"] == "denoiser":
        x = torch.zeros(*sample_shape(model, 2))
        assert module(x, 0.5).shape == x.shape
    else:
        assert module.hidden(torch.zeros(2, 3)).shape == (2, 256)


TRAJECTORIES = ["noisy-lorenz63-window-k2", "noisy-lorenz63-conv", "noisy-lorenz63-levels"]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_recipes_of_trajectories_train_and_are_measured(name, tmp_path, monkeypatch):
    card = pretrained.train(name, budget="smoke", device="cpu", folder=tmp_path)
    assert card["training"]["window"] == (5 if "k2" in name else 65)
    denoiser, _ = pretrained.load(name, "cpu", tmp_path)
    assert denoiser.event == 2
    small = recipes.RECIPES[name].budgets["smoke"]
    monkeypatch.setattr(
        recipes.noisy_lorenz63, "DATA", {k: small[k] for k in ("trajectories", "length", "burn_in")}
    )
    monkeypatch.setattr(recipes.noisy_lorenz63, "STEPS", 3)
    brief = pretrained.measure(name, 2**12, device="cpu", folder=tmp_path, brief=True)
    assert 0 < brief["denoising_error"] < 1.5
    assert brief == pretrained.measure(name, 2**12, device="cpu", folder=tmp_path, brief=True)
    full = pretrained.measure(name, 2**10, device="cpu", folder=tmp_path)
    assert full["trajectories"] == 2**10 // 65
    assert math.isfinite(full["log_prior_generated"])
    # by theory 64 transitions of log-density -3/2 log(2 pi dt e) on average
    assert full["log_prior_data"] == pytest.approx(81.7, abs=15)


def test_observations_of_the_training_with_levels():
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    precision = recipes.noisy_lorenz63.observed(4000, 65, uniform)
    seen = precision > 0
    some = seen.flatten(1).any(1)
    assert float(some.float().mean()) == pytest.approx(0.82, abs=0.03)  # gaps leave some with none
    # one std for a trajectory, log-uniform from 0.02 to 1
    std = precision.flatten(1).max(1).values[some].rsqrt()
    assert 0.02 <= float(std.min()) < 0.021
    assert 0.95 < float(std.max()) <= 1
    assert float(std.log().mean()) == pytest.approx(math.log(0.02 * 50**0.5), abs=0.05)
    values = torch.where(seen, precision, precision.flatten(1).max(1).values[:, None, None])
    assert torch.equal(values.amax((1, 2)), values.amin((1, 2)))
    # the first component more often than the others, which are alike
    share = seen.any(1).float().mean(0)
    assert float(share[1] - share[2]) == pytest.approx(0, abs=0.03)
    assert float(share[0] - share[1]) > 0.1
    # strides are powers of two: without gaps, the first two observed states tell
    times = seen.any(2)
    gaps = [int(t.nonzero()[:2, 0].diff()) for t in times if int(t.sum()) > 1]
    assert {1, 2, 4, 8, 16} <= set(gaps)


@pytest.mark.parametrize("budget", recipes.CONTINUED)
def test_training_goes_on_from_the_weights_that_are_there(budget, tmp_path, monkeypatch):
    name, system = "fitzhugh-nagumo-trajectories", "fitzhugh-nagumo"
    make = functools.partial(recipes.trajectories.ENSEMBLES[system], burn_in=6.0)
    monkeypatch.setitem(recipes.trajectories.ENSEMBLES, system, make)
    settings = {"device": "cpu", "folder": tmp_path}
    with pytest.raises(RuntimeError, match="is not there; train it"):
        pretrained.train(name, budget=budget, **settings)
    first = pretrained.train(name, budget="smoke", **settings)
    started = training.load_tensors(tmp_path / f"{name}.safetensors")[0]
    quick = {"trajectories": 64, "batch": 8, "groups": 4, "pool": 16, "lr": 1e-7, "kernel_lr": 1e-7}
    known = recipes.RECIPES[name].budgets
    monkeypatch.setitem(known, budget, known[budget] | quick)
    card = pretrained.train(name, budget=budget, steps=3, **settings)
    ended = training.load_tensors(tmp_path / f"{name}.safetensors")[0]
    assert all(torch.allclose(started[k], ended[k], atol=2e-3) for k in started)
    assert any(not torch.equal(started[k], ended[k]) for k in started)
    assert card["command"] == f"{first['command']} && python -m ddmlib train {name} " + (
        f"--budget {budget} --steps 3"
    )
    assert card["training"]["steps"] == 3
    assert card["training"]["far"] == {"tail": 0.05, "share": 0.5}
    assert card["training"]["before"]["steps"] == first["training"]["steps"]
    assert card["model"] == first["model"]
    with pytest.raises(
        ValueError, match="budget must be one of default, full, further, more, smoke"
    ):
        pretrained.train(name, budget="huge", **settings)
    with pytest.raises(ValueError, match="budget must be one of"):
        pretrained.train(MAIN, budget=budget, **settings)


def test_the_network_is_compiled_when_asked_for(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    settings = {"budget": "smoke", "device": "cpu", "folder": tmp_path, "steps": 2}
    card = pretrained.train(MAIN, compiled=True, **settings)
    assert [kind.__name__ for kind in compiled] == [card["model"]["network"]]
    assert card["command"].endswith("--budget smoke --steps 2 --compile")
    with pytest.raises(ValueError, match="steps must be"):
        pretrained.train(MAIN, **settings | {"steps": 0})


@pytest.mark.parametrize("name", [*recipes.trajectories.RECIPES, *recipes.low_noise.RECIPES])
def test_trajectory_weights_are_trained_and_measured(name, tmp_path, monkeypatch):
    quick = {"lorenz63": {"burn_in": 0.1}, "fitzhugh-nagumo": {"burn_in": 6.0}}
    for system, settings in quick.items():  # far from stationary, but seconds instead of minutes
        make = functools.partial(recipes.trajectories.ENSEMBLES[system], **settings)
        monkeypatch.setitem(recipes.trajectories.ENSEMBLES, system, make)
    recipes.trajectories.reference.cache_clear()
    card = pretrained.train(name, budget="smoke", device="cpu", folder=tmp_path)
    assert math.isfinite(card["training"]["final_loss"])
    denoiser, _ = pretrained.load(name, "cpu", tmp_path)
    assert denoiser(torch.zeros(2, 60, len(card["model"]["mean"])), 0.5).shape[:2] == (2, 60)
    found = pretrained.measure(name, 16, device="cpu", folder=tmp_path)
    assert 0 <= found["total_variation_floor"] < 1
    assert 0 < found["total_variation"] <= 1
    assert 0 <= found["probability"] <= 1
    brief = pretrained.measure(name, 16, device="cpu", folder=tmp_path, brief=True)
    assert brief.items() < found.items()
    recipes.trajectories.reference.cache_clear()


LOW, CPU = "fitzhugh-nagumo-trajectories-low", torch.device("cpu")


@pytest.fixture
def low(tmp_path, monkeypatch):
    """Return a folder with weights for low noise, trained for seconds from the shipped ones."""
    make = functools.partial(recipes.trajectories.ENSEMBLES["fitzhugh-nagumo"], burn_in=6.0)
    monkeypatch.setitem(recipes.trajectories.ENSEMBLES, "fitzhugh-nagumo", make)
    known = recipes.RECIPES[LOW].budgets
    quick = {"pool": 16, "lr": 1e-7, "kernel_lr": 1e-7}
    monkeypatch.setitem(known, "smoke", known["smoke"] | quick)
    pretrained.train(LOW, budget="smoke", device="cpu", folder=tmp_path, steps=2)
    return tmp_path


def test_weights_for_low_noise_start_from_those_for_all_and_say_so(low):
    start, card = recipes.RECIPES[LOW].start, pretrained.card(LOW, low)
    before = training.load_tensors(pretrained.WEIGHTS / f"{start}.safetensors")[0]
    after = training.load_tensors(low / f"{LOW}.safetensors")[0]
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=2e-3) for k in before)
    shipped = pretrained.card(start)
    assert card["command"] == (
        f"{shipped['command']} && python -m ddmlib train {LOW} --budget smoke --steps 2"
    )
    assert card["training"]["before"]["steps"] == shipped["training"]["steps"]
    assert card["model"] == shipped["model"] | {"ratios": [0.01, 1.5]}


def test_by_further_the_error_of_c_counts_more(low, monkeypatch):
    system, start = "fitzhugh-nagumo", recipes.RECIPES[LOW].start
    known = recipes.RECIPES[LOW].budgets
    quick = {"trajectories": 64, "batch": 8, "groups": 4, "pool": 16, "lr": 1e-7, "kernel_lr": 1e-7}
    settings = known["further"] | quick
    monkeypatch.setitem(known, "further", settings)
    card = pretrained.train(LOW, budget="further", device="cpu", folder=low, steps=1)
    assert card["training"]["event"] == recipes.low_noise.ASKED
    denoiser = pretrained.load(start, "cpu")[0]

    def value(**change):
        loss = recipes.trajectories.denoising(
            system, denoiser, {k: v for k, v in (settings | change).items() if v is not None}, CPU
        )
        return float(loss(torch.Generator().manual_seed(0)))

    without, once, twice = value(event=None), value(event=0.3), value(event=0.6)
    assert 0 < without < once
    assert twice - without == pytest.approx(2 * (once - without), rel=1e-4)


def test_two_networks_are_joined_where_the_recipe_says(low, tmp_path):
    start, below = recipes.RECIPES[LOW].start, recipes.RECIPES[LOW].below
    both, card = pretrained.joined(LOW, "cpu", low)
    assert card == pretrained.card(LOW, low)
    parts = pretrained.load(start, "cpu")[0], pretrained.load(LOW, "cpu", low)[0]
    assert both.ratios == (parts[1].ratios[0], parts[0].ratios[1]) == (0.01, 80.0)
    x = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1, 1)
    for ratio, part in ((0.99 * below, parts[1]), (1.01 * below, parts[0])):
        assert torch.equal(both.denoise(x, one, ratio * one), part.denoise(x, one, ratio * one))
    # weights of the folder come before those of the package
    pretrained.train(start, budget="smoke", device="cpu", folder=low, steps=1)
    mine = pretrained.joined(LOW, "cpu", low)[0].denoise(x, one, one)
    assert not torch.equal(mine, both.denoise(x, one, one))
    with pytest.raises(ValueError, match="name must be that of weights for low noise, got"):
        pretrained.joined(start, "cpu")


def test_the_network_of_lorenz_63_for_low_noise_is_averaged_over_its_mirror(tmp_path, monkeypatch):
    name = "lorenz63-trajectories-low"
    make = functools.partial(recipes.trajectories.ENSEMBLES["lorenz63"], burn_in=0.1)
    monkeypatch.setitem(recipes.trajectories.ENSEMBLES, "lorenz63", make)
    pretrained.train(name, budget="smoke", device="cpu", folder=tmp_path, steps=1)
    both, _ = pretrained.joined(name, "cpu", tmp_path)
    x = 10 * torch.randn(3, 60, 3, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([-1.0, -1.0, 1.0])
    units, t = both.standardizer, float(both.schedule.time(torch.tensor(0.5)))
    alpha, sigma = (float(v) for v in both.schedule(t))
    noise = sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    here = units.inverse(both(alpha * units(x) + noise, t))
    there = units.inverse(both(alpha * units(signs * x) + signs * noise, t))
    torch.testing.assert_close(there, signs * here, rtol=1e-4, atol=1e-4)


def test_eight_bits_change_a_training_loss_by_next_to_nothing(monkeypatch):
    make = functools.partial(recipes.trajectories.ENSEMBLES["lorenz63"], burn_in=1.0)
    monkeypatch.setitem(recipes.trajectories.ENSEMBLES, "lorenz63", make)
    monkeypatch.setitem(recipes.trajectories.RATIOS, "lorenz63", (0.05, 400.0))
    denoiser, _ = pretrained.load("lorenz63-trajectories", "cpu")
    denoiser.requires_grad_(True)
    values, slopes = [], []
    for flag in (False, True):
        settings = {"trajectories": 64, "batch": 32, "groups": 8, "bfloat16": flag}
        loss = recipes.trajectories.denoising("lorenz63", denoiser, settings, torch.device("cpu"))
        value = loss(torch.Generator().manual_seed(0))
        (slope,) = torch.autograd.grad(value, denoiser.network.last.weight)
        values.append(float(value.detach()))
        slopes.append(slope)
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.01)
    assert float((slopes[1] - slopes[0]).norm() / slopes[0].norm()) < 0.2
    assert slopes[1].dtype == torch.float32


# --- bad files -----------------------------------------------------------------------------------


def test_unknown_names_are_refused(tmp_path):
    for call in (pretrained.card, pretrained.load, pretrained.train, pretrained.measure):
        with pytest.raises(ValueError, match=r"name must be one of .*lorenz63-states.*'lorenz'"):
            call("lorenz")
    with pytest.raises(ValueError, match="budget must be one of default"):
        pretrained.train(MAIN, budget="huge", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_files_are_refused(folder):
    train = f"python -m ddmlib train {MAIN}"
    (folder / f"{MAIN}.safetensors").unlink()
    with pytest.raises(RuntimeError, match=rf"{MAIN}\.safetensors is not there.*{train}"):
        pretrained.load(MAIN, "cpu", folder)
    (folder / f"{MAIN}.json").unlink()
    with pytest.raises(RuntimeError, match=rf"{MAIN}\.json is not there.*{train}"):
        pretrained.load(MAIN, "cpu", folder)


@pytest.mark.parametrize("size", [0, 50, -1])
def test_truncated_weights_are_refused(folder, size):
    path = folder / f"{MAIN}.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RuntimeError, match=rf"{MAIN}\.safetensors is truncated or no safetensors"):
        pretrained.load(MAIN, "cpu", folder)


@pytest.mark.parametrize("text", ["", '{"name": ', "weights"])
def test_truncated_card_is_refused(folder, text):
    (folder / f"{MAIN}.json").write_text(text)
    with pytest.raises(RuntimeError, match=rf"{MAIN}\.json is truncated or no card"):
        pretrained.card(MAIN, folder)


def test_foreign_weights_are_refused(folder):
    path = folder / f"{MAIN}.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)  # a pickle is never read
    with pytest.raises(RuntimeError, match="truncated or no safetensors file"):
        pretrained.load(MAIN, "cpu", folder)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(RuntimeError, match="not written by ddmlib"):
        pretrained.load(MAIN, "cpu", folder)
    shutil.copy(folder / f"{FEATURES}.safetensors", path)
    with pytest.raises(RuntimeError, match=rf"{MAIN}.safetensors does not fit.*missing \['network"):
        pretrained.load(MAIN, "cpu", folder)


def test_weights_of_the_wrong_shape_are_refused(folder):
    path = folder / f"{MAIN}.safetensors"
    tensors, note = training.load_tensors(path)
    key = "network.last.bias"
    training.save_tensors(path, tensors | {key: torch.zeros(5)}, note)
    with pytest.raises(RuntimeError, match=f"wrong shape.*{key}"):
        pretrained.load(MAIN, "cpu", folder)


def test_half_precision_weights_are_loaded_in_single(folder):
    path = folder / f"{MAIN}.safetensors"
    tensors, note = training.load_tensors(path)
    training.save_tensors(path, {k: v.half() for k, v in tensors.items()}, note)
    denoiser, _ = pretrained.load(MAIN, "cpu", folder)
    assert all(p.dtype == torch.float32 for p in denoiser.parameters())


# --- the command line ----------------------------------------------------------------------------


def test_command_line_lists_names_as_a_module():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ddmlib", "list"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()] == pretrained.names()


def test_command_line_trains_and_shows_a_card(tmp_path, capsys, smoke):
    where = ["--folder", str(tmp_path)]
    train = ["train", MAIN, "--budget", "smoke", "--device", "cpu", *where]
    assert command_line.main(train) == 0
    assert "samples/s" in capsys.readouterr().out
    assert command_line.main(["card", MAIN, *where]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card == pretrained.card(MAIN, tmp_path)
    assert card["training"] == pretrained.card(MAIN, smoke)["training"]
    assert same_weights(smoke, tmp_path)


def test_command_line_reports_errors(capsys, tmp_path):
    assert command_line.main(["card", "lorenz"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: name must be one of")
    assert command_line.main(["card", MAIN, "--folder", str(tmp_path)]) == 1
    assert "python -m ddmlib train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["train", MAIN, "--budget", "huge"])
    for alone in (["--write"], ["--samples", "5"], ["--device", "cpu"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command_line.main(["card", MAIN, *alone])
        assert f"{alone[0]} goes with --measure" in capsys.readouterr().err


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    names = [f"lorenz63-f24-{head}-cosine-0" for head in ("noise", "state")]
    options = {"budget": "smoke", "device": "cpu", "folder": tmp_path}
    options["checkpoint"] = tmp_path / "run.ckpt"
    pretrained.train(names[0], **options)
    with pytest.raises(ValueError, match="checkpoint of other settings"):
        pretrained.train(names[1], **options)
    assert not (tmp_path / f"{names[1]}.safetensors").exists()


def test_measure_refuses_no_samples():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        pretrained.measure(MAIN, 0)
