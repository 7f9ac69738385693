"""The module for Flax, beside the one for PyTorch with the same parameters."""

import numpy as np
import pytest

from skips import import_or_skip

jax = import_or_skip("jax", 'pip install ".[jax]"')
nnx = import_or_skip("flax.nnx", 'pip install ".[flax]"')
torch = import_or_skip("torch")

import jax.numpy as jnp

import carafepp.torch
import test_jax  # noqa: F401  # skips this file too, where the build has no handlers
from carafepp.jax import CARAFE

OPTIONS = [
    pytest.param({"up": 2}, id="up2"),
    pytest.param({"down": 2, "batch_norm": True}, id="down2, BatchNorm"),
    pytest.param(
        {"up": 3, "down": 2, "groups": 2, "compressed_channels": None}, id="no compressor"
    ),
    pytest.param({"up": 2, "kernel_size": 3, "padding": (0, 1)}, id="padding"),
    pytest.param({"up": 2, "padding": 1, "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"down": 2, "padding_mode": "circular", "ceil_mode": False}, id="circular"),
    pytest.param(
        {"encoder_kernel_size": 5, "encoder_dilation": 2, "normalizer": "sigmoid"}, id="encoder"
    ),
]


def to_nhwc(tensor):
    return jnp.asarray(np.moveaxis(tensor.detach().numpy(), 1, -1))


def pair_of_modules(options):
    """Return the module of PyTorch, with parameters that do not make averages, and Flax's."""
    torch.manual_seed(0)
    theirs = carafepp.torch.CARAFE(8, **options)
    with torch.no_grad():
        for tensor in [*theirs.parameters(), *theirs.buffers()]:
            if tensor.is_floating_point():
                # Values have both signs, but for those of BatchNorm.
                tensor.copy_(torch.rand(tensor.shape) / 2 - (tensor.dim() > 1) / 4)
    ours = CARAFE(8, **options, rngs=nnx.Rngs(0))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_pytorch(options, training):
    theirs, ours = pair_of_modules(options)
    theirs.train(training)
    ours.train() if training else ours.eval()
    x = torch.rand(2, 8, 7, 9, requires_grad=True)
    output = theirs(x)
    weights = torch.rand(output.shape)
    (output * weights).sum().backward()

    @nnx.jit
    def gradients(module, x):
        def loss(module, x):
            return jnp.sum(module(x) * to_nhwc(weights))

        return nnx.grad(loss, argnums=(0, 1))(module, x)

    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(ours(to_nhwc(x)), to_nhwc(output), **close)
    of_module, of_x = gradients(ours, to_nhwc(x))
    np.testing.assert_allclose(of_x, to_nhwc(x.grad), **close)
    weight = theirs.content_encoder.weight.grad
    np.testing.assert_allclose(
        of_module["content_encoder"]["kernel"][...],
        weight.numpy().transpose(2, 3, 1, 0),
        rtol=1e-3,
        atol=1e-3 * float(weight.abs().max()),
    )


@pytest.mark.parametrize("size", [(13, 18), (15, 18), (15, 19), (14, 17)])
@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
def test_sizes_of_skip_connections(size, padding_mode):
    theirs, ours = pair_of_modules({"up": 2, "padding_mode": padding_mode})
    x = torch.rand(8, 7, 9)
    for name in ("forward", "masks"):
        expected = getattr(theirs, name)(x, size)
        actual = getattr(ours, "__call__" if name == "forward" else name)(
            jnp.moveaxis(jnp.asarray(x.numpy()), 0, -1), size
        )
        np.testing.assert_allclose(
            jnp.moveaxis(actual, -1, 0), expected.detach(), rtol=1e-5, atol=1e-5
        )


def test_a_network_trains_to_the_loss_of_pytorch():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        carafepp.torch.CARAFE(4, down=2, kernel_size=3), carafepp.torch.CARAFE(4, up=2)
    )
    down = CARAFE(4, down=2, kernel_size=3, rngs=nnx.Rngs(0))
    up = CARAFE(4, up=2, rngs=nnx.Rngs(0))
    for k, module in enumerate((down, up)):
        module.load_state_dict(network.state_dict(), prefix=f"{k}.")
    modules = nnx.List([down, up]) if hasattr(nnx, "List") else [down, up]  # before 0.12
    x, rate = torch.rand(2, 4, 8, 10), 0.5
    target = x.roll(1, -1)

    optimizer = torch.optim.SGD(network.parameters(), rate)
    expected = []
    for _ in range(30):
        loss = ((network(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    graph, state = nnx.split(modules)

    @jax.jit
    def step(state):
        def loss(state):
            down, up = nnx.merge(graph, state)
            return jnp.mean((up(down(to_nhwc(x))) - to_nhwc(target)) ** 2)

        value, gradient = jax.value_and_grad(loss)(state)
        return value, jax.tree.map(lambda p, g: p - rate * g, state, gradient)

    losses = []
    for _ in range(30):
        value, state = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_parameters_that_do_not_fit():
    module = CARAFE(8, up=2, rngs=nnx.Rngs(0))
    before = np.asarray(module.content_encoder.kernel[...])
    state = carafepp.torch.CARAFE(8, up=2).state_dict()
    missing = {name: value for name, value in state.items() if not name.endswith("encoder.bias")}
    with pytest.raises(ValueError, match=r"\[CARAFE\] state_dict must have .*content_encoder.bias"):
        module.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"after the prefix 'neck.'; got nothing"):
        module.load_state_dict(state, prefix="neck.")
    with pytest.raises(ValueError, match=r"channel_compressor.weight in the shape \(1, 1, 8, 64\)"):
        module.load_state_dict(carafepp.torch.CARAFE(16, up=2).state_dict())
    np.testing.assert_array_equal(module.content_encoder.kernel[...], before)


def test_wrong_options_and_sizes():
    with pytest.raises(ValueError, match=r"\[CARAFE\] kernel_size must be odd"):
        CARAFE(8, kernel_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\[CARAFE\] size must be from \(0, 0\) to \(11, 13\)"):
        CARAFE(8, up=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 6, 8)), (12, 12))


def test_dtypes():
    x = jnp.ones((1, 5, 6, 8))
    module = CARAFE(8, up=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert module(x).dtype == jnp.bfloat16
    assert module.content_encoder.kernel.dtype == jnp.float32
    assert CARAFE(8, up=2, rngs=nnx.Rngs(0))(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
