"""Networks: maps of a state and a noise level, and plain ones of a state alone.

`ResidualMLP` is F24's (Finn et al. 2024): residual blocks whose normalised input is scaled and
shifted feature by feature (FiLM, Perez et al. 2018) as a function of the noise level.  The noise
level enters as one number, `log(sigma/alpha)`, so the network is tied to no schedule.

Two networks of trajectories follow R23 (Rozet & Louppe 2023): `WindowMLP` sees a window of 2k+1
states as one vector, `ConvNet` is a one-dimensional residual convolution of any length.  Both give
each state an output that depends on its neighbours alone.  `TrajectoryUNet` sees the whole of a
trajectory, for events that depend on all of it (Z23, Finzi et al. 2023).
"""

from torch import nn

from .. import checks
from .states import ACTIVATIONS, Dense, NoiseEmbedding, ResidualBlock, ResidualMLP
from .trajectories import ConvNet, Convolution, ConvolutionBlock, WindowMLP
from .unet import TrajectoryUNet, UNetBlock

__all__ = [
    "ACTIVATIONS",
    "ConvNet",
    "Convolution",
    "ConvolutionBlock",
    "Dense",
    "NoiseEmbedding",
    "ResidualBlock",
    "ResidualMLP",
    "TrajectoryUNet",
    "UNetBlock",
    "WindowMLP",
    "from_settings",
]


def from_settings(kind: str, settings: dict) -> nn.Module:
    """Build the network that a weight file's card describes."""
    kinds: dict[str, type[nn.Module]] = {
        kind.__name__: kind for kind in (ResidualMLP, Dense, WindowMLP, ConvNet, TrajectoryUNet)
    }
    return kinds[checks.choice("network", kind, kinds)](**settings)
