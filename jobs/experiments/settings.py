"""Settings of training and tracking. Importable without torch: the command line is made of them."""

import math
from dataclasses import Field, dataclass, field
from typing import Any, Literal, get_args

from diffusion.settings import require

MAX_SEED = 2**63 - 1
Channel = Literal["mail", "webhook", "wandb"]
"""How people are told of a run's end."""
Choice = Literal["auto", "always", "never"]
"""Whether to do what a machine may be unable to do, or what does not always pay."""

FREE = {"may_change": "free"}
"""Marks a setting that a continued run may change at any time, because it does not touch the result."""
ON_PURPOSE = {"may_change": "on purpose"}
"""Marks a setting that `resume` may change, although it touches the result."""


def may_change(setting: Field[Any], *, on_purpose: bool) -> bool:
    """Whether a continued run may change the setting, by `resume` (on purpose) or by the same `train` once more."""
    mark = setting.metadata.get("may_change")
    return mark == "free" or (on_purpose and mark is not None)


def check_seed(name: str, seed: int) -> None:
    """Raises SettingsError for a seed that the random number generators do not take."""
    require(0 <= seed <= MAX_SEED, f"{name} must lie between 0 and 2^63 - 1", seed)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how fast to train."""

    steps: int = field(metadata=ON_PURPOSE)
    """Optimizer updates; `resume` with more of them trains longer."""
    batch_size: int
    """Examples in each update, over all GPUs."""
    grad_shards: int | None = field(default=None, metadata=ON_PURPOSE)
    """Parts of the batch whose gradients are added up in one order: on so many GPUs, or fewer, bytes are the same.
    A GPU computes its parts one after the other, so more of them need less memory.
    None is as many as there are GPUs at the first start. `resume` takes a number alone; then later bytes differ."""
    lr: float
    """AdamW's highest learning rate, reached after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0; from there it falls as a cosine, almost to 0 at the last."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradient."""
    noise_levels: tuple[float, float] | None = None
    """Mean and standard deviation of ln(sigma / alpha), the noise of nine in ten training examples: with 0.1 0.9 most
    are half hidden. The loss is that of v, as in EDM, for which a network needs --model.noise-skip. None is as in DDPM:
    all timesteps alike, and the loss of eps."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, reached after a warm-up: min(ema_decay, (1 + step) / (10 + step))."""
    seed: int = 0
    """Decides initial weights, data order, timesteps and noise."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = field(default="auto", metadata=ON_PURPOSE)
    """auto is bf16 where the hardware computes in it, else fp32, and stays what it was at the first start. tf32 is fp32
    that multiplies with fewer digits, on GPUs alone. If `resume` changes it, later bytes differ."""
    compile: Choice = field(default="auto", metadata=ON_PURPOSE)
    """Compile the network with torch.compile: a minute at each start, for a GPU's steps that take half as long. always,
    also the flag alone, needs a C++ compiler. auto is for runs of 10,000 steps or more on GPUs, if it can be done, and
    stays what it was at the first start. If `resume` changes it, later bytes differ."""
    cuda_graph: Choice = field(default="auto", metadata=FREE)
    """Capture a step once on a GPU (CUDA graph) and launch it as a whole: small batches are several times faster. auto
    does it on one GPU; always also on several, which nobody has measured yet."""
    log_every: int = field(default=10, metadata=FREE)
    """Steps between lines of metrics.jsonl."""
    held_out_every: int = field(default=0, metadata=FREE)
    """Steps between held-out losses: the averaged weights on test images, at fixed timesteps and noise; 0 is none."""
    evaluate_every: int = field(default=0, metadata=FREE)
    """Judge 1,000 samples of the first checkpoint at or after each multiple of so many steps, in a process beside the
    training; 0 is never. For 1d (W1 and KS) and digits (Frechet distance)."""
    checkpoint_every: int | None = field(default=None, metadata=FREE)
    """Steps between checkpoints. None is 1,000 on a CPU; a GPU, which makes so many in seconds, then saves by minutes,
    and at the multiples of evaluate-every and keep-every."""
    checkpoint_minutes: float | None = field(default=None, metadata=FREE)
    """Minutes after which a checkpoint is written in any case. None is 10, or 1 where minutes alone decide."""
    keep_checkpoints: int = field(default=2, metadata=FREE)
    """Number of newest checkpoints to keep."""
    keep_every: int = field(default=0, metadata=FREE)
    """Also keep the first checkpoint at or after each multiple of so many steps; 0 is none."""
    keep_best: bool = field(default=False, metadata=FREE)
    """Also keep the checkpoint with the lowest held-out loss so far."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{_flag(name)} must be at least 1", value)
        for name in ("lr", "max_grad_norm", "checkpoint_minutes"):
            value = getattr(self, name)
            fits = value is None or (math.isfinite(value) and value > 0)
            require(fits, f"{_flag(name)} must be positive and finite", value)
        for name in ("ema_decay", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{_flag(name)} must lie in [0, 1)", getattr(self, name))
        shards = self.grad_shards
        require(
            shards is None or (shards >= 1 and self.batch_size % shards == 0),
            f"train.grad-shards must divide train.batch-size, {self.batch_size}",
            shards,
        )
        for name in ("warmup_steps", "held_out_every", "evaluate_every", "keep_every"):
            require(getattr(self, name) >= 0, f"{_flag(name)} must be at least 0", getattr(self, name))
        needs = "train.keep-best needs train.held-out-every to be at least 1"
        require(self.held_out_every >= 1 or not self.keep_best, needs, self.held_out_every)
        levels = self.noise_levels
        rule = "train.noise-levels must be a mean from -5 to 5 and a standard deviation from 0.1 to 5"
        fits = levels is None or (len(levels) == 2 and -5 <= levels[0] <= 5 and 0.1 <= levels[1] <= 5)
        require(fits, rule, levels)
        decay = self.weight_decay
        require(math.isfinite(decay) and decay >= 0, "train.weight-decay must be at least 0 and finite", decay)
        # If the newest one turns out to be damaged, the one before it is the last resort.
        require(self.keep_checkpoints >= 2, "train.keep-checkpoints must be at least 2", self.keep_checkpoints)
        check_seed("train.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Where curves and pictures go besides the run's folder."""

    mode: Literal["auto", "online", "offline", "disabled"] = field(default="auto", metadata=FREE)
    """auto is $WANDB_MODE if that is set, else online with a key and a server that answers, else offline."""
    project: str = field(default="diffusion-launcher", metadata=FREE)
    """Project in wandb."""
    samples_every: int = field(default=1000, metadata=FREE)
    """Steps between pictures of samples, drawn beside the training from its checkpoints; 0 is none."""
    checkpoints: bool = field(default=False, metadata=FREE)
    """Upload every checkpoint; the final weights are uploaded in any case."""
    alerts: bool = field(default=True, metadata=FREE)
    """Have wandb alert you (in Slack or by mail, as you have set it up there) when the run has finished or failed,
    hangs, skips steps or makes no progress."""
    notify: tuple[Channel, ...] | None = field(default=None, metadata=FREE)
    """Tell people once that the run has finished, has failed or hangs: mail goes to $DIFFUSION_MAIL or to you on this
    machine, webhook posts JSON to $DIFFUSION_WEBHOOK, wandb sends an alert. None is as the profile says, or nobody."""

    def __post_init__(self) -> None:
        # What else is said here is not shown, because it may be the secret address of a webhook.
        channels, known = set(self.notify or ()), set(get_args(Channel))
        require(channels <= known, "tracking.notify must be made of mail, webhook and wandb", "another word")
        clash = "tracking.notify wandb needs a tracking.mode other than disabled"
        require("wandb" not in channels or self.mode != "disabled", clash, self.mode)
        require(bool(self.project), "tracking.project must not be empty", repr(self.project))
        require(self.samples_every >= 0, "tracking.samples-every must be at least 0", self.samples_every)

    def check(self) -> None:
        """Raises SettingsError for a project that wandb does not take; a run of an earlier version may have one."""
        rule = "tracking.project must have at most 128 characters and none of /\\#?%:"
        require(len(self.project) <= 128 and not set("/\\#?%:") & set(self.project), rule, self.project)


def _flag(field: str) -> str:
    return f"train.{field.replace('_', '-')}"
