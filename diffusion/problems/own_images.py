"""Images of the user's own, of any size up to 64x64, grey or coloured. Importable without torch."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from diffusion.problems.images import ImageProblem
from diffusion.settings import ModelSettings, require

if TYPE_CHECKING:
    from diffusion.data.own_images import OwnImages


@dataclass(frozen=True, kw_only=True)
class OwnImagesProblem(ImageProblem):
    """The images below --data.root."""

    root: str = ""
    """Must be given: a folder of PNG or JPEG files, an npy or npz file, IDX files, or CIFAR-10
    (docs/your-own-data.md)."""
    size: tuple[int, ...] | None = None
    """Height and width, or one number for both, to cut and scale images to; None: all have one size."""
    channels: Literal[1, 3] | None = None
    """1 makes images grey, 3 coloured; None: all are alike."""
    sha256: str = ""
    """Hash of the images: found at the start, and a run takes no others."""

    def __post_init__(self) -> None:
        fits = self.size is None or (len(self.size) in (1, 2) and all(8 <= side <= 64 for side in self.size))
        require(fits, "data.size must be one or two numbers from 8 to 64", self.size)

    @property
    def is_known(self) -> bool:
        """Whether the images have been read, and the settings say what they are."""
        return self.size is not None and len(self.size) == 2 and self.channels is not None and self.sha256 != ""

    @property
    def data_set(self) -> "OwnImages":
        from diffusion.data.own_images import OwnImages  # here, because --help and other experiments need no such files

        assert self.is_known and self.size is not None and self.channels is not None
        height, width = self.size
        return OwnImages(name="This data set", height=height, width=width, channels=self.channels, sha256=self.sha256)

    @property
    def about(self) -> str:
        height, width, channels = self.shape
        return f"The author's own images, {height}x{width} and {'grey' if channels == 1 else 'coloured'}."

    def check(self, model: ModelSettings) -> None:
        # Images that nobody has read yet may fit; `absolute` reads them, and what it returns is checked again.
        if self.is_known:
            super().check(model)

    def absolute(self) -> Self:
        """Also reads the images, if that has not been done, and says what they are."""
        from diffusion.data.own_images import load

        require(self.root != "", "--data.root must name your images, a folder or a file", "nothing")
        found = replace(self, root=str(Path(os.path.expanduser(self.root)).absolute()))
        if found.is_known:
            return found
        size = self.size or ()
        loaded = load(Path(found.root), size * 2 if len(size) == 1 else size, self.channels)
        require(
            self.sha256 in ("", loaded.sha256),
            f"data.sha256 must be {loaded.sha256}, that of {found.root}",
            self.sha256,
        )
        height, width, channels = loaded.shape
        fits = min(height, width) >= 8  # `load` has refused larger ones than 64
        require(fits, "images must have 8 to 64 pixels on a side", f"{height}x{width} in {found.root}")
        # The number of channels is spelled out, because type checkers take no int for one of two literals.
        return replace(found, size=(height, width), channels=1 if channels == 1 else 3, sha256=loaded.sha256)

    def moved(self, root: str | None) -> Self:
        found = root is not None or Path(self.root).exists()
        require(found, "--data.root must say where your images lie now", f"none, and {self.root} is gone")
        return super().moved(root)


@dataclass(frozen=True, kw_only=True)
class OwnClassesProblem(OwnImagesProblem):
    """The images below --data.root, and their classes."""

    classes: int = 0
    """Number of classes: found at the start."""

    @property
    def num_classes(self) -> int:
        return self.classes

    def absolute(self) -> Self:
        """Also counts the classes, if that has not been done."""
        from diffusion.data.own_images import load

        found = super().absolute()
        # Not `found`, which is known by now: a number that was typed beside unread images is still to be compared.
        if self.is_known and self.classes:
            return found
        labels = load(Path(found.root), found.size or (), found.channels).labels
        # Over both splits, because a class may have images in one alone.
        classes = 1 + max(int(of_split.max()) for of_split in labels.values())
        rule = f"images-classes needs at least two classes, such as a folder for each, in {found.root}"
        require(classes >= 2, rule, classes)
        require(self.classes in (0, classes), f"data.classes must be {classes}, that of {found.root}", self.classes)
        return replace(found, classes=classes)
