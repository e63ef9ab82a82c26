"""Backbones: the values are torchvision's own, weights are what was asked for, faults are named."""

import os
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms._presets import ImageClassification

from ctrkit import backbones, recipe
from ctrkit.backbones import Backbone
from ctrkit.errors import UsageError, UserError
from ctrkit.pictures import decode
from ctrkit.tuning import Accuracy

SHARED = Path(os.environ.get("CTRKIT_SHARED", Path(__file__).parents[2] / "shared"))
SQUEEZENET = SHARED / "weights" / "squeezenet1_1-imagenet.pth"


def load(backbone: str, weights: object = "random", size: int = 64, dtype: str = "float32", seed: int = 5) -> Backbone:
    return backbones.load(backbone, weights=str(weights), seed=seed, size=size, dtype=dtype, device="cpu")


def pictures(n: int = 2, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalised(x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_vgg16_layers_are_torchvisions_own_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None).eval()
    file = tmp_path / "vgg16.pth"
    torch.save({k: v for k, v in vgg.state_dict().items() if not k.startswith(("classifier.3", "classifier.6"))}, file)
    x = pictures(2, 32)
    with torch.inference_mode():
        conv5 = vgg.avgpool(vgg.features(normalised(x))).flatten(1)
        fc6 = vgg.classifier[:2](conv5)
        for layer, wanted in [("conv5", conv5), ("fc6", fc6)]:
            network = load(f"vgg16:{layer}", file, size=32)
            assert network.width == wanted.shape[1] == {"conv5": 25088, "fc6": 4096}[layer]
            torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-6)
    numbers = sum(p.numel() for p in network.parameters())
    assert numbers == sum(p.numel() for p in [*vgg.features.parameters(), *vgg.classifier[0].parameters()])
    with pytest.raises(UserError, match=r"classifier\.3\.bias, classifier\.3\.weight"):
        load("vgg16:fc7", file, size=32)
    file.unlink()  # half a gigabyte


def photo(width: int, height: int) -> bytes:
    """A JPEG file of smooth colours and some noise."""
    rng = np.random.default_rng(width)
    patches = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(patches) + rng.normal(0, 6, (height, width, 3))
    out = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


SHAPES = [(2, 1.5), (1, 2), (1, 1), (0.4, 0.5), (3.7, 0.9), (0.3, 2.1)]
"""Width and height of files, in sides of the square that the network sees."""


def both_ways(size: int) -> tuple[Tensor, Tensor]:
    """JPEG files as ours see them, uint8, and after torchvision's own preprocessing, float32."""
    files = [photo(round(size * width), round(size * height)) for width, height in SHAPES]
    theirs = ImageClassification(crop_size=size, resize_size=round(size * 256 / 224))
    ours = [torch.from_numpy(decode(data, size)) for data in files]
    return torch.stack(ours), torch.stack([theirs(Image.open(BytesIO(data))) for data in files])


def assert_same_values(ours: Tensor, theirs: Tensor, rtol: float = 1e-5) -> None:
    """Of each picture, to the rounding of float32."""
    assert float(theirs.std()) > 0
    assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < rtol


def test_vggs_layers_are_torchvisions_own_from_the_file_on_side_by_side() -> None:
    torch.manual_seed(5)
    vgg = torchvision.models.vgg16(weights=None).eval()
    network = load("vgg16:conv5+vgg16:fc6+vgg16:fc7+vgg16:fc8", size=48)
    ours, theirs = both_ways(48)
    with torch.inference_mode():
        conv5 = vgg.avgpool(vgg.features(theirs)).flatten(1)
        fc6, fc7 = vgg.classifier[:2](conv5), vgg.classifier[:5](conv5)
        wanted = [conv5, fc6, fc7, vgg(theirs)]
        found = network(ours).split([25088, 4096, 4096, 1000], dim=1)
    for layer, (a, b) in zip(["conv5", "fc6", "fc7", "fc8"], zip(found, wanted, strict=True), strict=True):
        assert_same_values(a, b)
        assert float(a.min()) >= 0 or layer == "fc8"


@pytest.mark.parametrize("size", [32, 64, 100, 224])
def test_resnets_pooled_layer_is_torchvisions_own_from_the_file_on(size: int) -> None:
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18(weights=None).eval()
    ours, theirs = both_ways(size)
    with torch.inference_mode():
        pooled = torch.nn.Sequential(*list(resnet.children())[:-1])(theirs).flatten(1)
        assert_same_values(load("resnet18:fc+resnet18:avgpool", size=size)(ours)[:, 1000:], pooled)


@pytest.mark.parametrize(("model", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_weights_of_a_file_go_with_the_scale_that_published_ones_were_trained_for(
    model: str, size: int, tmp_path: Path
) -> None:
    """torchvision sets `transform_input` with the weights that it publishes."""
    torch.manual_seed(5)
    theirs = torchvision.models.get_model(model, weights=None, init_weights=True, aux_logits=False)
    x, as_theirs = both_ways(size)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        theirs.train()(as_theirs)  # so that norms fit, and outputs differ from picture to picture
        theirs.eval()
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    with torch.inference_mode():
        plain = theirs(as_theirs)
        assert float((plain[0] - plain[1]).norm() / plain[0].norm()) > 0.01
        theirs.transform_input = True
        assert float((theirs(as_theirs) - plain).norm() / plain.norm()) > 0.01
        assert_same_values(load(f"{model}:fc", file, size=size)(x), theirs(as_theirs), rtol=2e-4)  # rounding adds up


def test_on_the_same_pixels_values_are_the_same() -> None:
    for model in ("resnet18", "mobilenet_v3_small", "regnet_x_400mf"):
        torch.manual_seed(5)
        theirs = backbones._build(model)
        layer = [name for name in backbones.layer_names(model) if name in dict(theirs.named_modules())][-1]
        with torch.inference_mode():
            torch.testing.assert_close(
                load(f"{model}:{layer}")(pictures()), theirs(normalised(pictures())), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("backbone", "widths"),
    [
        ("vgg16:conv5", [25088]),
        ("vgg16:fc6", [4096]),
        ("vgg16:fc7", [4096]),
        ("vgg16:fc8", [1000]),
        ("resnet152:avgpool", [2048]),
        ("vgg16:fc6+resnet152:avgpool", [4096, 2048]),
        ("vgg16:features.28", [512]),
        ("vgg16:features.28:flat", [512 * 14 * 14]),
    ],
)
def test_widths_of_the_paper(backbone: str, widths: list[int]) -> None:
    """Of shapes alone: no weight is given memory."""
    graphs = [(backbones._graph(backbones._skeleton(layer.model), layer), layer) for layer in backbones.parse(backbone)]
    assert [backbones._shape(graph, layer, 224, backbone).width for graph, layer in graphs] == widths
    assert all(p.is_meta for graph, _ in graphs for p in graph.parameters())


def test_random_weights_follow_torchvisions_rules_and_the_seed() -> None:
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(weights=None)
    before = torch.random.get_rng_state()
    whole = load("resnet18:fc")
    assert torch.equal(before, torch.random.get_rng_state())
    assert whole.weights == "random, seed 5"
    found = {name.removeprefix("extractors.0."): p for name, p in whole.named_parameters()}
    torch.testing.assert_close(found, {n: p.detach() for n, p in theirs.named_parameters()})
    other = load("resnet18:fc", seed=6)
    assert not torch.equal(next(other.parameters()), next(whole.parameters()))


def test_a_part_of_a_random_network_holds_no_more_than_it_needs() -> None:
    part = load("resnet18:layer2")
    found = {name.removeprefix("extractors.0."): p for name, p in part.named_parameters()}
    whole = [name for name, _ in torchvision.models.resnet18(weights=None).named_parameters()]
    assert found.keys() == {n for n in whole if n.startswith(("conv1", "bn1", "layer1", "layer2"))}
    for name, p in found.items():
        if "bn" in name or "downsample.1" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all()
        else:  # Kaiming's normal by fan out
            assert float(p.std()) == pytest.approx((2 / (p.shape[0] * p.shape[2] * p.shape[3])) ** 0.5, rel=0.05)
    assert all(torch.equal(p, q) for p, q in zip(load("resnet18:layer2").parameters(), part.parameters(), strict=True))


def test_maps_are_averaged_over_space_unless_flat() -> None:
    x = pictures()
    with torch.inference_mode():
        flat = load("squeezenet1_1:features.3:flat")(x)
        mean = load("squeezenet1_1:features.3")(x)
        both = load("squeezenet1_1:features.3+resnet18:avgpool")(x)
        resnet = load("resnet18:avgpool")(x)
    assert mean.shape == (2, 128)
    torch.testing.assert_close(flat.view(2, 128, -1).mean(2), mean)
    torch.testing.assert_close(both, torch.cat([mean, resnet], 1))


def test_swins_maps_have_their_channels_last() -> None:
    torch.manual_seed(5)
    swin = torchvision.models.swin_t(weights=None).eval()
    network = load(
        "+".join(f"swin_t:{layer}" for layer in ("features", "features.1", "permute", "features.0.0", "head"))
    )
    assert [shape.width for shape in network.shapes] == [768, 96, 768, 96, 1000]
    with torch.inference_mode():
        x = normalised(pictures())
        first, inner, whole = swin.features[0][0](x), swin.features[:2](x), swin.features(x)
        last = swin.permute(swin.norm(whole))
        wanted = [whole.mean((1, 2)), inner.mean((1, 2)), last.mean((2, 3)), first.mean((2, 3)), swin(x)]
        torch.testing.assert_close(network(pictures()), torch.cat(wanted, 1), rtol=1e-4, atol=1e-5)


SPACE = {
    "vgg16:avgpool": (2, 3),
    "vgg16:features": (2, 3),
    "alexnet:avgpool": (2, 3),
    "resnet18:layer2": (2, 3),
    "squeezenet1_1:features": (2, 3),
    "densenet121:features": (2, 3),
    "efficientnet_b0:features": (2, 3),
    "convnext_tiny:features.1": (2, 3),
    "convnext_tiny:features.1.0.block.3": (1, 2),
    "swin_v2_t:features.5": (1, 2),
    "vit_b_16:conv_proj": (2, 3),
    "resnet18:avgpool": (2, 3),
}
"""Layer → the dimensions of space."""


@pytest.mark.parametrize("backbone", SPACE)
def test_the_dimensions_of_space_are_found(backbone: str) -> None:
    (layer,) = backbones.parse(backbone)
    graph = backbones._graph(backbones._skeleton(layer.model), layer)
    assert backbones._shape(graph, layer, 224, backbone).space == SPACE[backbone]


def test_where_space_cannot_be_told_flat_is_asked_for() -> None:
    (layer,) = backbones.parse("maxvit_t:blocks.0.layers.0.layers.window_attention.partition_op")
    graph = backbones._graph(backbones._skeleton(layer.model), layer)
    with pytest.raises(UsageError, match=r"cannot be told.*append ':flat'"):
        backbones._shape(graph, layer, 224, layer.node)


def test_a_layers_values_are_not_changed_by_the_activation_after_it() -> None:
    with torch.inference_mode():
        assert load("squeezenet1_1:features.0")(pictures()).min() < 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near(dtype: str) -> None:
    with torch.inference_mode():
        exact, near = (load("squeezenet1_1:features.5", dtype=d)(pictures()) for d in ("float32", dtype))
    assert near.dtype == torch.float32
    assert not torch.equal(exact, near)
    torch.testing.assert_close(exact, near, rtol=0.1, atol=0.1 * float(exact.abs().mean()))


def test_the_published_squeezenet_features() -> None:
    if not SQUEEZENET.is_file():
        pytest.skip(f"no real weights: {SQUEEZENET} is not there (set CTRKIT_SHARED)")
    theirs = torchvision.models.squeezenet1_1(weights=None).eval()
    theirs.load_state_dict(torch.load(SQUEEZENET, weights_only=True), strict=False)
    network = load("squeezenet1_1:features", SQUEEZENET)
    with torch.inference_mode():
        wanted = theirs.features(normalised(pictures())).mean((2, 3))
        torch.testing.assert_close(network(pictures()), wanted, rtol=1e-4, atol=1e-4)
    assert len(network.weights) == 32
    with pytest.raises(UserError, match=r"no weights for 2 of the 52 .*classifier\.1\.bias"):
        load("squeezenet1_1:classifier.1", SQUEEZENET)


def test_the_movielens_recipe_needs_no_classifier() -> None:
    if not SQUEEZENET.is_file():
        pytest.skip(f"no real weights: {SQUEEZENET} is not there (set CTRKIT_SHARED)")
    plain = recipe.load("movielens")
    asked = {recipe.load("movielens", name).extract_images.backbone for name in plain.variants}
    assert {b: load(b, SQUEEZENET).width for b in asked} == {
        "squeezenet1_1:features": 512,
        "squeezenet1_1:features.9": 384,
        "squeezenet1_1:features.7": 256,
    }


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("vgg61:fc6", "or 'vgg16'"),
        ("vgg16:fc66", "did you mean 'fc6'"),
        ("vgg16", "MODEL:LAYER"),
        ("vgg16:fc6:round", "MODEL:LAYER"),
        ("squeezenet1_1:feature", "did you mean 'features"),
        ("vit_b_16:encoder.ln", "neither a vector nor a map"),
    ],
)
def test_unknown_names_are_told_with_near_ones(backbone: str, said: str) -> None:
    with pytest.raises(UsageError) as told:
        load(backbone, size=224)
    assert said in told.value.message


def test_pictures_too_small_for_the_model() -> None:
    with pytest.raises(UsageError, match=r"extract-images\.size = 32: inception_v3 cannot take"):
        load("inception_v3:avgpool", size=32)
    with pytest.raises(UsageError, match=r"extract-images\.size = 64: vit_b_16 cannot take"):
        load("vit_b_16:heads", size=64)


def test_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="not a device"):
        backbones.load("alexnet:fc6", weights="random", seed=0, size=64, dtype="float32", device="toaster")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="neither 'published' nor 'random'"):
        load("squeezenet1_1:features", file)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not a state dict that torch can load"):
        load("squeezenet1_1:features", file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(UserError, match="does not map names to tensors"):
        load("squeezenet1_1:features", file)
    torch.save({"network": Accuracy.none("cpu")}, file)
    with pytest.raises(UserError, match=r"other objects than tensors.*state_dict\(\) alone") as told:
        load("squeezenet1_1:features", file)
    assert "weights_only" not in told.value.message
    torch.save({"features.0.weight": torch.zeros(64, 3, 5, 5), "features.0.bias": torch.zeros(64)}, file)
    with pytest.raises(UserError, match=r"features\.0\.weight \[64, 3, 5, 5\], not \[64, 3, 3, 3\]"):
        load("squeezenet1_1:features.0", file)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints_of_a_training_are_taken(tmp_path: Path, inside: bool) -> None:
    torch.manual_seed(3)
    state = {f"module.{k}": v for k, v in torchvision.models.squeezenet1_1(weights=None).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if inside else state, tmp_path / "checkpoint.pth")
    network = load("squeezenet1_1:features.0", tmp_path / "checkpoint.pth")
    torch.testing.assert_close(next(network.parameters()).detach(), state["module.features.0.weight"])


def test_a_folder_of_weights_serves_several_models(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet1_1-abc.pth")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    assert load("squeezenet1_1:features.2+resnet18:avgpool", tmp_path).width == 64 + 512
    with pytest.raises(UserError, match="0 files of weights of alexnet"):
        load("alexnet:fc6", tmp_path)


def test_published_weights_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    urllib.request.install_opener(None)  # type: ignore[arg-type]  # so that the proxy is read anew
    try:
        with pytest.raises(
            UserError, match=r"published weights of squeezenet1_1 could not be fetched .*--weights FILE"
        ):
            load("squeezenet1_1:features", "published")
    finally:
        urllib.request.install_opener(None)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.pth"))
