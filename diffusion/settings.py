"""Settings of data, networks, diffusion and samplers; the table of samplers.

Importable without torch: the command line is made of them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffusion.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """A row of the table of samplers."""

    help: str
    default_steps: int | None
    """Network evaluations of a sampler that is not the experiment's own; None is one for each timestep."""
    is_deterministic: bool
    """Whether it draws no noise on its way, unless eta asks for some."""
    takes_eta: bool = False


SAMPLERS = {
    "ddpm": SamplerKind(help="ancestral", default_steps=None, is_deterministic=False),
    "ddim": SamplerKind(help="", default_steps=50, is_deterministic=True, takes_eta=True),
    "dpm++": SamplerKind(help="DPM-Solver++ 2M", default_steps=30, is_deterministic=True),
    "heun": SamplerKind(help="second order, of Karras et al. 2022", default_steps=50, is_deterministic=True),
    "sde-dpm++": SamplerKind(
        help="SDE-DPM-Solver++ 2M, twice as random as ddpm", default_steps=50, is_deterministic=False
    ),
}
"""Each has its function in the table FUNCTIONS of diffusion/process/samplers.py. Figures take colours in this order."""

# Type checkers refuse a Literal made from a table; the command line takes its choices from it.
if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


class SettingsError(UserError):
    """A wrong setting."""


def require(holds: bool, rule: str, got: object) -> None:
    """Raises SettingsError("rule; got value") unless the rule holds."""
    if not holds:
        raise SettingsError(f"{rule}; got {got}")


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """A Gaussian mixture in one dimension, whose diffusion is known in closed form."""

    means: tuple[float, ...] = (-2.0, 1.5)
    """Mean of each component."""
    stds: tuple[float, ...] = (0.4, 0.8)
    """Standard deviation of each component."""
    weights: tuple[float, ...] = (0.35, 0.65)
    """Probability of each component; they sum to 1."""

    def __post_init__(self) -> None:
        lengths = (len(self.means), len(self.stds), len(self.weights))
        require(len(set(lengths)) == 1, "data.means, data.stds and data.weights must be equally long", lengths)
        require(lengths[0] >= 1, "data.means needs at least one component", "none")
        require(all(map(math.isfinite, self.means)), "data.means must be finite", self.means)
        require(all(math.isfinite(s) and s > 0 for s in self.stds), "data.stds must be positive", self.stds)
        require(all(w > 0 for w in self.weights), "data.weights must be positive", self.weights)
        # 1e-6, because thirds are typed with as many digits as somebody likes.
        require(math.isclose(sum(self.weights), 1, abs_tol=1e-6), "data.weights must sum to 1", self.weights)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A network."""

    def __post_init__(self) -> None:
        """Raises SettingsError for settings that no network can have."""


@dataclass(frozen=True, kw_only=True)
class ClassSettings(ModelSettings):
    """A network that is told the class of what it shall draw."""

    class_dropout: float = 0.1
    """Share of the training examples whose class is not told: there the network learns to do without, as guidance
    needs it."""

    def __post_init__(self) -> None:
        # Not for ModelSettings, which checks nothing: if a class has a second base, this runs the checks of that one.
        super().__post_init__()
        require(0 < self.class_dropout < 1, "model.class-dropout must lie between 0 and 1", self.class_dropout)


@dataclass(frozen=True, kw_only=True)
class MlpSettings(ModelSettings):
    """A multilayer perceptron with a time embedding."""

    dim: int = 128
    """Width of the hidden layers."""
    layers: int = 3
    """Number of hidden layers."""

    def __post_init__(self) -> None:
        require(self.dim >= 2 and self.dim % 2 == 0, "model.dim must be even and at least 2", self.dim)
        require(self.layers >= 1, "model.layers must be at least 1", self.layers)


@dataclass(frozen=True, kw_only=True)
class ClassMlpSettings(ClassSettings, MlpSettings):
    """A multilayer perceptron that is told the time and the class."""


@dataclass(frozen=True, kw_only=True)
class UnetSettings(ModelSettings):
    """denoising-diffusion-pytorch's U-Net."""

    dim: int = 64
    """Channels at full resolution; a multiple of 8."""
    dim_mults: tuple[int, ...] = (1, 2, 4)
    """Channels at each resolution, in multiples of dim; after the first, each halves height and width."""
    attn_heads: tuple[int, ...] | None = None
    """Attention heads at each resolution; None is the library's 4 everywhere."""
    noise_skip: bool = False
    """Predict eps as sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) network(x_t): right at large t from the beginning."""
    patch_size: int = 1
    """Side of the squares folded into channels before the network (space-to-depth): with 2, it sees four
    times the channels at half the height and width."""

    def __post_init__(self) -> None:
        require(self.dim >= 8 and self.dim % 8 == 0, "model.dim must be a multiple of 8", self.dim)
        require(self.patch_size in (1, 2), "model.patch-size must be 1 or 2", self.patch_size)
        require(len(self.dim_mults) >= 1, "model.dim-mults needs at least one entry", self.dim_mults)
        require(all(m >= 1 for m in self.dim_mults), "model.dim-mults must be at least 1", self.dim_mults)
        fits = self.attn_heads is None or len(self.attn_heads) == len(self.dim_mults)
        require(fits, "model.attn-heads must be as long as model.dim-mults", self.attn_heads)
        require(all(h >= 1 for h in self.attn_heads or ()), "model.attn-heads must be at least 1", self.attn_heads)


@dataclass(frozen=True, kw_only=True)
class ClassUnetSettings(ClassSettings, UnetSettings):
    """denoising-diffusion-pytorch's U-Net for guidance without a classifier."""

    attn_heads: ClassVar[None] = None  # type: ignore[misc]
    """No setting: the library's network has 4 everywhere."""


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """The forward process."""

    timesteps: int = 1000
    """T, the number of noise levels."""
    beta_schedule: Literal["linear", "cosine"] = "linear"
    """Variance schedule: linear (DDPM) or cosine (Improved DDPM)."""

    def __post_init__(self) -> None:
        # The linear schedule's last beta is 20 / T, a variance below 1.
        require(self.timesteps > 20, "diffusion.timesteps must be more than 20", self.timesteps)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How samples are drawn."""

    sampler: SamplerName
    steps: int
    """Network evaluations for each sample; guidance of either kind doubles them."""
    eta: float = 0.0
    """DDIM's noise: 0 is deterministic, 1 is as random as ddpm."""

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample depends on its initial noise alone."""
        return SAMPLERS[self.sampler].is_deterministic and self.eta == 0

    def check(self, timesteps: int) -> None:
        """Raises SettingsError if these settings do not fit a process of `timesteps` noise levels."""
        require(
            1 <= self.steps <= timesteps, f"steps must lie between 1 and diffusion.timesteps={timesteps}", self.steps
        )
        require(0 <= self.eta <= 1, "eta must lie between 0 and 1", self.eta)
        takers = " and ".join(name for name, kind in SAMPLERS.items() if kind.takes_eta)
        fits = self.eta == 0 or SAMPLERS[self.sampler].takes_eta
        require(fits, f"only {takers} takes eta, not {self.sampler}", self.eta)

    @property
    def label(self) -> str:
        """Names the settings in file names, as in `dpm++-25` and `ddim-50-eta0.5`."""
        return f"{self.sampler}-{self.steps}" + (f"-eta{self.eta:g}" if self.eta else "")
