"""Fine-tuning a torchvision classification model on pictures labelled by category.

What a step does depends on the seed and the step's number alone: order, crops, flips and dropout are drawn anew from
them. So a run that goes on from a checkpoint, in the middle of an epoch too, ends in the same bytes as one that was
never stopped (on a CPU, with the same number of threads). Checkpoints lie in a hidden folder beside the target,
`.NAME.checkpoint-KEY/`, and outlive the machine's restarts. KEY is a digest of all that decides the result.
"""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from ctrkit import backbones, digests, files, pictures, provenance, state_dict
from ctrkit.distinct_pictures import Contents
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.labelled_pictures import Int, Split
from ctrkit.pictures import BadPicture, Pixels, Place
from ctrkit.progress import Meter, say
from ctrkit.recipe import TuneBackbone

BATCHES_AHEAD = 2
"""Batches that are decoded while the network works on one."""
CHECK_STEPS = 20
"""Steps between looks at the loss, each of which waits for the device."""
LOOKED_AT = 256
"""Pictures that are handed to the threads at a time, to see whether they can be decoded."""
TOP = 5
ASPECT = 4 / 3
"""Of random crops, at most, either way."""


def build(model: str, categories: int) -> nn.Module:
    """Return a model with so many outputs, by torchvision's own rules of initialisation."""
    more = backbones.options(model, trained=True)
    if more:  # the auxiliary classifiers of these serve training from nothing, and no layer of the backbone needs them
        more["aux_logits"] = False
    network: nn.Module = torchvision.models.get_model(model, weights=None, num_classes=categories, **more)
    return network


def _skeleton(model: str, categories: int) -> nn.Module:
    """Return a model whose tensors have shapes but no memory, where its constructor can do without their values."""
    try:
        with torch.device("meta"):
            return build(model, categories)
    except RuntimeError:
        return build(model, categories)


@dataclass(frozen=True)
class Start:
    """What a network is tuned from."""

    head: list[str]
    """Names of the last layer's tensors, which are made anew."""
    weights: str
    """What the others are: their file's digest, or "random, seed N"."""
    state: dict[str, Tensor]
    """The others; none where they are random."""


def start(options: TuneBackbone) -> Start:
    """Check model, size and frozen layers, and read the weights to start from. Raises UserError."""
    known = torchvision.models.list_models(module=torchvision.models)
    if options.model not in known:
        raise UsageError(
            f"tune-backbone.model = {options.model!r}: torchvision has no such classification model"
            f"{nearest(options.model, known)}"
        )
    network, other = (_skeleton(options.model, categories) for categories in (2, 3))
    _check_size(network, options)
    frozen_names(options, network)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    head = [name for name, tensor in other.state_dict().items() if tensor.shape != shapes[name]]
    if options.weights == "random":
        return Start(head, f"random, seed {options.seed}", {})
    if options.weights != "published" and not Path(options.weights).exists():
        raise UserError(
            f"tune-backbone.weights = {options.weights!r} is neither 'published' nor 'random' nor a file or folder"
        )
    path = backbones.weights_file(options.model, options.weights)
    given = state_dict.read(path)
    needed = [name for name in shapes if name not in head and not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"{path} has no weights for {len(missing)} of the {len(needed)} tensors of {options.model} before its last "
            f"layer, such as {missing[0]}. Start from a whole state dict, or tune a model whose weights you have "
            "(tune-backbone.model)."
        )
    for name in needed:
        if given[name].shape != shapes[name]:
            raise UserError(
                f"{path} does not fit {options.model}: {name} is {list(given[name].shape)}, not {list(shapes[name])}."
            )
    return Start(head, digests.Digests().of(path), {name: given[name] for name in needed})


def _check_size(network: nn.Module, options: TuneBackbone) -> None:
    """Refuse a size that the model cannot take, by sending a picture without values through it."""
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, options.size, options.size, device=device))
    except (RuntimeError, AssertionError) as e:  # what torch and torchvision's vit raise
        reason = str(e).splitlines()[0]
        raise UsageError(
            f"tune-backbone.size = {options.size}: {options.model} cannot take such pictures ({reason}); set another"
        ) from None


def make_network(options: TuneBackbone, begin: Start, categories: int) -> nn.Module:
    """Return the network to tune; its last layer, or all of it, is drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = build(options.model, categories)
    network.load_state_dict(begin.state, strict=False)
    return network


def frozen_names(options: TuneBackbone, network: nn.Module) -> set[str]:
    """Return the names of the parameters and modules up to the layer `options.freeze`, in the order of computation."""
    if not options.freeze:
        return set()
    nodes = backbones.layer_names(options.model)
    known = {".".join(parts[:n]) for parts in (x.split(".") for x in nodes) for n in range(1, len(parts) + 1)}
    if options.freeze not in known:
        raise UsageError(
            f"tune-backbone.freeze = {options.freeze!r}: {options.model} has no such layer"
            f"{nearest(options.freeze, known)} (`ctrkit extract-images --list-layers {options.model}` lists them all)"
        )
    last = backbones.parse(f"{options.model}:{options.freeze}")[0].node
    end = max(i for i, node in enumerate(nodes) if f"{node}.".startswith(f"{last}."))
    done = [f"{node}." for node in nodes[: end + 1]]
    names = [name for name, _ in (*network.named_parameters(), *network.named_modules()) if name]
    return {name for name in names if f"{name}.".startswith(tuple(done))}


def crop_and_flip(square: Pixels, options: TuneBackbone, rng: np.random.Generator) -> Pixels:
    """Return a random part of a picture [3, s, s] uint8 as [3, size, size], mirrored or not."""
    side = square.shape[1]
    width = height = float(side)
    for _ in range(10):
        area = rng.uniform(options.smallest_crop, 1) * side * side
        ratio = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        if max(area * ratio, area / ratio) <= side * side:
            width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            break
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    image = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
    box = (left, top, left + width, top + height)
    image = image.resize((options.size, options.size), Image.Resampling.BILINEAR, box=box)
    if options.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def find_broken(places: Sequence[Place], size: int, remembered: Path) -> dict[int, str]:
    """Decode every picture once; return which cannot be decoded and why, as in the JSON file `remembered` if it is
    there, which is written otherwise."""
    if remembered.is_file():
        return {int(content): reason for content, reason in files.read_json(remembered).items()}

    def fault(content: int) -> str:
        try:
            pictures.decode(pictures.read(places[content]), size)
        except BadPicture as bad:
            return str(bad)
        return ""

    with (
        ThreadPoolExecutor(pictures.THREADS) as pool,
        Meter("tune-backbone: look at pictures", len(places), "pictures") as meter,
    ):
        broken = {}
        for begin in range(0, len(places), LOOKED_AT):
            some = range(begin, min(begin + LOOKED_AT, len(places)))
            for content, reason in zip(some, pool.map(fault, some), strict=True):
                if reason:
                    broken[content] = reason
                meter.add()
    files.write_json(remembered, {str(content): reason for content, reason in broken.items()})
    return broken


def checkpoint_folder(
    target: Path, options: TuneBackbone, begin: Start, device: str, pairs: pl.DataFrame, contents: Contents
) -> Path:
    """Return where the checkpoints of this work lie, and remove those of other work on the same target.

    pairs, contents: the labelled pictures, as `labelled_pictures.split` takes them.
    """
    elsewhere = {"checkpoint_minutes", "device", "weights"}
    decides = [options.model_dump(mode="json", exclude=elsewhere), begin.weights, torch.device(device).type]
    made_by = [provenance.code_digest("tune-backbone"), provenance.versions()]
    h = hashlib.blake2b(json.dumps([decides, made_by], sort_keys=True).encode(), digest_size=8)
    h.update(json.dumps(pairs.rows()).encode())
    h.update(contents.digests.tobytes() + contents.content.tobytes())
    folder = target.with_name(f".{target.name}.checkpoint-{h.hexdigest()}")
    remove_checkpoints(target, but=folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_checkpoints(target: Path, but: Path | None = None) -> None:
    """Remove the checkpoints of a target, once it is there."""
    for old in target.parent.glob(f".{target.name}.checkpoint-*"):
        if old != but:
            files.remove(old)


@dataclass
class Accuracy:
    """Sums over pictures, on the network's device."""

    loss: Tensor
    """[] float64."""
    right: Tensor
    """[2] int64: pictures whose category is the first, or among the first `TOP`."""
    pictures: int = 0

    @classmethod
    def none(cls, device: str) -> "Accuracy":
        """Return sums over no pictures."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        )

    def add(self, logits: Tensor, category: Tensor, loss: Tensor) -> None:
        """Count a batch: logits [n, categories], category [n], mean loss []."""
        first = logits.detach().topk(min(TOP, logits.shape[1]), dim=1).indices == category[:, None]
        self.right += torch.stack([first[:, 0].sum(), first.sum()])
        self.loss += loss.detach().double() * len(category)
        self.pictures += len(category)

    def means(self) -> tuple[float, float, float]:
        """Return mean loss, top-1 and top-5 accuracy."""
        return float(self.loss) / self.pictures, *(r / self.pictures for r in self.right.tolist())


@dataclass
class Tuner:
    """Everything that moves while a network is tuned."""

    network: nn.Module
    head: list[str]
    """Names of the last layer's tensors."""
    options: TuneBackbone
    places: Sequence[Place]
    """Of each distinct content."""
    split: Split
    folder: Path
    """Of checkpoints."""
    device: str
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        options = self.options
        frozen = frozen_names(options, self.network)
        self.network = self.network.to(self.device).to(memory_format=torch.channels_last)
        self.still = [module for name, module in self.network.named_modules() if name in frozen]
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
            if name not in frozen:
                groups.setdefault((name in self.head, parameter.ndim > 1), []).append(parameter)
        if not groups:
            raise UsageError(
                f"tune-backbone.freeze = {options.freeze!r} leaves nothing to learn; name an earlier layer"
            )
        parameters = [
            {
                "params": some,
                "rate": options.head_rate if new else 1.0,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (new, decays), some in groups.items()
        ]
        self.optimiser: torch.optim.Optimizer
        if options.optimiser == "sgd":
            self.optimiser = torch.optim.SGD(parameters, lr=options.learning_rate, momentum=options.momentum)
        else:
            self.optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate)
        self.ends = batch_ends(len(self.split.train), options.batch)
        self.batches = len(self.ends)
        self.seen = Accuracy.none(self.device)
        mean, std = torch.tensor(backbones.MEAN) * 255, torch.tensor(backbones.STD) * 255
        self.mean, self.std = (x.view(1, 3, 1, 1).to(self.device) for x in (mean, std))
        self.saved = time.monotonic()

    def run(self) -> dict[str, Tensor]:
        """Tune from where the last checkpoint is; return the best epoch's tensors, on the CPU."""
        self._resume()
        with ThreadPoolExecutor(pictures.THREADS) as pool, pictures.quiet():
            while self.step < self.options.epochs * self.batches and not self._waited_enough():
                self._epoch(pool)
                self._validate(pool)
        return state_dict.read(self.folder / "best.pt")

    def commonest(self) -> float:
        """Return the share of the validation pictures that the most frequent training category has."""
        guess = np.bincount(self.split.category[self.split.train]).argmax()
        return float((self.split.category[self.split.valid] == guess).mean())

    def best(self) -> dict[str, Any]:
        """Return the record of the best epoch: by top-1 accuracy, then by loss."""
        return max(self.history, key=lambda record: (record["valid_top1"], -record["valid_loss"]))

    def _waited_enough(self) -> bool:
        if not self.history or not self.options.patience:
            return False
        return bool(self.history[-1]["epoch"] - self.best()["epoch"] >= self.options.patience)

    def _epoch(self, pool: ThreadPoolExecutor) -> None:
        """Train to the end of the epoch."""
        options = self.options
        epoch, begin = divmod(self.step, self.batches)
        self.network.train()
        for module in self.still:
            module.eval()
        order = np.random.default_rng([options.seed, epoch]).permutation(self.split.train)
        batches = np.split(order, self.ends[:-1])[begin:]
        larger = pictures.resized(options.size, pictures.CROP)

        def decode(content: int) -> Pixels:
            rng = np.random.default_rng([options.seed, epoch, content])
            return crop_and_flip(
                pictures.decode(pictures.read(self.places[content]), larger, options.crop), options, rng
            )

        name = f"tune-backbone: epoch {epoch + 1}/{options.epochs}"
        with Meter(name, sum(map(len, batches)), "pictures") as meter:
            for batch, pixels in self._decoded(batches, decode, pool):
                self._train(batch, pixels)
                told = ""
                if self.step % CHECK_STEPS == 0:
                    told = f"loss {self._means()[0]:.3f}"
                meter.add(len(batch), told)
                minutes = (time.monotonic() - self.saved) / 60
                if self.step % self.batches and minutes >= options.checkpoint_minutes:
                    self._save()

    def _decoded(
        self, batches: Iterable[Int], decode: Callable[[int], Pixels], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Int, npt.NDArray[np.uint8]]]:
        """Yield the contents and pixels [n, 3, size, size] of batches, decoding ahead."""
        ahead: deque[tuple[Int, list[Future[Pixels]]]] = deque()

        def done() -> tuple[Int, npt.NDArray[np.uint8]]:
            batch, futures = ahead.popleft()
            try:
                return batch, np.stack([future.result() for future in futures])
            except BadPicture as bad:
                raise UserError(f"a picture has changed since the run began ({bad}); run it again") from None

        for batch in batches:
            ahead.append((batch, [pool.submit(decode, content) for content in batch.tolist()]))
            if len(ahead) > BATCHES_AHEAD:
                yield done()
        while ahead:
            yield done()

    def _forward(self, contents: Int, pixels: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [n, categories] float32, categories [n] and the mean loss []."""
        on_gpu = torch.device(self.device).type == "cuda"
        x, category = torch.from_numpy(pixels), torch.from_numpy(self.split.category[contents])
        if on_gpu:
            x, category = x.pin_memory(), category.pin_memory()
        x, category = (t.to(self.device, non_blocking=on_gpu) for t in (x, category))
        x = ((x.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        mixed = self.options.dtype == "bfloat16"
        try:
            with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=mixed):
                logits = self.network(x).float()
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.device} has too little memory for batches of {len(x)} pictures; lower tune-backbone.batch or "
                "size, or freeze more layers (tune-backbone.freeze)"
            ) from None
        return logits, category, nn.functional.cross_entropy(logits, category)

    def _train(self, batch: Int, pixels: npt.NDArray[np.uint8]) -> None:
        rate = learning_rate(self.options, self.step, self.options.epochs * self.batches)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)  # of dropout
        logits, category, loss = self._forward(batch, pixels)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.seen.add(logits, category, loss)
        self.step += 1

    def _means(self) -> tuple[float, float, float]:
        """Return the means of the epoch so far. Raises UserError if the loss is not a number."""
        means = self.seen.means()
        if not math.isfinite(means[0]):
            raise UserError(
                f"the training loss is not a finite number by step {self.step}. Lower tune-backbone.learning_rate (now "
                f"{self.options.learning_rate:g}) or head_rate (now {self.options.head_rate:g}), or look whether the "
                "weights it starts from hold numbers only."
            )
        return means

    def _validate(self, pool: ThreadPoolExecutor) -> None:
        """Measure the network on the validation pictures, as extract-images would see them, and keep it."""
        options = self.options
        loss, top1, _ = self._means()

        def decode(content: int) -> Pixels:
            return pictures.decode(pictures.read(self.places[content]), options.size, options.crop)

        valid = self.split.valid
        batches = [valid[i : i + options.batch] for i in range(0, len(valid), options.batch)]
        sums = Accuracy.none(self.device)
        self.network.eval()
        with Meter("tune-backbone: validation", len(valid), "pictures") as meter, torch.inference_mode():
            for batch, pixels in self._decoded(batches, decode, pool):
                sums.add(*self._forward(batch, pixels))
                meter.add(len(batch))
        valid_loss, valid_top1, valid_top5 = sums.means()
        record = {
            "epoch": self.step // self.batches,
            "step": self.step,
            "learning_rate": self.optimiser.param_groups[0]["lr"] / self.optimiser.param_groups[0]["rate"],
            "loss": loss,
            "top1": top1,
            "valid_loss": valid_loss,
            "valid_top1": valid_top1,
            "valid_top5": valid_top5,
        }
        if not math.isfinite(valid_loss):
            raise UserError(
                f"the validation loss of epoch {record['epoch']} is not a finite number. Lower "
                f"tune-backbone.learning_rate (now {options.learning_rate:g})."
            )
        self.history.append(record)
        say(
            f"tune-backbone: epoch {record['epoch']}: loss {loss:.3f}, top-1 {top1:.3f}; validation loss "
            f"{valid_loss:.3f}, top-1 {valid_top1:.3f}, top-{TOP} {valid_top5:.3f}"
        )
        self.seen = Accuracy.none(self.device)
        if self.best() is record:
            self._write("best.pt", {name: _plain(tensor) for name, tensor in self.network.state_dict().items()})
        self._save()

    def _save(self) -> None:
        """Write a checkpoint: all that later steps depend on."""
        if self.seen.pictures:
            self._means()
        self._write(
            "last.pt",
            {
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "loss": self.seen.loss,
                "right": self.seen.right,
                "pictures": self.seen.pictures,
                "history": json.dumps(self.history),
            },
        )
        self.saved = time.monotonic()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            with files.atomic(self.folder / name) as tmp:
                state_dict.write(tmp, value)
        except OSError as e:
            raise files.cannot_write(self.folder / name, e) from None

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.is_file():
            return
        last = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(last["network"])
        self.optimiser.load_state_dict(last["optimiser"])
        self.step, self.history = last["step"], json.loads(last["history"])
        self.seen = Accuracy(last["loss"], last["right"], last["pictures"])
        total = self.options.epochs * self.batches
        say(f"tune-backbone: {self.step:,} of {total:,} steps were done before")


def batch_ends(pictures: int, batch: int) -> list[int]:
    """Return where each batch of an epoch ends. The last one may be smaller, but one picture alone, of which
    BatchNorm can take no variance, joins the batch before it."""
    ends = [*range(batch, pictures, batch), pictures]
    if len(ends) > 1 and batch > 1 and pictures - ends[-2] == 1:
        del ends[-2]
    return ends


def learning_rate(options: TuneBackbone, step: int, steps: int) -> float:
    """Return the rate of a step (from 0): a straight rise, then a cosine to 0."""
    rise = options.warm_up * steps
    if step < rise:
        return options.learning_rate * (step + 1) / (rise + 1)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def _plain(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, laid out in the usual order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def write(folder: Path, tuner: Tuner, state: dict[str, Tensor]) -> None:
    """Write the output (see docs/formats.md): `MODEL.pth`, `head.pth`, the categories, the pictures, the metrics."""
    folder.mkdir()
    body = {name: tensor for name, tensor in state.items() if name not in tuner.head}
    state_dict.write(folder / f"{tuner.options.model}.pth", body)
    state_dict.write(folder / "head.pth", {name: state[name] for name in tuner.head})
    tuner.split.per_category().write_parquet(folder / "categories.parquet")
    tuner.split.table.write_parquet(folder / "pictures.parquet")
    lines = "".join(json.dumps(record) + "\n" for record in tuner.history)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
