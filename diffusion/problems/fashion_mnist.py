"""Fashion-MNIST: pictures of clothes in MNIST's format (Xiao et al. 2017). Importable without torch."""

from dataclasses import dataclass, field

from diffusion.data.idx import IdxDataset
from diffusion.problems.images import ImageProblem

FASHION_MNIST = IdxDataset(
    name="FashionMNIST",
    variable="FASHION_MNIST_ROOT",
    height=28,
    width=28,
    count={"train": 60_000, "test": 10_000},
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    # Not https, which S3 does not speak for pages of this kind: what is trusted are the hashes above.
    mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),  # torchvision's
)


@dataclass(frozen=True, kw_only=True)
class FashionMnistProblem(ImageProblem):
    """The clothes of Fashion-MNIST."""

    root: str = field(default_factory=FASHION_MNIST.default_root)
    """Folder of the data set, as torchvision lays it out; fetched when missing. Default: $FASHION_MNIST_ROOT, or
    data."""

    data_set = FASHION_MNIST
    noun = "clothes"
