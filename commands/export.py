"""The command `export`: makes a folder with a trained model, to be published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from commands.arguments import Run, RunsDir
from commands.where import Checkpoint
from jobs.storage import run_folder


@dataclass(frozen=True, kw_only=True)
class Export:
    """Makes a folder to publish: weights, a card with picture and numbers, a program that draws samples."""

    run: Run
    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="The folder to make; if it is there, it is empty.")]
    checkpoint: Checkpoint = None
    license: str = "unknown"
    """Licence of the weights, as the Hugging Face Hub names it: mit, apache-2.0, cc-by-4.0, ..."""
    runs_dir: RunsDir = Path("runs")

    def __call__(self) -> int:
        from jobs.publish import folder  # here, because other commands need none of it, nor does --help

        run = run_folder.find(self.run, self.runs_dir)
        folder.publish(run, self.checkpoint, self.license, self.folder.resolve(), print)
        print(f"{self.folder} holds the model; its README.md is the card. Try: python {self.folder}/generate.py")
        return 0
