"""Passes an evaluation on to wandb when it is complete: `python -m jobs.evaluation_follower RUN NAME`."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from jobs.dashboard import Identity, open_dashboard
from jobs.following import follow, say
from jobs.run_folder import RunFolder
from jobs.tracking import group


class EvaluationFollower:
    """Metrics and figures of an evaluation that is complete."""

    def __init__(self, run: RunFolder, name: str) -> None:
        self._folder = run.samples / name
        self._results: dict[str, Any] = json.loads((self._folder / "metrics.json").read_text())
        experiment, config = run.read_experiment()
        suffix = hashlib.sha256(f"evaluate/{name}".encode()).hexdigest()[:6]
        identity = Identity(
            folder=run.path,
            run_id=f"{run.read_launch()['wandb_id']}-{suffix}",
            project=config.tracking.project,
            name=f"{experiment}/{run.path.name}/{name}/evaluate",
            group=group(run, experiment),
            job_type="evaluate",
            tags=[experiment],
            config=self._results["protocol"],
        )
        self._dashboard = open_dashboard(identity, config.tracking.mode, say)

    def look(self) -> None:
        """All there is to see comes at the end."""

    def end(self) -> None:
        """Passes on everything; the step is that of the weights, so that evaluations of a run make a curve."""
        step = self._results["protocol"]["samples"]["step"]
        metrics = self._results["metrics"].items()
        floors = {f"floor/{name}": metric["floor"] for name, metric in metrics}
        self._dashboard.log(step, {**{f"evaluate/{name}": metric["value"] for name, metric in metrics}, **floors})
        pictures = sorted(self._folder.glob("*.png"))
        self._dashboard.show(step, {f"evaluate/{path.stem}": path for path in pictures})
        self._dashboard.finish(0, preempted=False)


def main() -> None:
    run, name = RunFolder(Path(sys.argv[1])), sys.argv[2]
    follow(lambda attempt: EvaluationFollower(run, name))


if __name__ == "__main__":
    main()
