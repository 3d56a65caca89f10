"""Weights from elsewhere: official MAE files, timm and Hugging Face files and folders, big_vision's, and our own.

Every tensor has to find its place, and every place its tensor.
"""

import dataclasses
from pathlib import Path

import numpy as np

from maejax import build
from maejax.convert import files
from maejax.convert.infer import Hints, infer
from maejax.convert.names import Arrays, compare, lines
from maejax.convert.source import find
from maejax.convert.weights import Weights, network_shapes, patch_of, without_tables, zeros


def read(source: Path, hints: Hints) -> Weights:
    """The network in a file or folder; raises UsageError, one line, for whatever does not fit."""
    found = find(source)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    c, parts, classes, notes = infer(found, shapes, hints)
    wanted = network_shapes(c, parts, classes)
    if found.format == "big_vision":  # its table has no row for the class token
        n = build.shapes_of(c).patches
        wanted["encoder/pos_embed"] = (1, n, wanted["encoder/pos_embed"][2])
    if found.format == "safetensors":
        wanted = {name: shape for name, shape in wanted.items() if name in shapes or not name.endswith("/pos_embed")}
    expected = lines(found.table, wanted, patch_of(c))
    where = str(found.where)
    actual = found.actual
    compare(where, [dataclasses.replace(line, theirs=actual.get(line.theirs, line.theirs)) for line in expected],
            {actual[name]: shape for name, shape in shapes.items()})  # fmt: skip
    arrays: Arrays = {name: zeros(shape) for name, shape in wanted.items()}
    for line in expected:
        line.fill(arrays, files.read(found.where, actual[line.theirs], found.tensors[line.theirs]))
    if found.format == "big_vision" and c.model.cls_token:
        table = arrays["encoder/pos_embed"]
        arrays["encoder/pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    called = {line.ours: actual[line.theirs] for line in expected}
    arrays, c = without_tables(where, arrays, c, called)
    notes = (f"mapped {len(expected)}/{len(found.tensors)} tensors", *notes)
    if found.ignored:
        notes = (*notes, f"left out, as no part of the network: {', '.join(found.ignored)}")
    origin = {"source": source.name, "format": found.format, "license": found.license}
    return Weights(c, arrays, origin, notes)
