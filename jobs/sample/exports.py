"""Sets of samples in the forms that other tools read. Imports numpy and Pillow when it writes one."""

import io
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from diffusion.errors import UserError
from jobs.files import whole, whole_folder
from jobs.sample.sample_set import SampleSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

Form = Literal["adm", "png", "zip", "npy"]
"""OpenAI's npz, a folder of PNGs, a zip file of PNGs, one array."""

_SUFFIX: dict[Form, str] = {"adm": ".npz", "png": "", "zip": ".zip", "npy": ".npy"}


def check(form: Form, sample_shape: Sequence[int]) -> None:
    """Raises UserError for a form that these samples cannot take."""
    if form != "npy" and len(sample_shape) != 3:
        raise UserError(f"--export takes npy alone for samples that are no images; got {form}")


def path(samples: SampleSet, form: Form) -> Path:
    """Where the export lies. The number of samples is part of its name, because the set may grow."""
    return samples.folder / f"export-{form}-{samples.num_samples}{_SUFFIX[form]}"


def needed_bytes(samples: SampleSet, form: Form | None, sample_shape: Sequence[int]) -> int:
    """Disk space for the export if it is missing; PNGs count as much as the pixels in them."""
    if form is None or path(samples, form).exists():
        return 0
    copies = 3 if form == "adm" and sample_shape[-1] == 1 else 1  # grey as three equal channels
    return copies * samples.num_samples * samples.bytes_per_sample


def export(samples: SampleSet, form: Form | None) -> None:
    """Writes a complete set in this form, whole or not at all; does nothing for None or if it is there already.

    Memory does not grow with the number of samples.
    """
    if form is None:
        return
    samples.remove_abandoned()
    if (target := path(samples, form)).exists():
        return
    if form == "png":
        with whole_folder(target) as folder:
            for name, content in _pngs(samples):
                (folder / name).write_bytes(content)
        return
    with whole(target) as temporary:
        if form == "npy":
            with temporary.open("wb") as array:
                _write_array(array, samples)
        elif form == "zip":
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, content in _pngs(samples):
                    archive.writestr(zipfile.ZipInfo(name), content)  # with a fixed date; PNGs are packed already
        else:
            with zipfile.ZipFile(samples.file) as merged, zipfile.ZipFile(temporary, "w") as archive:
                for name in merged.namelist():  # the images, and their classes where there are any
                    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                        if name == "arr_0.npy":
                            _write_array(member, samples, channels=3)
                        else:
                            shutil.copyfileobj(merged.open(name), member)


def _write_array(file: IO[bytes], samples: SampleSet, channels: int | None = None) -> None:
    """Writes the samples as npy, grey images in so many equal channels."""
    import numpy as np

    for number, part in enumerate(_parts(samples)):
        shape = part.shape[1:] if channels is None else (*part.shape[1:-1], channels)
        if number == 0:
            whole_shape = (samples.num_samples, *shape)
            header = {"descr": part.dtype.str, "fortran_order": False, "shape": whole_shape}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.broadcast_to(part, (len(part), *shape)).tobytes())


def _pngs(samples: SampleSet) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the content of one PNG after the other, grey or coloured as the samples are."""
    from PIL import Image

    images = (image for part in _parts(samples) for image in part)
    for number, image in enumerate(images):
        content = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "png")
        yield f"{number:08d}.png", content.getvalue()


def _parts(samples: SampleSet) -> Iterator["NDArray[Any]"]:
    """Yields the samples in order, those of one shard at a time."""
    return (samples.read_shard(shard) for shard in range(samples.num_shards))
