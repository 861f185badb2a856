"""Run folders of each format that there has been, in an archive for each: `format` in experiment.json, none was 1.

A run of `1d` and one of `mnist-small`, interrupted with Ctrl-C, with a set of 128 samples of the checkpoint that was
written then. Format 1 was made by commit 85652e8, with its copies of the code, and 2 by 164d247, without. To add those
of another format: train and sample as launch.json of these runs says, and pack `EXPERIMENT/old` with `tar -cJf`.
"""

import json
import tarfile
from pathlib import Path

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))
EXPERIMENTS = ("1d", "mnist-small")


def unpack(archive: Path, experiment: str, runs_dir: Path, data: Path) -> Path:
    """The archive's run of an experiment below `runs_dir`; its data lie in `data` now. Returns the run's folder."""
    with tarfile.open(archive) as files:
        members = [member for member in files if member.name.startswith(f"{experiment}/")]
        # Not by extractall(filter="data"), which Python 3.11 knows from 3.11.4 on, and Debian 12 has 3.11.2.
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        files.extractall(runs_dir, members)
    run = runs_dir / experiment / "old"
    settings = json.loads((run / "experiment.json").read_text())
    if "root" in settings["data"]:
        settings["data"]["root"] = str(data)
        (run / "experiment.json").write_text(json.dumps(settings))
    return run
