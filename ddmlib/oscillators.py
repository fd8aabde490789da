r"""Two further systems of Z23 (Finzi et al. 2023): coupled FitzHugh-Nagumo cells, double pendulum.

Both are systems in the sense of `dynamics`: an object with ``dim`` and ``tendency``, on states of
shape (..., dim), physical units.

*FitzHugh-Nagumo*, two cells coupled in the fast variable x:

    dx_i/dt = x_i (a - x_i)(x_i - 1) - y_i + k (x_j - x_i),    dy_i/dt = b_i x_i - c y_i.

For the published parameters small oscillations are interrupted by rare spikes of both cells
(Ansmann, Karnatak, Lehnertz & Feudel 2013, Phys. Rev. E 88, 052911).

*Double pendulum* of unit masses, lengths and gravity.  With the angles θ from the downward
vertical, ω = dθ/dt and c = cos(θ_1 - θ_2), the energy is

    H = ½ ωᵀ M ω - 2 cos θ_1 - cos θ_2,    M = [[2, c], [c, 1]],

and the momenta are p = M ω.  The state is (θ_1, θ_2, ω_1, ω_2), angles unwrapped, because that is
what Z23's data hold; the equations are those of the Hamiltonian H(θ, p).  Z23's code has the
kinetic matrix of other masses, [[3, 2c], [2c, 2]], beside the same potential; ours is the physical
one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddmlib import checks


@dataclass(frozen=True)
class FitzHughNagumo:
    """Two coupled FitzHugh-Nagumo cells, state (x_1, x_2, y_1, y_2).

    Parameters
    ----------
    a, c, k : float
        Threshold, decay of the recovery variable, and coupling.
    b : pair of float
        Growth rate of each cell's recovery variable; their difference makes the extreme events.
    """

    a: float = -0.025794
    b: tuple[float, float] = (0.0065, 0.0135)
    c: float = 0.02
    k: float = 0.128
    dim: ClassVar[int] = 4

    def tendency(self, x: Tensor) -> Tensor:
        """Return dx/dt at states of shape (..., 4); each component in a row of its own."""
        x_1, x_2, y_1, y_2 = x.unbind(-1)
        flow = self.k * (x_2 - x_1)
        rates = (
            x_1 * (self.a - x_1) * (x_1 - 1) - y_1 + flow,
            x_2 * (self.a - x_2) * (x_2 - 1) - y_2 - flow,
            self.b[0] * x_1 - self.c * y_1,
            self.b[1] * x_2 - self.c * y_2,
        )
        return torch.stack(rates).movedim(0, -1)


@dataclass(frozen=True)
class DoublePendulum:
    """The double pendulum of unit masses, lengths and gravity, state (θ_1, θ_2, ω_1, ω_2)."""

    dim: ClassVar[int] = 4

    def tendency(self, x: Tensor) -> Tensor:
        """Return dx/dt at states of shape (..., 4); each component in a row of its own."""
        theta_1, theta_2, omega_1, omega_2 = x.unbind(-1)
        c, s = torch.cos(theta_1 - theta_2), torch.sin(theta_1 - theta_2)
        # M dω/dt = f, solved by hand: det M = 2 - c² ≥ 1
        f_1 = -s * omega_2 * omega_2 - 2 * torch.sin(theta_1)
        f_2 = s * omega_1 * omega_1 - torch.sin(theta_2)
        determinant = 2 - c * c
        rates = (omega_1, omega_2, (f_1 - c * f_2) / determinant, (2 * f_2 - c * f_1) / determinant)
        return torch.stack(rates).movedim(0, -1)

    def energy(self, x: Tensor) -> Tensor:
        """Return H, shape (...,), which every trajectory keeps."""
        theta_1, theta_2, omega_1, omega_2 = checks.last_axis("x", x, 4).unbind(-1)
        c = torch.cos(theta_1 - theta_2)
        kinetic = omega_1 * omega_1 + c * omega_1 * omega_2 + omega_2 * omega_2 / 2
        return kinetic - 2 * torch.cos(theta_1) - torch.cos(theta_2)

    def momenta(self, x: Tensor) -> Tensor:
        """Return p = M ω, shape (..., 2)."""
        theta_1, theta_2, omega_1, omega_2 = checks.last_axis("x", x, 4).unbind(-1)
        c = torch.cos(theta_1 - theta_2)
        return torch.stack((2 * omega_1 + c * omega_2, c * omega_1 + omega_2), dim=-1)

    def state(self, theta: Tensor, p: Tensor) -> Tensor:
        """Return the state (..., 4) of angles and momenta, each of shape (..., 2)."""
        theta_1, theta_2 = checks.last_axis("theta", theta, 2).unbind(-1)
        p_1, p_2 = checks.last_axis("p", p, 2).unbind(-1)
        c = torch.cos(theta_1 - theta_2)
        determinant = 2 - c * c
        omega_1, omega_2 = (p_1 - c * p_2) / determinant, (2 * p_2 - c * p_1) / determinant
        return torch.stack((theta_1, theta_2, omega_1, omega_2), dim=-1)

    def on_circle(self, x: Tensor) -> Tensor:
        """Return (sin θ_1, sin θ_2, cos θ_1, cos θ_2, ω_1, ω_2) of states (..., 4).

        The pendulum does not know how often it has turned, and neither do these: states after one
        turn, or ten, are like those before.
        """
        theta, omega = checks.last_axis("x", x, 4).split(2, -1)
        return torch.cat((torch.sin(theta), torch.cos(theta), omega), dim=-1)

    def unwound(self, circle: Tensor, interval: float) -> Tensor:
        """Return the states whose `on_circle` is given, full turns counted along a trajectory.

        Between two states each angle turns by ∫ω dt, and the trapezoidal rule needs to know it to
        half a turn only.  Of states 0.5 apart it is wrong by less than 0.5 radians.  Squares of
        sine and cosine need not add to one.

        Parameters
        ----------
        circle : Tensor of shape (..., length, 6)
            As from `on_circle`; the first angles are taken from (-π, π].
        interval : float
            Time between states.

        Returns
        -------
        Tensor of shape (..., length, 4)
        """
        checks.positive("interval", interval)
        if circle.ndim < 2:
            raise ValueError(f"circle must hold trajectories (..., length, 6), got {circle.shape}")
        sine, cosine, omega = checks.last_axis("circle", circle, 6).split(2, -1)
        theta = torch.atan2(sine, cosine)
        turned = interval / 2 * (omega[..., 1:, :] + omega[..., :-1, :])
        turns = torch.round((turned - theta.diff(dim=-2)) / (2 * torch.pi)).detach()
        full = torch.nn.functional.pad(turns.cumsum(-2), (0, 0, 1, 0))
        return torch.cat((theta + 2 * torch.pi * full, omega), dim=-1)
