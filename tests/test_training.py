"""Training: exact resumption, checkpoints that survive a kill, convergence to the oracle."""

import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from torch import nn

from ddmlib import datasets, denoisers, guidance, networks, schedules, surrogates, training

MEAN = torch.tensor([0.3, -0.2])
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.7]])


def states(n=4096, seed=0):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return MEAN + z @ torch.linalg.cholesky(COVARIANCE).mT


def make(device="cpu", width=8, blocks=1, embedding=4):
    """Return a new denoiser with an average: every call the same parameters."""
    torch.manual_seed(1)
    net = networks.ResidualMLP(dim=2, width=width, blocks=blocks, embedding=embedding)
    settings = {"head": "velocity", "ratios": (1e-2, 1e2)}
    schedule = schedules.LogLinear(1e-2, 1e2)
    standardizer = datasets.Standardizer.identity(2)
    return denoisers.NetworkDenoiser(net, schedule, standardizer, **settings).to(device)


class Run:
    """One training run from the start; ``go`` runs it on, ``tensors`` is all of its state."""

    def __init__(self, path=None, device="cpu", steps=24, seed=2, **changes):
        self.denoiser = make(device)
        self.average = training.Average(self.denoiser, 0.9)
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = {
            "steps": steps,
            "lr": 3e-3,
            "warmup": 5,
            "weight_decay": 0.01,
            "report_every": 3,
            "checkpoint": path,
            "checkpoint_every": 4,
        } | changes
        self.loss = training.denoising_batches(
            self.denoiser, states(200).to(device), batch=16, groups=4
        )

    def go(self, stop=None):
        for progress in training.fit(
            self.denoiser,
            self.loss,
            generator=self.generator,
            average=self.average,
            **self.settings,
        ):
            if stop is not None and progress.step >= stop:
                break
        return self

    def tensors(self):
        parts = {"module": self.denoiser, "average": self.average.module}
        out = {f"{a}.{k}": v for a, m in parts.items() for k, v in m.state_dict().items()}
        return out | {"generator": self.generator.get_state()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- resumption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear", "constant"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, device, lr_schedule):
    whole = Run(device=device, lr_schedule=lr_schedule).go()
    path = tmp_path / "run.ckpt"
    Run(path, device=device, lr_schedule=lr_schedule).go(stop=6)  # between two checkpoints
    _, note = training.load_tensors(path)
    assert note["step"] == 4
    Run(path, device=device, lr_schedule=lr_schedule).go(stop=15)  # and again
    resumed = Run(path, device=device, lr_schedule=lr_schedule).go()
    if device.type == "cpu":
        assert same(resumed.tensors(), whole.tensors())
    else:
        for key, value in whole.tensors().items():
            torch.testing.assert_close(resumed.tensors()[key], value, rtol=1e-4, atol=1e-5)


def test_a_resumed_training_counts_the_seconds_before_it(tmp_path, monkeypatch):
    clock, path = [0.0], tmp_path / "run.ckpt"
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    def seconds(stop):
        clock[0] += 1000.0  # between two trainings
        run = Run(path, samples_per_step=16)
        loss = run.loss

        def slow(generator):
            clock[0] += 10.0
            return loss(generator)

        for progress in training.fit(
            run.denoiser, slow, generator=run.generator, average=run.average, **run.settings
        ):
            if progress.step >= stop:
                return progress.seconds, progress.samples_per_second
        raise AssertionError("no record")

    assert seconds(6) == (60.0, 1.6)  # of which the checkpoint knows the first four steps
    assert seconds(24) == (240.0, 1.6)
    assert training.load_tensors(path)[1]["seconds"] == 240.0


def test_saving_does_not_change_the_training(tmp_path):
    assert same(Run(tmp_path / "a").go().tensors(), Run().go().tensors())
    other = Run(tmp_path / "b", report_every=100, checkpoint_every=7).go()
    assert same(other.tensors(), Run().go().tensors())


def test_finished_training_is_not_repeated(tmp_path):
    first = Run(tmp_path / "run").go()
    again = Run(tmp_path / "run")
    records = list(
        training.fit(
            again.denoiser,
            lambda generator: pytest.fail("no step is left"),
            generator=again.generator,
            average=again.average,
            **again.settings,
        )
    )
    assert records == []
    assert same(again.tensors(), first.tensors())


KILLED = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import test_training
    calls, real = 0, os.{call}

    def deadly(*arguments):
        global calls
        calls += 1
        if calls == 3:
            os._exit(9)  # nothing is cleaned up, as by SIGKILL
        return real(*arguments)

    os.{call} = deadly
    test_training.Run({path!r}).go()
"""


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path, call):
    path = tmp_path / "run.ckpt"
    script = textwrap.dedent(KILLED).format(
        tests=os.path.dirname(__file__), call=call, path=str(path)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    tensors, note = training.load_tensors(path)
    assert note["step"] == 8  # the third save was of step 12
    assert any(key.startswith("average.") for key in tensors)
    assert same(Run(path).go().tensors(), Run().go().tensors())


def test_a_failed_save_leaves_the_previous_checkpoint_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    Run(path).go(stop=6)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        Run(path).go()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    run = Run(path)
    good, calls = run.loss, []

    def bad(generator):
        calls.append(1)
        return good(generator) * (math.nan if len(calls) > 9 else 1)

    run.loss = bad
    with pytest.raises(RuntimeError, match="loss is not finite at step 12"):
        run.go()
    _, note = training.load_tensors(path)
    assert note["step"] == 8
    assert same(Run(path).go().tensors(), Run().go().tensors())


# --- bad files -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    Run(path).go(stop=6)
    return path


def refused(path, error, words, **changes):
    """Assert that a run refuses the checkpoint and that nothing of the run has changed."""
    run = Run(path, **changes)
    before = {k: v.clone() for k, v in run.tensors().items()}
    with pytest.raises(error, match=words):
        run.go()
    assert same(run.tensors(), before)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_checkpoints_are_refused(checkpoint, size):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:size])
    refused(checkpoint, RuntimeError, r"run.ckpt is truncated or no safetensors file")


def test_foreign_files_are_refused(checkpoint):
    checkpoint.write_text("not a tensor in sight")
    refused(checkpoint, RuntimeError, "truncated or no safetensors file")
    torch.save({"a": torch.zeros(3)}, checkpoint)  # a pickle
    refused(checkpoint, RuntimeError, "truncated or no safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(3)}, checkpoint)
    refused(checkpoint, RuntimeError, "not written by ddmlib")
    safetensors.torch.save_file({"a": torch.zeros(3)}, checkpoint, {"note": "{oh"})
    refused(checkpoint, RuntimeError, "not written by ddmlib")
    training.save_tensors(checkpoint, {"a": torch.zeros(3)}, {"name": "other"})
    refused(checkpoint, ValueError, "other settings")


@pytest.mark.parametrize(
    "changes", [{"steps": 48}, {"lr": 1e-3}, {"lr_schedule": "linear"}, {"warmup": 0}]
)
def test_checkpoints_of_other_settings_are_refused(checkpoint, changes):
    refused(checkpoint, ValueError, "checkpoint of other settings", **changes)


def test_a_checkpoint_says_which_run_it_is_of(tmp_path):
    path = tmp_path / "in" / "a" / "new" / "folder" / "run.ckpt"
    Run(path, identity={"name": "a", "widths": (8, 16)}).go(stop=6)
    Run(path, identity={"name": "a", "widths": [8, 16]}).go(stop=8)  # as JSON knows it
    refused(path, ValueError, "checkpoint of other settings", identity={"name": "b"})
    refused(path, ValueError, "checkpoint of other settings")


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    path = tmp_path / "run.ckpt"
    run = Run(path, checkpoint_every=1, report_every=1)
    good, weight = run.loss, next(run.denoiser.parameters())

    def bad(generator):
        value = good(generator)  # finite, with a gradient that is not
        return value + (0.0 * weight.sum()).sqrt() * (torch.rand((), generator=generator) > 2)

    run.loss = bad
    with pytest.raises(RuntimeError, match="a parameter is not finite at step 1"):
        run.go()
    assert not path.exists()


def test_a_generator_of_another_device_is_refused(checkpoint):
    tensors, note = training.load_tensors(checkpoint)
    odd = tensors | {"generator": torch.zeros(16, dtype=torch.uint8)}
    training.save_tensors(checkpoint, odd, note)
    refused(checkpoint, RuntimeError, "holds a generator of another device")


def test_tensors_that_share_memory_are_saved(tmp_path):
    tied = torch.arange(4.0)
    training.save_tensors(tmp_path / "x", {"a": tied, "b": tied, "c": tied[1:]}, {"n": 1})
    back, _ = training.load_tensors(tmp_path / "x")
    for name, expected in {"a": tied, "b": tied, "c": tied[1:]}.items():
        assert torch.equal(back[name], expected)


def test_states_are_no_trajectories(generator):
    network = networks.TrajectoryUNet(dim=3, widths=(8, 16), blocks=1, kernel=3, embedding=8)
    denoiser = denoisers.NetworkDenoiser(network, schedules.Cosine(), datasets.LORENZ63)
    with pytest.raises(ValueError, match="window must be given"):
        training.denoising_batches(denoiser, torch.zeros(500, 3), batch=16, groups=4)
    with pytest.raises(ValueError, match="x_0 must have more than 2 axes"):
        guidance.error_variance(denoiser, torch.zeros(500, 3), torch.tensor([0.1, 1.0]))
    with pytest.raises(ValueError, match="denoiser must be one of states"):
        surrogates.DenoiserFeatures(denoiser)


def test_checkpoints_of_another_network_are_refused_and_nothing_is_assigned(checkpoint):
    tensors, note = training.load_tensors(checkpoint)
    wide = {k: v.repeat(2, 1) if v.ndim == 2 else v for k, v in tensors.items()}
    training.save_tensors(checkpoint, wide, note)
    refused(checkpoint, RuntimeError, "wrong shape")
    for part in ("module", "average", "optimiser", "generator"):
        less = {k: v for k, v in tensors.items() if not k.startswith(part)}
        training.save_tensors(checkpoint, less, note)
        refused(checkpoint, RuntimeError, "missing")
    odd = tensors | {"module.network.tail.weight": torch.zeros(2)}
    training.save_tensors(checkpoint, odd, note)
    refused(checkpoint, RuntimeError, "unknown")


def test_assign_changes_all_or_nothing():
    module = nn.Linear(2, 3)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    for bad, words in (
        ({"weight": torch.ones(3, 2)}, r"file does not fit.*missing \['bias'\]"),
        (good | {"more": torch.ones(1)}, r"unknown \['more'\]"),
        (good | {"bias": torch.ones(2)}, r"wrong shape \['bias'\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            training.assign(module, bad, "file")
        assert same(module.state_dict(), before)
    training.assign(module, good, "file")
    assert same(module.state_dict(), good)


def test_tensors_and_note_come_back(tmp_path, device):
    tensors = {
        "a": torch.randn(3, 4, device=device).mT,  # not contiguous
        "b": torch.arange(3, dtype=torch.uint8),
        "c": torch.randn(2, dtype=torch.float64, requires_grad=True),
        "d": torch.randn(4).half(),
    }
    training.save_tensors(tmp_path / "x", tensors, {"steps": 3, "nested": {"lr": 0.1}})
    back, note = training.load_tensors(tmp_path / "x")
    assert same(back, {k: v.detach().cpu() for k, v in tensors.items()})
    assert note == {"steps": 3, "nested": {"lr": 0.1}}


# --- the loop ------------------------------------------------------------------------------------


def test_learning_rates():
    def rates(kind, warmup=0, steps=100):
        return [training.learning_rate(k, steps, 0.5, kind, warmup) for k in range(steps)]

    assert rates("constant") == [0.5] * 100
    assert rates("linear") == pytest.approx([0.5 * (1 - k / 100) for k in range(100)])
    cosine = rates("cosine")
    assert cosine[0] == 0.5
    assert cosine[50] == pytest.approx(0.25)
    assert cosine[25] + cosine[75] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 1e-3
    for kind in ("constant", "linear", "cosine"):
        warm = rates(kind, warmup=10)
        assert warm[:10] == pytest.approx([0.05 * (k + 1) for k in range(10)])
        assert warm[10] == pytest.approx(0.5)
        assert warm == pytest.approx(warm[:10] + rates(kind, steps=90))


def test_average_follows_its_formula():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average = training.Average(module, decay=0.6)
    assert not any(p.requires_grad for p in average.module.parameters())
    expected = 1.0
    for n in range(12):
        nn.init.constant_(module.weight, float(n * n))
        average.update(module, n)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == 121


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_a_step_is_adamw(clip):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=0.02, weight_decay=0.1, foreach=False)
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    for k in range(30):
        optimiser.param_groups[0]["lr"] = training.learning_rate(k, 30, 0.02, "cosine", 4)
        optimiser.zero_grad()
        (theirs(x) - y).square().mean().backward()
        if clip == 0.5:
            norm = math.hypot(*(float(p.grad.norm()) for p in theirs.parameters()))
            assert (norm > clip) or k > 3  # the first gradients are shortened
            for p in theirs.parameters():
                p.grad *= min(1.0, clip / norm)
        optimiser.step()
    g = torch.Generator()
    settings = {"steps": 30, "lr": 0.02, "weight_decay": 0.1, "warmup": 4, "generator": g}
    settings["clip"] = clip
    list(training.fit(ours, lambda _: (ours(x) - y).square().mean(), **settings))
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_progress_records():
    values = iter(range(1, 100))
    module = nn.Linear(1, 1)

    def loss(generator):
        return 0 * module.weight.sum() + next(values)

    settings = {"steps": 10, "report_every": 4, "lr_schedule": "linear", "lr": 0.1}
    records = list(
        training.fit(module, loss, generator=torch.Generator(), samples_per_step=32, **settings)
    )
    assert [r.step for r in records] == [4, 8, 10]
    assert [r.loss for r in records] == [2.5, 6.5, 9.5]  # means since the last report
    assert [r.lr for r in records] == pytest.approx([0.07, 0.03, 0.01])
    assert all(r.samples_per_second > 0 for r in records)
    assert records[0]._fields == ("step", "loss", "lr", "samples_per_second", "seconds")


@pytest.fixture
def spy(monkeypatch):
    """Collect the arguments of the denoising loss."""
    calls = []

    def loss(denoiser, x_0, t, noise):
        calls.append((x_0, t, noise))
        return x_0.sum()

    monkeypatch.setattr(training, "denoising_loss", loss)
    return calls


def test_levels_are_stratified_and_every_state_is_met(spy, device, generator):
    data = torch.arange(40.0, device=device)[:, None].expand(40, 2).contiguous()
    loss, g = training.denoising_batches(make(device), data, batch=64, groups=16), generator()
    for _ in range(20):
        loss(g)
    for x_0, t, noise in spy:
        assert x_0.shape == noise.shape == (16, 4, 2)
        assert t.shape == (16, 1)
        assert torch.floor(16 * t[:, 0]).tolist() == list(range(16))  # one in each part
    met = torch.cat([x_0.reshape(-1, 2)[:, 0] for x_0, _, _ in spy])
    assert set(met.tolist()) == set(range(40))
    offsets = torch.cat([16 * t - torch.floor(16 * t) for _, t, _ in spy])
    assert float(offsets.mean()) == pytest.approx(0.5, abs=0.05)  # uniform within its part
    assert float(offsets.var()) == pytest.approx(1 / 12, rel=0.2)
    noise = torch.cat([n for _, _, n in spy])
    assert float(noise.mean()) == pytest.approx(0, abs=0.07)
    assert float(noise.var()) == pytest.approx(1, abs=0.1)
    batch = spy[0]
    loss(generator())
    assert all(torch.equal(a, b) for a, b in zip(spy[-1], batch, strict=True))


def test_windows_are_drawn_from_everywhere(spy, device, generator):
    data = torch.arange(4 * 9.0, device=device).reshape(4, 9, 1).expand(4, 9, 2).contiguous()
    loss = training.denoising_batches(make(device), data, batch=64, groups=16, window=5)
    for k in range(20):
        loss(generator(k))
    x = torch.cat([x_0.flatten(0, 1) for x_0, _, _ in spy])[..., 0]
    assert spy[0][0].shape == spy[0][2].shape == (16, 4, 5, 2)
    assert spy[0][1].shape == (16, 1)
    assert (x.diff(dim=1) == 1).all()  # consecutive states
    assert (x[:, 0] // 9 == x[:, -1] // 9).all()  # of one trajectory
    starts = torch.bincount(x[:, 0].long(), minlength=36).reshape(4, 9)
    assert (starts[:, 5:] == 0).all()
    assert starts[:, :5].min() > 0.6 * starts.sum() / 20  # each of the 20 windows as often


def test_discrete_levels_are_those_of_f24(spy, device, generator):
    loss = training.denoising_batches(
        make(device), states(50).to(device), batch=500, groups=500, levels=10
    )
    loss(generator())
    levels = torch.round(10 * spy[0][1][:, 0]).long()
    torch.testing.assert_close(levels / 10, spy[0][1][:, 0])
    assert torch.bincount(levels).tolist() == [0, *[50] * 10]  # 1 … 10, never 0


def test_training_converges_to_the_gaussian_oracle(device):
    denoiser = make(device, width=32, blocks=2, embedding=16)
    average = training.Average(denoiser, 0.99)
    loss = training.denoising_batches(denoiser, states(2**17).to(device), batch=512, groups=32)
    g = torch.Generator().manual_seed(4)
    settings = {"steps": 1000, "lr": 5e-3, "warmup": 20, "average": average}
    records = list(training.fit(denoiser, loss, generator=g, **settings))
    assert records[-1].loss < records[0].loss
    exact = denoisers.GaussianDenoiser(MEAN, COVARIANCE, denoiser.schedule)
    x_0, eps = states(4096, 7).to(device), states(4096, 8).to(device)
    eps = (eps - MEAN.to(device)) @ torch.linalg.inv(torch.linalg.cholesky(COVARIANCE)).mT.to(
        device
    )
    ratios = []
    for ratio in (0.03, 0.3, 1.0, 3.0, 30.0):
        t = float(denoiser.schedule.time(ratio))
        alpha, sigma = (float(v) for v in denoiser.schedule(t))
        x_t = alpha * x_0 + sigma * eps
        best = exact(x_t, t)
        excess = (average.module(x_t, t) - best).square().mean().sqrt()
        least = (best - x_0).square().mean().sqrt()
        ratios.append(float(excess / least))
    assert max(ratios) < 0.1, ratios  # the error of x̂ is within 0.5 % of the least


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": -1.0}, ValueError, "lr must be positive"),
        ({"lr_schedule": "step"}, ValueError, "lr_schedule must be one of"),
        ({"report_every": 0}, ValueError, "report_every"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
    ],
)
def test_fit_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        Run(**changes).go()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch": 10, "groups": 4}, ValueError, "batch must be a multiple of groups"),
        ({"groups": 0}, ValueError, "groups"),
        ({"levels": 0}, ValueError, "levels"),
        ({"data": torch.zeros(4, 5, 2)}, ValueError, "data must have shape"),
        ({"data": torch.zeros(4, 5, 2), "window": 6}, ValueError, "length >= 6"),
        ({"data": torch.zeros(9, 2), "window": 2}, ValueError, r"data must have shape \(n, length"),
        ({"data": torch.zeros(4, 5, 2), "window": 0}, ValueError, "window must be at least 1"),
        ({"data": torch.zeros(0, 2)}, ValueError, "n > 0"),
        ({"data": torch.full((4, 2), math.inf)}, ValueError, "data must be finite"),
        ({"data": torch.zeros(4, 3)}, ValueError, r"data must have shape \(\.\.\., 2\)"),
    ],
)
def test_batches_refuse(changes, error, words):
    arguments = {"data": states(10), "batch": 16, "groups": 4} | changes
    with pytest.raises(error, match=words):
        training.denoising_batches(make(), **arguments)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_average_refuses(decay):
    with pytest.raises(ValueError, match="decay"):
        training.Average(nn.Linear(1, 1), decay)


def test_notes_are_json(tmp_path):
    training.save_tensors(tmp_path / "x", {}, {"a": [1, 2]})
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        assert json.loads(file.metadata()["note"]) == {"a": [1, 2]}
