"""Do devices that should hold the same numbers hold the same numbers? Every device fingerprints what lies on it.

What is whole on several devices, or on several groups of them, is compared among them: all of a state under
`sharding=replicate`, and between slices or nodes (`mesh.dcn_data`) under any preset. What is split over all devices has
no second copy and cannot be compared. With one device nothing is done.
"""

from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from maejax.errors import SilentCorruption
from maejax.fingerprint import fingerprint
from maejax.interruption import StepEnd
from maejax.processes import fetch
from maejax.state import TrainState
from maejax.tree import named_leaves


class CompareReplicas:
    """Compares every so many steps (0: never), and whenever asked; raises SilentCorruption on all processes alike.

    What was found is read when the next step has been started, so no step waits for it. `shapes`: of the state, with
    shardings.
    """

    def __init__(self, shapes: TrainState, mesh: Mesh, *, every: int):
        self._every, self._mesh = every, mesh
        leaves = {name: leaf.sharding.spec for name, leaf in named_leaves(_fields(shapes)).items()}
        self._free = {name: axes for name, spec in leaves.items() if (axes := _free_axes(spec, mesh))}
        self._shapes = {name: leaf for name, leaf in named_leaves(_fields(shapes)).items() if name in self._free}
        self._pending: tuple[int, jax.Array, jax.Array] | None = None
        specs = {name: leaves[name] for name in self._free}
        everywhere = P(mesh.axis_names)
        self._compare = jax.jit(
            jax.shard_map(
                self._compare_here, mesh=mesh, in_specs=(specs,), out_specs=(P(), everywhere), check_vma=False
            )
        )

    def _compare_here(self, blocks: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """On one device: how many (leaf, device) pairs differ anywhere, and this device's fingerprints (1 leaves)."""
        prints = {name: fingerprint(block) for name, block in blocks.items()}
        together = defaultdict(list)
        for name, axes in self._free.items():
            together[axes].append(name)
        different = jnp.zeros((), jnp.int32)
        for axes, names in together.items():
            mine = jax.lax.bitcast_convert_type(jnp.stack([prints[name] for name in names]), jnp.int32)
            different += jnp.sum(jax.lax.pmin(mine, axes) != jax.lax.pmax(mine, axes), dtype=jnp.int32)
        everywhere = tuple(self._mesh.axis_names)
        return jax.lax.psum(different, everywhere), jnp.stack([prints[name] for name in blocks])[None]

    def __call__(self, end: StepEnd) -> None:
        self.settle()
        if self._every and end.step % self._every == 0:
            self._start(end)

    def _start(self, end: StepEnd) -> None:
        if not self._free:
            return
        there = named_leaves(_fields(end.state))
        self._pending = (end.step, *self._compare({name: there[name] for name in self._free}))

    def now(self, end: StepEnd) -> None:
        """Compares this step's state before anything else is done with it, such as saving it."""
        if self._every and not (self._pending and self._pending[0] == end.step):
            self.settle()
            self._start(end)
        self.settle()

    def settle(self) -> None:
        """Waits for the comparison under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending and int(pending[1]):
            raise SilentCorruption(self._finding(pending[0], fetch(pending[2])))

    def _finding(self, step: int, table: np.ndarray) -> str:
        """Which device is unlike the others; `table` uint32 (devices leaves)."""
        devices, said = list(self._mesh.devices.flat), []
        for prints, (name, leaf) in zip(table.T, sorted(self._shapes.items()), strict=True):
            said += [f"{name} on {where}" for where in odd_ones(prints, leaf, devices)]
        listed = "; ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")
        return (
            f"replicas differ at step {step}: {listed}. The newest checkpoint is from before: the same command goes on "
            "from it; if it happens again, leave that device out"
        )


def odd_ones(prints: np.ndarray, leaf: Any, devices: list[jax.Device]) -> list[str]:
    """The devices whose fingerprint of a leaf is not that of most of those that hold the same part of it."""
    place = leaf.sharding.devices_indices_map(leaf.shape)
    groups = defaultdict(list)
    for device, value in zip(devices, prints, strict=True):
        groups[str(place[device])].append((device, int(value)))
    odd = []
    for members in groups.values():
        (common, votes), *others = Counter(value for _, value in members).most_common()
        if not others:
            continue
        if votes == others[0][1]:  # two against two: nobody knows who is right
            odd.append("one of " + ", ".join(_place(device) for device, _ in members))
        else:
            odd += [_place(device) for device, value in members if value != common]
    return odd


def _place(device: jax.Device) -> str:
    return f"process {device.process_index}, device {device.id} ({device.device_kind})"


def _free_axes(spec: P, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a leaf is repeated."""
    used = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
    return tuple(axis for axis in mesh.axis_names if axis not in used and mesh.shape[axis] > 1)


def _fields(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "ema": state.ema, "stats": state.stats,
            "guard": state.guard, "step": state.step}  # fmt: skip
