"""UperNet: formulas of its components, where CARAFE++ sits, odd sizes, learning, errors."""

import doctest

import pytest

from skips import import_or_skip

torch = import_or_skip("torch")
nn, F = torch.nn, torch.nn.functional

from carafepp.torch import CARAFE
from carafepp.torch.models import UPSAMPLERS, ResNet, UperNet, upernet
from carafepp.torch.models.upernet import FUSE, PPM

upsamplers = pytest.mark.parametrize("name", UPSAMPLERS)
CARAFES = {
    "ppm": [f"fpn.laterals.3.upsamplers.{i}" for i in range(4)],
    "fpn": [f"fpn.upsamplers.{i}" for i in range(3)],
    "fuse": [f"fuse.upsamplers.{i}" for i in range(3)],
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(downsampler=None, **options):
    backbone = ResNet((1, 1, 1, 1), width=8, num_classes=None, downsampler=downsampler)
    return UperNet(backbone, 3, 16, **options)


def carafes(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, CARAFE)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Components


@pytest.mark.parametrize("size", [(12, 16), (13, 9), (2, 3)], ids=str)
def test_ppm_upsamples_in_two_steps(size):
    ppm = PPM(6, 4).eval()
    x = torch.randn(2, 6, *size)
    half = [-(-n // 2) for n in size]
    parts = [x]
    for scale, branch, carafe in zip((1, 2, 3, 6), ppm.branches, ppm.upsamplers, strict=True):
        pooled = branch[1](F.adaptive_avg_pool2d(x, scale))
        enlarged = F.interpolate(pooled, half, mode="bilinear")
        parts.append(carafe(enlarged)[..., : size[0], : size[1]])
    torch.testing.assert_close(ppm(x), ppm.output(torch.cat(parts, 1)))


def test_the_original_ppm_upsamples_in_one():
    ppm = PPM(6, 4, upsampler="bilinear").eval()
    x = torch.randn(2, 6, 13, 9)
    parts = [F.interpolate(branch(x), (13, 9), mode="bilinear") for branch in ppm.branches]
    torch.testing.assert_close(ppm(x), ppm.output(torch.cat([x, *parts], 1)))


def test_fuse_upsamples_and_concatenates_from_p5_to_p2():
    fuse = FUSE(4, upsampler="nearest").eval()
    p2, p3, p4, p5 = (torch.randn(1, 4, 16 // s, 24 // s) for s in (1, 2, 4, 8))

    def enlarged(x, s):
        return x.repeat_interleave(s, 2).repeat_interleave(s, 3)

    # A sequence of nearest-neighbour upsamplings is exactly one of them.
    at_once = torch.cat([p2, enlarged(p3, 2), enlarged(p4, 4), enlarged(p5, 8)], 1)
    torch.testing.assert_close(fuse([p2, p3, p4, p5]), fuse.output(at_once))
    with_carafe = FUSE(4)
    assert [carafe.channels for carafe in with_carafe.upsamplers] == [4, 8, 12]


# Places of CARAFE++


def test_ten_carafes_in_the_decoder_and_seven_in_the_backbone():
    with torch.device("meta"):
        network = UperNet(ResNet(num_classes=None, downsampler="carafe"))
    found = carafes(network)
    decoder = [name for component in CARAFES.values() for name in component]
    assert {name for name in found if not name.startswith("backbone.")} == set(decoder)
    assert len(found) == 10 + 7
    assert all(found[name].up == 2 for name in decoder)
    assert [found[name].channels for name in CARAFES["fuse"]] == [512, 1024, 1536]


@pytest.mark.parametrize("component", CARAFES)
def test_components_can_be_chosen_one_by_one(component):
    """Table 9 does so."""
    assert list(carafes(small(upsampler="bilinear"))) == []
    alone = small(upsampler="bilinear", **{component: "carafe"})
    assert list(carafes(alone)) == CARAFES[component]
    without = small(kernel_size=3, **{component: "bilinear"})
    assert set(carafes(without)).isdisjoint(CARAFES[component])
    assert len(carafes(without)) == 10 - len(CARAFES[component])
    assert {m.kernel_size for m in carafes(without).values()} == {3}


def test_parameters():
    """The original has the sizes of its convolutions; ten CARAFE++ add theirs."""
    with torch.device("meta"):
        networks = {
            name: UperNet(ResNet(num_classes=None), upsampler=name)
            for name in ("bilinear", "carafe")
        }
    d = 512

    def unit(c_in, c_out, k):
        return k * k * c_in * c_out + 2 * c_out

    expected = 25_557_032 - (2048 * 1000 + 1000)
    expected += 4 * unit(2048, d, 1) + unit(2048 + 4 * d, d, 3)  # PPM
    expected += sum(unit(c, d, 1) for c in (256, 512, 1024)) + 3 * unit(d, d, 3)  # FPN
    expected += unit(4 * d, d, 3) + d * 150 + 150  # FUSE, classifier
    assert count(networks["bilinear"]) == expected
    channels = 4 * [d] + 3 * [d] + [d, 2 * d, 3 * d]
    added = sum(64 * c + 64 + (9 * 64 * 100 + 100) for c in channels)
    assert count(networks["carafe"]) == expected + added


# As a network


@pytest.mark.parametrize("size", [(64, 96), (67, 81)], ids=str)
@upsamplers
def test_logits_have_the_size_of_the_picture(name, size):
    assert small(upsampler=name)(torch.randn(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("name", ["carafe", "bilinear"])
def test_a_traced_network_goes_on_with_other_sizes(name):
    network = small("carafe", upsampler=name).eval()
    traced = torch.jit.trace(network, torch.randn(1, 3, 64, 64))
    for size in [(64, 96), (67, 81)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(x), network(x))


@pytest.mark.parametrize("downsampler", [None, "carafe"])
@upsamplers
def test_it_learns_and_gradients_reach_every_parameter(name, downsampler):
    """To tell three stripes of colour."""
    network = small(downsampler, upsampler=name)
    target = (torch.arange(96) // 32).expand(2, 64, 96)
    x = F.one_hot(target, 3).permute(0, 3, 1, 2) + 0.3 * torch.randn(2, 3, 64, 96)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    constant = "fpn.laterals.3.upsamplers.0"  # the average of all: GUM may sample it anywhere
    for parameter_name, parameter in network.named_parameters():
        if name == "gum" and parameter_name.startswith(constant):
            continue
        assert parameter.grad.count_nonzero() > 0, parameter_name


def test_channels_last_gives_the_same():
    network, x = small("carafe").eval(), torch.randn(1, 3, 65, 64)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    output = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: small(upsampler="x"), ValueError, "name must be one of nearest, .*; got 'x'"),
        (lambda: small(ppm="x"), ValueError, "name must be one of nearest, .*; got 'x'"),
        (lambda: small(up=3), TypeError, "options of 'carafe' must be .*; got up"),
        (lambda: PPM(4, 4, scales=()), ValueError, r"\[PPM\] scales must be .* from 1; got \(\)"),
        (lambda: PPM(4, 4, scales=(0, 1)), ValueError, r"scales must .* from 1; got \(0, 1\)"),
        (
            lambda: PPM(4, 4, scales=(1.0,)),
            TypeError,
            r"scales must .*; got \(1.0,\) \(tuple",
        ),
        (
            lambda: PPM(4.0, 4),
            TypeError,
            r"in_channels must be a positive integer; got 4.0",
        ),
        (lambda: FUSE(4, 2.0), TypeError, r"\[FUSE\] levels must be a positive integer; got 2.0"),
    ],
    ids=range(8),
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_examples():
    assert doctest.testmod(upernet).failed == 0
