"""Passes a set of samples, or its evaluation, on to wandb: `python -m jobs.followers.parts RUN NAME [evaluation]`."""

import json
import sys
from pathlib import Path
from typing import Any

from jobs.followers.loop import follow, open_part
from jobs.storage.run_folder import RunFolder

WINDOW = 10
"""A rate is the mean over so many shards."""


class SampleFollower:
    """Shows how far a set of samples is, and the pictures of a complete one.

    Progress and rate are computed from the times of the shards' files, so every follower sends the same values.
    """

    def __init__(self, run: RunFolder, name: str) -> None:
        self._run, self._folder, self._sent = run, run.samples / name, 0
        manifest = self._manifest()
        self._shard_size = manifest["shard_size"]
        self._dashboard = open_part(run, name, "sample", _settings(manifest))

    def look(self) -> None:
        """Passes on the shards that are new, in the order in which they were written."""
        times = sorted(path.stat().st_mtime for path in self._folder.glob("shard-*.npy"))
        total = self._manifest()["num_samples"]
        for done in range(self._sent + 1, len(times) + 1):
            first = max(0, done - WINDOW)
            seconds = times[done - 1] - times[first]
            samples = min(done * self._shard_size, total)
            # Times are those at which shards ended, so the first one in the window gives a time and no samples.
            rate = (samples - (first + 1) * self._shard_size) / seconds if seconds > 0 else None
            self._dashboard.log(samples, {"run/done": samples / total, "speed/samples_per_s": rate})
        self._sent = len(times)

    def end(self) -> None:
        """Passes on the rest: pictures of a complete set."""
        self.look()
        manifest = self._manifest()
        if manifest["complete"]:
            pictures = {f"generated/{path.stem}": path for path in sorted(self._folder.glob("*.png"))}
            self._dashboard.show(manifest["num_samples"], pictures)
            name, kept = f"{self._run.path.name}-samples", [self._folder / "manifest.json"]
            self._dashboard.keep(name, "samples", kept, self._folder, in_place=True)
        self._dashboard.finish(0, preempted=False)

    def _manifest(self) -> dict[str, Any]:
        return self._run.read_samples(self._folder.name)


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine the samples, named as the flags of `sample`."""
    others = ("complete", "sha256", "sampler", "step", "autoguidance")
    about = {key: value for key, value in manifest.items() if key not in others}
    if guided := manifest.get("autoguidance"):
        about |= {"autoguidance": guided["scale"], "weak_checkpoint": guided["step"]}
    return {**about, **manifest["sampler"], "checkpoint": manifest["step"]}


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
    kind = EvaluationFollower if "evaluation" in sys.argv[3:] else SampleFollower
    follow(lambda attempt: kind(RunFolder(Path(sys.argv[1])), sys.argv[2]))


if __name__ == "__main__":
    main()
