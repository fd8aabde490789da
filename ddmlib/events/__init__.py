r"""Events that the user defines: conditional samples, and honest probabilities.

After Z23 (Finzi et al. 2023, ICML).  An event is a `Constraint` C(x) > 0 on a sample in physical
units, an `Equality`, or several of them joined by ``&``.  `EventGuidance` conditions any denoiser
on it, and the result is a denoiser again; `log_probability` estimates P(E), each estimate with
a standard error, an interval, and a word on whether to trust it; `twisted_samples` draws from the
sampler's law given the event, with weights that make it exact in the limit of many paths, and
`renew` makes samples of an event anew without leaving it.
"""

from ddmlib.events.constraints import Conjunction, Constraint, Equality, Event
from ddmlib.events.estimates import Estimate
from ddmlib.events.guidance import Calibration, Conditioned, EventGuidance
from ddmlib.events.odds import FittedGuidance, Odds
from ddmlib.events.pilot import calibrate
from ddmlib.events.probability import METHODS, log_probability, twisted_samples
from ddmlib.events.published import one_lobe, over_the_top, spike
from ddmlib.events.renewal import renew

__all__ = [
    "METHODS",
    "Calibration",
    "Conditioned",
    "Conjunction",
    "Constraint",
    "Equality",
    "Estimate",
    "Event",
    "EventGuidance",
    "FittedGuidance",
    "Odds",
    "calibrate",
    "log_probability",
    "one_lobe",
    "over_the_top",
    "renew",
    "spike",
    "twisted_samples",
]
