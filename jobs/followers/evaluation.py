"""Passes an evaluation on to wandb when it is complete: `python -m jobs.followers.evaluation RUN NAME`."""

import json
import sys
from pathlib import Path
from typing import Any

from jobs.followers.loop import follow, open_part
from jobs.storage.run_folder import RunFolder


class EvaluationFollower:
    """Shows metrics and figures of a complete evaluation."""

    def __init__(self, run: RunFolder, name: str) -> None:
        self._folder = run.samples / name
        self._results: dict[str, Any] = json.loads((self._folder / "metrics.json").read_text())
        self._dashboard = open_part(run, f"{name}/evaluate", "evaluate", self._results["protocol"])

    def look(self) -> None:
        """Does nothing: everything is shown at the end."""

    def end(self) -> None:
        """Passes on everything; the step is that of the weights, so that evaluations of a run make a curve."""
        step = self._results["protocol"]["samples"]["step"]
        metrics = self._results["metrics"].items()
        floors = {f"quality/{name}_floor": metric["floor"] for name, metric in metrics}
        self._dashboard.log(step, {**{f"quality/{name}": metric["value"] for name, metric in metrics}, **floors})
        pictures = sorted(self._folder.glob("*.png"))
        self._dashboard.show(step, {f"results/{path.stem}": path for path in pictures})
        self._dashboard.finish(0, preempted=False)


def main() -> None:
    run, name = RunFolder(Path(sys.argv[1])), sys.argv[2]
    follow(lambda attempt: EvaluationFollower(run, name))


if __name__ == "__main__":
    main()
