"""The encoder as an ONNX graph: `model.onnx`, and its weights beside it in `model.onnx.data`.

Written with the `onnx` package's helpers (the [interop] extra). Opset 20 has LayerNormalization and the exact Gelu. The
weights lie in a file of their own because one protocol buffer holds 2 GB at most, and ViT-H has more.
"""

import math
from pathlib import Path
from typing import Any

from maejax.convert.files import Pending, made
from maejax.convert.names import CONVOLUTION, DENSE, DENSE_OF_HEADS, FLAT, SAME, Rule, blocks
from maejax.errors import UsageError

OPSET, IR_VERSION = 20, 9
TABLE = [
    Rule("cls_token", "encoder/cls_token"),
    Rule("pos_embed", "encoder/pos_embed"),
    Rule("embed.weight", "encoder/embed/kernel", CONVOLUTION),
    Rule("embed.bias", "encoder/embed/bias"),
    *blocks("blocks.{i}.", "encoder", [
        ("norm1.scale", "norm1/scale", SAME, None), ("norm1.bias", "norm1/bias", SAME, None),
        ("qkv.kernel", "attn/qkv/kernel", DENSE, None), ("qkv.bias", "attn/qkv/bias", FLAT, None),
        ("proj.kernel", "attn/proj/kernel", DENSE_OF_HEADS, None), ("proj.bias", "attn/proj/bias", SAME, None),
        ("norm2.scale", "norm2/scale", SAME, None), ("norm2.bias", "norm2/bias", SAME, None),
        ("fc1.kernel", "mlp/fc1/kernel", DENSE, None), ("fc1.bias", "mlp/fc1/bias", SAME, None),
        ("fc2.kernel", "mlp/fc2/kernel", DENSE, None), ("fc2.bias", "mlp/fc2/bias", SAME, None),
    ]),
    Rule("norm.scale", "encoder/norm/scale"),
    Rule("norm.bias", "encoder/norm/bias"),
]  # fmt: skip


def check() -> None:
    """Raises UsageError if the `onnx` package is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--to=onnx needs the onnx package ({error}); pip install 'maejax[interop]'") from error


class _Graph:
    """Nodes in order; every method adds one and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        from onnx import helper

        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"node_{output}", **attributes))
        return output

    def integers(self, values: list[int]) -> str:
        """A constant of int64."""
        from onnx import TensorProto, helper

        name = f"integers_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def scalar(self, value: float) -> str:
        """A constant of float32."""
        from onnx import TensorProto, helper

        name = f"scalar_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def linear(self, x: str, name: str) -> str:
        """x @ kernel + bias."""
        return self.add("Add", self.add("MatMul", x, f"{name}.kernel"), f"{name}.bias")

    def norm(self, x: str, name: str) -> str:
        """LayerNorm over the last axis."""
        return self.add("LayerNormalization", x, f"{name}.scale", f"{name}.bias", axis=-1, epsilon=1e-6)

    def block(self, x: str, at: str, heads: int, size: int) -> str:
        """A transformer block, (b s d) -> (b s d); `at` is the prefix of its weights."""
        qkv = self.linear(self.norm(x, f"{at}norm1"), f"{at}qkv")
        qkv = self.add("Reshape", qkv, self.integers([0, 0, 3, heads, size]))
        qkv = self.add("Transpose", qkv, perm=[2, 0, 3, 1, 4])  # 3 b heads s size
        q, k, v = (self.add("Squeeze", self.add("Slice", qkv, self.integers([i]), self.integers([i + 1]),
                   self.integers([0])), self.integers([0])) for i in range(3))  # fmt: skip
        q = self.add("Mul", q, self.scalar(size**-0.5))
        weights = self.add("Softmax", self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", weights, v), perm=[0, 2, 1, 3])
        mixed = self.add("Reshape", mixed, self.integers([0, 0, heads * size]))
        x = self.add("Add", x, self.linear(mixed, f"{at}proj"))
        hidden = self.add("Gelu", self.linear(self.norm(x, f"{at}norm2"), f"{at}fc1"))
        return self.add("Add", x, self.linear(hidden, f"{at}fc2"))


def write(folder: Path, tensors: list[Pending], facts: dict[str, Any]) -> None:
    """Writes the graph: "images", normalised float32 (b c h w), to "tokens" (b [1+]n d)."""
    check()
    import onnx
    from onnx import TensorProto, helper

    weights, at = [], 0
    with (folder / "model.onnx.data").open("wb") as file:
        for tensor in tensors:
            weights.append(_external(tensor, at))
            at += file.write(made(tensor).data.cast("B"))
    g, (h, w), (p, q), d = _Graph(), facts["image"], facts["patch"], facts["width"]
    x = g.add("Conv", "images", "embed.weight", "embed.bias", kernel_shape=[p, q], strides=[p, q])
    x = g.add("Transpose", g.add("Reshape", x, g.integers([0, d, -1])), perm=[0, 2, 1])
    if facts["cls_token"]:
        batch = g.add("Slice", g.add("Shape", "images"), g.integers([0]), g.integers([1]), g.integers([0]))
        shape = g.add("Concat", batch, g.integers([1, d]), axis=0)
        x = g.add("Concat", g.add("Expand", "cls_token", shape), x, axis=1)
    x = g.add("Add", x, "pos_embed")
    for i in range(facts["depth"]):
        x = g.block(x, f"blocks.{i}.", facts["heads"], d // facts["heads"])
    x = g.norm(x, "norm")
    g.nodes.append(helper.make_node("Identity", [x], ["tokens"], name="node_tokens"))
    count = (h // p) * (w // q) + int(facts["cls_token"])
    graph = helper.make_graph(
        g.nodes,
        "maejax_encoder",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", facts["channels"], h, w])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["b", count, d])],
        [*weights, *g.constants],
    )
    model = helper.make_model(
        graph, producer_name="maejax", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / "model.onnx"))


def _external(tensor: Pending, offset: int) -> Any:
    from onnx import TensorProto

    length = 4 * math.prod(tensor.shape)
    entry = TensorProto(name=tensor.name, data_type=TensorProto.FLOAT, dims=tensor.shape)
    entry.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", str(offset)), ("length", str(length))):
        entry.external_data.add(key=key, value=value)
    return entry
