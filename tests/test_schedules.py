"""Schedules: their definitions, inverses and limits."""

import math

import pytest
import torch

from ddmlib import schedules

ALL = [
    schedules.Cosine(),
    schedules.Cosine(T=50, shift=0.02, cap=0.5),
    schedules.Linear(),
    schedules.Linear(T=20, first=1e-3, last=0.4),
    schedules.LogLinear(),
    schedules.LogLinear(1e-2, 10.0),
    schedules.CosineSquared(),
    schedules.CosineSquared(eta=0.05),
    schedules.VariancePreserving(),
    schedules.SubVariancePreserving(),
    schedules.VarianceExploding(),
    schedules.VarianceExploding(0.01, 50.0),
    schedules.Straight(),
]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=repr)


def inside(device, n=501):
    """Return pseudo-times away from both ends, float64."""
    return torch.linspace(0, 1, n + 2, dtype=torch.float64, device=device)[1:-1]


@every_schedule
def test_ratio_rises_strictly_and_alpha_never_does(schedule, device):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64, device=device)[:-1]
    assert (schedule.ratio(t).diff() > 0).all()
    alpha, sigma = schedule(t)
    assert (alpha.diff() <= 0).all()
    assert (alpha > 0).all()
    assert (sigma >= 0).all()


@every_schedule
def test_time_inverts_ratio(schedule, device):
    t = inside(device)
    torch.testing.assert_close(schedule.time(schedule.ratio(t)), t, rtol=0, atol=1e-8)
    ratio = schedule.ratio(t)
    torch.testing.assert_close(schedule.ratio(schedule.time(ratio)), ratio, rtol=1e-8, atol=0)
    assert float(schedule.time(0.0)) == pytest.approx(0, abs=1e-12)  # the nearest end
    assert float(schedule.time(1e12)) == pytest.approx(1, abs=1e-10)
    assert schedule.time(torch.ones(2, 3)).shape == (2, 3)


@every_schedule
def test_variance_is_kept_where_claimed(schedule, device):
    alpha, sigma = schedule(inside(device))
    total = alpha**2 + sigma**2
    if isinstance(schedule, schedules.CosineSquared):
        total = total - schedule.eta**2  # R23 adds it, so that sigma never vanishes
    if schedule.preserves_variance:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    else:
        assert (total - 1).abs().max() > 0.05


@every_schedule
def test_ends_are_data_and_noise(schedule, device):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    alpha, sigma = (v.tolist() for v in schedule(ends))
    assert alpha[0] == pytest.approx(1, abs=2e-4)
    least = getattr(schedule, "eta", getattr(schedule, "ratio_min", 0.0))
    assert sigma[0] == pytest.approx(least, rel=1e-3, abs=1e-9)
    assert sigma[1] > 5 * alpha[1]
    outside, _ = schedule(torch.tensor([-0.5, 1.5], dtype=torch.float64, device=device))
    assert outside.tolist() == alpha  # clamped


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.Cosine(cap=1.0), "shift and cap must give betas"),
        (lambda: schedules.Cosine(shift=-0.5), "shift and cap must give betas"),
        (lambda: schedules.Linear(T=10, first=0.1, last=2.0), "first and last must give betas"),
        (lambda: schedules.Linear(first=math.nan), "first and last must give betas"),
    ],
)
def test_settings_without_noise_levels_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_schedules_can_be_differentiated_after_inference(device):
    schedule = schedules.Cosine(T=50)
    t = torch.tensor([0.3], dtype=torch.float64, device=device)
    with torch.inference_mode():
        schedule(t)
    t.requires_grad_()
    assert float(torch.autograd.grad(schedule(t)[0].sum(), t)[0]) < 0


@every_schedule
def test_dtype_shape_and_numbers(schedule, device):
    t = torch.rand(2, 3, device=device)
    alpha, sigma = schedule(t)
    assert alpha.shape == sigma.shape == (2, 3)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.device == t.device
    exact = schedule(t.double())
    torch.testing.assert_close(alpha.double(), exact[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sigma.double(), exact[1], rtol=1e-6, atol=1e-7)
    assert schedule(0.3)[0].dtype == torch.float64
    whole, number = schedule(torch.tensor([0, 1], device=device)), schedule(1)
    assert whole[1].dtype == torch.float64
    assert float(whole[1][1]) == float(number[1]) > 0


@every_schedule
def test_settings_make_the_schedule_again(schedule):
    again = schedules.by_name(type(schedule).__name__, **schedule.settings())
    assert repr(again) == repr(schedule)
    t = inside("cpu")
    for ours, theirs in zip(again(t), schedule(t), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("steps", [1000, 50])
def test_cosine_equals_the_product_of_its_betas(steps, device):
    """F24's table by its definition: a product, step by step, of 1 - min(beta, cap)."""

    def f(k):
        return math.cos(math.pi / 2 * (k / steps + 0.008) / 1.008) ** 2

    product, expected = 1.0, [1.0]
    for k in range(1, steps + 1):
        product *= 1 - min(1 - f(k) / f(k - 1), 0.9)
        expected.append(product)
    t = torch.arange(steps + 1, dtype=torch.float64, device=device) / steps
    alpha, sigma = schedules.Cosine(T=steps)(t)
    expected = torch.tensor(expected, dtype=torch.float64, device=device)
    torch.testing.assert_close(alpha**2, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=1e-10, atol=1e-14)
    capped = f(steps) / f(steps - 1) < 0.1
    assert capped
    assert float(alpha[-1] ** 2 / alpha[-2] ** 2) == pytest.approx(0.1)


def test_linear_equals_the_product_of_its_betas(device):
    product, expected = 1.0, [1.0]
    for k in range(1000):
        product *= 1 - (1e-4 + (0.03 - 1e-4) * k / 999)
        expected.append(product)
    t = torch.arange(1001, dtype=torch.float64, device=device) / 1000
    alpha, sigma = schedules.Linear()(t)
    expected = torch.tensor(expected, dtype=torch.float64, device=device)
    torch.testing.assert_close(alpha**2, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=1e-9, atol=1e-14)


def test_discrete_schedules_are_noised_at_a_constant_rate_between_steps():
    schedule = schedules.Linear(T=20, first=1e-3, last=0.4)
    (a, b), (middle, _) = (
        schedule(torch.tensor([0.25, 0.3], dtype=torch.float64))[0],
        schedule(0.275),
    )
    assert float(middle) == pytest.approx(math.sqrt(float(a * b)), rel=1e-12)


def test_closed_forms_of_the_papers(device):
    t = inside(device)
    alpha, sigma = schedules.CosineSquared(eta=1e-3)(t)  # R23
    expected = torch.cos(math.acos(math.sqrt(1e-3)) * t) ** 2
    torch.testing.assert_close(alpha, expected)
    torch.testing.assert_close(sigma**2, 1 - expected**2 + 1e-6)
    alpha, sigma = schedules.VarianceExploding()(t)  # Z23
    torch.testing.assert_close(sigma**2, 1e-6 * ((300 / 1e-3) ** (2 * t) - 1))
    assert (alpha == 1).all()
    vp, sub = schedules.VariancePreserving()(t), schedules.SubVariancePreserving()(t)
    rate = 0.1 * t + (20 - 0.1) * t**2 / 2  # the integral of beta
    torch.testing.assert_close(vp[0] ** 2, torch.exp(-rate))
    torch.testing.assert_close(sub[0], vp[0])
    torch.testing.assert_close(sub[1], vp[1] ** 2)  # Song et al.: 1 - exp(-integral)
    alpha, sigma = schedules.Straight()(t)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(t))


def test_log_linear_is_uniform_in_the_logarithm_of_the_ratio(device):
    ratio = schedules.LogLinear(1e-2, 1e2).ratio(inside(device, 99))
    steps = ratio.log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(1e4) / 100))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: schedules.by_name("Sine"), ValueError, "schedule must be one of Cosine.*'Sine'"),
        (lambda: schedules.by_name("Linear", steps=3), TypeError, "steps"),
        (lambda: schedules.Cosine(T=1), ValueError, "T must be at least 2"),
        (lambda: schedules.Linear(T=10.0), TypeError, "T must be an integer"),
        (lambda: schedules.LogLinear(1.0, 1.0), ValueError, "ratio_max must exceed"),
        (lambda: schedules.LogLinear(-1.0), ValueError, "ratio_min must be positive"),
        (lambda: schedules.CosineSquared(0.0), ValueError, "eta must be positive"),
        (lambda: schedules.CosineSquared(1.5), ValueError, "eta must lie"),
        (lambda: schedules.VariancePreserving(beta_max=math.nan), ValueError, "beta_max"),
        (lambda: schedules.VarianceExploding(2.0, 1.0), ValueError, "sigma_max must exceed"),
    ],
)
def test_bad_settings_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("between", [(1.5, 8.0), (0.01, 8.0), (1.5, 100.0)])
def test_a_focus_gives_some_noise_levels_their_share_and_the_others_stay_even(between):
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    focused = schedules.LogLinear(0.01, 100.0).focused(t, between, 0.4)
    assert (focused.diff() >= 0).all()
    assert (float(focused[0]), float(focused[-1])) == (0.0, 1.0)
    ratio = 0.01 * 10_000**focused
    inside = (ratio > between[0]) & (ratio < between[1])
    low, high = (math.log(r / 0.01) / math.log(10_000) for r in between)
    assert float(inside.double().mean()) == pytest.approx(0.4 + 0.6 * (high - low), abs=1e-4)
    for part, width in ((inside, 0.4 + 0.6 * (high - low)), (focused > high, 0.6 * (1 - high))):
        if part.any():  # even within: as many in its first half as in its second
            middle = (focused[part].min() + focused[part].max()) / 2
            first = float((part & (focused < middle)).double().mean())
            assert first == pytest.approx(width / 2, abs=1e-4)
    with pytest.raises(ValueError, match="between and share must lie in the range"):
        schedules.LogLinear(0.01, 100.0).focused(t, (8.0, 1.5), 0.4)
