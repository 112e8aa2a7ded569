import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.networks.discriminator import build_discriminator
from ganserve_trainer.networks.layers import FromImage, ToImage
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.weights import Weights


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 1))


def objective(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    with torch.autocast("cpu", torch.bfloat16, enabled=next(net.parameters()).dtype == torch.bfloat16):
        return (net(x).float() - x.sum(1, keepdim=True)).square().mean()


def test_descend_is_adam() -> None:
    ours, theirs = network(), network()
    weights = Weights(ours, (0.5, 0.99), bf16=False)
    weights.learning_rate = 0.01
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.5, 0.99))
    for step in range(5):
        weights.descend([objective(ours, step)])
        adam.zero_grad()
        objective(theirs, step).backward()
        adam.step()
    torch.testing.assert_close(weights.state_dict(), theirs.state_dict())


def test_betas_may_be_whole_numbers_as_a_file_of_settings_writes_them() -> None:
    whole, decimal = (Weights(network(), betas, bf16=False) for betas in ((0, 0.99), (0.0, 0.99)))
    for weights in (whole, decimal):
        weights.learning_rate = 1
        weights.descend([objective(weights.network, 0)])
    torch.testing.assert_close(whole.state_dict(), decimal.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_before_the_first_step_has_the_state_of_every_weight() -> None:
    weights = Weights(network(), (0.5, 0.99), bf16=False)
    state = weights.optimizer_state()
    assert list(state) == list(weights.masters)
    for name, weight in weights.masters.items():
        assert list(state[name]) == ["exp_avg", "exp_avg_sq", "step"]
        assert state[name]["exp_avg"].shape == state[name]["exp_avg_sq"].shape == weight.shape
        assert not any(values.any() for values in state[name].values())


def test_a_weight_without_a_gradient_stays_and_counts_no_step() -> None:
    net = network()
    weights = Weights(net, (0.0, 0.99), bf16=True)
    weights.learning_rate = 0.1
    before = {name: value.clone() for name, value in weights.state_dict().items()}
    weights.descend([net[0](torch.randn(4, 6, dtype=torch.bfloat16)).float().sum()])
    for name, state in weights.optimizer_state().items():
        assert int(state["step"]) == name.startswith("0.")
        assert torch.equal(before[name], weights.state_dict()[name]) == (not name.startswith("0."))
    assert len(weights.gradients()) == 2


def test_steps_too_small_for_bf16_add_up_in_fp32() -> None:
    net = network()
    weights = Weights(net, (0.0, 0.99), bf16=True)
    weights.learning_rate = 1e-5  # of weights near 0.3, whose neighbours in bf16 are 0.002 away
    before = weights.state_dict()["0.weight"].clone()
    held = net[0].weight.detach().clone()
    for step in range(10):
        weights.descend([objective(net, step)])
    moved = (weights.state_dict()["0.weight"] - before).abs()
    assert 0 < moved.max() < 2e-4
    assert net[0].weight.dtype == torch.bfloat16
    assert torch.equal(net[0].weight, weights.state_dict()["0.weight"].bfloat16())
    assert (net[0].weight != held).float().mean() < 0.3


def test_a_state_comes_back_whole() -> None:
    first, second = (Weights(network(), (0.5, 0.99), bf16=True) for _ in range(2))
    for weights in (first, second):
        weights.learning_rate = 0.01
    for step in range(3):
        first.descend([objective(first.network, step)])
    second.load_state_dict(first.state_dict(), first.optimizer_state())
    for weights in (first, second):
        weights.descend([objective(weights.network, 3)])
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        second.load_state_dict({}, first.optimizer_state())


def test_weights_under_spectral_normalisation_stay_in_fp32() -> None:
    settings = from_preset("dcgan", {"spectral_norm": True, "width": 4})
    discriminator = build_discriminator(settings, ImageSpec(1, 28, 28, ()))
    Weights(discriminator, (0.0, 0.99), bf16=True)
    kinds = {name.rpartition(".")[2]: parameter.dtype for name, parameter in discriminator.named_parameters()}
    assert kinds == {"original": torch.float32, "bias": torch.bfloat16}


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_next_to_the_image_are_convolutions(channels: int) -> None:
    torch.manual_seed(0)
    for layer, plain, shape in (
        (FromImage(channels, 5), F.conv2d, (2, channels, 12, 8)),
        (ToImage(5, channels), F.conv_transpose2d, (2, 5, 6, 4)),
    ):
        x = torch.randn(shape, requires_grad=True)
        inputs = (x, layer.weight, layer.bias)
        outputs = (layer(x), plain(*inputs, stride=2, padding=1), layer.eval()(x.detach()))
        seen = torch.randn_like(outputs[0])
        first, second = (torch.autograd.grad((output * seen).sum(), inputs) for output in outputs[:2])
        for output in outputs[1:]:
            torch.testing.assert_close(outputs[0], output)
        torch.testing.assert_close(first, second)
