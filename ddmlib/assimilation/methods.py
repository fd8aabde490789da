"""Methods of cycled assimilation: each propagates its state and assimilates one observation.

A method is a small object with `start` and `cycle`; `cycling.twin` runs any number of them side by
side.  Write your own by giving it these two functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.assimilation import ensemble as ens
from ddmlib.assimilation.observations import Observation
from ddmlib.assimilation.perturbations import Sampler
from ddmlib.assimilation.variational import three_d_var

Forecast = Callable[[Tensor], Tensor]


class Cycle(NamedTuple):
    """One cycle: the method's new state, its background and analysis (*batch, d), and the ensemble
    (*batch, N, d) that stood for the uncertainty of the background, if any."""

    state: Tensor
    background: Tensor
    analysis: Tensor
    ensemble: Tensor | None = None


class Method(Protocol):
    """What `cycling.twin` asks of a method."""

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the state to begin with, given first guesses ``x`` (*batch, d)."""

    def cycle(
        self,
        state: Tensor,
        forecast: Forecast,
        observation: Observation,
        generator: torch.Generator,
    ) -> Cycle:
        """Propagate to the next observation and assimilate it."""


class DeterministicMethod(ABC):
    """A method that carries one state."""

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the first guess."""
        del generator
        return x

    def cycle(
        self,
        state: Tensor,
        forecast: Forecast,
        observation: Observation,
        generator: torch.Generator,
    ) -> Cycle:
        """Propagate the state, `analyse` it."""
        background = self.background(state, forecast)
        analysis, ensemble = self.analyse(background, observation, generator)
        return Cycle(analysis, background, analysis, ensemble)

    def background(self, state: Tensor, forecast: Forecast) -> Tensor:
        """Return what is assumed before the observation: the forecast."""
        return forecast(state)

    @abstractmethod
    def analyse(
        self, background: Tensor, observation: Observation, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return the analysis, and the ensemble that was used, if any."""


@dataclass(frozen=True)
class ThreeDVar(DeterministicMethod):
    """3D-Var with a static background covariance (d, d); see `variational.three_d_var`."""

    covariance: Tensor
    iterations: int = 1

    def analyse(
        self, background: Tensor, observation: Observation, generator: torch.Generator
    ) -> tuple[Tensor, None]:
        """Return the 3D-Var analysis."""
        b = self.covariance.to(background)
        return three_d_var(background, b, observation, iterations=self.iterations), None


@dataclass(frozen=True)
class OptimalInterpolation(DeterministicMethod):
    """The climatology N(mean, covariance) corrected by the observation; no forecast at all.

    Parameters
    ----------
    mean, covariance : Tensor of shape (d,) and (d, d)
    """

    mean: Tensor
    covariance: Tensor

    def background(self, state: Tensor, forecast: Forecast) -> Tensor:
        """Return the climatological mean."""
        return self.mean.to(state).expand_as(state)

    def analyse(
        self, background: Tensor, observation: Observation, generator: torch.Generator
    ) -> tuple[Tensor, None]:
        """Return the mean of the climatology given the observation."""
        return three_d_var(background, self.covariance.to(background), observation), None


@dataclass(frozen=True)
class EnOI(DeterministicMethod):
    """Ensemble optimal interpolation around one forecast; see `ensemble.enoi`.

    Parameters
    ----------
    sampler : callable
        Maps states (*batch, d) and a generator to ensembles (*batch, N, d), physical units: a
        diffusion model's `sampling.resample`, or one of `perturbations`.
    inflation : float
        Factor of the covariance.
    """

    sampler: Sampler
    inflation: float = 1.0

    def analyse(
        self, background: Tensor, observation: Observation, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the analysis and the sampled ensemble, centred on the background."""
        ensemble = self.sampler(background, generator)
        _, x = ens.anomalies(ensemble)
        around = background[..., None, :] + self.inflation**0.5 * x
        return ens.enoi(background, around, observation), around


@dataclass(frozen=True)
class EnsembleMethod(ABC):
    """A method that carries an ensemble.

    Parameters
    ----------
    members : int
    analysis_inflation : float
        Factor of the anomalies after each analysis (DAPPER's ``infl``).
    rotation : bool
        Rotate the anomalies at random after each analysis.
    spread : float
        Standard deviation of the first ensemble about the first guess.
    """

    members: int
    analysis_inflation: float = 1.0
    rotation: bool = False
    spread: float = 1.0

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return an ensemble about the first guess."""
        checks.count("members", self.members, 2)
        shape = (*x.shape[:-1], self.members, x.shape[-1])
        z = noise.normal(shape, generator=generator, device=x.device, dtype=x.dtype)
        return x[..., None, :] + self.spread * z

    def cycle(
        self,
        state: Tensor,
        forecast: Forecast,
        observation: Observation,
        generator: torch.Generator,
    ) -> Cycle:
        """Do what `update` says, then inflate and rotate."""
        before, after = self.update(state, forecast, observation)
        analysis = after.mean(-2)
        if self.analysis_inflation != 1:
            after = ens.inflate(after, self.analysis_inflation)
        if self.rotation:
            after = ens.rotate(after, generator)
        return Cycle(after, before.mean(-2), analysis, before)

    @abstractmethod
    def update(
        self, state: Tensor, forecast: Forecast, observation: Observation
    ) -> tuple[Tensor, Tensor]:
        """Return the ensembles before and after the analysis, at the time of the observation."""


@dataclass(frozen=True)
class ETKF(EnsembleMethod):
    """Ensemble-transform Kalman filter; see `ensemble.etkf` and `EnsembleMethod`.

    Parameters
    ----------
    inflation : float
        Factor of the forecast covariance.
    """

    inflation: float = 1.0

    def update(
        self, state: Tensor, forecast: Forecast, observation: Observation
    ) -> tuple[Tensor, Tensor]:
        """Propagate, then transform."""
        before = forecast(state)
        return before, ens.etkf(before, observation, inflation=self.inflation)


@dataclass(frozen=True)
class EnKFN(EnsembleMethod):
    """Finite-size filter, no inflation to tune; see `ensemble.enkf_n` and `EnsembleMethod`."""

    def update(
        self, state: Tensor, forecast: Forecast, observation: Observation
    ) -> tuple[Tensor, Tensor]:
        """Propagate, then transform with adaptive inflation."""
        before = forecast(state)
        return before, ens.enkf_n(before, observation)


@dataclass(frozen=True)
class IEnKS(EnsembleMethod):
    """Iterative ensemble smoother with a lag of one cycle; see `ensemble.ienks`,
    `EnsembleMethod`.

    Parameters
    ----------
    iterations : int
        Most Gauss–Newton iterations.
    """

    iterations: int = 10

    def update(
        self, state: Tensor, forecast: Forecast, observation: Observation
    ) -> tuple[Tensor, Tensor]:
        """Iterate over the interval between two observations."""
        return ens.ienks(state, forecast, observation, iterations=self.iterations)
