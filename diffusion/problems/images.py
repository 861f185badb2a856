"""What all data sets of images share. Importable without torch."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from diffusion.data.idx import Split
from diffusion.problems.problem import Problem, SampleFormat, Say
from diffusion.settings import DiffusionSettings, ModelSettings, UnetSettings, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffusion.images.evaluation import ImageEvaluator
    from diffusion.images.experiment import ImageExperiment
    from diffusion.images.pixels import Images
    from diffusion.statistics.evaluator import Drawn


class DataSet(Protocol):
    """Images in files below a folder `root`, with what `IdxDataset` knows of them."""

    @property
    def name(self) -> str: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def channels(self) -> int: ...
    def num_test(self, root: Path) -> int: ...
    def read_images(self, root: Path, split: Split) -> "NDArray[np.uint8]": ...
    def read_labels(self, root: Path, split: Split) -> "NDArray[np.uint8]": ...
    def digest(self) -> str: ...
    def require(self, root: Path) -> None: ...
    def fetch(self, root: Path, *, say: Say) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ImageProblem(Problem):
    """Images in files, learned by the U-Net, and judged by what needs no classifier unless there is one."""

    root: str
    """Folder of the data set."""

    metrics_version = 2  # since real digits have as many of each class asked for, and test_loss has this name
    noun: ClassVar[str] = "images"
    """What figures and tables call the images."""
    classifier: ClassVar[Path | None] = None
    """Weights of a classifier of these images, in whose features they are judged; with an evaluator of its own."""

    @property
    @abstractmethod
    def data_set(self) -> DataSet:
        """Which images these are; most problems have one data set, and set this name to it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.data_set.height, self.data_set.width, self.data_set.channels

    @property
    def sample(self) -> SampleFormat:
        return SampleFormat("uint8", self.shape, fewest=100)

    @property
    def remark(self) -> str:
        if self.classifier is not None:
            return ""
        return (
            f"There is no classifier of {self.noun} here: samples are judged by near copies alone, with "
            "--inception-fid also in Inception's features, and the model by the bits per dimension of test images."
        )

    def check(self, model: ModelSettings) -> None:
        assert isinstance(model, UnetSettings)
        height, width, _ = self.shape
        fits = height % model.patch_size == width % model.patch_size == 0
        require(fits, f"model.patch-size must divide {height}x{width}", model.patch_size)
        height, width, halvings = height // model.patch_size, width // model.patch_size, len(model.dim_mults) - 1
        rule = f"model.dim-mults halves {height}x{width} once for each entry after the first, which must divide evenly"
        require(height % 2**halvings == width % 2**halvings == 0, rule, model.dim_mults)

    def absolute(self) -> Self:
        # Shells leave the ~ in --data.root=~/d as it is.
        return replace(self, root=str(Path(os.path.expanduser(self.root)).absolute()))

    def moved(self, root: str | None) -> Self:
        if root is not None:
            return replace(self, root=root).absolute()
        where = f"--data.root must say where {self.data_set.name} lies now, or where to fetch it to"
        require(Path(self.root).exists(), where, f"none, and {self.root} is gone")
        return self

    def prepare(self, say: Say) -> None:
        self.data_set.fetch(Path(self.root), say=say)

    def digest(self, *, inception: bool) -> Mapping[str, str]:
        found = {"data": self.data_set.digest()}
        if self.classifier is not None:
            # Distances in the features of another classifier are other numbers.
            found["features"] = hashlib.sha256(self.classifier.read_bytes()).hexdigest()
        if inception:
            from diffusion.images.inception import weights_path

            found["inception"] = hashlib.sha256(weights_path().read_bytes()).hexdigest()
        return found

    def build(self, model: UnetSettings, diffusion: DiffusionSettings) -> "ImageExperiment":
        from diffusion.images.experiment import ImageExperiment

        return ImageExperiment(self._load, self.shape, self.noun, model, diffusion, self.num_classes)

    def evaluator(self, model: UnetSettings, diffusion: DiffusionSettings, drawn: "Drawn") -> "ImageEvaluator":
        from diffusion.images.evaluation import RealImages

        samples = drawn.samples[: self.data_set.num_test(Path(self.root))]  # as many real ones stand beside them
        judged = drawn._replace(samples=samples)
        # A function and not the images: a process reads a split only when one of its units needs it.
        return self.evaluator_class()(lambda split: RealImages(*self._load(split)), judged, self.noun)

    def _load(self, split: Split) -> "tuple[Images, NDArray[np.uint8]]":
        """Returns images [n, height, width, channels] and their classes [n]; raises UserError if files are wrong."""
        root = Path(self.root)
        # Again, although the launcher has looked: a job may run much later, and on a machine with other disks.
        self.data_set.require(root)
        return self.data_set.read_images(root, split), self.data_set.read_labels(root, split)

    def evaluator_class(self) -> "type[ImageEvaluator]":
        """Returns the evaluator; imports torch."""
        from diffusion.images.evaluation import ImageEvaluator

        return ImageEvaluator
