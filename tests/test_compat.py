"""GAUC as other programs compute it: against loops written from their definitions, and the programs where installed."""

import numpy as np
import pytest
import torch

from ctrkit.compat import compat
from ctrkit.gauc import gauc, user_auc


def data(seed=0, n=900, values=12, dtype=np.float64):
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 90, n) ** 2 // 80
    label = rng.random(n) < rng.random(120)[user] * 0.6
    score = rng.choice(np.linspace(0, 1, values), n).astype(dtype)
    return user, label, score


def without_ties(seed=0, n=900):
    user, label, _ = data(seed, n)
    return user, label, np.random.default_rng(seed).permutation(n) / n


def pairs(label, score, of_ties=0.5):
    wins = [
        1.0 if s > t else of_ties if s == t else 0.0
        for y, s in zip(label, score, strict=True)
        if y
        for z, t in zip(label, score, strict=True)
        if not z
    ]
    return sum(wins) / len(wins)


def by_user(user, label, score):
    for u in sorted(set(user.tolist())):
        rows = user == u
        if 0 < label[rows].sum() < rows.sum():
            yield label[rows], score[rows]


def mean(values, weights):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def test_programs_that_average_ties_differ_by_weight_alone():
    user, label, score = data()
    users = list(by_user(user, label, score))
    aucs = [pairs(*u) for u in users]
    assert compat("fuxictr", user, label, score).value == pytest.approx(mean(aucs, [len(y) for y, _ in users]))
    assert compat("recbole", user, label, score).value == pytest.approx(mean(aucs, [y.sum() for y, _ in users]))
    assert compat("torcheasyrec", user, label, score).value == pytest.approx(np.mean(aucs))
    for program, weight in (("fuxictr", "impressions"), ("recbole", "clicks"), ("torcheasyrec", "users")):
        found = compat(program, user, label, score)
        assert found.value == found.low == found.high == pytest.approx(gauc(user, label, score, weight).value)


def torchrec_loop(user, label, score, order=lambda score: np.argsort(score, kind="stable")):
    """The mean over sessions of: each click's others that the sort puts before it, over all pairs."""
    aucs = []
    for y, s in by_user(user, label, score):
        if all(x == s[0] or x == 0 for x in s):
            continue
        y = y[order(s)]
        wins = sum(not z for i, clicked in enumerate(y) if clicked for z in y[:i])
        aucs.append(wins / (y.sum() * (~y).sum() + 1e-10))
    return (sum(aucs) + 1e-9) / (len(aucs) + 2e-9)


@pytest.mark.parametrize("seed", range(4))
def test_torchrec_takes_ties_as_the_sort_leaves_them(seed):
    user, label, score = data(seed, values=4)
    found = compat("torchrec", user, label, score)
    assert found.value == pytest.approx(torchrec_loop(user, label, score), abs=1e-12)
    assert found.low < found.value < found.high
    for shuffle in range(5):
        rng = np.random.default_rng(shuffle)
        some = torchrec_loop(user, label, score, lambda s, rng=rng: np.lexsort((rng.random(len(s)), s)))
        assert found.low <= some <= found.high
    torch_sorts = torchrec_loop(user, label, score, lambda s: torch.argsort(torch.from_numpy(s)).numpy())
    assert found.low <= torch_sorts <= found.high


def test_torchrec_without_ties_is_the_mean_over_users():
    user, label, score = without_ties()
    found = compat("torchrec", user, label, score)
    assert found.low == found.value == found.high
    assert found.value == pytest.approx(gauc(user, label, score, "users").value, abs=1e-9)


def test_torchrec_leaves_out_sessions_of_one_score_and_zeros():
    label = [1, 0, 0]
    assert compat("torchrec", [1, 1, 1], label, [0.3, 0.3, 0.3]).value == 0.5  # that of no session
    assert compat("torchrec", [1, 1, 1], label, [0.3, 0.0, 0.0]).value == 0.5  # taken for one score and padding
    assert compat("torchrec", [1, 1, 1], [0, 1, 0], [0.0, 0.3, 0.0]).value == pytest.approx(1.0)


@pytest.mark.parametrize("program", ["fuxictr", "recbole", "torcheasyrec"])
def test_no_user_is_nan(program):
    assert compat(program, [1, 2], [1, 0], [0.1, 0.2]).value is None
    assert compat(program, [], [], []).value is None


def test_the_real_fuxictr(monkeypatch):
    metrics = pytest.importorskip("fuxictr.metrics", reason="FuxiCTR is not installed: pip install fuxictr==2.3.10")
    monkeypatch.setattr(metrics.mp, "Pool", OneProcess)
    for user, label, score in (data(), without_ties()):
        theirs = metrics.evaluate_metrics(label.astype(float), score, ["gAUC"], group_id=user)["gAUC"]
        assert compat("fuxictr", user, label, score).value == pytest.approx(theirs, abs=1e-12)


class OneProcess:
    """A pool that works at once, here: forking beside torch's threads would warn."""

    def __init__(self, processes):
        pass

    def apply_async(self, function, args):
        self.made = function(*args)
        return Done(self.made)

    def close(self):
        pass

    join = close


class Done:
    def __init__(self, made):
        self.made = made

    def get(self):
        return self.made


def test_the_real_recbole():
    """Through its collector and its metric, each user's impressions being items of its own."""
    collector = pytest.importorskip("recbole.evaluator.collector", reason="RecBole is not installed")
    metrics = pytest.importorskip("recbole.evaluator.metrics", reason="RecBole is not installed")
    config = {
        "metric_decimal_place": 12,
        "metrics": ["GAUC"],
        "topk": [1],
        "device": "cpu",
        "eval_args": {"mode": "full"},
    }
    for user, label, score in (data(), without_ties()):
        users = [np.flatnonzero(user == u) for u in np.unique(user)]
        scores = torch.full((len(users), 1 + max(map(len, users))), -torch.inf)
        positive_u, positive_i = [], []
        for u, rows in enumerate(users):
            scores[u, 1 : 1 + len(rows)] = torch.from_numpy(score[rows]).float()
            of = np.flatnonzero(label[rows])
            positive_u += [u] * len(of)
            positive_i += (1 + of).tolist()
        made = collector.Collector(Settings(config))
        made.eval_batch_collect(scores, None, torch.tensor(positive_u), torch.tensor(positive_i))
        theirs = metrics.GAUC(config).calculate_metric(made.get_data_struct())["gauc"]
        assert compat("recbole", user, label, score).value == pytest.approx(theirs, abs=1e-6)


class Settings(dict):
    """What RecBole's collector asks of a configuration."""

    final_config_dict = property(lambda self: self)


def test_torcheasyrec_by_torchmetrics():
    """TorchEasyRec averages torchmetrics' AUCs of the users."""
    auroc = pytest.importorskip(
        "torchmetrics.functional.classification", reason="torchmetrics is not installed: pip install torchmetrics"
    ).binary_auroc
    for user, label, score in (data(), without_ties()):
        aucs = [auroc(torch.from_numpy(s), torch.from_numpy(y.astype(int))) for y, s in by_user(user, label, score)]
        assert compat("torcheasyrec", user, label, score).value == pytest.approx(float(np.mean(aucs)), abs=1e-6)


def test_the_real_torchrec():
    try:
        from torchrec.metrics.gauc import compute_gauc_3d, compute_window_auc
    except (ImportError, OSError) as e:
        pytest.skip(f"torchrec cannot be imported here: {e}")
    for user, label, score in (data(), without_ties()):
        users = [np.flatnonzero(user == u) for u in np.unique(user)]
        width = max(map(len, users))
        padded = np.zeros((3, len(users), width))
        for u, rows in enumerate(users):
            padded[:, u, : len(rows)] = np.stack([score[rows], label[rows], np.ones(len(rows))])
        states = compute_gauc_3d(*(torch.from_numpy(x)[None] for x in padded))
        theirs = float(compute_window_auc(states["auc_sum"], states["num_samples"])["gauc"])
        found = compat("torchrec", user, label, score)
        assert found.low - 1e-12 <= theirs <= found.high + 1e-12


def test_the_sums_of_parts_are_those_of_the_whole():
    from ctrkit.compat import partial, total

    user, label, score = data()
    for program in ("fuxictr", "recbole", "torcheasyrec", "torchrec"):
        parts = []
        for rest in range(3):
            at = user % 3 == rest
            parts.append(partial(program, user_auc(user[at], label[at], score[at]), user[at], label[at], score[at]))
        whole, joined = compat(program, user, label, score), total(program, parts)
        assert joined.value == pytest.approx(whole.value, abs=1e-14)
        assert joined.low == pytest.approx(whole.low, abs=1e-14)


@pytest.mark.parametrize("program", ["foo", None])
def test_an_unknown_program_raises(program):
    with pytest.raises(ValueError, match=r"not one of .*fuxictr"):
        compat(program, [1, 1], [1, 0], [0.1, 0.2])
