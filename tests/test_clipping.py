"""Clipping by the global norm, whatever meshes the parameters are on, equals torch's on whole gradients."""

import pytest
import torch
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rsa_lightning.parallel.clipping import clip_by_norm

SHAPES = {
    "plain": (3, 4),
    "rows": (6, 4),
    "uneven rows": (5, 4),
    "columns": (3, 6),
    "replicated": (4,),
    "unsummed": (4, 2),
}
PLACEMENTS = {"rows": Shard(0), "uneven rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}


def whole_gradients() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def clipped_by_torch(max_norm: float) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in whole_gradients().items()}
    for name, grad in whole_gradients().items():
        parameters[name].grad = grad
    norm = nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    return norm, {name: parameter.grad for name, parameter in parameters.items()}


def placed(name: str, grad: Tensor, meshes: list[DeviceMesh]) -> Tensor:
    """A gradient where its name says; split over every dimension of its mesh but the first of two, as of HSDP."""
    mesh = meshes[len(name) % len(meshes)]
    if name == "plain":
        return grad
    if name == "unsummed":  # a part on each rank, as of a norm over split heads
        return DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
    return distribute_tensor(grad, mesh, [*[Replicate()] * (mesh.ndim - 1), PLACEMENTS[name]])


def clipped_over(rank: int, shapes: list[tuple[int, ...]], max_norm: float) -> tuple[Tensor, dict[str, Tensor]]:
    meshes = [init_device_mesh("cpu", shape) for shape in shapes]
    parameters = {}
    for name, grad in whole_gradients().items():
        grad = placed(name, grad, meshes)
        parameters[name] = nn.Parameter(
            torch.zeros_like(grad)
            if name != "unsummed"
            else distribute_tensor(torch.zeros(4, 2).double(), grad.device_mesh)
        )
        parameters[name].grad = grad
    given = [*parameters.values(), parameters["rows"], nn.Parameter(torch.ones(2))]  # one twice, one without gradient
    norm = clip_by_norm(given, max_norm)
    return norm, {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in parameters.items()}


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize(
    "shapes", [[(2,)], [(2,), (1, 2)], [(4,), (2, 2)]], ids=["one mesh", "two meshes", "a plane and a line"]
)
def test_norm_and_gradients_are_those_of_whole_gradients(shapes, max_norm):
    norm, gradients = clipped_by_torch(max_norm)
    for found, clipped in on_ranks(2 if shapes[0] == (2,) else 4, clipped_over, shapes, max_norm):
        torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
        for name, grad in gradients.items():
            torch.testing.assert_close(clipped[name], grad, rtol=1e-12, atol=0)


def learnt(model: nn.Module, rows: Tensor) -> None:
    model(rows).square().mean().backward()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def fully_sharded(rank: int, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    mesh, model = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]), net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    learnt(model, torch.arange(24.0).double().reshape(4, 6).chunk(4)[rank])
    norm = clip_by_norm(model.parameters(), 0.1)
    return norm, [parameter.grad.full_tensor() for parameter in model.parameters()]


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["FSDP2", "HSDP"])
def test_sharded_data_parallelism_clips_as_one_process(shape):
    ranks, whole = 2 * len(shape), net()
    learnt(whole, torch.arange(24.0).double().reshape(4, 6)[:ranks])
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    for found, gradients in on_ranks(ranks, fully_sharded, shape):
        torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
        for mine, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-15)


def test_bf16_squares_are_summed_in_fp32():
    """4096 ones have the norm 64; in bf16 a running sum of ones stops at 256."""
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert clip_by_norm([parameter], 1.0) == 64.0
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.unique().tolist() == [1 / 64]


def test_bf16_gradients_are_scaled_by_a_factor_in_fp32():
    """One rounding, of the product: a factor in bf16 is up to 0.4 % off, for all gradients to one side."""
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    grad = torch.linspace(0.5, 1, 4096).bfloat16()
    parameter.grad = grad.clone()
    norm = clip_by_norm([parameter], 1.0)
    torch.testing.assert_close(norm.double(), grad.double().norm(), rtol=1e-6, atol=0)
    assert torch.equal(parameter.grad, (grad.float() / (norm + 1e-6)).bfloat16())


def test_nothing_to_clip():
    assert clip_by_norm([nn.Parameter(torch.ones(2))], 1.0) == 0.0


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_is_positive(max_norm):
    with pytest.raises(ValueError, match=r"max_norm is a positive number, got .* leave clipping out"):
        clip_by_norm([], max_norm)
