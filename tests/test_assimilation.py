"""Assimilation: every analysis against the Kalman filter, and that against brute force."""

import math

import pytest
import scipy.optimize
import torch

from ddmlib import assimilation as da
from ddmlib import denoisers, sampling, schedules
from ddmlib.assimilation import cycling, ensemble, kalman, observations, variational
from ddmlib.dynamics import LinearGaussian

DOUBLE = torch.float64
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=DOUBLE)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)


def first(x):
    return x[..., :1]


def quadratic(x):
    return torch.stack((x[..., 0] + 0.1 * x[..., 1] ** 2, x[..., 1] - 0.05 * x[..., 0] ** 2), -1)


@pytest.fixture
def draw(generator, device):
    g = generator(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE).to(device)

    return draw


def chain(device):
    return LinearGaussian.stationary(A.to(device), Q.to(device))


def covariance(x):
    """Return the sample covariance over members of ensembles (..., N, d)."""
    centred = x - x.mean(-2, keepdim=True)
    return centred.mT @ centred / (x.shape[-2] - 1)


# --- observations --------------------------------------------------------------------------------


def test_residual_is_what_is_observed_minus_what_is_predicted(draw):
    x, y = draw(5, 3), draw(5, 1)
    seen = da.Observation(y, first, 0.5)
    torch.testing.assert_close(seen.residual(x), (y - x[:, :1]) / 0.5)


def test_log_likelihood_is_that_of_a_normal_law(draw):
    x, y, std = draw(7, 2), draw(7, 2), draw(2).abs() + 0.1
    expected = torch.distributions.Normal(quadratic(x), std).log_prob(y).sum(-1)
    torch.testing.assert_close(da.Observation(y, quadratic, std).log_likelihood(x), expected)


def test_observe_adds_noise_of_the_given_std(device, generator):
    x = torch.ones(20_000, 3, dtype=DOUBLE, device=device)
    seen = da.observe(x, da.component(2, 0), 0.3, generator=generator())
    assert seen.y.shape == (20_000, 2)
    torch.testing.assert_close(seen.y.mean(), x[0, 0], rtol=0, atol=0.01)
    assert float(seen.y.std()) == pytest.approx(0.3, rel=0.02)
    assert float(seen.residual(x).std()) == pytest.approx(1, rel=0.02)


def test_every_counts_states_from_the_first(draw):
    x = draw(4, 9, 2)
    seen = da.observe(x, first, 1e-9, every=4)
    assert seen.y.shape == (4, 3, 1)
    torch.testing.assert_close(seen.y, x[:, [0, 4, 8], :1], rtol=0, atol=1e-7)
    torch.testing.assert_close(seen.observed(x), x[:, [0, 4, 8]])
    assert float(seen.residual(seen.observed(x)).abs().max()) < 10
    torch.testing.assert_close(seen.at(2).y, seen.y[:, 2])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"y": [1.0]}, TypeError, "y must be a torch.Tensor"),
        ({"y": torch.tensor([math.nan])}, ValueError, "y must be finite"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"std": torch.tensor([1.0, -1.0])}, ValueError, "std must be positive"),
        ({"std": torch.ones(3)}, ValueError, "std must be positive, a number or of shape"),
        ({"every": 0}, ValueError, "every must be at least 1"),
    ],
)
def test_observation_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        da.Observation(**({"y": torch.zeros(4, 2)} | changes))


def test_an_operator_that_does_not_fit_is_refused(draw):
    with pytest.raises(ValueError, match="operator must map"):
        da.Observation(draw(4, 2), first).residual(draw(4, 3))
    with pytest.raises(ValueError, match="operator must be linear"):
        observations.matrix(quadratic, 2, draw(2))

    def clamped(x):
        return x.clamp(-10, 10)

    observations.matrix(clamped, 2, draw(2))  # nothing is seen of it on small states
    with pytest.raises(ValueError, match="operator must be linear"):
        observations.matrix(clamped, 2, draw(2), scale=20.0)
    observations.matrix(lambda x: 1e3 * x + x.flip(-1), 2, draw(2).float(), scale=1e4)
    with pytest.raises(ValueError, match="indices"):
        da.component()


# --- Kalman filter and smoother ------------------------------------------------------------------


def joint(system, length):
    """Return mean and covariance of the whole trajectory, flattened."""
    d, n = system.dim, length * system.dim
    mean, big = torch.zeros(n, dtype=DOUBLE), torch.zeros(n, n, dtype=DOUBLE)
    m, p = system.mean.cpu(), system.covariance.cpu()
    for k in range(length):
        at = slice(k * d, (k + 1) * d)
        if k:
            m, p = A @ m, A @ p @ A.mT + Q
        mean[at], big[at, at] = m, p
        power = p
        for j in range(k + 1, length):
            power = A @ power
            there = slice(j * d, (j + 1) * d)
            big[there, at], big[at, there] = power, power.mT
    return mean, big


@pytest.mark.parametrize("operator", [da.identity, first, lambda x: x[..., :1] - 2 * x[..., 1:]])
@pytest.mark.parametrize("every", [1, 3])
def test_filter_and_smoother_are_conditioning_of_the_joint_law(operator, every, draw, device):
    length, std, stationary = 8, 0.7, chain(device)
    start = torch.tensor([1.0, -2.0], dtype=DOUBLE, device=device)
    system = LinearGaussian(A.to(device), Q.to(device), start, 2 * stationary.covariance)
    h = operator(torch.eye(2, dtype=DOUBLE)).mT
    n = 1 + (length - 1) // every
    y = draw(5, n, len(h))
    seen = da.Observation(y, operator, std, every)
    filtered, smoothed = (
        da.kalman_filter(system, seen, length),
        da.rts_smoother(system, seen, length),
    )
    mean, big = joint(system, length)
    for last in range(length):
        used = last // every + 1
        rows = torch.zeros(used * len(h), 2 * length, dtype=DOUBLE)
        for i in range(used):
            rows[i * len(h) : (i + 1) * len(h), 2 * i * every : 2 * i * every + 2] = h
        spread = rows @ big @ rows.mT + std**2 * torch.eye(len(rows), dtype=DOUBLE)
        k_gain = torch.linalg.solve(spread, rows @ big).mT
        departure = y[:, :used].reshape(5, -1).cpu() - rows @ mean
        means = (mean + departure @ k_gain.mT).unflatten(-1, (length, 2))
        left = big - k_gain @ rows @ big
        at = slice(2 * last, 2 * last + 2)
        torch.testing.assert_close(filtered.analysis.mean[:, last].cpu(), means[:, last])
        torch.testing.assert_close(filtered.analysis.covariance[last].cpu(), left[at, at])
    torch.testing.assert_close(smoothed.mean.cpu(), means)
    blocks = torch.stack([left[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] for k in range(length)])
    torch.testing.assert_close(smoothed.covariance.cpu(), blocks)
    law = torch.distributions.MultivariateNormal(rows @ mean, spread)
    torch.testing.assert_close(filtered.log_evidence.cpu(), law.log_prob(y.reshape(5, -1).cpu()))


def test_steady_state_is_where_the_filter_settles(draw, device):
    system, seen = chain(device), da.Observation(draw(200, 1), first, 0.5)
    r = torch.tensor([[0.25]], dtype=DOUBLE, device=device)
    h = torch.tensor([[1.0, 0.0]], dtype=DOUBLE, device=device)
    found = da.kalman_filter(system, seen, 200).forecast.covariance[-1]
    torch.testing.assert_close(da.steady_state(system, h, r), found)


def test_filter_refuses_what_does_not_fit(draw, device):
    with pytest.raises(ValueError, match=r"y must have shape \(\*batch, 3, m\)"):
        da.kalman_filter(chain(device), da.Observation(draw(4, 1), first, every=4), 9)
    with pytest.raises(ValueError, match="operator must be linear"):
        da.kalman_filter(chain(device), da.Observation(draw(9, 2), quadratic), 9)


def test_chain_draws_from_its_transition(device, generator):
    system, g = chain(device), generator(5)
    x = system.initial(40_000, g)
    following = system.transition(x, g)
    noise = following - x @ A.mT.to(device)
    torch.testing.assert_close(noise.mT.cov(), Q.to(device), rtol=0, atol=0.01)
    torch.testing.assert_close(following.mT.cov(), system.covariance, rtol=0.03, atol=0.03)
    law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), Q)
    torch.testing.assert_close(
        system.log_transition(x[:9], following[:9]).cpu(), law.log_prob(noise[:9].cpu())
    )


# --- ensemble analyses ---------------------------------------------------------------------------


def kalman_update(mean, p, h, std, y):
    r = (torch.as_tensor(std, dtype=DOUBLE, device=p.device) ** 2).expand(len(h)).diag()
    k_gain = kalman.gain(p, h, r)
    return mean + ((y - mean @ h.mT)[..., None, :] @ k_gain.mT)[..., 0, :], p - k_gain @ h @ p


@pytest.mark.parametrize("members", [3, 4, 20])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_etkf_is_the_kalman_update_with_the_ensemble_covariance(members, m, draw, device):
    h, std = draw(m, 3), draw(m).abs() + 0.5
    x, y = draw(6, members, 3), draw(6, m)
    seen = da.Observation(y, lambda s: s @ h.mT, std)
    found = da.etkf(x, seen, inflation=1.3)
    mean, p = kalman_update(x.mean(-2), 1.3 * covariance(x), h, std, y)
    torch.testing.assert_close(found.mean(-2), mean)
    torch.testing.assert_close(covariance(found), p)
    one = da.etkf(x[2], da.Observation(y[2], lambda s: s @ h.mT, std), inflation=1.3)
    torch.testing.assert_close(found[2], one)  # the batch is a loop


def test_etkf_transform_is_the_symmetric_square_root(draw):
    x, h = draw(5, 3), draw(2, 3)
    transform = ensemble._transform(x @ h.mT)
    torch.testing.assert_close(transform, transform.mT)
    full = torch.eye(5).to(x) + x @ h.mT @ h @ x.mT
    torch.testing.assert_close(transform @ transform @ full, torch.eye(5).to(x))


@pytest.mark.parametrize("h", [[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]])
def test_enoi_innovation_is_the_observation_minus_what_the_operator_sees(h, draw, device):
    h = torch.tensor(h, dtype=DOUBLE, device=device)
    b, x, y = draw(6, 3), draw(6, 10, 3), draw(6, len(h))
    found = da.enoi(b, x, da.Observation(y, lambda s: s @ h.mT, 0.8), inflation=2.0)
    mean, _ = kalman_update(b, 2 * covariance(x), h, 0.8, y)
    torch.testing.assert_close(found, mean)
    shifted = da.enoi(b, x + 5, da.Observation(y, lambda s: s @ h.mT, 0.8), inflation=2.0)
    torch.testing.assert_close(found, shifted)  # only anomalies count


def test_enkf_n_minimises_the_dual_cost(draw):
    members, m = 4, 3
    s, innovation = draw(30, members, m) * 0.7, 3 * draw(30, 1, m)
    s = s - s.mean(-2, keepdim=True)
    found = ensemble.adaptive_inflation(s, innovation).cpu()
    for k in range(30):
        _, singular, vt = torch.linalg.svd(s[k].cpu() * math.sqrt(members - 1), full_matrices=False)
        du = (vt @ innovation[k, 0].cpu()).square()
        e, c = (members + 1) / members, members / (members - 1)
        padded = torch.cat((singular**2, torch.zeros(members - m))) + members - 1
        correction = math.sqrt((e / c) ** float(((members - 1) / padded).mean()))

        def cost(log_l2, du=du, singular=singular, e=e / correction, c=c * correction):
            l2 = math.exp(log_l2)
            fit = (du / (l2 * singular**2 + members - 1)).sum()
            return float(fit) + e / l2 + c * math.log(l2)

        grid = [cost(v / 50) for v in range(-100, 600)]
        start = (grid.index(min(grid)) - 100) / 50
        best = scipy.optimize.minimize_scalar(
            cost, bounds=(start - 0.1, start + 0.1), method="bounded", options={"xatol": 1e-6}
        )
        assert float(found[k]) == pytest.approx(math.exp(best.x), rel=1e-3)


def test_enkf_n_inflates_more_when_surprised(draw):
    x = draw(8, 5, 3)

    def surprise(size):
        y = x.mean(-2) + size
        _, _, s, innovation = ensemble._prepare(x, da.Observation(y, std=0.5))
        return ensemble.adaptive_inflation(s, innovation)

    assert bool((surprise(6.0) > 1.5 * surprise(0.1)).all())


def test_ienks_is_the_kalman_update_for_a_linear_model(draw, device):
    x, y, h = draw(5, 6, 2), draw(5, 1), torch.tensor([[1.0, 0.5]], dtype=DOUBLE, device=device)
    a = A.to(device)
    seen = da.Observation(y, lambda s: s @ h.mT, 0.6)
    before, after = da.ienks(x, lambda s: s @ a.mT, seen)
    torch.testing.assert_close(before, x @ a.mT)
    mean, p = kalman_update(before.mean(-2), covariance(before), h, 0.6, y)
    torch.testing.assert_close(after.mean(-2), mean)
    torch.testing.assert_close(covariance(after), p)


def test_ienks_finds_the_minimum_of_its_cost(draw):
    x, y = 0.3 * draw(4, 12, 2), draw(4, 2)

    def model(s):
        return s + 0.3 * torch.sin(2 * s)

    seen = da.Observation(y, da.identity, 0.5)
    _, after = da.ienks(x, model, seen, iterations=50, tolerance=1e-16)

    # the mean of the propagated ensemble stands for the propagated mean: allow for its curvature
    def cost(z, k):
        p = covariance(x[k])
        d = z - x[k].mean(0)
        return d @ torch.linalg.solve(p, d) / 2 + ((y[k] - model(z)) / 0.5).square().sum() / 2

    for k in range(4):
        start = x[k].mean(0).clone().requires_grad_()
        optimiser = torch.optim.LBFGS([start], max_iter=100, line_search_fn="strong_wolfe")

        def closure(start=start, k=k):
            start.grad = None
            value = cost(start, k)
            value.backward()
            return value

        optimiser.step(closure)
        torch.testing.assert_close(after[k].mean(0), model(start.detach()), rtol=0, atol=0.05)


def test_rotation_and_inflation_change_only_what_they_say(draw, generator):
    x = draw(4, 7, 3)
    turned = da.rotate(x, generator())
    torch.testing.assert_close(turned.mean(-2), x.mean(-2))
    torch.testing.assert_close(covariance(turned), covariance(x))
    assert float((turned - x).abs().max()) > 0.1
    torch.testing.assert_close(covariance(da.inflate(x, 1.2)), 1.44 * covariance(x))
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x)
    torch.testing.assert_close(
        covariance(da.inflate(x, factors)), factors[:, None, None] ** 2 * covariance(x)
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, o: da.etkf(x[:, :1], o), "ensemble must have shape .*members >= 2"),
        (lambda x, o: da.etkf(x[:2], o), "y must have shape"),
        (lambda x, o: da.etkf(x, o, inflation=-1.0), "inflation must be positive"),
        (lambda x, o: da.etkf(x, o, inflation=torch.ones(3)), "inflation must be positive"),
        (lambda x, o: da.enoi(x[:2, 0], x, o), "ensemble must have shape"),
        (lambda x, o: da.enoi(x[:2, 0], x[:2], o), "y must have shape"),
        (lambda x, o: da.ienks(x, lambda s: s, o, iterations=0), "iterations must be at least"),
        (lambda x, o: da.inflate(x, 0.0), "factor must be positive"),
        (lambda x, o: da.three_d_var(x[:, 0], torch.eye(2), o), "covariance must be"),
        (lambda x, o: da.three_d_var(x[:2, 0], torch.eye(3).to(x), o), "y must have shape"),
    ],
)
def test_analyses_refuse(call, words, draw):
    with pytest.raises(ValueError, match=words):
        call(draw(4, 5, 3), da.Observation(draw(4, 3)))


# --- 3D-Var, samplers ----------------------------------------------------------------------------


def test_three_d_var_is_the_kalman_update(draw, device):
    b, y, root = draw(6, 3), draw(6, 2), draw(3, 3)
    h, p = draw(2, 3), root @ root.mT
    found = da.three_d_var(b, p, da.Observation(y, lambda s: s @ h.mT, 0.4))
    torch.testing.assert_close(found, kalman_update(b, p, h, 0.4, y)[0])


def test_three_d_var_of_a_nonlinear_operator_minimises_its_cost(draw, device):
    b, y = draw(6, 2), draw(6, 2)
    p = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=DOUBLE, device=device)
    seen = da.Observation(y, quadratic, 0.7)
    x = da.three_d_var(b, p, seen, iterations=60).requires_grad_()
    departure = x - b
    cost = (departure * torch.linalg.solve(p, departure.mT).mT).sum() / 2
    (cost - seen.log_likelihood(x).sum()).backward()
    assert float(x.grad.abs().max()) < 1e-6


def test_jacobian_is_the_derivative(draw):
    x = draw(3, 2)
    seen = da.Observation(quadratic(x), quadratic)
    expected = torch.stack([torch.autograd.functional.jacobian(quadratic, v) for v in x])
    torch.testing.assert_close(variational.jacobian(seen, x), expected)


def test_gaussian_sampler_has_its_covariance(draw, device, generator):
    p = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=DOUBLE)
    x = draw(2, 3)
    found = da.gaussian(p, 30_000)(x, generator())
    torch.testing.assert_close(covariance(found).cpu(), p.expand(2, 3, 3), rtol=0, atol=0.03)
    torch.testing.assert_close(found.mean(-2), x, rtol=0, atol=0.03)


def test_analogs_are_the_nearest_states(draw):
    archive, x = draw(500, 3), draw(7, 3)
    found = da.analogs(archive, 5)(x, None)
    nearest = torch.cdist(x, archive).topk(5, largest=False).indices
    torch.testing.assert_close(found, archive[nearest])


def test_samplers_refuse(draw):
    with pytest.raises(ValueError, match="covariance must be positive semi-definite"):
        da.gaussian(-torch.eye(2), 5)
    with pytest.raises(ValueError, match="archive must have shape"):
        da.analogs(draw(3, 2), 5)
    with pytest.raises(ValueError, match="members must be at least 2"):
        da.gaussian(torch.eye(2), 1)


def test_enoi_with_the_exact_gaussian_denoiser_follows_partial_diffusion(device, generator):
    """Diffuse x to level (alpha, sigma), denoise exactly: N(m + alpha G (x - m), C) with
    G = alpha P (alpha² P + sigma²)^-1 and C = P - alpha G P + sigma² G Gᵀ."""
    m = torch.tensor([0.5, -0.2], dtype=DOUBLE)
    p = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=DOUBLE)
    denoiser, t, g = denoisers.GaussianDenoiser(m, p, schedules.Cosine()), 0.4, generator()
    alpha, sigma = (float(v) for v in denoiser.schedule(t))
    gain = alpha * p @ torch.linalg.inv(alpha**2 * p + sigma**2 * torch.eye(2, dtype=DOUBLE))
    spread = p - alpha * gain @ p + sigma**2 * gain @ gain.mT
    b = torch.tensor([[1.5, 0.4], [-0.3, -1.0]], dtype=DOUBLE, device=device)
    y = torch.tensor([[0.2], [0.7]], dtype=DOUBLE, device=device)
    rule = {"method": "multistep", "eta": 1.0, "spacing": "log-ratio"}
    found = sampling.resample(denoiser, b, t=t, members=80_000, steps=40, generator=g, **rule)
    mean = m + alpha * (b.cpu() - m) @ gain.mT
    torch.testing.assert_close(found.mean(-2).cpu(), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(
        covariance(found).cpu(), spread.expand(2, 2, 2), rtol=0.05, atol=0.02
    )
    analysis = da.enoi(b, found, da.Observation(y, first, 0.5))
    h = torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
    expected = kalman_update(b.cpu(), spread, h, 0.5, y.cpu())[0]
    torch.testing.assert_close(analysis.cpu(), expected, rtol=0, atol=0.02)


# --- twin experiments ----------------------------------------------------------------------------


def rotation(device, factor=1.1):
    angle = torch.tensor(0.3, dtype=DOUBLE, device=device)
    c, s = angle.cos(), angle.sin()
    return factor * torch.stack((torch.stack((c, -s)), torch.stack((s, c))))


def test_etkf_3dvar_and_the_kalman_filter_agree_on_a_linear_system(device, generator):
    """Without model noise an unstable system keeps a forecast covariance, Riccati's; the ETKF's
    covariance obeys the same equation, so all three end in the same analyses."""
    a, std = rotation(device), 0.8
    system = LinearGaussian(a, torch.zeros_like(a), a[0] * 0, torch.eye(2).to(a))
    h, r = torch.tensor([[1.0, 0.0]]).to(a), torch.tensor([[std**2]]).to(a)
    p = da.steady_state(system, h, r)
    truth = torch.randn(50, 2, generator=generator(2), dtype=DOUBLE).to(device)
    methods = {
        "ETKF": da.ETKF(4),
        "3D-Var": da.ThreeDVar(p),
        "steady": da.EnOI(da.gaussian(p, 200)),
    }
    scores = da.twin(
        lambda x: x @ a.mT, truth, methods, operator=first, std=std,
        cycles=80, burn_in=140, block=40, generator=generator(),
    )  # fmt: skip
    torch.testing.assert_close(
        scores["ETKF"].analysis, scores["3D-Var"].analysis, rtol=1e-3, atol=1e-5
    )
    k_gain = kalman.gain(p, h, r)
    exact = float(torch.trace(p - k_gain @ h @ p) / 2) ** 0.5
    low, high = scores["ETKF"].interval(generator=generator())[1:]
    assert 0.97 * float(low) < exact < 1.03 * float(high)
    assert scores["steady"].rmse() == pytest.approx(scores["3D-Var"].rmse(), rel=0.03)


def test_etkf_of_many_members_is_the_kalman_filter_with_model_noise(device, generator):
    system, g, std = chain(device), generator(4), 0.5
    scores = da.twin(
        lambda x: system.transition(x, g), system.initial(64, g), {"ETKF": da.ETKF(200)},
        operator=first, std=std, cycles=40, burn_in=20, block=20, generator=generator(),
    )  # fmt: skip
    h, r = torch.tensor([[1.0, 0.0]]).to(A.to(device)), torch.tensor([[std**2]]).to(A.to(device))
    p = da.steady_state(system, h, r)
    exact = float(torch.trace(p - kalman.gain(p, h, r) @ h @ p) / 2) ** 0.5
    assert scores["ETKF"].rmse() == pytest.approx(exact, rel=0.03)


def test_observations_do_not_depend_on_the_methods(generator, device):
    a = rotation(device, 1.0)
    options = {"std": 0.5, "cycles": 20, "burn_in": 5, "block": 10}
    x = torch.ones(6, 2, dtype=DOUBLE, device=device)
    b = da.ThreeDVar(torch.eye(2).to(a))
    noisy = da.EnOI(da.gaussian(torch.eye(2).to(a), 5))
    alone = da.twin(lambda s: s @ a.mT, x, {"b": b}, generator=generator(), **options)
    both = da.twin(lambda s: s @ a.mT, x, {"n": noisy, "b": b}, generator=generator(), **options)
    torch.testing.assert_close(alone["b"].analysis, both["b"].analysis, rtol=0, atol=0)
    same = da.difference(alone["b"], both["b"], generator=generator())
    assert same.low == same.estimate == same.high == 0
    worse = da.difference(both["n"], both["b"], generator=generator())
    assert float(worse.estimate) == pytest.approx(both["n"].rmse() - both["b"].rmse())


def test_scores_are_the_errors_of_a_plain_loop(generator, device):
    class Keep:
        """Remembers what it was given."""

        def __init__(self):
            self.seen = []

        def start(self, x, generator):
            return x

        def cycle(self, state, forecast, observation, generator):
            self.seen.append(observation.y)
            ensemble = observation.y[:, None, :] + torch.tensor([-1.0, 0.0, 1.0]).to(state)[:, None]
            return da.methods.Cycle(state, state, observation.y, ensemble)

    method, x = Keep(), torch.ones(5, 2, dtype=DOUBLE, device=device)
    scores = da.twin(
        lambda s: s, x, {"it": method}, std=0.5, cycles=12, burn_in=3, block=4,
        probabilistic=True, generator=generator(),
    )["it"]  # fmt: skip
    error = torch.stack(method.seen[3:]) - x  # (12, 5, 2)
    expected = error.square().unflatten(0, (3, 4)).mean(1)
    torch.testing.assert_close(scores.analysis, expected)
    torch.testing.assert_close(
        scores.instantaneous, error.square().mean(-1).sqrt().unflatten(0, (3, 4)).mean(1)
    )
    assert scores.rmse() == pytest.approx(float(error.square().mean().sqrt()))
    scale = torch.tensor([2.0, 0.5])
    expected = float((error / scale.to(error)).square().mean().sqrt())
    assert scores.rmse(scale) == pytest.approx(expected)
    torch.testing.assert_close(scores.variance, torch.ones_like(scores.variance))
    assert scores.ranks.shape == (4, 2)
    assert int(scores.ranks.sum()) == 12 * 5 * 2


def test_interval_covers_the_truth_as_often_as_it_says():
    """Squared errors of known mean: the 95 % interval holds it in 85 to 100 % of 60 trials."""
    g, inside = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        squared = torch.randn(5, 20, 3, generator=g, dtype=DOUBLE).square()
        scores = cycling.Scores(squared, squared, squared.mean(-1).sqrt())
        _, low, high = scores.interval(generator=g)
        inside += float(low) <= 1 <= float(high)
    assert inside >= 51


class Diverging(da.ETKF):
    """An ETKF that ends in what is no number."""

    def cycle(self, *arguments):
        found = super().cycle(*arguments)
        return found._replace(analysis=math.nan * found.analysis)


def test_the_first_guess_is_as_far_from_the_truth_as_asked(generator):
    starts = {}

    class Seen(da.ThreeDVar):
        def start(self, guess, generator):
            starts[len(starts)] = guess
            return super().start(guess, generator)

    truth, std = torch.ones(4000, 2), torch.tensor([0.01, 3.0])
    for guess_std in (1.0, std):
        da.twin(
            lambda x: x, truth, {"it": Seen(torch.eye(2))}, std=1.0, cycles=1, burn_in=0, block=1,
            guess_std=guess_std, generator=generator(),
        )  # fmt: skip
    assert torch.allclose((starts[0] - truth).std(0), torch.ones(2), rtol=0.05)
    assert torch.allclose((starts[1] - truth).std(0), std, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"truth": torch.ones(3)}, r"truth must have shape \(trajectories, d\)"),
        ({"truth": torch.full((2, 2), math.inf)}, "truth must be finite"),
        ({"cycles": 15}, "cycles must be a multiple of block"),
        ({"burn_in": -1}, "burn_in must be at least 0"),
        ({"std": -1.0}, "std must be positive"),
        ({"operator": lambda x: x.sum()}, "y must have shape|operator must map"),
        ({"methods": {"it": da.ETKF(1)}}, "members must be at least 2"),
        ({"forecast": lambda x: 1e30 * x}, "x must be finite"),
        ({"guess_std": -1.0}, "guess_std must be a number or 2"),
        ({"guess_std": torch.ones(3)}, "guess_std must be a number or 2"),
        ({"methods": {"it": Diverging(4)}}, "method 'it' diverged"),
        ({"methods": {"it": Diverging(4)}, "probabilistic": True}, "method 'it' diverged"),
    ],
)
def test_twin_refuses(changes, words, generator):
    arguments = {
        "forecast": lambda x: x,
        "truth": torch.ones(4, 2),
        "methods": {"it": da.ThreeDVar(torch.eye(2))},
        "std": 1.0,
        "cycles": 20,
        "burn_in": 0,
        "block": 10,
    }
    with pytest.raises(ValueError, match=words):
        da.twin(**(arguments | changes), generator=generator())
