"""The state of a training (model, moving average, optimizer) and the update that takes it from step k to step k + 1."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.process.cuda_graphs import Captured
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.noise_levels import NoiseLevels
from diffusion.process.randomness import Stream, generator, normal, stratified
from diffusion.process.transfer import sent
from jobs.experiments.settings import TrainSettings
from jobs.runtime.compiling import compile_by
from jobs.runtime.job import JobError
from jobs.runtime.prefetch import Prefetch
from jobs.runtime.signals import Stop
from jobs.runtime.world import World
from jobs.storage.checkpoints import Snapshot
from jobs.train.ema import Ema, decay_at
from jobs.train.flat_weights import ALIGNMENT, Flat, FlatAdamW
from jobs.train.held_out import HeldOut
from jobs.train.shards import VOTES, ShardSum, room, share

LOSS_BANDS = 4
"""The timesteps are cut into this many equal parts; the loss of each is logged."""


class NotFinite(JobError):
    """The weights or gradients are NaN or infinite."""


@dataclass(frozen=True)
class Update:
    """What one step did. Most of it stays in tensors, because reading a tensor would wait for the device."""

    losses: Tensor
    """The loss of each example of this process's share of the batch, times the weight of its timestep, [n]."""
    t: Tensor
    """Their timesteps, [n]."""
    grad_norm: float
    """The norm of the whole batch's gradient before clipping; it is the same on every process."""
    lr: float
    stop: Stop
    """The reason to stop after this step that all processes agree on."""

    @property
    def loss(self) -> Tensor:
        """The mean loss of this process's share of the batch."""
        return self.losses.mean()

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were, because the gradient was not finite."""
        return not math.isfinite(self.grad_norm)


def band_sums(losses: Tensor, t: Tensor, num_timesteps: int) -> tuple[Tensor, Tensor]:
    """The sum of losses [n] and the number of examples in each band of timesteps, both [LOSS_BANDS] in float64."""
    bands = torch.arange(LOSS_BANDS, device=t.device)
    inside = (t * LOSS_BANDS // num_timesteps)[:, None] == bands  # [n, LOSS_BANDS]
    # Not index_add: on a GPU its order of summation, hence the last bits, would depend on chance.
    return torch.where(inside, losses[:, None].double(), 0.0).sum(0), inside.double().sum(0)


def lr_at(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step (from 1): a linear rise over `warmup_steps`, then a cosine towards 0."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    # + 1, because at a learning rate of 0 the last step would change nothing.
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Training:
    """The state of a run. It is a pure function of (settings, step): data, timesteps and noise are drawn by counter."""

    def __init__(self, experiment: Experiment, settings: TrainSettings, world: World) -> None:
        self.experiment, self.settings, self.world = experiment, settings, world
        # torch's CPU generator keeps 32 bits of its seed, so those must depend on all bits of ours.
        torch.manual_seed(int(generator(settings.seed, Stream.WEIGHTS).integers(2**32)))
        self.raw: DiffusionModel = experiment.build_model()
        # Convolutions are fastest with channels last; tensors that are not images are left as they are.
        self.raw.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._flat = Flat(self.raw.network)
        self._gradient = self._flat.place_gradients(room(len(self._flat.weights), world.size))
        self.ema = Ema(self.raw.network, self._flat.weights)
        self._levels = NoiseLevels(self.raw.alphas_cumprod, settings.noise_levels)
        self._weights = self._levels.weights.to(world.device)
        self.held_out = HeldOut(experiment, self._levels, self.ema_model, world)
        # The model is on its device already. Placement by Accelerate would copy the parameters out of the flat tensor.
        # In evaluation mode it adds autocast alone: gradients are summed in an order of our own (jobs/train/shards.py).
        self.model: nn.Module = world.accelerator.prepare_model(self.raw, device_placement=False, evaluation_mode=True)
        # More processes than shards cut the batch more finely; then bytes differ from those of fewer processes.
        self.shards = max(settings.grad_shards or 1, world.size)
        self._own_shards = share(world.rank, world.size, self.shards)
        self._sum_shards = ShardSum(self._gradient, self.shards, world.rank, world.size)
        self.optimizer = FlatAdamW(self._flat, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay)
        self._noise = Prefetch(self._draw_noise)
        self._next: tuple[int, tuple[Tensor, ...]] | None = None
        # A captured step reads these two from the same memory each time, so their values are written into them.
        self._ema_share = torch.zeros((), device=world.device)
        self._norm_below = torch.full((), math.inf, device=world.device)
        self._asked: Callable[[], Stop] = lambda: Stop.NO
        self._launch_in_pieces()
        self.step = 0
        self.data_s = 0.0  # how long steps have waited for their examples so far

    def update(self, asked: Callable[[], Stop] = lambda: Stop.NO) -> Update:
        """Makes one optimizer update on the next global batch.

        `asked` tells, when the processes exchange gradients, why this one should stop after the step. A process that
        stopped on its own would leave the others waiting in the next exchange.
        """
        self.step += 1
        self._asked = asked
        examples, lr = self._examples_of(self.step), lr_at(self.step, self.settings)
        self.optimizer.set_lr(lr)
        self._ema_share.fill_(1 - decay_at(self.step, self.settings.ema_decay))
        losses, found = self._advance(*examples)
        if self.step == self.settings.steps:
            self._launch_in_pieces()  # the memory that graphs keep is for the figures now
        elif self.world.device.type == "cuda":
            # The GPU still computes this step while its host draws the examples of the next one.
            self._next = self.step + 1, self.examples(self.step + 1)
        # Here the host waits for the GPU: to read the norm and the votes.
        norm, *votes = found.tolist()
        # A process alone may still heed what it was asked during the step.
        stop = max(reason for reason in Stop if votes[reason]) if self.world.size > 1 else asked()
        return Update(losses, examples[1], norm, lr, stop)

    def _launch_in_pieces(self) -> None:
        """Launches steps kernel by kernel: as a whole, and before and after the exchange of gradients."""
        self._advance: Callable[..., tuple[Tensor, ...]] = self._whole_step
        self._before: Callable[..., tuple[Tensor, ...]] = self._sum_own
        self._after: Callable[..., tuple[Tensor, ...]] = self._move

    def _whole_step(self, *examples: Tensor) -> tuple[Tensor, ...]:
        """Computes the step; returns the loss of each example [n], and the gradient's norm and votes [1 + VOTES].

        Of a process alone the host decides nothing in here, so that a GPU can replay it.
        """
        losses, *sums = self._before(*examples)
        if self.world.size > 1:
            self._sum_shards.exchange(sums, self._asked())
        return losses, *self._after()

    def _sum_own(self, *examples: Tensor) -> tuple[Tensor, ...]:
        """Returns the loss of each example, and the sums of gradients that `ShardSum.add_up` returns."""
        losses: list[Tensor] = []
        shards = self._by_shard(*examples)
        first, _ = self._own_shards
        sums = self._sum_shards.add_up(lambda shard: losses.append(self._pass(*shards[shard - first])))
        return torch.cat(losses), *sums

    def _move(self) -> tuple[Tensor]:
        """Moves weights and averages by the gradient, which is zero afterwards; returns its norm and votes [1 + VOTES].

        The choice whether weights move is a tensor, too: they do if the norm is below `_norm_below`, which is infinity
        for a step, 0 for one that changes nothing. A norm that is NaN or infinite is never below it.
        """
        gradient, votes = self._gradient[: len(self._flat.weights)], self._gradient[-VOTES:]
        # The norm of 16 rows' norms, because one fp32 sum of ten million squares is wrong in its fourth digit.
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(gradient.view(ALIGNMENT, -1), dim=1))
        moves = (norm < self._norm_below).to(norm.dtype)
        # The fused AdamW divides gradients by grad_scale, which clips them, and does nothing where found_inf is 1.
        self.optimizer.grad_scale = (norm / self.settings.max_grad_norm).clamp_(min=1)
        self.optimizer.found_inf = 1 - moves
        self.optimizer.step()
        self.ema.update(self._ema_share * moves)
        found = torch.cat([norm[None], votes])
        self.optimizer.zero_grad()
        votes.zero_()
        return (found,)

    def _pass(self, *examples: Tensor) -> Tensor:
        """Returns the losses of a shard's examples, and adds their part of the batch's gradient."""
        losses: Tensor = self.model(*examples) * self._weights[examples[1]]
        self.world.accelerator.backward(losses.sum() / self.settings.batch_size)
        return losses.detach()

    def _by_shard(self, *examples: Tensor) -> list[tuple[Tensor, ...]]:
        """Cuts this process's examples into its shards."""
        size = self.settings.batch_size // self.shards
        return list(zip(*(tensor.split(size) for tensor in examples), strict=True))

    @contextmanager
    def _without_moving(self) -> Iterator[tuple[Tensor, ...]]:
        """While entered, a step changes nothing, even if it fails halfway; yields the examples of the next step."""
        self._norm_below.zero_()
        self._next = self.step + 1, self.examples(self.step + 1)
        try:
            yield self._next[1]
        finally:
            self.optimizer.zero_grad()
            self._norm_below.fill_(math.inf)

    def compile(self) -> float:
        """Compiles the network for this process's shards, by computing one in vain; returns the seconds that it took.

        Raises JobError if that fails; usually there is no C++ compiler.
        """
        # A shard and no step: processes of which one fails here could not exchange anything.
        with self._without_moving() as examples:
            shard = self._by_shard(*examples)[0]
            return compile_by([self.raw.network], lambda: self._pass(*shard))

    def launch_uncompiled(self) -> None:
        """Computes without what `compile` may have made, until something is compiled again."""
        torch.compiler.set_stance("force_eager")

    def capture(self) -> None:
        """Captures the step as a CUDA graph, so that the host launches it at once.

        With several processes, what comes before the exchange of gradients and what comes after it are graphs; the
        exchange itself is none, so each process may decide alone. Raises RuntimeError if something cannot be captured;
        then all is launched kernel by kernel as before.
        """
        with self._without_moving() as examples:
            if self.world.size == 1:
                self._advance = Captured(self._whole_step, *examples)
            else:
                self._before, self._after = Captured(self._sum_own, *examples), Captured(self._move)

    @property
    def communication_s(self) -> float:
        """The seconds that exchanging gradients has taken so far, with waiting for processes that are slower."""
        return self._sum_shards.exchange_s

    def _examples_of(self, step: int) -> tuple[Tensor, ...]:
        """Returns a step's examples; if they are not drawn yet, the device waits, and `data_s` counts that time."""
        drawn, self._next = self._next, None
        if drawn is not None and drawn[0] == step:
            return drawn[1]
        started = time.perf_counter()
        examples = self.examples(step)
        self.data_s += time.perf_counter() - started
        return examples

    def examples(self, step: int) -> tuple[Tensor, ...]:
        """Draws this process's share of a step's global batch: x0 [n, *sample_shape], t [n], eps like x0.

        If the network is told classes, these [n] come last.
        """
        seed, batch_size, device = self.settings.seed, self.settings.batch_size, self.world.device
        start, stop = self._share()
        x0 = self.experiment.batch(seed, step, start, stop, batch_size, device)
        told = self.experiment.told(seed, step, start, stop, batch_size)
        drawn: list[NDArray[Any]] = [*self._noise.of(step), *told]
        t, eps, *classes = (sent(numbers, device) for numbers in drawn)
        self._noise.begin(step + 1)
        return x0, t, eps, *classes

    def _share(self) -> tuple[int, int]:
        """Returns [start, stop) of this process's examples in the global batch."""
        start, stop = (shard * self.settings.batch_size // self.shards for shard in self._own_shards)
        return start, stop

    def _draw_noise(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draws timesteps [n] and noise [n, *sample_shape] of this process's share."""
        seed, batch_size = self.settings.seed, self.settings.batch_size
        start, stop = self._share()
        u = stratified(seed, Stream.TIMESTEP, step, start, stop, batch_size)
        eps = normal(seed, Stream.NOISE, step, start, stop, self.experiment.sample_shape)
        return self._levels.timesteps(u), eps

    def sums(self, update: Update) -> tuple[float, Tensor, Tensor]:
        """Returns the step's mean loss, and `band_sums`, over the whole batch; every process must call it.

        Each shard is summed alone, as its gradient is, so that the numbers do not depend on the number of processes.
        """
        rows = torch.zeros(self.shards, 1 + 2 * LOSS_BANDS, dtype=torch.float64, device=self.world.device)
        for shard, (losses, t) in enumerate(self._by_shard(update.losses, update.t), self._own_shards[0]):
            bands = band_sums(losses, t, len(self.raw.alphas_cumprod))
            rows[shard] = torch.cat([losses.double().sum()[None], *bands])
        # Of each row one process has the numbers and the others zeros, which can be added in any order.
        loss, sums, counts = self.world.sum(rows).sum(0).cpu().split([1, LOSS_BANDS, LOSS_BANDS])
        return float(loss) / self.settings.batch_size, sums, counts

    def loss_floor(self) -> float | None:
        """The smallest loss that any network can reach, where it is known: for timesteps that count alike."""
        return self.experiment.loss_floor() if self.settings.noise_levels is None else None

    def ema_model(self) -> DiffusionModel:
        """Builds a model whose network has the averaged weights."""
        model = self.experiment.build_model().to(self.world.device)
        model.network = self.ema.network
        return model

    def snapshot(self) -> Snapshot:
        """Copies the state for a checkpoint; raises NotFinite if weights are NaN or infinite."""
        model, ema = self._flat.state_dict(self.raw.network), self.ema.state_dict()
        for name, value in (*model.items(), *ema.items()):
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(
                    f"the weights {name} are not finite after step {self.step}; no checkpoint is written of them"
                )
        return Snapshot(self.step, model, ema, self.optimizer.state_dict())

    def restore(self, snapshot: Snapshot) -> None:
        """Continues from a checkpoint."""
        self.raw.network.load_state_dict(snapshot.model)
        self.ema.network.load_state_dict(snapshot.ema)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.step = snapshot.step
