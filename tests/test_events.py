"""Events: constraints, guidance and probabilities, against exact answers on the Gaussian."""

import dataclasses
import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from half_space import conditional, guided_quantiles, sampler_law

from ddmlib import events, networks, sampling, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import Denoiser, GaussianDenoiser, NetworkDenoiser
from ddmlib.events import estimates, paths, pilot, trust
from ddmlib.events.constraints import mills
from ddmlib.tails import AsinhStandardizer

MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64)
UNITS = Standardizer(
    torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
)
DIRECTION = torch.tensor([0.5, 2.0], dtype=torch.float64)  # in physical units
DOUBLE = {"dtype": torch.float64}


class Reshaped(Denoiser):
    """A Gaussian over whole trajectories of the given shape."""

    def __init__(self, inner, shape):
        self.inner, self.schedule, self.shape = inner, inner.schedule, shape
        self.standardizer = Standardizer.identity(shape[-1])

    def denoise(self, x_t, alpha_t, sigma_t):
        n = len(self.shape)
        levels = (v.reshape(*v.shape[: max(v.ndim - n, 0)], 1) for v in (alpha_t, sigma_t))
        flat = x_t.reshape(*x_t.shape[: x_t.ndim - n], -1)
        return self.inner.denoise(flat, *levels).reshape(x_t.shape)


def gaussian(schedule=None):
    return GaussianDenoiser(MEAN, COVARIANCE, schedule, UNITS)


def half_space(probability, mean=MEAN, covariance=COVARIANCE, direction=DIRECTION):
    """The event direction · x > b of given probability under the data, and b."""
    a = direction * UNITS.std  # in standardised units
    centre = float(direction @ UNITS.mean + a @ mean)
    spread = math.sqrt(float(a @ covariance @ a))
    b = centre + spread * scipy.stats.norm.isf(probability)
    return events.Constraint(lambda x: x @ direction.to(x) - b, (2,)), b


def normal_1d():
    return GaussianDenoiser(torch.zeros(1, **DOUBLE), torch.ones(1, 1, **DOUBLE))


def beyond(b):
    return events.Constraint(lambda x: x[..., 0] - b, (1,))


def own_log_probability(denoiser, direction, b, steps, rule="multistep"):
    """log P(direction · x > b) of the sampler with these steps."""
    mean, covariance = sampler_law(denoiser, steps, rule)
    units = denoiser.standardizer
    a = direction * units.std.double()
    centre = float(direction @ units.mean.double() + a @ mean)
    return scipy.stats.norm.logsf(b, centre, math.sqrt(float(a @ covariance @ a)))


# --- constraints ---------------------------------------------------------------------------------


def test_mills_ratio_is_the_slope_of_log_phi():
    z = torch.linspace(-30, 8, 77, **DOUBLE).requires_grad_()
    (slope,) = torch.autograd.grad(torch.special.log_ndtr(z).sum(), z)
    torch.testing.assert_close(mills(z), slope, rtol=1e-8, atol=1e-14)
    far = torch.tensor([-1e4, -1e18, 40.0, 1e18])
    torch.testing.assert_close(mills(far), torch.tensor([1e4, 1e18, 0.0, 0.0]))
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([-1e3, -5.0, 0.0, 5.0, 11.9, 12.1, 300.0], dtype=dtype).requires_grad_()
        (slope,) = torch.autograd.grad(mills(z).sum(), z)
        expected = -mills(z) * (z + mills(z)).detach()
        expected = torch.cat((torch.full_like(z[:1], -1), expected[1:]))  # where this cancels
        torch.testing.assert_close(slope, expected.detach(), rtol=1e-3, atol=1e-6)


def test_margins_and_conjunctions(generator):
    x = torch.randn(50, 4, 2, generator=generator())
    a = events.Constraint(lambda x: x[..., 0].amax(-1) - 0.5, (4, 2))
    b = events.Constraint(lambda x: 1 - x[..., 1].abs().amax(-1), (4, 2))
    both = a & b
    assert isinstance(both, events.Conjunction)
    assert both.parts == (a, b)
    assert (a & b & a).parts == (a, b, a)
    assert torch.equal(both.holds(x), a.holds(x) & b.holds(x))
    assert torch.equal(both.margin(x) > 0, both.holds(x))
    assert 0 < int(both.holds(x).sum()) < int(a.holds(x).sum())
    assert a.margin(x.reshape(5, 10, 4, 2)).shape == (5, 10)
    with pytest.raises(ValueError, match="one shape"):
        a & events.Constraint(lambda x: x[..., 0], (2,))
    with pytest.raises(TypeError):
        a & 3


@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        (lambda x: x[..., 0], (60, 3), r"one number a sample, shape \(2,\).*got \(2, 60\)"),
        (lambda x: x.sum(), (3,), r"one number a sample, shape \(2,\).*got \(\)"),
        (lambda x: x[..., :1], (3,), r"got \(2, 1\)"),
        (lambda x: 1.0, (3,), "got float"),
        (lambda x: x[..., 0], (), r"shape must be \(d,\) or \(length, d\)"),
        (lambda x: x[..., 0], (2, 3, 4), "shape must be"),
        (lambda x: x[..., 0], (0,), "shape must be at least 1"),
    ],
)
def test_functions_of_the_wrong_shape_are_refused(function, shape, words):
    with pytest.raises(ValueError, match=words):
        events.Constraint(function, shape)


def test_samples_of_the_wrong_shape_are_refused():
    event, _ = half_space(0.1)
    for x in (torch.zeros(5, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2\)"):
            event.holds(x)
    with pytest.raises(TypeError, match="floating"):
        event.holds(torch.zeros(5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        events.Constraint(lambda x: x[..., 0].sqrt(), (2,)).holds(-torch.ones(3, 2))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: (x[..., 0] > 0).float(), "not differentiable"),
        (lambda x: x[..., 0].detach(), "not differentiable"),
        (lambda x: -torch.ones(len(x)), "not differentiable"),
        (lambda x: torch.round(x[..., 0]), "gradient zero at all of 8 samples"),
        (lambda x: 0 * x[..., 0] - 1, "gradient zero at all of 8 samples"),
        (lambda x: (x[..., 0] - x[..., 0]).sqrt(), "gradient that is not finite"),
    ],
)
def test_constraints_that_guidance_cannot_follow_are_refused(function, words):
    event = events.Constraint(function, (2,), "this one")
    for constraint in (event, half_space(0.1)[0] & event):
        with pytest.raises(ValueError, match=f"this one .*{words}"):
            events.EventGuidance(gaussian(), constraint)
    done = events.log_probability(gaussian(), event, method="plain", samples=20, steps=3)
    assert isinstance(done, events.Estimate)  # counting needs no gradient


def test_guidance_passes_on_what_samplers_ask_for(device):
    net = NetworkDenoiser(
        networks.ResidualMLP(2, width=8, blocks=1), schedules.Cosine(), Standardizer.identity(2)
    )
    net = net.to(device)
    guided = events.EventGuidance(net, events.Constraint(lambda x: x[..., 0] - 1, (2,)))
    assert (guided.event, guided.ratios) == (net.event, net.ratios)
    assert guided.device == net.device == torch.empty(0, device=device).device


def test_guidance_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(4, 3\).*2 components"):
        events.EventGuidance(gaussian(), events.Constraint(lambda x: x.sum((-2, -1)), (4, 3)))
    with pytest.raises(TypeError, match="constraint must be a Constraint"):
        events.EventGuidance(gaussian(), lambda x: x[..., 0])
    with pytest.raises(ValueError, match="floor must be positive"):
        events.EventGuidance(gaussian(), half_space(0.1)[0], floor=0.0)
    path = Reshaped(GaussianDenoiser(torch.zeros(8), torch.eye(8)), (4, 2))
    guided = events.EventGuidance(path, events.Constraint(lambda x: x.sum((-2, -1)), (4, 2)))
    with pytest.raises(ValueError, match=r"samples of shape \(4, 2\), got \(5, 2\)"):
        guided(torch.zeros(5, 2), 0.5)
    with pytest.raises(ValueError, match="one noise level"):
        guided(torch.zeros(3, 4, 2), torch.full((3, 4), 0.5))


# --- guidance ------------------------------------------------------------------------------------

TIMES = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], **DOUBLE)


def posterior(x_t, alpha, sigma):
    """Mean and covariance of x_0 given x_t, one sample."""
    precision = torch.linalg.inv(COVARIANCE) + (alpha / sigma) ** 2 * torch.eye(2, **DOUBLE)
    covariance = torch.linalg.inv(precision)
    return covariance @ (torch.linalg.inv(COVARIANCE) @ MEAN + alpha / sigma**2 * x_t), covariance


@pytest.mark.parametrize(
    "schedule", [schedules.Cosine(), schedules.VarianceExploding()], ids=["VP", "VE"]
)
@pytest.mark.parametrize("probability", [0.5, 1e-4])
def test_half_spaces_are_exact_on_a_gaussian(probability, schedule, generator, device):
    event, b = half_space(probability)
    guided = events.EventGuidance(gaussian(schedule), event, floor=1e-12)
    noise = torch.randn(5, 2, generator=generator(), **DOUBLE)
    alphas, sigmas = schedule(TIMES)
    x_t = (alphas[:, None] * MEAN + torch.hypot(alphas, sigmas)[:, None] * noise).to(device)
    found = guided(x_t, TIMES).cpu()
    a = DIRECTION * UNITS.std
    known = guided.condition(x_t, *guided.levels(x_t, TIMES))
    for k in range(5):
        alpha, sigma = float(alphas[k]), float(sigmas[k])
        mean, covariance = posterior(x_t[k].cpu(), alpha, sigma)
        s = math.sqrt(float(a @ covariance @ a))
        z = (float(DIRECTION @ UNITS.mean + a @ mean) - b) / s
        log_mass = scipy.stats.norm.logcdf(z)
        slope = math.exp(scipy.stats.norm.logpdf(z) - log_mass)
        # the mean of a Gaussian that is cut off by a plane
        exact = mean + covariance @ a * slope / s
        torch.testing.assert_close(found[k], exact, rtol=1e-6, atol=1e-7)
        assert float(known.log_mass[k]) == pytest.approx(log_mass, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(known.x_0[k].cpu(), mean, rtol=1e-8, atol=1e-8)


def test_the_guided_score_is_the_score_plus_the_gradient_of_log_mass(generator):
    event, _ = half_space(1e-2)
    base = gaussian()
    guided = events.EventGuidance(base, event)
    x = torch.randn(6, 2, generator=generator(), **DOUBLE).requires_grad_()
    log_mass = guided.condition(x, *guided.levels(x, 0.4)).log_mass
    (gradient,) = torch.autograd.grad(log_mass.sum(), x)
    difference = (guided.score(x, 0.4) - base.score(x, 0.4)).detach()
    torch.testing.assert_close(difference, gradient, rtol=1e-5, atol=1e-8)


def test_guidance_needs_no_gradient_and_gives_one(generator):
    event = events.Constraint(lambda x: x.square().sum(-1) - 4, (2,))
    guided = events.EventGuidance(gaussian(), event)
    x = torch.randn(3, 2, generator=generator(), **DOUBLE)
    with torch.no_grad():
        plain = guided(x, 0.3)
    assert not plain.requires_grad
    assert not guided(x, 0.3).requires_grad
    x.requires_grad_()
    torch.testing.assert_close(guided(x, 0.3).detach(), plain)
    assert torch.autograd.gradcheck(lambda v: guided(v, 0.3), (x,), atol=1e-6)


def test_equalities_are_exact_on_a_gaussian(generator):
    one = events.Equality(lambda x: x @ DIRECTION.to(x), 1.5, (2,))
    other = events.Equality(lambda x: x[..., 0] - x[..., 1], 4.0, (2,))
    x_t = torch.randn(4, 2, generator=generator(), **DOUBLE)
    alpha, sigma = (float(v) for v in schedules.Cosine()(0.4))
    for event in (one, one & other):
        guided = events.EventGuidance(gaussian(), event, floor=1e-14)
        found = guided.condition(x_t, *guided.levels(x_t, 0.4))
        rows = [DIRECTION, torch.tensor([1.0, -1.0], **DOUBLE)][: len(event.parts)]
        matrix = torch.stack(rows) * UNITS.std
        target = torch.tensor([part.target for part in event.parts], **DOUBLE)
        for k in range(4):
            mean, covariance = posterior(x_t[k], alpha, sigma)
            seen = torch.stack(rows) @ UNITS.mean + matrix @ mean
            law = torch.distributions.MultivariateNormal(seen, matrix @ covariance @ matrix.mT)
            gain = covariance @ matrix.mT @ torch.linalg.inv(matrix @ covariance @ matrix.mT)
            exact = mean + gain @ (target - seen)
            torch.testing.assert_close(found.guided[k], exact, rtol=1e-7, atol=1e-7)
            assert float(found.log_mass[k]) == pytest.approx(float(law.log_prob(target)), rel=1e-6)


def test_an_equality_has_no_probability():
    event = events.Equality(lambda x: x[..., 0], 1.0, (2,))
    with pytest.raises(ValueError, match="probability of an equality is zero"):
        events.log_probability(gaussian(), event & half_space(0.1)[0])
    with pytest.raises(ValueError, match="ask for C"):
        event.holds(torch.zeros(3, 2))


def test_a_conjunction_is_guidance_of_guidance_where_the_parts_are_independent(generator):
    base = GaussianDenoiser(MEAN, torch.diag(torch.tensor([1.0, 0.3], **DOUBLE)), None, UNITS)
    first = events.Constraint(lambda x: x[..., 0] - 5, (2,))
    second = events.Constraint(lambda x: -1.5 - x[..., 1], (2,))
    x_t = torch.randn(4, 2, generator=generator(), **DOUBLE)
    together = events.EventGuidance(base, first & second)(x_t, 0.5)
    each = [events.EventGuidance(base, event) for event in (first, second)]
    torch.testing.assert_close(together[:, 0], each[0](x_t, 0.5)[:, 0])
    torch.testing.assert_close(together[:, 1], each[1](x_t, 0.5)[:, 1])
    nested = events.EventGuidance(each[0], second)
    torch.testing.assert_close(nested(x_t, 0.5), together, rtol=1e-6, atol=1e-6)


def test_trajectories_are_guided_as_flat_states_are(generator):
    factor = torch.randn(6, 6, generator=generator(5), **DOUBLE) / 2
    flat = GaussianDenoiser(torch.zeros(6, **DOUBLE), factor @ factor.mT)
    on_flat = events.EventGuidance(flat, events.Constraint(lambda x: x.sum(-1) - 3, (6,)))
    on_path = events.EventGuidance(
        Reshaped(flat, (3, 2)), events.Constraint(lambda x: x.sum((-2, -1)) - 3, (3, 2))
    )
    x_t = torch.randn(4, 3, 2, generator=generator(), **DOUBLE)
    for t in (0.3, torch.tensor([0.1, 0.4, 0.6, 0.9])):
        expected = on_flat(x_t.flatten(-2), t).reshape(4, 3, 2)
        torch.testing.assert_close(on_path(x_t, t), expected)
    assert on_path(x_t[0], 0.3).shape == (3, 2)
    # Langevin steps too are as long as the whole trajectory says
    options = {"steps": 3, "corrections": 1, "ratios": (2e-3, 80.0), **DOUBLE}
    on_path, on_flat = (
        sampling.sample(guided, shape, generator=generator(1), **options)
        for guided, shape in ((on_path, (4, 3, 2)), (on_flat, (4, 6)))
    )
    torch.testing.assert_close(on_path.flatten(-2), on_flat)


@pytest.mark.parametrize("probability", [0.1, 1e-4])
def test_guided_samples_have_the_conditional_mean_and_variance(probability):
    found = conditional(probability)
    assert found["mean"] == pytest.approx(found["mean_exact"], rel=0.02)
    assert found["variance"] == pytest.approx(found["variance_exact"], rel=0.02)
    assert found["inside"] > 0.98


def normal_2d():
    return GaussianDenoiser(torch.zeros(2, **DOUBLE), torch.eye(2, **DOUBLE))


CIRCLE = events.Constraint(lambda x: x.square().sum(-1) - 9.0, (2,))
WALL = events.Constraint(lambda x: torch.tanh(2 * (x[..., 0] - 3)), (2,))
LEVEL = tuple(v.reshape(1) for v in schedules.Cosine()(torch.tensor(0.4, **DOUBLE)))


def test_steps_reach_the_event_and_no_further_where_the_slope_is_next_to_nothing():
    """Tangents of |x|² at its centre, and of tanh where it is flat, reach zero far away."""
    x_t = torch.tensor([[1e-3, 0.0], [0.05, 0.0], [0.0, -0.5]], **DOUBLE)
    found = events.EventGuidance(normal_2d(), CIRCLE).condition(x_t, *LEVEL)
    torch.testing.assert_close(
        found.guided.norm(dim=1), torch.full((3,), 3.0, **DOUBLE), atol=0.1, rtol=0
    )
    torch.testing.assert_close(  # in the direction that they had
        torch.nn.functional.normalize(found.guided), torch.nn.functional.normalize(x_t)
    )
    found = events.EventGuidance(normal_2d(), WALL).condition(x_t, *LEVEL)
    assert bool(((found.guided[:, 0] > 1) & (found.guided[:, 0] < 4)).all())
    on_circle = events.Equality(lambda x: x.square().sum(-1), 9.0, (2,))
    found = events.EventGuidance(normal_2d(), on_circle).condition(x_t, *LEVEL)
    torch.testing.assert_close(
        found.guided.norm(dim=1), torch.full((3,), 3.0, **DOUBLE), atol=0.1, rtol=0
    )


def test_a_step_that_leaves_the_range_of_the_units_is_shortened():
    """C is the difference of numbers that overflow together: not a number along the whole step."""
    units = AsinhStandardizer(torch.zeros(2), torch.ones(2))
    prior = GaussianDenoiser(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), None, units)
    rise = events.Constraint(lambda x: 3 * x[..., 0] - 2 * x[..., 1] - 1e6, (2,))
    guided = events.EventGuidance(prior, rise)
    x_t = torch.linspace(-3, 3, 21)[:, None] * torch.tensor([1.0, 1.0])
    for r in (0.1, 1.0, 10.0):
        alpha = torch.tensor([1 / math.hypot(1, r)])
        known = guided.condition(x_t, alpha, r * alpha)
        assert bool(torch.isfinite(known.guided).all())
        c = rise.value(units.inverse(known.guided))
        assert bool((c >= rise.value(units.inverse(known.x_0))).all())


def test_calibrated_guidance_does_not_run_away(generator):
    """The pilot's variance is zero at the last levels, which made steps of 1e12 there."""
    found = calibrated(normal_2d(), CIRCLE, 1024, 48, generator(1))
    assert float(found.scale[0, 0]) == float(found.extra[0, 0]) == 0
    guided = events.EventGuidance(normal_2d(), CIRCLE, calibration=found)
    z = sampling.sample(
        guided, (8000, 2), steps=48, method="multistep", eta=1.0, generator=generator(2), **DOUBLE
    )
    square = z.square().sum(1)  # in the event it exceeds 9 by an exponential number of mean 2
    assert float((square > 9).double().mean()) > 0.98
    assert float(square.max()) < 60
    assert float(square.median()) == pytest.approx(9 + 2 * math.log(2), abs=0.4)


# --- estimates -----------------------------------------------------------------------------------


def test_counts_have_the_exact_binomial_interval():
    found = estimates.from_count("plain", 20, 1000, 64_000)
    exact = scipy.stats.binomtest(20, 1000).proportion_ci(0.95, "exact")
    assert [math.exp(v) for v in found.interval] == pytest.approx([exact.low, exact.high])
    assert found.probability == pytest.approx(0.02)
    assert found.standard_error == pytest.approx(math.sqrt(0.98 / 20))
    assert found.trustworthy
    assert "only 3" in estimates.from_count("plain", 3, 1000, 0).warning


def test_events_that_never_or_always_hold_get_a_statement():
    event, _ = half_space(1e-12)
    never = events.log_probability(gaussian(), event, method="plain", samples=300, steps=4)
    assert never.log_probability == -math.inf
    assert math.exp(never.interval[1]) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert "none of 300 samples" in never.warning
    assert not never.trustworthy
    event, _ = half_space(1 - 1e-12)
    always = events.log_probability(gaussian(), event, method="plain", samples=300, steps=4)
    assert always.log_probability == 0
    assert "all of 300 samples" in always.warning
    for method, words in (
        ("subset", "all of 64 samples"),
        ("smc", "every path of the pilot was in the event"),
        ("importance", "every path of the pilot was in the event"),
    ):
        found = events.log_probability(
            gaussian(), event, method=method, samples=64, runs=2, steps=4, pilot=32
        )
        assert found.log_probability == pytest.approx(0, abs=0.3)
        assert words in found.warning
    impossible = events.Constraint(lambda x: -1 - x[..., 0].square(), (2,))
    for method in ("importance", "smc", "subset"):
        found = events.log_probability(
            gaussian(), impossible, method=method, samples=64, runs=2, steps=4
        )
        assert found.log_probability == -math.inf
        assert found.interval == (-math.inf, 0.0)
        assert "says nothing" in found.warning


def test_doubtful_error_bars_are_marked():
    even = torch.full((100,), 1e-3) * torch.linspace(0.9, 1.1, 100)
    good = estimates.from_values("smc", even, 400.0, 1, 1)
    assert good.trustworthy
    assert good.log_probability == pytest.approx(math.log(1e-3), abs=1e-6)
    assert good.interval[0] < good.log_probability < good.interval[1]
    assert "only 7 effective" in estimates.from_values("smc", even, 7.0, 1, 1).warning
    one = torch.zeros(100).index_fill(0, torch.tensor([5]), 1.0) + 1e-5
    assert "one value makes up" in estimates.from_values("importance", one, 400.0, 1, 1).warning


def test_intervals_of_populations_that_scatter_by_factors(generator):
    """Eight log-normal values of mean 1: Student's interval of their mean covers too seldom."""
    for sigma, least in ((0.05, 0.93), (1.0, 0.92)):
        logs = sigma * torch.randn(1000, 8, generator=generator(), **DOUBLE) - sigma**2 / 2
        found = [estimates.from_populations("smc", row, 400.0, 1, 1) for row in logs]
        covered = sum(e.interval[0] < 0 < e.interval[1] for e in found) / 1000
        assert least < covered < 0.98, sigma
        assert all(e.interval[0] <= e.log_probability <= e.interval[1] for e in found)
    student = [estimates.from_values("smc", row.exp(), 400.0, 1, 1) for row in logs]
    assert sum(e.interval[0] < 0 < e.interval[1] for e in student) / 1000 < 0.9


def test_populations_that_did_not_arrive_are_counted():
    logs = torch.tensor([-3.0, -3.1, -math.inf, -2.9], **DOUBLE)
    found = estimates.from_populations("smc", logs, 400.0, 1, 1)
    assert found.log_probability == pytest.approx(float(logs.exp().mean().log()))
    assert "1 of 4 populations did not reach the event" in found.warning
    none = estimates.from_populations("smc", torch.full((4,), -math.inf), 0.0, 1, 1)
    assert none.log_probability == -math.inf
    assert "says nothing" in none.warning


def test_the_tail_index_is_that_of_the_law(generator):
    u = torch.rand(20_000, generator=generator(), **DOUBLE)
    assert estimates.tail_index(-u.log()) == pytest.approx(0, abs=0.15)  # exponential
    for k in (0.5, 1.0):
        assert estimates.tail_index(u**-k) == pytest.approx(k, abs=0.2)
    assert estimates.tail_index(u) == pytest.approx(-1, abs=0.2)  # bounded
    assert estimates.tail_index(torch.ones(200)) == 0
    heavy = estimates.from_values("importance", u**-1.0, 1000.0, 1, 1)
    assert "heavy tail, of index" in heavy.warning
    assert estimates.from_values("importance", u, 1000.0, 1, 1).trustworthy


def test_effective_size():
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert estimates.effective_size(weights + 700).tolist() == [4, 1]
    assert estimates.effective_size(torch.full((3,), -math.inf)) == 0


def test_systematic_resampling_repeats_by_weight(generator):
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    index = paths.systematic(weights.log(), generator(), 8)
    assert index.shape == (2, 8)
    assert torch.bincount(index[0], minlength=4).tolist() == [4, 2, 2, 0]
    assert index[1].tolist() == [3] * 8
    uneven = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(4000, 4).log()
    share = torch.bincount(paths.systematic(uneven, generator()).flatten(), minlength=4) / 16_000
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)


# --- the pilot -----------------------------------------------------------------------------------


def calibrated(denoiser, event, n, steps, generator):
    guidance = events.EventGuidance(denoiser, event)
    grid = sampling.times(denoiser.schedule, steps, spacing="log-ratio", ratios=(2e-3, 80.0))
    like = torch.zeros((), **DOUBLE)
    return pilot.calibrate(guidance, grid, n, rule="multistep", like=like, generator=generator)


def test_the_pilot_leaves_exact_guidance_as_it_is(generator):
    event, _ = half_space(1e-3)
    found = calibrated(gaussian(), event, 1024, 32, generator(1))
    assert found.intercept.shape == (1, 32)
    assert bool((found.log_ratios.diff() > 0).all())
    spread = math.sqrt(float((DIRECTION * UNITS.std) @ COVARIANCE @ (DIRECTION * UNITS.std)))
    for correction, scale in (
        (found.intercept, spread),
        (found.slope - 1, 1),
        (found.scale - 1, 1),
        (found.extra, spread**2),
    ):
        # below, the sampler's last steps are coarse: they add less noise than the exact law has
        assert float(correction[:, found.log_ratios > -2].abs().max()) < 0.05 * scale


def test_the_pilot_finds_the_mean_of_a_curved_constraint(generator):
    denoiser = GaussianDenoiser(torch.zeros(2, **DOUBLE), torch.eye(2, **DOUBLE))
    event = events.Constraint(lambda x: x.square().sum(-1) - 9.0, (2,))
    found = calibrated(denoiser, event, 1024, 32, generator(1))
    ratio = found.log_ratios.exp()
    trace = 2 * ratio**2 / (1 + ratio**2)  # of Cov[x_0 | x_t], the mean of C(x_0) - C(x̂)
    error = (found.intercept[0] + (found.slope[0] - 1) * -9.0 - trace).abs()
    assert float(error.max()) < 0.5
    assert float(error[ratio > 3].max()) < 0.4
    # at high noise C(x_0) has the variance 4 of |x|², and its linearisation next to none; with 4
    # its tail beyond 9 would be too light, and the variance is raised until P(E) is met
    assert float(found.extra[0, -1]) > 4 * 1.5
    mass = scipy.stats.norm.sf(9 - 2, scale=float(found.extra[0, -1]) ** 0.5)
    assert 0.5 < mass / math.exp(-4.5) < 2
    assert float(found.extra[0, 0]) < 1e-3


def test_the_pilot_does_not_believe_a_scatter_of_s2_that_residuals_do_not_follow():
    g = torch.Generator().manual_seed(0)
    values, noise = torch.randn(2, 1, 4096, generator=g, **DOUBLE)
    scattered = torch.exp(2 * torch.randn(1, 4096, generator=g, **DOUBLE))
    same = torch.full_like(scattered, 0.5)
    for variances, made_by, scale, extra in (
        (scattered, same, 0.0, 0.5),  # as at high noise, where the network's Jacobian is poor
        (scattered, scattered, 1.0, 0.0),
        (scattered, same + scattered / 4, 0.25, 0.5),
        (same, same, 1.0, 0.0),
    ):
        ends = values + made_by.sqrt() * noise
        found = pilot.corrections(ends, values, variances)[:, 0]
        assert float(found[2]) == pytest.approx(scale, abs=0.1)
        assert float(found[3]) == pytest.approx(extra, abs=0.2)


def test_corrections_are_interpolated_in_the_logarithm_of_the_noise():
    rows = torch.tensor([[[0.0, 1.0, 4.0]], [[1.0, 1.0, 1.0]], [[1.0, 0.5, 0.0]], [[0.0, 0, 9]]])
    found = events.Calibration(torch.tensor([-1.0, 0.0, 2.0]), *rows)
    ratio = torch.tensor([-5.0, -1.0, -0.5, 0.0, 1.0, 2.0, 7.0]).exp()[:, None]
    intercept, slope, scale, extra = found.at(0, ratio)
    assert intercept.shape == (7, 1)
    torch.testing.assert_close(intercept[:, 0], torch.tensor([0, 0, 0.5, 1, 2.5, 4, 4]))
    torch.testing.assert_close(slope, torch.ones(7, 1))
    torch.testing.assert_close(scale[:, 0], torch.tensor([1, 1, 0.75, 0.5, 0.25, 0, 0]))
    torch.testing.assert_close(extra[:, 0], torch.tensor([0, 0, 0, 0, 4.5, 9, 9]))


def test_the_pilot_refuses(generator):
    with pytest.raises(ValueError, match="n must be at least 16"):
        calibrated(gaussian(), half_space(0.1)[0], 8, 4, generator())
    equality = events.Equality(lambda x: x[..., 0], 1.0, (2,))
    with pytest.raises(ValueError, match="equalities cannot be calibrated"):
        calibrated(gaussian(), equality, 32, 4, generator())


# --- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 1e-4])
@pytest.mark.parametrize("method", ["importance", "smc"])
def test_guided_estimates_of_a_half_space(method, probability, generator):
    event, b = half_space(probability)
    found = events.log_probability(
        gaussian(), event, method=method, samples=4096, steps=128, generator=generator(), **DOUBLE
    )
    own = own_log_probability(gaussian(), DIRECTION, b, 128)
    assert own == pytest.approx(math.log(probability), abs=0.02)
    assert found.log_probability == pytest.approx(own, abs=0.02)
    assert found.interval[0] - 0.01 < own < found.interval[1] + 0.01
    assert found.standard_error < 0.02
    assert found.trustworthy
    # the pilot, the first population, its fit; results diffused again
    extra = (5 if method == "importance" else 6) * 256
    assert found.evaluations == found.products == 128 * (4096 + extra)


@pytest.mark.parametrize(("rule", "order", "last"), [("ddpm", 1, 0.2), ("multistep", 2, 0.002)])
def test_the_samplers_own_probability_tends_to_the_true_one(rule, order, last):
    _, b = half_space(1e-4)
    errors = [
        abs(own_log_probability(gaussian(), DIRECTION, b, steps, rule) - math.log(1e-4))
        for steps in (128, 256, 512)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < last


def test_plain_and_subset_estimates_of_a_half_space(generator):
    event, b = half_space(0.1)
    own = own_log_probability(gaussian(), DIRECTION, b, 16)
    plain = events.log_probability(
        gaussian(), event, method="plain", samples=20_000, steps=16, chunk=7000,
        generator=generator(),
    )  # fmt: skip
    assert plain.interval[0] < own < plain.interval[1]
    p = math.exp(own)
    assert plain.standard_error == pytest.approx(math.sqrt((1 - p) / p / 20_000), rel=0.1)
    event, b = half_space(1e-3)
    own = own_log_probability(gaussian(), DIRECTION, b, 16)
    subset = events.log_probability(
        gaussian(), event, method="subset", samples=8 * 256, steps=16, generator=generator()
    )
    assert abs(subset.log_probability - own) < 3 * subset.standard_error
    assert subset.standard_error < 0.35


def test_intervals_cover_as_often_as_they_say(generator):
    """200 repetitions of both guided estimates, at P = 0.1 and 1e-4."""
    repetitions, runs, n, steps = 200, 8, 64, 32
    denoiser = normal_1d()
    grid = sampling.times(denoiser.schedule, steps, spacing="log-ratio", ratios=(2e-3, 80.0))
    on = {"rule": "multistep", "like": torch.zeros((), **DOUBLE), "generator": generator()}
    for probability in (0.1, 1e-4):
        b = float(scipy.stats.norm.isf(probability))
        own = own_log_probability(denoiser, torch.ones(1, **DOUBLE), b, steps)
        guidance = events.EventGuidance(denoiser, beyond(b))
        smc = paths.twisted(guidance, grid, n, repetitions * runs, defensive=0.1, **on)
        values = {"smc": smc.log_probability.exp().reshape(repetitions, runs)}
        drawn = paths.importance(guidance, grid, repetitions * runs * n, defensive=0.1, **on)
        # the paths without guidance come first: deal them out evenly
        values["importance"] = drawn.log_weights[0].exp().reshape(-1, repetitions).mT
        for method, rows in values.items():
            found = [estimates.from_values(method, row, 100.0, 0, 0) for row in rows]
            covered = sum(e.interval[0] < own < e.interval[1] for e in found) / repetitions
            assert 0.91 <= covered <= 0.98, (method, probability, covered)


def test_a_curved_event_needs_the_pilot(generator):
    """|x|² > c of a standard normal, where moment matching alone is far from exact."""
    denoiser = GaussianDenoiser(torch.zeros(2, **DOUBLE), torch.eye(2, **DOUBLE))
    _, covariance = sampler_law(denoiser, 24)
    event = events.Constraint(lambda x: x.square().sum(-1) - 9.0, (2,))
    own = -9.0 / 2 / float(covariance[0, 0])
    options = {"samples": 8192, "steps": 24, "generator": generator(3), **DOUBLE}
    found = events.log_probability(denoiser, event, method="smc", **options)
    assert abs(found.log_probability - own) < 3 * found.standard_error
    assert found.trustworthy
    options["generator"] = generator(5)
    blind = events.log_probability(denoiser, event, method="smc", pilot=0, **options)
    assert abs(blind.log_probability - own) > 3 * blind.standard_error  # it misses most paths
    assert "no pilot" in blind.warning
    assert "at one level the weights left only" in blind.warning
    weighted = events.log_probability(denoiser, event, method="importance", **options)
    # the weights of whole paths have a heavy tail here: right, or marked as doubtful
    error = abs(weighted.log_probability - own)
    assert error < 3 * weighted.standard_error or not weighted.trustworthy


def populations(denoiser, event, generator, **changes):
    """Twisted paths with a pilot's guidance, its findings changed: what `trust` looks at."""
    found = dataclasses.replace(calibrated(denoiser, event, 256, 32, generator), **changes)
    guidance = events.EventGuidance(denoiser, event, calibration=found)
    grid = sampling.times(denoiser.schedule, 32, spacing="log-ratio", ratios=(2e-3, 80.0))
    on = {"rule": "multistep", "like": torch.zeros((), **DOUBLE), "generator": generator}
    return guidance, grid, paths.twisted(guidance, grid, 256, 8, defensive=0.1, **on)


def test_exact_guidance_overlooks_nothing(generator):
    for probability in (0.1, 1e-4):
        event, _ = half_space(probability)
        made = populations(gaussian(), event, generator())
        share, _ = trust.overlooked(*made, 2000, None, generator(1))
        # a thousandth, and what lies on the border within the noise of the last level
        assert share <= 0.01
        assert trust.doubts(*made, 500, None, generator(1)) == ""
        means = made[2].log_means  # E[h_t] is P(E) at every level
        assert bool(((means - math.log(probability)).abs() < 0.35).all())


def test_a_constraint_that_saturates_is_marked_or_mended(generator):
    """x_1 > 3 written with tanh: h is certain of no wherever tanh is flat, and paths go missing."""
    # as where no path of the pilot meets the event
    made = populations(normal_2d(), WALL, generator(), least=1e-10)
    share, ratio = trust.overlooked(*made, 500, None, generator(1))
    assert share > 0.3
    assert 0.1 < ratio < 10
    assert "next to impossible: many may be missing" in trust.doubts(*made, 500, None, generator(1))
    exact = float(scipy.stats.norm.logsf(3))
    options = {"samples": 2048, "steps": 32, "pilot": 64, **DOUBLE}
    for seed in range(4):  # fitted odds see what h does not
        found = events.log_probability(normal_2d(), WALL, generator=generator(seed), **options)
        assert abs(found.log_probability - exact) < 3 * found.standard_error < 1.2
    plane = events.Constraint(lambda x: x[..., 0] - 3, (2,))
    assert events.log_probability(normal_2d(), plane, generator=generator(), **options).trustworthy


def test_what_the_pilot_adds_keeps_paths_that_h_is_wrong_about(generator):
    """Outside a circle C is far from Gaussian at high noise: paths were dropped in every run."""
    made = populations(normal_2d(), CIRCLE, generator())
    assert 0.003 < made[0].least * 100 < 0.03  # the mean of h is about P(E) = 0.011
    assert trust.overlooked(*made, 500, None, generator(1))[0] < 0.02
    without = populations(normal_2d(), CIRCLE, generator(), least=1e-10)
    assert trust.overlooked(*without, 500, None, generator(1))[0] > trust.BLIND
    assert without[2].log_probability.std() > made[2].log_probability.std()


def test_a_bottleneck_is_a_reason_for_doubt(generator):
    guidance, grid, done = populations(normal_2d(), CIRCLE, generator())
    narrow = done._replace(fewest=torch.full((8,), 3.0))
    assert "left only 24 effective paths" in trust.doubts(
        guidance, grid, narrow, 0, None, generator()
    )
    wide = done._replace(fewest=torch.full((8,), 30.0))
    assert trust.doubts(guidance, grid, wide, 0, None, generator()) == ""


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_paths_are_weighted_for_the_event_whatever_the_guidance_aims_at(method, generator):
    event, b = half_space(1e-2)
    denoiser = gaussian()
    milder = events.EventGuidance(denoiser, half_space(5e-2)[0])
    found = events.log_probability(
        denoiser, event, method=method, samples=4096, steps=24, guidance=milder,
        generator=generator(), **DOUBLE,
    )  # fmt: skip
    own = own_log_probability(gaussian(), DIRECTION, b, 24)
    assert abs(found.log_probability - own) < 4 * found.standard_error < 0.4


def test_correlated_parts_bias_guidance_but_not_the_estimate(generator):
    """Of 1 < x < 2 the margins are opposite; guidance takes them to be independent."""
    event = beyond(1.0) & events.Constraint(lambda x: 2 - x[..., 0], (1,))
    exact = math.log(scipy.stats.norm.cdf(2) - scipy.stats.norm.cdf(1))
    guided = events.EventGuidance(normal_1d(), event)
    at_noise = guided.condition(
        torch.zeros(1, 1, **DOUBLE), *guided.levels(torch.zeros(1, 1, **DOUBLE), 1.0)
    )
    product = math.log(scipy.stats.norm.sf(1) * scipy.stats.norm.cdf(2))
    assert float(at_noise.log_mass) == pytest.approx(product, abs=1e-3)
    assert product > exact + 0.1
    found = events.log_probability(
        normal_1d(), event, samples=4096, steps=128, generator=generator(), **DOUBLE
    )
    assert abs(found.log_probability - exact) < 3 * found.standard_error + 0.005
    assert found.standard_error < 0.05
    assert found.trustworthy
    x = guided_quantiles(event)
    law = scipy.stats.truncnorm(1, 2)
    assert float(x.mean()) == pytest.approx(law.mean(), rel=0.02)
    assert float(x.var()) == pytest.approx(law.var(), rel=0.2)


def test_the_likelihood_ratio_is_exact_for_exact_guidance(generator):
    """On a half-space its only error is that of the densities; it says that it is biased."""
    event, _ = half_space(1e-2)
    found = events.log_probability(
        gaussian(), event, method="likelihood-ratio", samples=5, steps=48,
        generator=generator(), **DOUBLE,
    )  # fmt: skip
    assert found.log_probability == pytest.approx(math.log(1e-2), abs=0.15)
    assert "biased" in found.warning
    assert found.effective_samples == 5


@pytest.mark.parametrize("until", [0.0, 1.0, 1e4])  # weights to the end, half-way, never
def test_twisted_samples_are_conditional_samples(until, generator):
    event, _ = half_space(1e-2)
    z = events.twisted_samples(
        gaussian(), event, 2000, until=until, chunk=500, generator=generator(), **DOUBLE
    )
    assert z.shape == (2000, 2)
    assert bool(event.holds(UNITS.inverse(z)).all()) or (until > 0 and len(z.unique(dim=0)) == 2000)
    assert float(event.holds(UNITS.inverse(z)).double().mean()) > 0.99
    mean, variance = half_space_moments(z)
    slope, exact = exact_moments(1e-2)
    assert mean == pytest.approx(slope, abs=0.05)
    assert variance == pytest.approx(exact, rel=0.2)


def test_twisted_samples_refuse(generator):
    event, _ = half_space(1e-2)
    impossible = events.Constraint(lambda x: -1 - x[..., 0].square(), (2,))
    with pytest.raises(RuntimeError, match=r"none of .* paths reached"):
        events.twisted_samples(gaussian(), impossible, 10, steps=4)
    for until in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="until must not be negative"):
            events.twisted_samples(gaussian(), event, 10, steps=4, until=until)


class Untouched(GaussianDenoiser):
    """A denoiser that must not be asked for anything."""

    def denoise(self, x_t, alpha_t, sigma_t):
        raise AssertionError("refused too late")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"chunk": 0}, ValueError, "chunk must be at least 2"),
        ({"defensive": 1.0}, ValueError, "defensive must lie in"),
        ({"pilot": 8}, ValueError, "pilot must be 0 or at least 16"),
        ({"pilot": -1}, ValueError, "pilot must be at least 0"),
        ({"constraint": lambda x: x}, TypeError, "constraint must be a Constraint"),
        ({"constraint": events.Constraint(lambda x: x[..., 0], (3,))}, ValueError, "2 components"),
        (
            {"constraint": events.Equality(lambda x: x[..., 0], 1.0, (2,)), "pilot": 0},
            ValueError,
            "equality is zero",
        ),
        (
            {"guidance": events.EventGuidance(gaussian(), half_space(0.1)[0])},
            ValueError,
            "guidance must be that of the same denoiser",
        ),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_run(arguments, error, words):
    settings = {"constraint": half_space(0.1)[0]} | arguments
    denoiser = Untouched(MEAN, COVARIANCE, None, UNITS)
    with pytest.raises(error, match=words):
        events.log_probability(denoiser, **settings)
    with pytest.raises(error, match=words):
        events.twisted_samples(denoiser, number=10, **settings)


def test_guidance_must_be_for_samples_of_the_same_shape():
    denoiser = gaussian()
    of_pairs = events.EventGuidance(denoiser, events.Constraint(lambda x: x[..., 0, 0], (4, 2)))
    with pytest.raises(ValueError, match=r"guidance must be for samples of shape \(2,\)"):
        events.log_probability(denoiser, half_space(0.1)[0], guidance=of_pairs)


@pytest.mark.parametrize("method", events.METHODS)
def test_an_event_of_states_is_refused_by_a_denoiser_of_trajectories(method):
    network = networks.TrajectoryUNet(dim=3, widths=(8, 16), blocks=1, kernel=3, embedding=8)
    denoiser = NetworkDenoiser(network, schedules.Cosine(), Standardizer.identity(3))
    event = events.Constraint(lambda x: x[..., 0], (3,))
    with pytest.raises(ValueError, match="the constraint is for states"):
        events.log_probability(denoiser, event, method=method, samples=16, steps=2)
    with pytest.raises(ValueError, match="the constraint is for states"):
        events.EventGuidance(denoiser, event)
    with pytest.raises(ValueError, match="the constraint is for states"):
        events.renew(denoiser, event, torch.zeros(5, 3), [1.0])


@pytest.mark.parametrize("steps", [1, 2])
def test_one_step_is_enough_for_an_estimate(steps, generator):
    """A pilot of one level has nothing to interpolate between."""
    event = beyond(0.0)
    found = events.log_probability(
        normal_1d(), event, steps=steps, samples=2048, pilot=64, generator=generator(), **DOUBLE
    )
    assert abs(found.log_probability - math.log(0.5)) < 3 * found.standard_error < 0.3
    z = events.twisted_samples(
        normal_1d(), event, 10, steps=steps, pilot=32, generator=generator(), **DOUBLE
    )
    assert bool((z > 0).all())


def test_what_is_no_number_is_not_trusted():
    values = torch.tensor([math.nan, -3.0, -3.1, -2.9])
    for found in (
        estimates.from_populations("smc", values, 1000.0, 1, 1),
        estimates.from_values("importance", values.exp(), 1000.0, 1, 1),
    ):
        assert math.isnan(found.log_probability)
        assert not found.trustworthy
        assert "not numbers" in found.warning


@pytest.mark.parametrize("method", ["plain", "subset"])
def test_a_constraint_that_is_no_number_is_an_error(method, generator):
    event = events.Constraint(lambda x: (x[..., 0] + 1).log(), (1,))
    with pytest.raises(ValueError, match="the constraint returned NaN"):
        events.log_probability(
            normal_1d(), event, method=method, samples=64, steps=4, generator=generator(), **DOUBLE
        )


def test_tensors_of_a_constraint_must_follow_its_samples():
    a = torch.ones(2, **DOUBLE)
    with pytest.raises(ValueError, match=r"made like its x, as a.to\(x\)"):
        events.Constraint(lambda x: x @ a - 1, (2,))
    assert events.Constraint(lambda x: x @ a.to(x) - 1, [2]).shape == (2,)


def half_space_moments(z):
    """Mean and variance along the half-space's normal, in its units, of standardised samples."""
    a = DIRECTION * UNITS.std
    along = (z - MEAN) @ a / math.sqrt(float(a @ COVARIANCE @ a))
    return float(along.mean()), float(along.var())


def exact_moments(probability):
    """The same of the law given the event of that probability."""
    cut = scipy.stats.norm.isf(probability)
    slope = scipy.stats.norm.pdf(cut) / probability
    return slope, 1 + cut * slope - slope**2


@pytest.mark.parametrize(("rule", "steps"), [("multistep", 128), ("ddpm", 512)])
def test_renewals_reach_the_law_given_the_event_from_anywhere_in_it(rule, steps, generator):
    """All copies of one sample: nothing but the moves makes them differ."""
    event, _ = half_space(0.1)
    z = (MEAN + 4 * DIRECTION * UNITS.std / (DIRECTION * UNITS.std).norm()).repeat(20_000, 1)
    assert bool(event.holds(UNITS.inverse(z)).all())
    moved, taken = events.renew(
        gaussian(), event, z, (2.0, 1.0) * 8, steps=steps, rule=rule, chunk=4096,
        generator=generator(),
    )  # fmt: skip
    assert bool(event.holds(UNITS.inverse(moved)).all())
    assert len(moved.unique(dim=0)) > 19_900
    mean, variance = half_space_moments(moved)
    slope, exact = exact_moments(0.1)
    assert mean == pytest.approx(slope, rel=0.02)
    assert variance == pytest.approx(exact, rel=0.03)
    assert len(taken) == 16
    assert taken[-2] == pytest.approx(0.2, abs=0.02)
    assert taken[-1] == pytest.approx(0.38, abs=0.02)


def test_renewals_keep_the_law_given_the_event_at_every_level(generator):
    """Exact samples stay exact samples; at high noise one in 1/P(E) moves is taken."""
    event, _ = half_space(0.1)
    root = torch.linalg.cholesky(COVARIANCE)
    z = MEAN + torch.randn(200_000, 2, generator=generator(), **DOUBLE) @ root.T
    z = z[event.holds(UNITS.inverse(z))]
    slope, exact = exact_moments(0.1)
    for ratio, share in ((0.02, 0.99), (0.5, 0.6), (80.0, 0.1)):
        moved, (taken,) = events.renew(
            gaussian(), event, z, [ratio], steps=128, generator=generator(1)
        )
        mean, variance = half_space_moments(moved)
        assert mean == pytest.approx(slope, rel=0.02)
        assert variance == pytest.approx(exact, rel=0.05)
        assert taken == pytest.approx(share, abs=0.1 if ratio < 1 else 0.01)


def test_renewals_take_in_samples_from_outside(generator):
    event, _ = half_space(0.5)
    z = events.renew(
        gaussian(), event, torch.zeros(500, 2, **DOUBLE), [80.0] * 20, steps=8,
        generator=generator(),
    )[0]  # fmt: skip
    assert bool(event.holds(UNITS.inverse(z)).all())


def test_renewed_twisted_samples_have_less_in_common(generator):
    event, _ = half_space(1e-3)
    options = {"excess": 1, "runs": 2, "steps": 32, "pilot": 0, **DOUBLE}
    copies, renewed = (
        events.twisted_samples(
            gaussian(), event, 1000, renewals=at, generator=generator(), **options
        )
        for at in ((), (1.0, 0.3))
    )
    assert len(copies.unique(dim=0)) < 900
    assert len(renewed.unique(dim=0)) > 960
    assert bool(event.holds(UNITS.inverse(renewed)).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"renewals": [0.0019]}, "renewals must be sigma/alpha from"),
        ({"renewals": [500.0]}, "renewals must be sigma/alpha from"),
        ({"renewals": [-1.0]}, "renewals must be positive"),
        ({"renewals": [math.nan]}, "renewals must be positive"),
        ({"x": torch.zeros(2)}, r"x must have shape \(n, "),
        ({"x": torch.zeros(5, 3)}, r"x must have shape \(n, "),
        ({"rule": "heun"}, "rule must be one of"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"event": events.Equality(lambda x: x[..., 0], 1.0, (2,))}, "equality"),
    ],
)
def test_bad_renewals_are_refused(arguments, words):
    """Also one that is a number instead of a sequence, which is a `TypeError`."""
    settings = {"event": half_space(0.1)[0], "x": torch.zeros(5, 2), "renewals": [1.0]} | arguments
    with pytest.raises(ValueError, match=words):
        events.renew(gaussian(), **settings)
    if "renewals" in arguments:
        with pytest.raises(ValueError, match=words):
            events.twisted_samples(gaussian(), half_space(0.1)[0], 10, **arguments)
    with pytest.raises(TypeError, match="renewals must be a sequence of numbers"):
        events.renew(gaussian(), half_space(0.1)[0], torch.zeros(5, 2), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_renewals_start_from_both_ends_of_the_grid(dtype, generator):
    """Given as the numbers that the grid was made from, and by whatever can be run through."""
    event, z = half_space(0.5)[0], torch.zeros(50, 2, dtype=dtype)
    options = {"steps": 16, "ratios": (0.04, 70.0)}
    at = (float(v) for v in torch.tensor([70.0, 0.04]))
    moved, taken = events.renew(gaussian(), event, z, at, generator=generator(), **options)
    assert len(taken) == 2
    assert moved.dtype == dtype


def test_many_renewals_keep_the_variance_where_steps_are_left(generator):
    """From the lowest of the levels they do not: the sampler's last step returns a mean."""
    anything = events.Constraint(lambda x: x[..., 0].square() + 1, (1,))
    z = torch.randn(20_000, 1, generator=generator(), **DOUBLE)
    options = {"steps": 48, "spacing": "central", "ratios": (0.04, 100.0)}
    variance = {
        ratio: float(
            events.renew(
                normal_1d(), anything, z, [ratio] * 100, generator=generator(1), **options
            )[0].var()
        )
        for ratio in (0.04, 1.0)
    }
    assert variance[1.0] == pytest.approx(1, abs=0.03)
    assert variance[0.04] == pytest.approx(6 / 7, abs=0.04)


def test_guidance_is_made_without_gradients_as_well():
    with torch.no_grad():
        guided = events.EventGuidance(gaussian(), half_space(0.1)[0])
    assert guided.event == 1


def test_chunks_change_nothing_but_memory(generator):
    event, _ = half_space(1e-2)
    options = {"samples": 64, "runs": 2, "steps": 6, "pilot": 32, **DOUBLE}
    sizes = []

    class Counted(GaussianDenoiser):
        def denoise(self, x_t, alpha_t, sigma_t):
            sizes.append(len(x_t))
            return super().denoise(x_t, alpha_t, sigma_t)

    denoiser, most, found = Counted(MEAN, COVARIANCE, None, UNITS), [], []
    for chunk in (None, 24):
        found.append(
            events.log_probability(denoiser, event, chunk=chunk, generator=generator(), **options)
        )
        most.append(max(sizes))
        sizes.clear()
        events.twisted_samples(
            denoiser, event, 40, chunk=chunk, renewals=[1.0], generator=generator(),
            **{k: v for k, v in options.items() if k != "samples"},
        )  # fmt: skip
        most.append(max(sizes))
        sizes.clear()
    assert found[1].log_probability == pytest.approx(found[0].log_probability, rel=1e-10)
    assert most[2] == most[3] == 24 < min(most[0], most[1])


def test_seeds_fix_estimates(generator):
    event, _ = half_space(0.3)
    for method in events.METHODS:
        options = {"method": method, "samples": 40, "runs": 2, "steps": 6}
        a, b, c = (
            events.log_probability(gaussian(), event, generator=generator(s), **options, **DOUBLE)
            for s in (1, 1, 2)
        )
        assert a == b
        assert a != c or method == "plain"  # two counts may agree


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "guess"}, "method must be one of"),
        ({"rule": "heun"}, "rule must be one of ddpm, multistep"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"runs": 1}, "runs must be at least 2"),
        ({"runs": 9, "samples": 17}, "runs must be at most half"),
        ({"defensive": 1.0}, "defensive must lie in"),
        ({"method": "subset", "keep": 1.0}, "keep must lie in"),
        ({"method": "subset", "moves": 0}, "moves must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 2"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        events.log_probability(gaussian(), half_space(0.1)[0], **({"samples": 20} | arguments))


def test_estimates_agree_on_trajectories_of_a_network(generator, device):
    torch.manual_seed(0)
    network = networks.TrajectoryUNet(dim=3, widths=(8, 16), blocks=1, kernel=3, embedding=8).to(
        device
    )
    denoiser = NetworkDenoiser(network, schedules.Cosine(), Standardizer.identity(3))
    event = events.Constraint(lambda x: x[..., 0].mean(-1) - 0.5, (12, 3))
    options = {"steps": 12, "samples": 512, "generator": generator()}
    plain, smc = (
        events.log_probability(denoiser, event, method=method, **options)
        for method in ("plain", "smc")
    )
    error = math.hypot(plain.standard_error, smc.standard_error)
    assert 0 < plain.effective_samples < 512
    assert abs(plain.log_probability - smc.log_probability) < 4 * error
    z = events.twisted_samples(denoiser, event, 20, steps=12, pilot=32, generator=generator())
    assert z.shape == (20, 12, 3)
    assert z.device.type == device.type
    assert bool(event.holds(z).all())


# --- Z23's events --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "d"), [(events.one_lobe(), 3), (events.spike(), 4), (events.over_the_top(), 4)]
)
def test_published_events_can_be_followed(event, d, generator):
    assert event.shape == (60, d)
    event.check_gradient(torch.randn(8, 60, d, generator=generator()))


def test_published_events_are_what_they_say():
    t = torch.arange(60)
    x = torch.zeros(2, 60, 3)
    x[:, :, 0] = 8.0  # one lobe, without an oscillation
    x[1, 30:, 0] = -8.0
    assert events.one_lobe().holds(x).tolist() == [True, False]
    amplitude = 0.4 * torch.cos(2 * torch.pi * 6 * t / 60)  # |rfft| is 30 · 0.4 at one frequency
    wave = torch.stack((amplitude, 0 * amplitude, 0 * amplitude), -1)
    assert float(events.one_lobe().margin(20 * wave)) == pytest.approx(0.6 - 12 / 30, abs=1e-5)
    cells = torch.zeros(2, 60, 4)
    cells[0, 17, :2] = torch.tensor([0.6, 0.41])
    cells[1, 17, :2] = torch.tensor([0.6, 0.39])
    assert events.spike().holds(cells).tolist() == [True, False]
    links = torch.zeros(3, 60, 4)
    links[0, 5, 1], links[1, 5, 0], links[2, 5, 2] = -3.2, 3.1, 9.0
    assert events.over_the_top().holds(links).tolist() == [True, False, False]


def test_an_event_of_other_variables_is_the_same_event(generator):
    x = 2 * torch.randn(50, 60, 4, generator=generator())
    event = events.over_the_top()
    halves = event.through(lambda y: y[..., :4] + y[..., 4:], (60, 8))
    y = torch.cat((0.3 * x, 0.7 * x), -1)
    torch.testing.assert_close(halves.margin(y), event.margin(x))
    assert halves.shape == (60, 8)
    assert halves.name == event.name
    halves.check_gradient(y)
    with pytest.raises(ValueError, match="over the top"):
        event.through(lambda y: y, (60, 5))


def test_a_stretched_event_is_the_same_event_and_grows_evenly_in_asinh_units(generator):
    event, scale = events.spike(), 0.86
    x = 0.35 * torch.randn(200, 60, 4, generator=generator())
    for c in (0.0, 0.7):
        aim = event.above(c).stretched(2.5 + c, scale)
        assert torch.equal(aim.holds(x), event.margin(x) > c)
        assert 0 < int(aim.holds(x).sum()) < 200
        aim.check_gradient(x)
    assert aim.shape == event.shape
    assert aim.name == event.name
    # heights that are even in asinh units are so in the function, however tall
    z = torch.linspace(0.1, 4.0, 9)
    cells = torch.zeros(9, 60, 4)
    cells[:, 30, 0] = cells[:, 30, 1] = scale / 5 * torch.sinh(z)
    found = event.stretched(2.5, scale).margin(cells)
    torch.testing.assert_close(found, z - math.asinh(2.5 / scale), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="scale must be positive"):
        event.stretched(2.5, 0.0)
