"""A whole training step (forward, backward, AdamW) on CPU cores, float32: maejax over PyTorch.

    python benchmarks/torch_step.py --model=ti            ViT-Ti/4, 32 px, batch 256
    python benchmarks/torch_step.py --model=b             ViT-B/16, 224 px, batch 16
    python benchmarks/torch_step.py --model=b --masking   encoding mask tokens over dropping them, maejax alone

The other side is `transformers.ViTMAEForPreTraining` of the same shape, eager, with `torch.optim.AdamW`. Windows of
both sides alternate in one process and the medians count; each ends when its results are there. Images are random, each
side draws or is given random masks, and both get the memory that `allocator.py` keeps. Needs the extra `[interop]`.

Where other work shares the cores, seconds are not comparable: a side whose threads wait for each other loses more. CPU
seconds on one core (`taskset -c 0 python ...`) are; on several, PyTorch's include the waiting of its threads.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from maejax.allocator import keep_freed_memory

keep_freed_memory()  # as the command line does; before JAX is imported

import jax  # noqa: E402
import numpy as np  # noqa: E402

from maejax import build  # noqa: E402
from maejax import config as configs  # noqa: E402
from maejax.mesh import make_mesh, to_global  # noqa: E402
from maejax.overrides import override  # noqa: E402
from maejax.program import make_program  # noqa: E402

# By name: side, patch, batch, and (width, depth, heads) of encoder and decoder.
MODELS: dict[str, tuple[int, int, int, tuple[int, int, int], tuple[int, int, int]]] = {
    "ti": (32, 4, 256, (192, 12, 3), (128, 4, 4)),
    "b": (224, 16, 16, (768, 12, 12), (512, 8, 16)),
}
Step = Callable[[], Any]


def maejax_step(name: str, *changes: str) -> tuple[Step, dict[str, float]]:
    """A function that makes one step and waits for it, and what XLA and the formula say that it computes."""
    side, patch, batch_size, encoder, decoder = MODELS[name]
    c = configs.default()
    keys = {"image_size": side, "model.patch": patch, "batch_size": batch_size, "total_steps": 10**6}
    keys |= dict(zip(("model.width", "model.depth", "model.heads"), encoder, strict=True))
    keys |= dict(zip(("decoder.width", "decoder.depth", "decoder.heads"), decoder, strict=True))
    c = override(c, {key: str(value) for key, value in keys.items()} | dict(change.split("=") for change in changes))
    mesh = make_mesh(c.mesh)
    program = make_program(c, mesh, num_examples=10**6, num_classes=None)
    s, rng = build.shapes_of(c), np.random.default_rng(0)
    order = np.argsort(rng.random((batch_size, s.patches)), axis=1).astype(np.int32)
    images = rng.integers(0, 256, (batch_size, *s.image, s.channels), dtype=np.uint8)
    batch = to_global({"image": images, "visible": order[:, : s.visible], "masked": order[:, s.visible :]}, mesh)
    compiled, state = program.train_step.lower(program.shapes, program.batch).compile(), program.new_state()

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    analytic = build.flops_per_image(c)
    # XLA counts a loop's body once.
    facts = {"gflop_per_image": analytic / 1e9}
    if not c.model.scan:
        facts["xla_flops_over_analytic"] = compiled.cost_analysis()["flops"] / batch_size / analytic
    return step, facts


def torch_step(name: str) -> Step:
    """The same step in PyTorch."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    side, patch, batch_size, (width, depth, heads), decoder = MODELS[name]
    config = ViTMAEConfig(
        image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, decoder_hidden_size=decoder[0], decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2], decoder_intermediate_size=4 * decoder[0], mask_ratio=0.75,
        norm_pix_loss=True,
    )  # fmt: skip
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(batch_size, 3, side, side)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model(images).loss
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def interleaved(sides: dict[str, Step], windows: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """The medians of the seconds and of the CPU seconds that a step of each side takes."""
    for step in sides.values():
        step()
        step()
    clocks = (time.perf_counter, time.process_time)
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for _ in range(windows):
        for name, step in sides.items():
            start = [clock() for clock in clocks]
            for _ in range(steps):
                step()
            spent[name].append(tuple((clock() - since) / steps for clock, since in zip(clocks, start, strict=True)))
    wall, cpu = ({name: statistics.median(v[i] for v in values) for name, values in spent.items()} for i in (0, 1))
    return wall, cpu


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="ti")
    parser.add_argument("--masking", action="store_true")
    parser.add_argument("--unroll", action="store_true", help="model.scan=false, so that XLA counts every block")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="a window")
    options = parser.parse_args()

    unroll = ["model.scan=false"] if options.unroll else []
    ours, facts = maejax_step(options.model, *unroll)
    if options.masking:
        whole, more = maejax_step(options.model, *unroll, "model.mask_tokens=true")
        wall, cpu = interleaved({"dropped": ours, "encoded": whole}, options.windows, options.steps)
        flops = more["gflop_per_image"] / facts["gflop_per_image"]
        result = {
            "flops": flops,
            "masking_efficiency": wall["encoded"] / wall["dropped"] / flops,
            "masking_efficiency_cpu_seconds": cpu["encoded"] / cpu["dropped"] / flops,
        }
    else:
        wall, cpu = interleaved({"maejax": ours, "torch": torch_step(options.model)}, options.windows, options.steps)
        result = {
            "maejax_over_torch": wall["torch"] / wall["maejax"],
            "maejax_over_torch_cpu_seconds": cpu["torch"] / cpu["maejax"],
        }
    batch_size = MODELS[options.model][2]
    result |= {f"{name}_img_per_s": batch_size / value for name, value in wall.items()}
    result |= {f"{name}_cpu_seconds": value for name, value in cpu.items()}
    result["load"] = os.getloadavg()[0]  # what else ran: at most the number of cores, if nothing did
    versions = {f: importlib.metadata.version(f) for f in ("jax", "torch", "transformers") if not options.masking}
    settings = {"model": options.model, "batch_size": batch_size, "windows": options.windows, "steps": options.steps}
    rounded = {name: round(value, 4) for name, value in (result | facts).items()}
    print(json.dumps(settings | rounded | {"cores": len(os.sched_getaffinity(0))} | versions))


if __name__ == "__main__":
    main()
