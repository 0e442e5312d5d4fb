"""A model with the layers of another, several times over: as deep as a real one, and as cheap as a test can pay for.

What it says is of no use. Its KV is as large, and comes a few layers at a time, as that of a model that was trained so.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil

from safetensors import safe_open
from safetensors.torch import save_file

_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..*)$")


def deepened(model: pathlib.Path, layers: int, target: pathlib.Path) -> pathlib.Path:
    """Writes a copy of a model whose layers go round until there are so many.

    Args:
        model: its directory, with one ``model.safetensors``.
        layers: of the copy.
        target: where it goes; must not exist.

    Returns:
        ``target``.
    """
    shutil.copytree(model, target)
    config = json.loads((model / "config.json").read_text())
    had = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][layer % had] for layer in range(layers)]
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            found = _LAYER.match(name)
            if found is None:
                tensors[name] = file.get_tensor(name)
                continue
            before, layer, after = found.groups()
            for copy in range(int(layer), layers, had):
                tensors[f"{before}{copy}{after}"] = file.get_tensor(name).clone()
        save_file(tensors, target / "model.safetensors", file.metadata())
    return target
