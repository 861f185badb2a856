"""The fast layers compute what the library's compute."""

import copy
from collections.abc import Iterator

import pytest
import torch
from denoising_diffusion_pytorch import Unet
from denoising_diffusion_pytorch import classifier_free_guidance as with_classes
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion.images.unet import FAST_LAYERS, Block, unit_norm, with_fast_layers

T = torch.tensor([0, 10, 500, 999])


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Told(with_classes.Unet):  # type: ignore[misc]
    """The library's network with classes, of which it is always told the same; of one it is not told."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = torch.tensor([True, False, True, True])
        out: Tensor = super().forward(x, t, torch.tensor([3, 9, 0, 3]), cond_keep_mask=told)
        return out


def pair(**settings: object) -> tuple[nn.Module, nn.Module]:
    """The library's network, its gains no longer 1, and the same with fast layers."""
    torch.manual_seed(0)
    plain = Told(**settings) if "num_classes" in settings else Unet(**settings)
    for name, parameter in plain.named_parameters():
        if name.endswith(".g"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return plain, with_fast_layers(copy.deepcopy(plain)).to(memory_format=torch.channels_last)


class Skipped(nn.Module):
    """In the place of a block whose output is like its input."""

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        return x


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    network(x, T).square().sum().backward()
    return {"x": x.grad, **{name: parameter.grad for name, parameter in network.named_parameters()}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"dim": 16, "dim_mults": (1, 2, 4), "channels": 1}, 28),
        ({"dim": 16, "dim_mults": (1, 2), "channels": 4, "attn_heads": (1, 2)}, 14),
        ({"dim": 16, "dim_mults": (1, 2, 4), "channels": 1, "num_classes": 10}, 28),
    ],
)
def test_outputs_and_gradients_equal_the_librarys(float64: None, settings: dict[str, object], side: int) -> None:
    plain, fast = pair(**settings)
    # A layer that is new in the library, or that has another name there, must not stay slow in silence.
    theirs = {type(module).__name__ for module in fast.modules() if "denoising_diffusion" in type(module).__module__}
    assert theirs <= {"Unet", "ResnetBlock", "Residual", "SinusoidalPosEmb", "Attend"}
    assert not {type(module) for module in fast.modules()} & FAST_LAYERS.keys()
    assert fast.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(len(T), settings["channels"], side, side)  # type: ignore[call-overload]
    torch.testing.assert_close(fast(x, T), plain(x, T), rtol=1e-10, atol=1e-12)
    expected = gradients(plain, x)
    for name, gradient in gradients(fast, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10 * float(expected[name].abs().max()))


@pytest.mark.parametrize("classes", [{}, {"num_classes": 10}], ids=["plain", "classes"])
def test_bf16_is_about_as_precise_as_the_librarys(classes: dict[str, int]) -> None:
    plain, fast = pair(dim=16, dim_mults=(1, 2, 4), channels=1, **classes)
    x = torch.randn(len(T), 1, 28, 28)
    exact = outcome(plain, x)

    def errors(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(network, x)
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])

    assert (errors(fast) < 2 * errors(plain)).all()


def outcome(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of all parameters in one vector."""
    network.zero_grad()
    y = network(x, T)
    y.float().square().sum().backward()
    return y.detach().float(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])  # type: ignore[union-attr]


@pytest.fixture
def autocast_of_cuda() -> Iterator[None]:
    """torch.autocast refuses to stand for CUDA where there is none."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


def test_a_gpus_autocast_keeps_bf16_too(autocast_of_cuda: None) -> None:
    """On tensors that have no memory, so without a GPU: there, autocast's lists are others than on a CPU."""
    dtypes = []
    with FakeTensorMode(), torch.device("cuda"):
        fast = with_fast_layers(Unet(dim=16, dim_mults=(1, 2), channels=1))
        for module in fast.modules():
            if isinstance(module, Block):
                module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        fast(torch.randn(2, 1, 28, 28), torch.tensor([0, 1]))
    assert dtypes and set(dtypes) == {torch.bfloat16}


def test_a_compiled_network_is_the_same_function_and_its_gradients_are_sums_in_a_fixed_order() -> None:
    """Compiled for a GPU, the gradient of an index adds with atomics, in whatever order threads come."""
    operations: set[str] = set()

    def seen(graph: torch.fx.GraphModule, inputs: object) -> object:
        operations.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    # With classes: their network has all layers of the one without, and tracing it takes seconds. So each layer is
    # there once or twice.
    plain, fast = pair(dim=16, dim_mults=(1, 2), channels=1, num_classes=10)
    for network in (plain, fast):
        network.mid_block2 = network.downs[0][1] = network.downs[1][1] = Skipped()  # type: ignore[index]
    x = torch.randn(len(T), 1, 28, 28)
    # What Inductor gets to compile; it would take a minute more.
    fast.compile(backend=aot_autograd(fw_compiler=seen, bw_compiler=seen, decompositions=select_decomp_table()))
    for found, expected in zip(outcome(fast, x), outcome(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert "aten.convolution_backward.default" in operations
    in_any_order = ("index_put", "index_add", "scatter_add", "scatter_reduce", "embedding_dense_backward")
    assert [name for name in operations if any(part in name for part in in_any_order)] == []


def test_the_gradient_of_the_norm(float64: None) -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(unit_norm, torch.randn(2, 3, 2, 2, requires_grad=True))


def test_a_pixel_without_signal_stays_one() -> None:
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    y = unit_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad is not None and torch.isfinite(x.grad).all()
