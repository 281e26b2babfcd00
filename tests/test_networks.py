"""The contract of networks: any leading dimensions, gradients, state, dtype, text, output bias. One line a network."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, special, stats
from torch import nn

from pyro_vae import expressions, networks
from pyro_vae.networks.convolutional import Upsampling
from pyro_vae.networks.layers import activation_gain, convolution, group_norm, linear

LEADING = [(), (5,), (3, 5), (0,)]
ALL = {"activation": "tanh", "normalization": True, "dropout": 0.5}
SMALL = {"channels": (3, 4), "hidden": (6,)}
NETWORKS = {  # name: (network, shape of one input, shape of one output)
    "MLP": (lambda: networks.MLP(3, 8, hidden=(6,)), (3,), (8,)),
    "MLP of a shape": (lambda: networks.MLP((2, 4), 8, hidden=(6, 5), activation="tanh"), (2, 4), (8,)),
    "MLP without hidden layers": (lambda: networks.MLP(3, 8, hidden=()), (3,), (8,)),
    "MLP gated": (lambda: networks.MLP(3, 8, hidden=(6, 5), gated=True), (3,), (8,)),
    "MLP normalized": (lambda: networks.MLP(3, 8, hidden=(6, 5), normalization=True), (3,), (8,)),
    "MLP all": (lambda: networks.MLP(3, 8, hidden=(6, 5), gated=True, **ALL), (3,), (8,)),
    "ResidualMLP": (lambda: networks.ResidualMLP((2, 4), 8, width=6, blocks=3), (2, 4), (8,)),
    "ResidualMLP normalized": (lambda: networks.ResidualMLP(3, 8, width=6, normalization=True), (3,), (8,)),
    "ResidualMLP all": (lambda: networks.ResidualMLP(3, 8, width=6, blocks=1, **ALL), (3,), (8,)),
    "ConvEncoder": (lambda: networks.ConvEncoder((2, 8, 6), 5, channels=(3, 4)), (2, 8, 6), (5,)),
    "ConvEncoder normalized": (lambda: networks.ConvEncoder((1, 8, 8), 5, normalization=True), (1, 8, 8), (5,)),
    "ConvEncoder all": (lambda: networks.ConvEncoder((1, 5, 7), 5, gated=True, **SMALL, **ALL), (1, 5, 7), (5,)),
    "ConvDecoder": (lambda: networks.ConvDecoder(3, (2, 8, 6), channels=(4, 3)), (3,), (2, 8, 6)),
    "ConvDecoder normalized": (lambda: networks.ConvDecoder(3, (1, 8, 8), normalization=True), (3,), (1, 8, 8)),
    "ConvDecoder all": (lambda: networks.ConvDecoder(3, (1, 5, 7), gated=True, **SMALL, **ALL), (3,), (1, 5, 7)),
    "ResNetEncoder": (lambda: networks.ResNetEncoder((2, 8, 6), 5, channels=(3, 4)), (2, 8, 6), (5,)),
    "ResNetEncoder normalized": (lambda: networks.ResNetEncoder((1, 8, 8), 5, normalization=True), (1, 8, 8), (5,)),
    "ResNetEncoder all": (lambda: networks.ResNetEncoder((1, 5, 7), 5, blocks=2, **SMALL, **ALL), (1, 5, 7), (5,)),
    "ResNetDecoder": (lambda: networks.ResNetDecoder(3, (2, 8, 6), channels=(4, 3)), (3,), (2, 8, 6)),
    "ResNetDecoder normalized": (lambda: networks.ResNetDecoder(3, (1, 8, 8), normalization=True), (3,), (1, 8, 8)),
    "ResNetDecoder all": (lambda: networks.ResNetDecoder(3, (1, 5, 7), blocks=2, **SMALL, **ALL), (3,), (1, 5, 7)),
    "AnyLeading": (lambda: networks.AnyLeading(networks.MLP((2, 4), 8, hidden=(6,)), 2), (2, 4), (8,)),
}
ENCODERS = [networks.ConvEncoder, networks.ResNetEncoder]
DECODERS = [networks.ConvDecoder, networks.ResNetDecoder]


@pytest.fixture(params=NETWORKS)
def network(request):
    make, in_shape, out_shape = NETWORKS[request.param]
    return make().double(), in_shape, out_shape


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("leading", LEADING)
def test_shapes(network, leading):
    net, in_shape, out_shape = network
    assert net(normal(*leading, *in_shape)).shape == (*leading, *out_shape)


def test_leading_dimensions_are_a_batch(network):
    net, in_shape, _ = network
    if any(isinstance(module, nn.Dropout | nn.Dropout2d) for module in net.modules()):
        net.eval()  # and without dropout the mode makes no difference, as it would for batch normalization
    x = normal(3, 5, *in_shape)
    one_by_one = torch.stack([net(x[i]) for i in itertools.product(range(3), range(5))])
    torch.testing.assert_close(net(x).flatten(0, 1), one_by_one)


def test_a_gradient_reaches_every_parameter(network):
    net, in_shape, out_shape = network
    (net(normal(64, *in_shape)) * normal(64, *out_shape)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()]


def test_state_dtype_repr(network):
    net, in_shape, _ = network
    net.eval()
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(net.state_dict())
    x = normal(5, *in_shape)
    assert torch.equal(net(x), other(x))
    assert net.float()(x.float()).dtype == torch.float32
    assert type(net).__name__ in repr(net)


def test_text_round_trip(network):
    net, _, _ = network
    text = expressions.write(net, "net")
    parsed = expressions.parse(text, "net")
    assert text.startswith(f"{type(net).__name__}(")
    assert expressions.write(parsed, "net") == text
    assert repr(parsed) == repr(net)


def test_output_bias_shifts_the_output(network):
    net, in_shape, out_shape = network
    net.eval()
    x = normal(5, *in_shape)
    before = net(x)
    shift = torch.arange(1.0, math.prod(out_shape) + 1, dtype=torch.float64)
    assert any(net.output_bias is parameter for parameter in net.parameters())
    with torch.no_grad():
        net.output_bias.view(-1)[:] = shift
    torch.testing.assert_close(net(x), before + shift.reshape(out_shape))


def test_biases_start_at_zero(network):
    net, _, _ = network
    assert not any(parameter.any() for name, parameter in net.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 28, 20), (3, 32, 32), (1, 5, 7), (2, 1, 1), (1, 9, 1), (4, 2, 3)])
@pytest.mark.parametrize("channels", [(3,), (3, 2, 4)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_images_of_any_size(size, channels, kernel_size):
    for encoder in ENCODERS:
        assert encoder(size, 5, channels, kernel_size=kernel_size)(torch.rand(2, *size)).shape == (2, 5)
    for decoder in DECODERS:
        assert decoder(5, size, channels, kernel_size=kernel_size)(torch.randn(2, 5)).shape == (2, *size)


WRONG = {  # name: (what raises, parts of its message between two dots)
    "MLP width": (lambda: networks.MLP(2, 2, hidden=(0,)), "MLP: expected positive sizes, got .. hidden=(0,)"),
    "MLP activation": (lambda: networks.MLP(2, 2, (), "relus"), "expected one of .. relu, .. ; got 'relus'"),
    "MLP input": (lambda: networks.MLP((2, 3), 2)(torch.zeros(5, 3, 2)), "of shape ('*', 2, 3), got (5, 3, 2)"),
    "MLP scalar": (lambda: networks.MLP(1, 2)(torch.zeros(())), "of shape ('*', 1), got ()"),
    "ResidualMLP blocks": (lambda: networks.ResidualMLP(2, 2, blocks=0), "ResidualMLP: expected positive sizes"),
    "ResidualMLP input": (lambda: networks.ResidualMLP(2, 2)(torch.zeros(5, 3)), "ResidualMLP: expected an input"),
    "AnyLeading event_dim": (lambda: networks.AnyLeading(nn.ReLU(), -1), "event_dim of 0 or more, got -1"),
    "AnyLeading input": (
        lambda: networks.AnyLeading(nn.ReLU(), 3)(torch.zeros(2, 2)),
        "at least 3 dim .. got shape (2, 2)",
    ),
    "AnyLeading net": (lambda: networks.AnyLeading(nn.Flatten(0), 1)(torch.zeros(5, 3)), "shape (5, '*'), got (15,)"),
}
for cls in ENCODERS:
    for name, options, message in [
        ("shape", {"in_shape": (8, 8)}, "expected in_shape (channels, height, width), got (8, 8)"),
        ("size", {"in_shape": (1, 8, 0)}, "expected positive sizes, got in_shape=(1, 8, 0)"),
        ("outputs", {"out_features": 0}, "expected positive sizes, got .. out_features=0"),
        ("channels", {"channels": ()}, "expected one or more channels"),
        ("kernel", {"kernel_size": 4}, "expected an odd kernel_size, got 4"),
        ("activation", {"activation": "softmax"}, "got 'softmax'"),
    ]:
        given = {"in_shape": (1, 8, 8), "out_features": 4} | options
        WRONG[f"{cls.__name__} {name}"] = (lambda cls=cls, given=given: cls(**given), message)
    WRONG[f"{cls.__name__} input"] = (
        lambda cls=cls: cls((1, 8, 8), 4)(torch.zeros(5, 8, 8)),
        "1, 8, 8), got (5, 8, 8)",
    )
for cls in DECODERS:
    for name, options, message in [
        ("shape", {"out_shape": (1, 8, 8, 2)}, "expected out_shape (channels, height, width), got (1, 8, 8, 2)"),
        ("inputs", {"in_features": 0}, "expected positive sizes, got in_features=0"),
        ("channels", {"channels": (4, 0)}, "expected positive sizes, got .. channels=(4, 0)"),
        ("kernel", {"kernel_size": 2}, "expected an odd kernel_size, got 2"),
    ]:
        given = {"in_features": 3, "out_shape": (1, 8, 8)} | options
        WRONG[f"{cls.__name__} {name}"] = (lambda cls=cls, given=given: cls(**given), message)
    WRONG[f"{cls.__name__} input"] = (lambda cls=cls: cls(3, (1, 8, 8))(torch.zeros(5, 4)), "('*', 3), got (5, 4)")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_in_one_line(name):
    call, parts = WRONG[name]
    with pytest.raises(ValueError, match=".") as error:
        call()
    assert all(part in str(error.value) for part in parts.split(" .. "))
    assert "\n" not in str(error.value)


def test_a_number_of_features_takes_a_batch_of_images():
    net = networks.MLP(8, 3)
    assert net(torch.zeros(1, 1, 2, 4)).shape == (1, 3)  # one image: its batch dimension stays
    assert net(torch.zeros(5, 2, 4)).shape == (5, 3)
    assert networks.MLP(1, 3)(torch.zeros(5)).shape == (5, 3)


def test_any_leading_dimensions_of_a_users_network():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 10)).double()
    x = normal(3, 5, 1, 6, 8)
    wrapped = networks.AnyLeading(net, event_dim=3)
    torch.testing.assert_close(wrapped(x), torch.stack([net(particle) for particle in x]))
    assert wrapped(x[0, 0]).shape == (10,)
    assert not hasattr(wrapped, "output_bias")
    assert networks.AnyLeading(nn.Tanh(), 0)(x).shape == x.shape


def test_layers_are_their_formulas():
    x = normal(5, 3)
    gated = networks.MLP(3, 2, hidden=(4,), activation="tanh", gated=True).double()
    (hidden, last), (value, gate) = gated.layers, (gated.layers[0].value[0], gated.layers[0].gate)
    torch.testing.assert_close(gated(x), last(torch.tanh(value(x)) * torch.sigmoid(gate(x))))
    assert hidden.value[0].weight.shape == gate.weight.shape

    normalized = networks.MLP(3, 2, hidden=(4,), activation="tanh", normalization=True).double()
    hidden, last = normalized.layers[0](x), normalized.layers[-1]
    centred = hidden - hidden.mean(-1, keepdim=True)
    standard = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normalized(x), last(torch.tanh(standard)))

    residual = networks.ResidualMLP(3, 2, width=4, blocks=1, activation="tanh").double()
    first, block, last = residual.layers
    _, inner, _, outer = block.branch
    h = first(x)
    torch.testing.assert_close(residual(x), last(h + outer(torch.tanh(inner(torch.tanh(h))))))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_upsampling_repeats_pixels_and_convolves(kernel_size):
    layer = Upsampling(3, 2, (10, 12), kernel_size).double()
    nn.init.normal_(layer.bias)
    x = normal(4, 3, 5, 6)
    kernel = layer.weight.flip(2, 3).transpose(0, 1)  # a transposed convolution turns its kernel by half a turn
    expected = F.conv2d(F.interpolate(x, scale_factor=2), kernel, layer.bias, padding=kernel_size // 2)
    torch.testing.assert_close(layer(x), expected)
    layer.size = (9, 11)
    torch.testing.assert_close(layer(x), expected[..., :9, :11])


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_last_of_a_decoders_biases_is_the_output_bias_alone(decoder):
    layers = decoder(3, (2, 8, 8), channels=(4, 3)).convolutions
    assert [layer.bias is None for layer in layers if isinstance(layer, Upsampling)] == [False, True]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_draws_no_checkerboard(decoder):
    """Where all pixels of the convolutions' input are equal, so are those of their output, but for the border."""
    net = decoder(3, (2, 64, 64), channels=(4, 3)).double()
    for parameter in net.convolutions.parameters():
        nn.init.normal_(parameter)
    pixels = normal(4, 1).expand(4, 16 * 16).reshape(1, -1)
    inside = net.convolutions(pixels)[..., 16:-16, 16:-16].flatten(2)
    assert inside.shape == (1, 2, 32 * 32)
    torch.testing.assert_close(inside, inside[..., :1].expand_as(inside))
    assert inside.abs().min() > 0


def test_dropout():
    """The share of zeros is the probability, within 4 standard errors (seed 0; 6e-5 false alarms, 2 checks)."""
    units = networks.MLP(3, 2, hidden=(400,), activation="tanh", dropout=0.3).layers[:-1](torch.randn(100, 3))
    share = (units == 0).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / units.numel()))
    net = networks.ConvEncoder((1, 8, 8), 2, channels=(50,), activation="tanh", dropout=0.3)
    dropped = (net.convolutions(torch.rand(200, 1, 8, 8)) == 0).flatten(2)
    assert torch.equal(dropped.any(-1), dropped.all(-1))  # whole channels
    share = dropped.all(-1).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / (200 * 50)))
    net.eval()
    assert not (net.convolutions(torch.rand(20, 1, 8, 8)) == 0).any()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (16, 2), (20, 2), (36, 4), (64, 8)])
def test_groups_have_about_8_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_glorot_initialization():
    weight = networks.MLP(300, 1, hidden=(500,)).layers[0].weight
    bound = (6 / 800) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(150, 150, 1.3),
        lambda: convolution(6, 200, 5, gain=1.3),
        lambda: Upsampling(6, 200, (2, 2), 5, 1.3),
    ],
)
def test_weights_start_at_the_gain(make):
    weight = make().weight.detach()
    assert weight.abs().max() <= 1.3 * (3 / 150) ** 0.5
    assert weight.std().item() == pytest.approx(1.3 / 150**0.5, rel=0.02)


def test_gated_layers_start_at_twice_glorots_weights():
    layer = networks.MLP(300, 1, hidden=(500,), gated=True).layers[0]
    bound = (6 / 800) ** 0.5
    assert layer.value[0].weight.std().item() == pytest.approx(2 * bound / 3**0.5, rel=0.02)
    assert layer.gate.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


FUNCTIONS = {"relu": lambda u: max(u, 0), "tanh": math.tanh, "silu": lambda u: u * special.expit(u)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_gain_by_quadrature(name, gated):
    def expected_square(f):
        parts = [integrate.quad(lambda u: f(u) ** 2 * stats.norm.pdf(u), *ends)[0] for ends in ((-20, 0), (0, 20))]
        return sum(parts)

    square = expected_square(FUNCTIONS[name]) * (expected_square(special.expit) if gated else 1)
    assert activation_gain(name, gated) == pytest.approx(square**-0.5, rel=1e-6)


DEEP = {
    "MLP": lambda **options: networks.MLP((3, 64, 64), 50, (400, 400), **options),
    "MLP gated": lambda **options: networks.MLP((3, 64, 64), 50, (400, 400), gated=True, **options),
    "ResidualMLP": lambda **options: networks.ResidualMLP((3, 64, 64), 50, 64, 50, **options),
    "ConvEncoder": lambda **options: networks.ConvEncoder((3, 64, 64), 50, (32,) * 5, **options),
    "ConvEncoder gated": lambda **options: networks.ConvEncoder((3, 64, 64), 50, (32,) * 5, gated=True, **options),
    "ResNetEncoder": lambda **options: networks.ResNetEncoder((3, 64, 64), 50, (16,) * 4, 10, **options),
    "ConvDecoder": lambda **options: networks.ConvDecoder(50, (3, 64, 64), (32,) * 5, **options),
    "ConvDecoder gated": lambda **options: networks.ConvDecoder(50, (3, 64, 64), (32,) * 5, gated=True, **options),
    "ResNetDecoder": lambda **options: networks.ResNetDecoder(50, (3, 64, 64), (16,) * 4, 10, **options),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("normalization", [False, True])
def test_signals_keep_their_size_with_depth(name, normalization):
    """Images in [0, 1] and standard normal inputs leave at most 3 times as large, and not below a tenth."""
    net = DEEP[name](normalization=normalization)
    shape = (50,) if "Decoder" in name else (3, 64, 64)
    for x in (torch.rand(8, *shape), torch.randn(8, *shape)):
        with torch.no_grad():
            assert 0.1 < net(x).std().item() < 3


@pytest.mark.parametrize("blocks", [1, 10])
def test_a_residual_network_starts_near_a_linear_map(blocks):
    """Branches of a tenth each, in independent directions, change the output by about a tenth times root `blocks`."""
    net = networks.ResidualMLP(30, 20, width=200, blocks=blocks).double()
    first, *_, last = net.layers
    x = normal(50, 30)
    straight = last(first(x))
    change = ((net(x) - straight).square().mean() / straight.square().mean()).sqrt().item()
    assert 0.05 * blocks**0.5 < change < 0.2 * blocks**0.5


@pytest.mark.parametrize("cls", [networks.ResidualMLP, *ENCODERS, *DECODERS])
def test_dropout_is_for_training(cls):
    sizes = (3, (1, 8, 8)) if cls in DECODERS else ((1, 8, 8), 3)
    net, x = cls(*sizes, dropout=0.5), torch.randn(4, 3) if cls in DECODERS else torch.randn(4, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
