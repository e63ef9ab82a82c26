"""The fixed part of the extractor: any layer of any torchvision classification model, by name.

A backbone is written `MODEL:LAYER`, such as `vgg16:fc6` (DICM section IV-A), and several joined by `+` give
their vectors side by side. Only the layers that are needed are ever given memory. Layers of vgg and alexnet
have their papers' names: `conv5` (after its pooling), `fc6`, `fc7` (after their ReLU) and `fc8`; any other
layer goes by its name in the model's graph (`ctrkit extract-images --list-layers MODEL`). A layer with four
dimensions is averaged over the two of space, unless `:flat` follows its name: those that grow with the pictures,
which are the last two in most networks, but the middle ones in Swin transformers.
"""

import contextlib
import functools
import socket
import urllib.error
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision.models import feature_extraction

from ctrkit import devices, state_dict
from ctrkit.digests import Digests
from ctrkit.errors import UsageError, UserError, nearest

ALIASES = {
    "vgg": {"conv5": "flatten", "fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6"},
    "alexnet": {"conv5": "flatten", "fc6": "classifier.2", "fc7": "classifier.5", "fc8": "classifier.6"},
}
"""Prefix of a model's name → the papers' name of a layer → its node in the model's graph."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue values of ImageNet, each within 0 to 1."""
ALL = range(10**9)
"""The number of every parameter."""
SIZE_ERRORS = (RuntimeError, AssertionError)
"""What torch and torchvision raise when a kernel is larger than its input, or a model is for another size."""
POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
DOWNLOAD_SECONDS = 20.0
"""How long the host of the published weights may stay silent."""


@dataclass(frozen=True)
class Layer:
    """One layer of one model."""

    model: str
    name: str
    node: str
    flat: bool


def parse(backbone: str) -> tuple[Layer, ...]:
    """Return the layers that a backbone such as `vgg16:fc6` or `vgg16:fc6+resnet152:avgpool` names.

    Raises UsageError, with near names, for a model or a layer that torchvision does not have.
    """
    return tuple(_parse_one(part.strip(), backbone) for part in backbone.split("+"))


def _parse_one(text: str, backbone: str) -> Layer:
    model, _, rest = text.partition(":")
    name, _, how = rest.partition(":")
    if not name or how not in ("", "flat"):
        raise UsageError(
            f"extract-images.backbone = {backbone!r}: {text!r} is not of the form MODEL:LAYER or "
            "MODEL:LAYER:flat, such as 'vgg16:fc6'; `ctrkit extract-images --list-layers MODEL` lists layers"
        )
    nodes = layer_names(model)
    node = _aliases(model).get(name, name)
    # A block such as "features" stands for the last layer in it.
    known = {".".join(parts[:n]) for parts in (x.split(".") for x in nodes) for n in range(1, len(parts) + 1)}
    if node not in known:
        raise UsageError(
            f"extract-images.backbone = {backbone!r}: {model} has no layer {name!r}{nearest(name, known)} "
            f"(`ctrkit extract-images --list-layers {model}` lists them all)"
        )
    return Layer(model, name, node, how == "flat")


def _aliases(model: str) -> dict[str, str]:
    return next((names for prefix, names in ALIASES.items() if model.startswith(prefix)), {})


@functools.cache
def layer_names(model: str) -> tuple[str, ...]:
    """Return the layers of a model in the order in which they are computed, the papers' names after them."""
    _, nodes = feature_extraction.get_graph_node_names(_skeleton(model), suppress_diff_warning=True)
    return (*nodes[1:], *_aliases(model))  # the first node is the input


def _skeleton(model: str, **more: Any) -> nn.Module:
    """Return a model whose tensors have shapes but no memory. more: given to its constructor."""
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise UsageError(f"torchvision has no classification model {model!r}{nearest(model, known)}")
    # Not `torch.device("meta")`: RegNet's constructor computes widths with tensors.
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(ALL):
        return _build(model, **more).to("meta")


def options(model: str, trained: bool) -> dict[str, bool]:
    """Return what torchvision's constructor of a model has to be told, beside its name.

    trained: the weights come from a file. Those that torchvision publishes for googlenet and inception_v3 were trained
    on pictures scaled to −1..1, and the network turns ImageNet's scale into that one first (`transform_input`).
    """
    if model not in ("googlenet", "inception_v3"):
        return {}
    return {"init_weights": True, "transform_input": trained}  # they warn unless told whether to initialise


def _build(model: str, trained: bool = False, **more: Any) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(model, weights=None, **options(model, trained), **more).eval()
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # the next layer must not change this one's values
    return network


class Backbone(nn.Module):
    """Pictures [n, 3, size, size] uint8 → vectors [n, width] float32, at the dtype and device it was given.

    Attributes
    ----------
    width: length of a vector.
    weights: what the weights are: their file's digest, or "random, seed N".
    """

    def __init__(
        self, extractors: Sequence[nn.Module], layers: Sequence[Layer], shapes: Sequence["Shape"], weights: str
    ) -> None:
        super().__init__()
        self.extractors = nn.ModuleList(extractors)
        self.layers = tuple(layers)
        self.shapes = tuple(shapes)
        self.width = sum(shape.width for shape in shapes)
        self.weights = weights
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the layers' values side by side, [n, width] float32."""
        dtype = next(self.extractors.parameters()).dtype
        x = (pictures.float() - self.mean) / self.std
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        parts = [_vectors(e(x)["out"], shape.space) for e, shape in zip(self.extractors, self.shapes, strict=True)]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Shape:
    """What a layer's values [n, …] become."""

    space: tuple[int, ...]
    """Dimensions that are averaged over; none if the values are taken as they are, one after the other."""
    width: int
    """Numbers for each picture."""


def _vectors(values: Tensor, space: tuple[int, ...]) -> Tensor:
    """Return a layer's values [n, …] as vectors [n, width] float32: their means over the dimensions `space`."""
    values = values.float()
    return values.mean(dim=space) if space else values.flatten(1)


def load(
    backbone: str,
    *,
    weights: str,
    seed: int,
    size: int,
    dtype: str,
    device: str,
    known: Digests | None = None,
) -> Backbone:
    """Build a backbone, ready to run.

    Parameters
    ----------
    backbone: `MODEL:LAYER`, several joined by `+`.
    weights: `published`, `random`, the path of a state dict, or of a folder with a state dict MODEL.pth (or
        MODEL-*.pth) for each model. Keys that the layers do not need may be absent.
    seed: of random weights; the rules are torchvision's own.
    size: side of the pictures in pixels; checked before any weight is loaded.
    dtype, device: torch's names of them; device "auto" is "cuda" where there is one.
    known: digests remembered from before.
    """
    layers = parse(backbone)
    where = torch.device(devices.resolve(device, "extract-images.device"))
    skeletons = {layer.model: _skeleton(layer.model) for layer in layers}
    graphs = [_graph(skeletons[layer.model], layer) for layer in layers]
    shapes = [_shape(graph, layer, size, backbone) for graph, layer in zip(graphs, layers, strict=True)]
    networks, described = {}, []
    for model, skeleton in skeletons.items():
        needed: set[str] = set()
        for graph, layer in zip(graphs, layers, strict=True):
            if layer.model == model:
                needed |= graph.state_dict().keys()
        if weights == "random":
            networks[model] = _random(model, skeleton, needed, seed)
            described.append(f"random, seed {seed}")
        else:
            path = weights_file(model, weights)
            networks[model] = _loaded(model, skeleton, needed, path, backbone)
            described.append((known or Digests()).of(path))
    extractors = [
        _graph(networks[layer.model], layer).to(where, getattr(torch, dtype)).to(memory_format=torch.channels_last)
        for layer in layers
    ]
    built = Backbone(extractors, layers, shapes, " + ".join(dict.fromkeys(described)))
    return built.to(where).eval().requires_grad_(False)


def _graph(network: nn.Module, layer: Layer) -> nn.Module:
    """Return what computes one layer, sharing the network's tensors and holding no others."""
    graph: nn.Module = feature_extraction.create_feature_extractor(
        network, {layer.node: "out"}, suppress_diff_warning=True
    )
    return graph


def _shape(graph: nn.Module, layer: Layer, size: int, backbone: str) -> Shape:
    """Return what becomes of a layer's values, found by sending shapes without values through its graph."""
    try:
        out = _send_shapes(graph, size)
    except SIZE_ERRORS as e:
        reason = str(e).splitlines()[0]
        raise UsageError(
            f"extract-images.size = {size}: {layer.model} cannot take such pictures ({reason}); set another"
        ) from None
    if not isinstance(out, Tensor) or out.dim() < 2 or (out.dim() not in (2, 4) and not layer.flat):
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(
            f"extract-images.backbone = {backbone!r}: layer {layer.name!r} gives {shape} for 2 pictures, "
            "which is neither a vector nor a map for each; choose another layer, or append ':flat'."
        )
    if len(out) != 2:
        raise UsageError(
            f"extract-images.backbone = {backbone!r}: layer {layer.name!r} gives {list(out.shape)} for 2 pictures, "
            "which is not one part for each; choose another layer."
        )
    if layer.flat or out.dim() == 2:
        return Shape((), out[0].numel())
    space = _space(graph, layer, size, out)
    if space is None:
        raise UsageError(
            f"extract-images.backbone = {backbone!r}: layer {layer.name!r} gives {list(out.shape)} for 2 pictures, "
            "and which of these dimensions are space, to be averaged over, cannot be told; choose another layer, or "
            f"append ':flat' for all {out[0].numel():,} numbers."
        )
    return Shape(space, _vectors(out, space).shape[1])


def _send_shapes(graph: nn.Module, size: int) -> Any:
    with torch.no_grad():
        return graph(torch.empty(2, 3, size, size, device="meta"))["out"]


def _space(graph: nn.Module, layer: Layer, size: int, out: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of a map [n, …] that are space: those that grow with the pictures. None: not known."""
    if isinstance(graph.get_submodule(layer.node) if layer.node in _modules(graph) else None, POOLINGS):
        return (2, 3)  # of a fixed size, but by definition the last ones
    try:
        larger = _send_shapes(graph, 2 * size)
    except SIZE_ERRORS:  # a transformer is built for one size
        larger = _of_larger(layer, 2 * size)
    if not isinstance(larger, Tensor) or larger.dim() != out.dim() or len(larger) != len(out):
        return None
    space = tuple(d for d in range(1, out.dim()) if out.shape[d] != larger.shape[d])
    if not space and sum(length > 1 for length in out.shape[1:]) <= 1:
        return space  # one number a channel
    return space if len(space) == 2 else None


def _modules(graph: nn.Module) -> set[str]:
    return {name for name, _ in graph.named_modules()}


def _of_larger(layer: Layer, size: int) -> Any:
    """Return a layer's values, without memory, of its model built for larger pictures; None if that cannot be."""
    for name in ("image_size", "input_size"):  # torchvision's names: of vit, of maxvit
        value = size if name == "image_size" else (size, size)
        with contextlib.suppress(TypeError, ValueError, *SIZE_ERRORS):
            return _send_shapes(_graph(_skeleton(layer.model, **{name: value}), layer), size)
    return None


@contextlib.contextmanager
def _parameters_on_meta(skip: Container[int]) -> Iterator[list[nn.Parameter]]:
    """Take the memory of parameters as they are made: those whose number, in order of making, is in `skip`.

    Yields the list of all that were made.
    """
    made: list[nn.Parameter] = []

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        number = len(made)
        kept = nn.Parameter(parameter.to("meta")) if number in skip else parameter
        made.append(kept)
        return kept

    hook = register_module_parameter_registration_hook(register)
    try:
        yield made
    finally:
        hook.remove()


def _numbers(model: str) -> dict[str, int]:
    """Return each parameter's place in the order in which the model's constructor makes them."""
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(ALL) as made:
        network = _build(model)
    place = {id(parameter): number for number, parameter in enumerate(made)}
    return {name: place[id(parameter)] for name, parameter in network.named_parameters()}


def _random(model: str, skeleton: nn.Module, needed: set[str], seed: int) -> nn.Module:
    """Build a model by its own rules of initialisation, without memory or time for what is not needed.

    Numbers are drawn only for what is needed; so two layers of a model, at one seed, need not share weights.
    """
    skip = {number for name, number in _numbers(model).items() if name not in needed}
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(skip):
        torch.manual_seed(seed)
        return _build(model)


def weights_file(model: str, weights: str) -> Path:
    """Return the file with a model's weights, downloaded if they are to be the published ones. Raises UserError.

    weights: `published`, a state dict, or a folder with one MODEL.pth or MODEL-*.pth for each model.
    """
    if weights == "published":
        return _download(model)
    path = Path(weights)
    if path.is_dir():
        found = sorted(p for p in path.glob("*.pth") if p.stem.partition("-")[0] == model)
        if len(found) != 1:
            raise UserError(
                f"{path} holds {len(found)} files of weights of {model}; "
                f"exactly one {model}.pth or {model}-*.pth is needed"
            )
        return found[0]
    if not path.is_file():
        raise UserError(
            f"extract-images.weights = {weights!r} is neither 'published' nor 'random' nor a file or folder"
        )
    return path


def _download(model: str) -> Path:
    """Return torchvision's published weights in torch's own cache, downloaded if they are not there yet."""
    entry = torchvision.models.get_model_weights(model).DEFAULT
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / Path(entry.url).name
    if path.is_file():
        return path
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=digest, progress=False)
    except (OSError, urllib.error.URLError, RuntimeError) as e:
        raise UserError(
            f"the published weights of {model} could not be fetched from {entry.url} ({e}). Fetch that "
            "file where there is a network and give it as --weights FILE (or as extract-images.weights), "
            "or use --weights random for an untrained network."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return path


def _loaded(model: str, skeleton: nn.Module, needed: set[str], path: Path, backbone: str) -> nn.Module:
    """Build a model with the tensors of a state dict, those that are needed and no others."""
    state = state_dict.read(path)
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(ALL):
        network = _build(model, trained=True)  # buffers are made in earnest: some are computed, and lie in no file
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    needed = {name for name in needed if name in shapes and not name.endswith("num_batches_tracked")}
    missing = sorted(needed - state.keys())
    if missing:
        raise UserError(
            f"{path} has no weights for {len(missing)} of the {len(needed)} tensors of {model} that "
            f"{backbone!r} needs: {_some(missing)}. It holds: {_some(sorted(state))}."
        )
    wrong = [
        f"{name} {list(state[name].shape)}, not {list(shapes[name])}"
        for name in sorted(needed)
        if state[name].shape != shapes[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit {model}: {_some(wrong)}.")
    chosen: dict[str, Any] = {name: state[name].detach() for name in needed}
    network.load_state_dict(chosen, strict=False, assign=True)
    return network


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
