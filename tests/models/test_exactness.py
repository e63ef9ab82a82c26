"""Each short cut against the plain form, for every model, in float64: the numbers and the gradients are the same."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrkit.batches import GroupedData
from ctrkit.collate import Collator
from ctrkit.embedding import Table
from ctrkit.modelfile import TrainedModel
from ctrkit.models.activation_unit import ActivationUnit
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.dicm import DICM
from ctrkit.models.layers import segment_max, segment_sum
from ctrkit.models.pairs import PairMLP, attend, attend_plain
from ctrkit.picture_vectors import PictureVectors
from ctrkit.recipe import Train
from ctrkit.scoring import look_up
from tests.models.reference import Run, collate, make, pictures, run
from tests.small_groups import Group, alone, random_groups, some_groups, to_block, write_groups

MODELS: dict[str, dict[str, Any]] = {
    "lr": {"model": "lr"},
    "base": {"model": "base", "activation": "dice"},
    "base, dropout": {"model": "base", "regularisation": "dropout"},
    "din-code": {"model": "din", "activation": "dice"},
    "din-v1": {"model": "din", "din": "din-v1"},
    "din-v1, dropout": {"model": "din", "din": "din-v1", "activation": "dice", "regularisation": "dropout"},
    "dicm": {"model": "dicm", "user_ids": True},
    "dicm, Dice": {"model": "dicm", "activation": "dice", "extractor_activation": "dice"},
    "dicm, sum": {"model": "dicm", "pooling": "sum", "extractor_activation": "dice", "share_extractors": True},
    "dicm, max": {"model": "dicm", "pooling": "max", "share_extractors": True},
    "dicm, din": {"model": "dicm", "pooling": "din", "user_ids": "din", "regularisation": "dropout"},
    "dicm, simtier": {"model": "dicm", "user_images": "simtier", "ad_image": False},
    "dicm, simtier and max": {"model": "dicm", "user_images": "simtier+pooled", "pooling": "max"},
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> PictureVectors:
    return pictures(tmp_path_factory.mktemp("pictures"))[0]


def same(one: Run, other: Run) -> None:
    """Compare loss and all gradients; log-odds only where the samples are in the same order."""
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        np.testing.assert_allclose(gradient, other.gradients[name], rtol=1e-8, atol=1e-13, err_msg=name)


@each_model
def test_the_order_of_a_batch_does_not_count(config: dict[str, Any], vectors: PictureVectors) -> None:
    """Groups, and the samples of each, in another order: every sample keeps its log-odds, every number its slope."""
    model, groups = make(config, vectors), some_groups(21)
    rng = np.random.default_rng(0)
    shuffled = [
        Group(g.user, g.behaviours, [g.samples[i] for i in rng.permutation(len(g.samples))], g.group_id) for g in groups
    ]
    shuffled = [shuffled[i] for i in rng.permutation(len(shuffled))]
    one, other = run(model, groups, True, (1, 0)), run(model, shuffled, True, (1, 0))
    by_id = [
        dict(zip([s["sample_id"] for g in which for s in g.samples], found.logit_S, strict=True))
        for which, found in ((groups, one), (shuffled, other))
    ]
    assert [*by_id[0]] != [*by_id[1]]
    for sample_id, logit in by_id[0].items():
        assert logit == pytest.approx(by_id[1][sample_id], rel=1e-10)
    same(one, other)


@each_model
def test_grouped_training_is_ungrouped_training(config: dict[str, Any], vectors: PictureVectors) -> None:
    """A group a sample, its history copied: also with dropout, where each sample draws for itself."""
    model, groups = make(config, vectors), some_groups(22)
    one, other = run(model, groups, True, (1, 0)), run(model, alone(groups), True, (1, 0))
    np.testing.assert_allclose(one.logit_S, other.logit_S, rtol=1e-10)
    same(one, other)


def backward(model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Return the loss and all gradients of a batch in training."""
    rows = {w: model.tables[w].gather(r) for w, r in batch.rows.items()}
    model.network.train()
    model.network.zero_grad()
    logit_S = model.network(batch, Lookup(batch, rows, {n: model.plan.width(n) for n in model.plan.ids}))
    loss = nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S)
    loss.backward()  # type: ignore[no-untyped-call]
    out = {n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None}
    for width, leaf in rows.items():
        assert leaf.grad is not None
        table = torch.zeros_like(model.tables[width].weight_VD)
        out[f"table {width}"] = table.index_add(0, batch.rows[width], leaf.grad)
    return out | {"loss": loss.detach(), "logit": logit_S.detach()}


@each_model
def test_distinct_rows_and_pictures_are_all_rows_and_pictures(config: dict[str, Any], vectors: PictureVectors) -> None:
    """A row of every id and of every picture that is named, as often as it is named."""
    model = make(config, vectors)
    batch = collate(model, random_groups(23, [3, 1, 4, 2], [4, 0, 5, 1]), (1, 0))
    plain = replace(batch, rows={}, index={}, picture_NW={}, picture_index={})
    named: dict[int, list[Tensor]] = {}
    for name, index in batch.index.items():
        width = model.plan.width(name)
        start = sum(len(part) for part in named.setdefault(width, []))
        named[width].append(batch.rows[width][index])
        plain.index[name] = start + torch.arange(len(index))
    plain.rows = {width: torch.cat(parts) for width, parts in named.items()}
    for name, index in batch.picture_index.items():
        plain.picture_NW[name] = batch.picture_NW[name][index]
        plain.picture_index[name] = torch.arange(len(index))
    assert any(len(plain.rows[w]) > len(r) for w, r in batch.rows.items())
    assert all(len(x) > len(batch.picture_NW[n]) for n, x in plain.picture_NW.items())
    one, other = backward(model, batch), backward(model, plain)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-8, atol=1e-13, msg=name)


@each_model
def test_row_wise_updates_are_dense_updates_of_the_rows_that_were_named(
    config: dict[str, Any], vectors: PictureVectors
) -> None:
    """Whole tables as parameters, Adam over all of them, rows without a gradient masked: after five steps."""
    model = make(config, vectors)
    whole = {w: t.weight_VD.clone().requires_grad_() for w, t in model.tables.items()}
    moments = {w: (torch.zeros_like(x), torch.zeros_like(x)) for w, x in whole.items()}
    for step in range(1, 6):
        batch = collate(model, random_groups(30 + step, [3, 1, 4], [4, 0, 3]), (1, step))
        for leaf in whole.values():
            leaf.grad = None
        gathered = {w: leaf.index_select(0, batch.rows[w]) for w, leaf in whole.items() if w in batch.rows}
        logit_S = model.network(batch, Lookup(batch, gathered, {n: model.plan.width(n) for n in model.plan.ids}))
        nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for w, leaf in whole.items():
                assert leaf.grad is not None
                m, v = moments[w]
                touched = torch.zeros(len(leaf), 1, dtype=torch.bool).index_fill(0, batch.rows[w], True)
                gradient = leaf.grad + 0.3 * leaf / model.tables[w].count_V.unsqueeze(1)  # DIN eq. 9
                m.copy_(torch.where(touched, 0.9 * m + 0.1 * gradient, m))
                v.copy_(torch.where(touched, 0.999 * v + 0.001 * gradient**2, v))
                size = 0.01 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                moved = leaf - size * m / (v.sqrt() + 1e-8)
                moved[0] = 0.0
                leaf.copy_(torch.where(touched, moved, leaf))
        rows = {w: model.tables[w].gather(r) for w, r in batch.rows.items()}
        logit_S = model.network(batch, Lookup(batch, rows, {n: model.plan.width(n) for n in model.plan.ids}))
        nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S).backward()  # type: ignore[no-untyped-call]
        for w, r in batch.rows.items():
            model.tables[w].update(r, rows[w], 0.01, "adaptive", 0.3)
            torch.testing.assert_close(model.tables[w].weight_VD, whole[w].detach(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("first", "lazily", "exactly"), [(1, 0.0010, 0.0060), (1000, 0.0025, 0.0253)])
def test_lazy_moments_against_exact_ones(first: int, lazily: float, exactly: float) -> None:
    """The example of docs/models.md: an id seen once, by step `first`, with a gradient of 1, learning rate 0.001.

    Exact Adam moves all rows in every step, also by what is left of old gradients; lazy Adam the batch's rows.
    """
    lazy, exact = (
        Table({"a": 3}, 1, {"a": np.array([0, 1, 1])}, torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(2)
    )
    start = float(lazy.weight_VD[2])
    dense = lazy.weight_VD[2].clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=0.001)
    for step in range(1, first + 400):
        for table, rows in ((lazy, [2] if step == first else [1]), (exact, [1, 2])):
            leaf = table.gather(torch.tensor(rows))
            leaf.grad = torch.tensor([[float(row == 2 and step == first)] for row in rows], dtype=torch.float64)
            table.update(torch.tensor(rows), leaf, 0.001, "none", 0.0)
        dense.grad = torch.full_like(dense, float(step == first))
        adam.step()
    assert start - float(lazy.weight_VD[2]) == pytest.approx(lazily, rel=0.01)
    assert start - float(exact.weight_VD[2]) == pytest.approx(exactly, rel=0.01)
    assert start - float(dense.detach()) == pytest.approx(exactly, rel=0.01)  # SparseAdam has its ε elsewhere


@each_model
@torch.inference_mode()
def test_the_batch_of_predict_changes_nothing(config: dict[str, Any], vectors: PictureVectors, tmp_path: Path) -> None:
    """Also where a batch cuts a group in two, or holds one sample."""
    model, groups = make(config, vectors), some_groups(25)
    model.network.eval()
    data = GroupedData(write_groups(tmp_path / "groups", {"test": groups}), "test", model.plan.features)
    assert to_block(groups).n_samples == len(data)

    def score(size: int) -> np.ndarray[Any, Any]:
        parts = []
        for block in data.epoch(size):
            batch = Collator(model.plan, model.tables, model.pictures)(block)
            parts.append(model.network(batch, look_up(model, batch)).numpy())
        return np.concatenate(parts)

    whole = score(1000)
    for size in (1, 2, 3, 5):
        np.testing.assert_allclose(score(size), whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("pooling", ["attentive", "sum", "max", "din"])
@pytest.mark.parametrize("user_ids", [True, "din"])
def test_an_empty_history_is_a_zero_vector(pooling: str, user_ids: bool | str, vectors: PictureVectors) -> None:
    """In what the discriminator gets: behind the context lie ids, pictures and tiers, all zero without a history."""
    config = {"model": "dicm", "pooling": pooling, "user_ids": user_ids, "user_images": "simtier+pooled"}
    for regularisation in ("none", "dropout"):
        model = make({**config, "regularisation": regularisation}, vectors)
        assert isinstance(model.network, DICM)
        got: list[Tensor] = []
        model.network.discriminator.register_forward_pre_hook(lambda _, x, got=got: got.append(x[0].detach()))
        groups = some_groups(26)
        run(model, groups, True, (1, 0))
        behind = got[0][:, model.plan.total_width([*model.plan.user, *model.plan.sample]) + 3 :]
        assert behind.shape[1] == 4 + 3 + 4 + 3 + 20
        empty = torch.tensor([not g.behaviours for g in groups for _ in g.samples])
        assert not behind[empty].any()
        assert behind[~empty].any(1).all()


def padded(k_BD: Tensor, v_BD: Tensor, lengths: Sequence[int], filler: float = 7.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return [S, L, …] keys and values with rubbish in the padding, and [S, L], true for what is real."""
    longest = max(lengths)
    keys, values = (torch.full((len(lengths), longest, x.shape[1]), filler, dtype=x.dtype) for x in (k_BD, v_BD))
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    start = 0
    for s, n in enumerate(lengths):
        keys[s, :n], values[s, :n], mask[s, :n] = k_BD[start : start + n], v_BD[start : start + n], True
        start += n
    return keys, values, mask


@pytest.mark.parametrize("form", ["attentive", "sum", "max", "din-v1", "din-code"])
@pytest.mark.parametrize("act", ["prelu", "dice"])
def test_jagged_pooling_is_padded_and_masked(form: str, act: str) -> None:
    """The pooled vector and its gradients, against [samples, longest, …] with a mask and the whole first layer."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    lengths = [3, 0, 1, 5]
    q, k, v = draw(4, 3), draw(9, 3), draw(9, 2)
    pairs = (torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)), torch.arange(9))
    unit: PairMLP | None = None
    if form.startswith("din"):
        unit = ActivationUnit(3, Train(din=form, activation=act, din_activation=act)).double()
    elif form == "attentive":
        unit = PairMLP(3, 3, (6, 5), act).double()
    if form == "sum":
        found = segment_sum(v, pairs[0], 4)
    elif form == "max":
        found = segment_max(v, pairs[0], 4)
    elif isinstance(unit, ActivationUnit):
        found = unit.pool(q, k, v, pairs)
        again = segment_sum(v[pairs[1]] * unit.weights_P(q, k, pairs).unsqueeze(1), pairs[0], 4)
        torch.testing.assert_close(found, again, rtol=1e-12, atol=1e-14)
    else:
        assert unit is not None
        found = attend(unit, q, k, v, *pairs, softmax=True)
        again = attend_plain(unit, q, k, v, *pairs, softmax=True)
        torch.testing.assert_close(found, again, rtol=1e-12, atol=1e-14)

    keys, values, mask = padded(k, v, lengths)
    weights = mask.to(torch.float64)
    if unit is not None:
        query = q.unsqueeze(1).expand_as(keys)
        inputs = {"q": query, "k": keys, "d": query - keys, "p": query * keys}
        rows = torch.cat([inputs[p] for p in unit.parts], -1)[mask]  # Dice sees real rows only
        h = nn.functional.linear(rows, torch.cat([unit.weight[p] for p in unit.parts], 1), unit.bias)
        for layer in (unit.act, *unit.rest):
            h = layer(h)
        scores = torch.full(mask.shape, -math.inf, dtype=torch.float64).masked_scatter(mask, h)
        if form == "din-v1":
            weights = scores.masked_fill(~mask, 0.0)
        else:
            scores = scores / math.sqrt(3) if form == "din-code" else scores
            weights = torch.softmax(scores.masked_fill(~mask.any(1, keepdim=True), 0.0), 1) * mask
    if form == "max":
        expected = values.masked_fill(~mask.unsqueeze(-1), -math.inf).amax(1).masked_fill(~mask.any(1, True), 0.0)
    else:
        expected = (weights.unsqueeze(-1) * values).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    leaves = [v, *([q, k, *unit.parameters()] if unit is not None else [])]
    sides = [torch.autograd.grad((out**2).sum(), leaves) for out in (found, expected)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@each_model
def test_gradcheck_of_the_whole_network(config: dict[str, Any], vectors: PictureVectors) -> None:
    """Log-odds as a function of all parameters and of the batch's embedding rows, in training."""
    model = make(config, vectors)
    batch = collate(model, random_groups(27, [2, 1, 2], [2, 0, 3]), (1, 0))
    network = model.network.train()
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    names = [name for name, _ in network.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in network.parameters()]
    rows = {w: model.tables[w].gather(r) for w, r in batch.rows.items()}
    widths = {n: model.plan.width(n) for n in model.plan.ids}

    def log_odds(*tensors: Tensor) -> Any:
        parameters = dict(zip(names, tensors, strict=False))
        here = dict(zip(rows, tensors[len(names) :], strict=True))
        state = parameters | {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(network, state, (batch, Lookup(batch, here, widths)))

    assert torch.autograd.gradcheck(log_odds, (*leaves, *rows.values()), fast_mode=True)
