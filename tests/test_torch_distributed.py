"""DTensors: two processes compute on their shards what one computes on the whole.

This file is their program too. Each process makes all checks, in order, up to the first failure.
"""

import copy
import datetime
import itertools
import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("distributed")  # the fixture takes long

CHECKS = {}
ROWS = 2  # an axis that no operator computes on in shards
SINGLE = {"up": 2, "groups": 1}
GROUPS = {"up": 2, "groups": 2, "layout": "NHWC"}
LOGITS = {"kernel_size": 3}


def check(function):
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def outcomes(torch, tmp_path_factory):
    """Return the outcome of each check: for both processes a traceback or None."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo in this build of PyTorch")
    folder = tmp_path_factory.mktemp("processes")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=240)
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def main(rank, folder):
    import torch
    import torch.distributed as dist

    outcome = {}
    try:
        if rank == 1:  # here DTensor is imported before the operators, in rank 0 after them
            import torch.distributed.tensor
        import carafepp.torch  # noqa: F401

        assert ("torch.distributed.tensor" in sys.modules) == (rank == 1)
        store = dist.FileStore(str(folder / "store"), 2)
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
        from torch.distributed.device_mesh import init_device_mesh

        for name, function in CHECKS.items():
            torch.manual_seed(0)
            function(init_device_mesh("cpu", (2,)))
            outcome[name] = None
    except BaseException:
        outcome["failure"] = traceback.format_exc()
        raise
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(outcome))


def random_tensors(groups, layout="NCHW", batch=3, channels=6, padding=(1, 1), **_):
    """Return small integers by name: features, masks, logits, grad_output. Their sums are exact."""
    import torch

    h, w = 2 + 2 * padding[0], 3 + 2 * padding[1]  # windows in a map of 4 rows and 5 columns
    shapes = {
        "features": (batch, channels, 4, 5),
        "masks": (batch, groups * 9, 2 * h, 2 * w),
        "logits": (batch, groups * 36, h, w),
        "grad_output": (batch, channels, 2 * h, 2 * w),
    }
    tensors = {name: torch.randint(-3, 4, shape).double() for name, shape in shapes.items()}
    if layout == "NHWC":
        tensors = {name: t.movedim(1, -1).contiguous() for name, t in tensors.items()}
    tensors["grad_masks"] = tensors["masks"]
    return tensors


OPERATORS = {
    "reassemble": ("features", "masks"),
    "reassemble_grad_features": ("grad_output", "features", "masks"),
    "reassemble_grad_masks": ("grad_output", "features", "masks"),
    "reassemble_with_logits": ("features", "logits"),
    "reassemble_with_logits_grad_features": ("grad_output", "features", "logits"),
    "reassemble_with_logits_grad_logits": ("grad_output", "features", "logits"),
    "normalize_masks": ("logits",),
    "normalize_masks_backward": ("grad_masks", "logits"),
}


def call(name, tensors, params):
    import torch

    more = LOGITS if "logits" in OPERATORS[name] else {}
    return getattr(torch.ops.carafepp, name)(*tensors, **params, **more)


def distribute(mesh, tensor, placement):
    """Return the DTensor of a tensor that all processes have."""
    from torch.distributed.tensor import DTensor

    local = tensor
    if placement.is_partial():
        local = tensor / mesh.size()
    elif placement.is_shard():
        local = tensor.chunk(mesh.size(), placement.dim)[mesh.get_rank()]
    return DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def distribute_all(mesh, tensors, placements):
    return [distribute(mesh, *pair) for pair in zip(tensors, placements, strict=True)]


def check_gradients(tensors, others):
    import torch

    for tensor, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(tensor.grad.full_tensor(), other.grad)


@check
def every_placement_gives_the_same_result(mesh):
    import torch
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for params in (SINGLE, GROUPS):
        whole = random_tensors(**params)
        rows, channels = (1, 3) if params is GROUPS else (2, 1)
        for name, arguments in OPERATORS.items():
            tensors = [whole[argument] for argument in arguments]
            expected = call(name, tensors, params)
            some = (Shard(0), Shard(channels), Shard(rows))
            mixed = ((*pair, pair[0])[: len(tensors)] for pair in itertools.product(some, some))
            alike = ([placement] * len(tensors) for placement in (Replicate(), Partial()))
            for given in itertools.chain(mixed, alike):
                result = call(name, distribute_all(mesh, tensors, given), params)
                assert type(result) is DTensor, (name, given)
                assert (result.shape, result.stride()) == (expected.shape, expected.stride())
                torch.testing.assert_close(
                    result.full_tensor(), expected, rtol=1e-12, atol=1e-12, msg=f"{name} {given}"
                )


@check
def results_are_placed_as_their_arguments(mesh):
    from torch.distributed.tensor import Partial, Replicate, Shard

    def placement(name, params, *given):
        whole = random_tensors(**params)
        tensors = [whole[argument] for argument in OPERATORS[name]]
        (result,) = call(name, distribute_all(mesh, tensors, given), params).placements
        return result

    batch, channels, last, everywhere = Shard(0), Shard(1), Shard(3), Replicate()
    three = {"up": 2, "groups": 3}  # two processes cannot share three groups
    for name, arguments in OPERATORS.items():
        of_masks = name.startswith("normalize") or name.endswith(("masks", "logits"))
        of_masks = of_masks and name != "reassemble_with_logits"
        count = len(arguments)
        assert placement(name, SINGLE, *[batch] * count) == batch
        assert placement(name, SINGLE, batch, *[everywhere] * (count - 1)) == batch
        assert placement(name, SINGLE, *[everywhere] * count) == everywhere
        assert placement(name, SINGLE, *[Shard(ROWS)] * count) == everywhere
        assert placement(name, GROUPS, *[last] * count) == last
        assert placement(name, three, *[channels] * count) == everywhere
        if "normalize" in name:
            assert placement(name, SINGLE, *[channels] * count) == everywhere
        else:
            of_channels = Partial() if of_masks else channels
            given = [channels] * (count - 1)
            assert placement(name, SINGLE, *given, everywhere) == of_channels


@check
def channels_need_no_communication(mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    for params, of_masks in ((SINGLE, Replicate()), (GROUPS, Shard(3))):
        of_features = Shard(3 if params is GROUPS else 1)
        whole = random_tensors(**params)
        for name, arguments in OPERATORS.items():
            given = [
                of_features if argument in ("features", "grad_output") else of_masks
                for argument in arguments
            ]
            tensors = distribute_all(mesh, [whole[argument] for argument in arguments], given)
            with CommDebugMode() as communication:
                call(name, tensors, params)
            assert communication.get_total_counts() == 0, name


@check
def two_dimensions_of_a_mesh_share_batch_and_channels(mesh):
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = random_tensors(2)
    tensors = whole["features"], whole["masks"]
    for shape in ((1, 2), (2, 1)):
        both = init_device_mesh("cpu", shape)
        distributed = [distribute_tensor(t, both, [Shard(0), Shard(1)]) for t in tensors]
        result = torch.ops.carafepp.reassemble(*distributed, up=2, groups=2)
        assert result.placements == (Shard(0), Shard(1))
        assert torch.equal(
            result.full_tensor(), torch.ops.carafepp.reassemble(*tensors, up=2, groups=2)
        )


@check
def single_images_are_sharded_by_channels(mesh):
    import torch
    from torch.distributed.tensor import Replicate, Shard

    import carafepp

    whole = random_tensors(2)
    x, m = whole["features"][0], whole["masks"][0]
    expected = carafepp.reassemble(x, m, up=2, groups=2)
    for place, placed in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        result = carafepp.reassemble(
            distribute(mesh, x, place), distribute(mesh, m, place), up=2, groups=2
        )
        assert result.placements == (placed,)
        assert torch.equal(result.full_tensor(), expected)


@check
def functions_are_differentiable(mesh):
    from torch.distributed.tensor import Replicate, Shard

    import carafepp

    def gradients(function, masks, **params):
        whole = random_tensors(**params)
        tensors = whole["features"] / 3, whole[masks] / 3
        pairs = [
            (Shard(0), Shard(0)),
            (Shard(1), Shard(1) if params["groups"] > 1 else Replicate()),
        ]
        expected = [tensor.requires_grad_() for tensor in tensors]
        function(*expected, **params).square().sum().backward()
        for places in pairs:
            inputs = distribute_all(mesh, [tensor.detach() for tensor in tensors], places)
            function(*[x.requires_grad_() for x in inputs], **params).square().sum().backward()
            check_gradients(inputs, expected)
            assert inputs[0].grad.placements == inputs[0].placements

    for groups in (1, 2):
        gradients(carafepp.reassemble, "masks", up=2, groups=groups)
        logits = {"kernel_size": 3, "padding": (0, 1)}
        gradients(carafepp.reassemble_with_logits, "logits", up=2, groups=groups, **logits)
        gradients(carafepp.reassemble, "masks", up=2, groups=groups, padding=(1, 0))


@check
def inference_mode_computes_on_shards(mesh):
    import torch
    from torch.distributed.tensor import Shard

    import carafepp

    whole = random_tensors(1)
    tensors = [distribute(mesh, whole[name], Shard(0)) for name in ("features", "masks")]
    with torch.inference_mode():
        assert carafepp.reassemble(*tensors, up=2).placements == (Shard(0),)


@check
def a_distributed_module_trains_on_shards_of_the_batch(mesh):
    import torch
    from torch.distributed.tensor import Shard, distribute_module

    from carafepp.torch import CARAFE

    # PyTorch 2.9 computes convolutions larger than 1x1 wrongly on a sharded batch.
    network = CARAFE(8, up=2, groups=2, encoder_kernel_size=1).double()
    distributed = distribute_module(copy.deepcopy(network), mesh)
    x = torch.randn(4, 8, 5, 6).double()
    shards = distribute(mesh, x, Shard(0)).requires_grad_()
    x.requires_grad_()
    for size in (None, (9, 12), (11, 12)):
        expected, output = network(x, size=size), distributed(shards, size=size)
        assert output.placements == (Shard(0),)
        torch.testing.assert_close(output.full_tensor(), expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    check_gradients([shards, *distributed.parameters()], [x, *network.parameters()])


@check
def a_fully_sharded_module_trains(mesh):
    import torch

    from carafepp.torch import CARAFE

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return  # PyTorch 2.5 has fully_shard elsewhere, and for CUDA alone

    network = CARAFE(8, up=2).double()
    sharded = copy.deepcopy(network)
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(4, 8, 5, 6).double()
    network(x).square().mean().backward()
    sharded(x.chunk(2)[mesh.get_rank()]).square().mean().backward()
    check_gradients(sharded.parameters(), network.parameters())


@check
def arguments_are_named_in_errors(mesh):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import carafepp

    whole = random_tensors(1)
    features = distribute(mesh, whole["features"], Shard(1))
    with pytest.raises(TypeError, match=r"\[reassemble\] masks must be a DTensor .*; got Tensor\."):
        carafepp.reassemble(features, whole["masks"], up=2)
    other = init_device_mesh("cpu", (2, 1))
    masks = distribute_tensor(whole["masks"], other, [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match=r"\[reassemble\] masks must be on the device mesh of"):
        carafepp.reassemble(features, masks, up=2)
    five = distribute(mesh, whole["features"][:, :5], Shard(1))
    masks = distribute(mesh, random_tensors(2)["masks"], Shard(1))
    with pytest.raises(ValueError, match="divisible by groups=2; got 5"):
        carafepp.reassemble(five, masks, up=2, groups=2)
    # Both processes refuse it, though the shards of one fit: else it would wait for the other.
    features = distribute(mesh, whole["features"], Shard(0))
    masks = distribute(mesh, random_tensors(1, batch=4)["masks"], Shard(0))
    with pytest.raises(ValueError, match=r"= \(3, 9, 8, 10\); got \(4, 9, 8, 10\)"):
        carafepp.reassemble(features, masks, up=2)
    short = distribute(mesh, whole["grad_output"][:, :5], Shard(1))
    features = distribute(mesh, whole["features"], Shard(1))
    masks = distribute(mesh, whole["masks"], Replicate())
    with pytest.raises(ValueError, match=r"= \(3, 6, 8, 10\); got \(3, 5, 8, 10\)"):
        carafepp.reassemble_backward(short, features, masks, up=2)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name, outcomes):
    for outcome in outcomes:
        assert outcome.get(name, outcome.get("failure")) is None, outcome["failure"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
