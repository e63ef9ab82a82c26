"""One peer's training steps, timed. Runs in the peers' own venv; `train.py` starts it.

    python benchmarks/train_peers.py deepctr rows.npz '{"steps": 10, "warm": 2, …}'

Prints one JSON object: the seconds of each step. Batches are ready in memory: what the peers' data loaders take, which
put a batch together row by row, is not counted, in their favour. A step is what their own `fit` does with a batch.
"""

import json
import sys
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import torch


def deepctr(rows: Any, config: dict[str, Any]) -> tuple[Any, list[Any]]:
    """DeepCTR-Torch's DIN: a function for a step, and the batches."""
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat, get_feature_names
    from deepctr_torch.layers.activation import Dice
    from deepctr_torch.models import DIN

    width, sizes, act = config["width"], config["sizes"], config["activation"]
    columns: list[Any] = [SparseFeat(n, sizes[n], width) for n in config["one_hot"]]
    columns += [SparseFeat(n, sizes[n], width) for n in ("goods", "category")]
    for n in ("goods", "category"):
        inner = SparseFeat(f"hist_{n}", sizes[n], width, embedding_name=n)
        columns.append(VarLenSparseFeat(inner, config["longest"], length_name="length"))
    model = DIN(
        columns,
        ["goods", "category"],
        dnn_use_bn=True,
        dnn_hidden_units=(200, 80),
        dnn_activation=act,
        att_hidden_size=(80, 40),
        att_activation=act,
        att_weight_normalization=True,
        l2_reg_embedding=0.0,
    )
    if act == "dice":  # its tower asks for Dice of three dimensions, and stops at its own two
        units = (200, 80)
        model.dnn.activation_layers = torch.nn.ModuleList([Dice(unit, dim=2) for unit in units])
    model.compile("adam", "binary_crossentropy", metrics=[])
    arrays = {n: rows[n] for n in [*config["one_hot"], "hist_goods", "hist_category", "length"]}
    arrays |= {"goods": rows["ad_goods"], "category": rows["ad_category"]}
    x = np.concatenate([arrays[n].reshape(len(arrays[n]), -1) for n in get_feature_names(columns)], 1)
    batch, click = config["batch"], rows["click"]
    batches = [
        (torch.from_numpy(x[i : i + batch]).float(), torch.from_numpy(click[i : i + batch]).float())
        for i in range(0, len(x), batch)
    ]
    model.train()

    def step(made: Any) -> None:  # the loop of deepctr_torch.models.basemodel.BaseModel.fit, without metrics
        x, y = made
        y_pred = model(x).squeeze()
        model.optim.zero_grad()
        loss = model.loss_func(y_pred, y.squeeze(), reduction="sum")
        total = loss + model.get_regularization_loss() + model.aux_loss
        total.backward()
        model.optim.step()

    return step, batches


def fuxictr(rows: Any, config: dict[str, Any]) -> tuple[Any, list[Any]]:
    """FuxiCTR's DIN, that of its model_zoo.LongCTR: a function for a step, and the batches."""
    from fuxictr.features import FeatureMap
    from model_zoo.LongCTR.DIN.DIN import DIN

    sizes, act = config["sizes"], {"prelu": "PReLU", "dice": "Dice"}[config["activation"]]
    kept = FeatureMap("bench", ".")
    names = dict.fromkeys(config["one_hot"], "user") | {"goods": "item", "category": "item"}
    kept.features = OrderedDict(
        (n, {"source": of, "type": "categorical", "vocab_size": sizes[n], "padding_idx": 0}) for n, of in names.items()
    )
    kept.labels, kept.default_emb_dim = ["click"], config["width"]
    model = DIN(
        kept,
        dnn_hidden_units=[200, 80],
        dnn_activations=act,
        attention_hidden_units=[80, 40],
        attention_hidden_activations=act,
        embedding_dim=config["width"],
        batch_norm=True,
        din_use_softmax=True,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root=".",
        verbose=0,
    )
    model.train()
    model._max_gradient_norm, model._batch_index = 10.0, 0
    batches = []
    for i in range(0, len(rows["click"]), config["batch"]):
        cut = slice(i, i + config["batch"])
        of_batch = {n: torch.from_numpy(rows[n][cut]) for n in (*config["one_hot"], "click")}
        items = {
            n: torch.from_numpy(np.hstack([rows[f"hist_{n}"][cut], rows[f"ad_{n}"][cut, None]]).flatten())
            for n in ("goods", "category")
        }
        batches.append((of_batch, items, torch.from_numpy((rows["hist_goods"][cut] > 0).astype(np.float32))))
    return model.train_step, batches


def main() -> None:
    peer, path, text = sys.argv[1:]
    config = json.loads(text)
    torch.set_num_threads(config["threads"])
    with np.load(path) as file:
        rows = {name: file[name] for name in file.files}
    step, batches = {"deepctr": deepctr, "fuxictr": fuxictr}[peer](rows, config)
    seconds = []
    for made in batches:
        started = time.perf_counter()
        step(made)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
