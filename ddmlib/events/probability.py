r"""The probability of an event under a diffusion model, by five methods.

All but "likelihood-ratio" estimate one number, P(E) of a stochastic sampler with the given steps;
how far this is from the truth is a matter of the model and of the steps, not of the estimator.

- "plain" counts samples; unbiased, good for P(E) above about 100/samples.
- "importance" weighs guided paths; unbiased, good where guidance is nearly exact.
- "smc" resamples them on the way as well; unbiased, the default.  Below P(E) of about 1e-12 it
  tends to lose the event, and says so (`guidance.LEAST`).
- "subset" needs no guidance; biased to order 1/n, a check and for events without gradients.
- "likelihood-ratio" is what Z23 publishes, to show its bias.

Z23's estimator averages log p(x) - log p(x|E) over guided samples.  With exact samples and
densities each value would be log P(E); with samples from q it is log P(E) - KL(q ‖ p(·|E)), and the
densities of the probability flow are not those of the stochastic sampler.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ddmlib import checks, likelihoods, sampling
from ddmlib.denoisers import Denoiser
from ddmlib.events import arguments, estimates, paths, renewal, subset, trust
from ddmlib.events.constraints import Event
from ddmlib.events.estimates import Estimate
from ddmlib.events.guidance import EventGuidance
from ddmlib.events.odds import prepare

UNCHECKED = "no pilot has corrected the guidance: paths that it misses do not show in the error"
ALWAYS = 'every path of the pilot was in the event, which may always hold: ask for method="plain"'
METHODS = ("plain", "importance", "smc", "subset", "likelihood-ratio")


def log_probability(
    denoiser: Denoiser,
    constraint: Event,
    *,
    method: str = "smc",
    samples: int = 4096,
    runs: int = 8,
    steps: int = 64,
    rule: str = "multistep",
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    defensive: float = 0.1,
    pilot: int = 256,
    fitted: bool = True,
    least: float | None = None,
    thin: int = 4,
    keep: float = 0.2,
    moves: int = 4,
    probes: int | None = None,
    guidance: EventGuidance | None = None,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Estimate log P(E) for samples of a denoiser.

    Parameters
    ----------
    denoiser : Denoiser
        Without guidance.
    constraint : Event
        The event E, of positive probability: no equality.
    method : str
        "plain", "importance", "smc", "subset" or "likelihood-ratio"; see the module.
    samples : int
        Paths in all, of "smc" at the levels with most; for "subset" the sum of all populations.
        For "likelihood-ratio" five are published.
    runs : int
        Independent populations that "smc" and "subset" divide the samples into; their scatter is
        the error.
    steps, spacing, ratios
        Of the sampler, as in `sampling.sample`.
    rule : str
        "multistep" or "ddpm", both with ``eta=1`` in the terms of `sampling.sample`.
    defensive : float
        Share of unguided paths ("importance") or steps ("smc"), in [0, 1).
    pilot : int
        Of "importance" and "smc": unguided paths that correct the guidance first, on top of the
        samples (see `pilot`); 16 or more, or 0 for none.  Twice as many weighted ones then tell
        whether fitted odds do better (see `odds`), and if so, twice as many how far to follow them:
        the cost of all is that of five or seven times so many paths.  "smc" looks in the end for
        paths that it overlooked, with as many of its results (see `trust`).
    fitted : bool
        Whether odds may be fitted at all.  They know less of an event's rare parts than C(x̂) does.
    least : float, optional
        Share of P(E) added to P(E | x_t), for paths to what the latter overlooks; more of them then
        end outside.  Default: 0.05, and without odds 0.01.
    thin : int
        Of "smc": where odds are fitted, a population has one in so many of its paths at the noise
        levels where little is decided.
    keep, moves : float, int
        Of "subset": the share above each threshold, and Metropolis moves at each.
    probes : int, optional
        Of "likelihood-ratio": vectors of Hutchinson's estimate; default: the exact trace.
    guidance : EventGuidance, optional
        Default: ``EventGuidance(denoiser, constraint)``; one that is given, of the same denoiser,
        is not corrected.  It may be that of another event, a milder one say: paths are weighted for
        ``constraint``.
    chunk : int, optional
        Paths evaluated at once by "plain", "importance" and "smc", to bound memory.
    generator : torch.Generator, optional
        Source of randomness.
    device, dtype : optional
        Of the paths; the device defaults to that of a network's parameters, else the CPU.  A
        network must be of the same dtype.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        For an unknown method, an event that the denoiser's samples are not for, an equality, or
        settings out of range.
    """
    checks.choice("method", method, METHODS)
    checks.choice("rule", rule, paths.RULES)
    asked: dict[str, Any] = {"defensive": defensive, "pilot": pilot, "chunk": chunk}
    arguments.weighted(denoiser, constraint, **asked, guidance=guidance)
    checks.count("samples", samples, 2)
    if method in ("smc", "subset"):
        if checks.count("runs", runs, 2) * 2 > samples:
            raise ValueError(f"runs must be at most half the samples, got {runs} and {samples}")
        samples -= samples % runs
    checks.count("thin", thin)
    if probes is not None:
        checks.count("probes", probes, 2)
    grid, like = _sampler(denoiser, steps, spacing, ratios, device, dtype)
    on: dict[str, Any] = {"rule": rule, "like": like, "generator": generator}
    parts = [samples] if chunk is None else _parts(samples, chunk)

    sampler: dict[str, Any] = {
        "steps": steps,
        "method": rule,
        "eta": 1.0,
        "spacing": spacing,
        "ratios": ratios,
        "generator": generator,
        "device": like.device,
        "dtype": dtype,
    }

    if method == "plain":
        hits = 0
        for n in parts:
            z = sampling.sample(denoiser, (n, *constraint.shape), **sampler)
            hits += int(constraint.holds(denoiser.standardizer.inverse(z)).sum())
        return estimates.from_count(method, hits, samples, samples * steps)

    if method == "subset":
        if not 0 < keep < 1:
            raise ValueError(f"keep must lie in (0, 1), got {keep}")
        chain: dict[str, Any] = {"keep": keep, "moves": checks.count("moves", moves)}
        found = [
            subset.subset_simulation(denoiser, constraint, grid, samples // runs, **chain, **on)
            for _ in range(runs)
        ]
        logs = torch.tensor([log_p for log_p, _, _ in found], dtype=torch.float64)
        inside, cost = sum(hits for _, hits, _ in found), sum(cost for _, _, cost in found)
        if cost == samples * steps and inside == samples:  # no threshold was needed
            return estimates.from_count(method, samples, samples, cost)
        return estimates.from_populations(method, logs, inside, cost, 0)

    first = 0
    if guidance is None:
        paths_before = 0 if method == "likelihood-ratio" else pilot
        guidance, first = prepare(
            denoiser, constraint, grid, paths_before, fitted=fitted, least=least, chunk=chunk, **on
        )
    evaluations = steps * (samples + first)
    products = evaluations * len(constraint.parts)
    unchecked = UNCHECKED if guidance.calibration is None else ""
    if guidance.calibration is not None and guidance.calibration.inside == 1:
        unchecked = ALWAYS
    if method == "importance":
        # each chunk holds the same share of unguided paths
        drawn = [
            paths.importance(guidance, grid, n, defensive=defensive, event=constraint, **on)
            for n in parts
        ]
        log_weights = torch.cat([part.log_weights[0] for part in drawn])
        size = float(estimates.effective_size(log_weights))
        return estimates.from_values(
            method, log_weights.exp(), size, evaluations, products, unchecked
        )
    if method == "smc":
        n = samples // runs
        settings: dict[str, Any] = {"defensive": defensive, "event": constraint, "chunk": chunk}
        done = paths.twisted(guidance, grid, n, runs, thin=thin, **settings, **on)
        size = float(estimates.effective_size(done.log_weights).sum())
        arrived = bool(torch.isfinite(done.log_probability).any())
        again = pilot if arrived else 0  # of the results, diffused again
        evaluations = done.evaluations + (first + again) * steps
        products = evaluations * len(constraint.parts)
        reasons = unchecked, trust.doubts(guidance, grid, done, again, chunk, generator)
        warning = "; ".join(filter(None, reasons))
        return estimates.from_populations(
            method, done.log_probability, size, evaluations, products, warning
        )

    z = sampling.sample(guidance, (samples, *constraint.shape), **sampler)
    density: dict[str, Any] = {"axes": len(constraint.shape), "steps": steps, "ratios": ratios}
    # the same vectors for both densities, so that their errors partly cancel
    seed = int(torch.randint(2**31, (), generator=generator, device=_home(generator)))
    plain, conditional = (
        likelihoods.log_density(
            each, z, probes=probes, generator=torch.Generator().manual_seed(seed), **density
        )
        for each in (denoiser, guidance)
    )
    traces = 8 * samples * steps * (probes or math.prod(constraint.shape))
    return estimates.from_logarithms(
        method,
        plain.value - conditional.value,
        9 * samples * steps,  # the sampler, and four for each step of two densities
        5 * products + traces,
        "the mean of log p(x) - log p(x|E) over guided samples is biased by minus their "
        "Kullback-Leibler divergence from p(x|E), which the error bar leaves out",
    )


def _home(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _parts(n: int, chunk: int) -> list[int]:
    """Return sizes of at most ``chunk`` that add up to n, as equal as can be."""
    pieces = -(-n // chunk)
    return [n // pieces + (k < n % pieces) for k in range(pieces)]


def twisted_samples(
    denoiser: Denoiser,
    constraint: Event,
    number: int,
    *,
    excess: int = 4,
    runs: int = 8,
    steps: int = 64,
    rule: str = "multistep",
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    defensive: float = 0.1,
    pilot: int = 256,
    fitted: bool = True,
    least: float | None = None,
    until: float = 0.0,
    renewals: Sequence[float] = (),
    guidance: EventGuidance | None = None,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw samples given the event from the law of a sampler, by twisted sequential Monte Carlo.

    Every sample is in the event.  Their law is exact as ``excess`` grows; some samples occur more
    than once, or share most of their path, unless ``renewals`` make them anew.

    With ``until`` weights steer the paths only where the noise is high and guidance poor.  From
    there on each goes down by guidance alone: nothing is weighted, copied or refused any more, so
    samples differ from one another, and a few may end outside the event.

    Parameters
    ----------
    denoiser, constraint, runs, steps, rule, spacing, ratios, defensive, pilot
        As in `log_probability`.
    fitted, least, guidance
        As in `log_probability`.
    chunk, generator, device, dtype
        As in `log_probability`.
    number : int
        Samples wanted.
    excess : int
        Weighted paths that each sample is picked from.
    until : float
        sigma/alpha at which weights end; 0: never, and only paths inside the event are returned.
    renewals : sequence of float
        sigma/alpha from which the samples are made anew in the end, see `renew`: they then have
        less in common.  A move costs one evaluation, without products, a step and sample.

    Returns
    -------
    Tensor of shape (number, *shape), standardised units

    Raises
    ------
    RuntimeError
        If no path reached the event.
    ValueError
        As in `log_probability`.
    """
    checks.count("number", number)
    asked: dict[str, Any] = {"defensive": defensive, "pilot": pilot, "chunk": chunk}
    arguments.weighted(denoiser, constraint, **asked, guidance=guidance)
    renewals = arguments.ratios("renewals", renewals)
    each = max(2, -(-number * checks.count("excess", excess) // checks.count("runs", runs)))
    grid, like = _sampler(denoiser, steps, spacing, ratios, device, dtype)
    on: dict[str, Any] = {"rule": checks.choice("rule", rule, paths.RULES), "like": like}
    on["generator"] = generator
    if not 0 <= until < math.inf:
        raise ValueError(f"until must not be negative, got {until}")
    renewal.starts(paths.levels(denoiser, grid, like), renewals)
    below = EventGuidance(denoiser, constraint) if guidance is None else guidance
    if guidance is None:
        # paths that then follow moment matching are picked by it: odds keep some that it loses
        settings: dict[str, Any] = {"fitted": fitted and until == 0, "least": least}
        guidance, _ = prepare(denoiser, constraint, grid, pilot, **settings, chunk=chunk, **on)
    settings = {"defensive": defensive, "until": until, "event": constraint}
    done = paths.twisted(guidance, grid, each, runs, chunk=chunk, **settings, **on)
    log_weights = done.log_weights.reshape(1, -1)
    if not bool(torch.isfinite(log_weights).any()):
        raise RuntimeError(f"none of {log_weights.numel()} paths reached the event")
    index = paths.systematic(log_weights, generator, number)[0]
    # copies of one path lie side by side: shuffled, any part of the samples is a fair one
    order = torch.randperm(number, generator=generator, device=_home(generator)).to(index.device)
    x = done.x_0.flatten(0, 1)[index[order]]
    passed = len(done.log_means) - 1
    if passed < steps - 1:  # the last step has not been taken
        rest: dict[str, Any] = {"method": rule, "eta": 1.0, "clean": True, "generator": generator}
        parts = x.split(chunk or number)
        x = torch.cat([sampling.reverse(below, part, grid[passed:], **rest) for part in parts])
    if not renewals:
        return x
    sampler: dict[str, Any] = {"steps": steps, "rule": rule, "spacing": spacing, "ratios": ratios}
    sampler |= {"chunk": chunk, "generator": generator}
    return renewal.renew(denoiser, constraint, x, renewals, **sampler)[0]


def _sampler(
    denoiser: Denoiser,
    steps: int,
    spacing: str,
    ratios: tuple[float, float] | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grid of `sampling.sample` with these settings, and a tensor like its samples."""
    device = denoiser.device if device is None else device
    grid = sampling.times_for(denoiser, steps, spacing=spacing, ratios=ratios)
    return grid, torch.zeros((), device=device, dtype=dtype)
