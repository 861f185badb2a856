"""The command `drill`: shows that a training that is stopped again and again ends with the same bytes."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from commands.arguments import AMONG_OPTIONS
from commands.where import Start, given, show
from diffusion.errors import UserError
from jobs.storage import provenance, run_folder
from jobs.storage.run_folder import RunFolder
from jobs.watch.cancel import cancel
from slurm import queue
from slurm.place import Here, OnSlurm


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Trains twice, once stopped again and again, and shows that the results are equal byte for byte.

    With --gpus N on this machine, every other start of the second one uses half as many processes. It stays until the
    end, with or without --wait.
    """

    kills: int = 4
    """How often the second training is stopped: here by SIGKILL, SIGTERM, SIGUSR2 and Ctrl-C in turn; on Slurm by the
    signal that precedes the time limit or a preemption, and by a requeue."""
    steps: int = 400
    """Steps of the training, a small 1D model."""
    seed: int = 0
    """Decides at which steps the training is stopped."""
    where: Annotated[Start, AMONG_OPTIONS] = field(default_factory=Start)

    def __call__(self) -> int:
        if not 0 < self.kills < self.steps:
            raise UserError(f"--kills must lie between 1 and --steps - 1; got {self.kills} of {self.steps} steps")
        folder = self.where.runs_dir.absolute() / "drill" / run_folder.new_name(self.where.runs_dir / "drill")
        place = self.where.place(RunFolder(folder))
        device = self.where.resolve_device(place)
        command = self._command(folder, place, device)
        if self.where.dry_run:
            return show({"steps": self.steps, "kills": self.kills}, " ".join(map(str, command)))
        from jobs.doctor import drill  # here, because all other commands start without it

        folder.mkdir(parents=True)
        print(f"Drill with {place.processes} process(es) on {device}; everything is kept in {folder}", flush=True)
        by_slurm = {"USR2": drill.on_its_job(queue.warn), "scontrol requeue": drill.on_its_job(queue.requeue)}
        disturbances = by_slurm if isinstance(place, OnSlurm) else drill.SIGNALS
        # On Slurm the same job comes back.
        fewer = () if isinstance(place, OnSlurm) else (max(1, place.processes // 2),)
        processes = (place.processes, *fewer)
        runs = [RunFolder(folder / "1d" / name) for name in ("whole", "killed")]

        def cancel_jobs() -> None:
            for run in filter(RunFolder.exists, runs if isinstance(place, OnSlurm) else []):
                with suppress(UserError):  # it has ended
                    cancel(run, queue.active, queue.cancel, queue.Pace().is_due, print)

        with drill.trainings(list(map(str, command)), folder / "log.txt", cancel_jobs) as start:
            found = drill.Drill(folder / "1d", start, disturbances, self.steps, self.kills, self.seed, processes)
            equal = found.run(print)
        print("Equal byte for byte: checkpoints and metrics." if equal else "NOT EQUAL: please report this.")
        return 0 if equal else 1

    def _command(self, folder: Path, place: Here | OnSlurm, device: str) -> list[object]:
        """Returns the command of the training, without the name of the run and the number of its processes."""
        cluster = ["--cluster", "slurm", "--wait"] if isinstance(place, OnSlurm) else ["--cluster", "local"]
        profile = ["--profile", self.where.profile] if self.where.profile is not None else []
        slurm = [f"--slurm.{name.replace('_', '-')}={value}" for name, value in given(self.where.slurm).items()]
        launch = [sys.executable, provenance.ROOT / "launch.py", "train", "1d", "--runs-dir", folder]
        # A multiple of the processes, so the gradient gets a shard for each, and half of them compute the same bytes.
        batch_size, every = 64 * place.processes, max(1, self.steps // 8)
        settings = (
            f"--device {device} --train.batch-size {batch_size} --train.steps {self.steps} "
            # For figures that take less time, because nobody looks at them; steps take as long as with 1,000 timesteps.
            "--diffusion.timesteps 50 "
            # --tracking.notify without a word: nobody is told of these runs, whatever the profile says.
            f"--train.log-every 1 --train.checkpoint-every {every} --tracking.mode disabled --tracking.notify"
        )
        return [*launch, *cluster, *profile, *slurm, *settings.split()]
