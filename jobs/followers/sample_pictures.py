"""Draws samples of a checkpoint while the training goes on, on a CPU.

`python -m jobs.followers.sample_pictures RUN STEP FOLDER`
"""

import sys
from pathlib import Path

from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder


def main() -> None:
    """Draws with the averaged weights of checkpoint STEP into FOLDER."""
    run, step, folder = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    experiment = run.read_experiment()[1].build()
    model = experiment.build_model().eval()
    model.network.load_state_dict(checkpoints.load(run.checkpoints, step).ema)
    experiment.sketch(model, folder)


if __name__ == "__main__":
    main()
