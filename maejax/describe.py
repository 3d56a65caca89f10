"""A run in a few lines for people, before it starts."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maejax import build
from maejax import config as configs
from maejax.data.sources import Source
from maejax.mesh import batch_shards


def describe(c: ConfigDict, source: Source, mesh: Mesh, num_parameters: int) -> Iterator[str]:
    """The lines: data, model, task, mesh, batch, learning rate and length."""
    n, s = len(source), build.shapes_of(c)
    width, depth, _ = build.encoder_size(c)
    devices, per_step = jax.device_count(), c.batch_size // c.grad_accum_steps
    shards = batch_shards(mesh)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "dcn_data" or size > 1)
    total, warmup = (configs.steps(c, name, n) for name in ("total", "warmup"))
    yield f"data      {c.data.source}: {n:,} images, id {source.fingerprint()}"
    kind = " of cross-attention" if c.decoder.kind == "cross" else ""
    decoder = "" if build.classifies(c) else f"; decoder {c.decoder.width} x {c.decoder.depth}{kind}"
    yield (
        f"model     ViT-{c.model.size} {width} x {depth}, image {s.image[0]}x{s.image[1]} in patches of "
        f"{s.patch[0]}x{s.patch[1]}{decoder}; {num_parameters / 1e6:.2f} M parameters, {c.dtype}"
    )
    cost = f"{build.mean_flops_per_image(c) / 1e9:.3g} GFLOP an image and step"
    if build.classifies(c):
        f = c.finetune
        trained = "everything" if f.blocks is None else f"the last {f.blocks} of {depth} blocks" if f.blocks else "head"
        yield f"classes   {f.num_classes}, from {f.pool} features; trained: {trained}; {cost}"
    else:
        part = f", {s.decoded} of {s.patches - s.visible} others decoded" if c.decoder.subset < 1 else ""
        yield f"mask      {c.mask.sampler} {c.mask.ratio:g}: {s.visible} of {s.patches} patches visible{part}; {cost}"
    if c.data.sides:
        yield f"sides     {', '.join(map(str, c.data.sides))} px in equal parts of the run; that cost is their mean"
    yield f"mesh      {axes}, {c.sharding}, {devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}"
    if mesh.shape["tensor"] > 1:
        yield f"          {mesh.shape['tensor']} devices share each row of a batch (tensor)"
    local = devices // jax.process_count() // mesh.shape["tensor"] or 1
    yield (
        f"batch     {c.batch_size} = {jax.process_count()} processes x {local} devices x {per_step // shards} "
        f"per device x {c.grad_accum_steps} accumulation"
    )
    yield f"lr        {c.base_lr * c.batch_size / 256:.3g} = base_lr {c.base_lr:g} x {c.batch_size} / 256"
    yield f"length    {total:,} steps = {total * c.batch_size / n:.4g} epochs, warm-up {warmup:,} steps"
    if warmup >= total:
        yield "note      the run is over before its warm-up is; set --config.warmup_steps for a short one"
