"""How a process finds the others of its run, and joins them in JAX's distributed runtime.

The first rule that applies decides; the run's first line says which it was:

    flags       --coordinator, --num-processes, --process-id
    MAEJAX_*    MAEJAX_COORDINATOR, MAEJAX_NUM_PROCESSES, MAEJAX_PROCESS_ID
    JAX_*       JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES (or JAX_PROCESS_COUNT), JAX_PROCESS_ID
    TPU pod     TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES with several hosts, or MEGASCALE_NUM_SLICES: by JAX itself
    TPU VM      a machine with TPU chips, of a slice with several: by Google's metadata server
    Slurm       a job step of several tasks (srun)
    Open MPI    mpirun with several processes
    torch       MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK (torchrun)
    alone       none of these: one process

One process may hold all devices of its node or one of them. Slurm, Open MPI and torch say how many processes share a
node; where there are several, each takes the GPU of its local number, unless the launcher has hidden the others.

Processes wait a minute for each other; MAEJAX_ARRIVAL_SECONDS is for launchers that start them further apart.
"""

import dataclasses
import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from maejax import faults, peers, watchdog
from maejax.coordination import NEVER, leave_deaths_to_the_line
from maejax.errors import UsageError
from maejax.rollcall import Connections, call_roll

ARRIVAL_SECONDS = 60.0  # that processes wait for each other at the start
PORT = 37373  # of the coordinator, where only a host is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Which process of how many this is.

    Attributes:
      rule: which rule found it, for people.
      coordinator: HOST:PORT of process 0; None for a process alone, and on a TPU pod, where JAX knows it.
      local_devices: numbers of the devices that this process takes; None: all of its node.
    """

    rule: str
    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    local_devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.num_processes == 1:
            return f"processes 1 ({self.rule})"
        where = f", coordinator {self.coordinator}" if self.coordinator else ""
        return f"processes {self.num_processes}, found by {self.rule}{where}; this is {self.process_id}"


def find_place(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Place:
    """This process's place by the first rule that applies; arguments are the flags.

    Raises:
      UsageError: a rule applies and what it needs is incomplete or makes no sense.
    """
    env = os.environ if env is None else env
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    explicit = (
        ("flags", {name: None if value is None else str(value) for name, value in flags.items()}),
        ("MAEJAX_*", _taken(env, "MAEJAX_COORDINATOR", "MAEJAX_NUM_PROCESSES", "MAEJAX_PROCESS_ID")),
        ("JAX_*", _jax_variables(env)),
    )
    for rule, given in explicit:
        if rule == "JAX_*" and list(given.values())[1:] == [None, None]:
            continue  # the address alone is JAX's own, and says nothing of processes
        if any(value is not None for value in given.values()):
            return _explicit(rule, given)
    for look in (_tpu_pod, _tpu_vm, _slurm, _open_mpi, _torch):
        if found := look(env):
            return found
    return Place(rule="alone")


def _taken(env: Mapping[str, str], *names: str) -> dict[str, str | None]:
    return {name: env.get(name) for name in names}


def _jax_variables(env: Mapping[str, str]) -> dict[str, str | None]:
    count = "JAX_PROCESS_COUNT" if "JAX_PROCESS_COUNT" in env else "JAX_NUM_PROCESSES"
    return _taken(env, "JAX_COORDINATOR_ADDRESS", count, "JAX_PROCESS_ID")


def _explicit(rule: str, given: Mapping[str, str | None], local: tuple[int, ...] | None = None) -> Place:
    """From an address, a number of processes and an id, all three of which must be there and fit."""
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise UsageError(f"{there} needs {' and '.join(missing)} beside it, to say where process 0 is and who is who")
    (address_name, address), (count_name, count), (id_name, process) = given.items()
    assert address and count and process
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"{count_name}={count} must be a number of processes, 1 or more")
    if not process.isdigit() or int(process) >= int(count):
        raise UsageError(f"{id_name}={process} must be a number from 0 to {int(count) - 1}, one for each process")
    host, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, "", str(PORT))
    if not host or not 0 < int(port) < 65536:
        raise UsageError(f"{address_name}={address} must be HOST:PORT, as in 10.0.0.1:{PORT}")
    return Place(
        rule=rule, coordinator=f"{host}:{port}", num_processes=int(count), process_id=int(process), local_devices=local
    )


def _tpu_pod(env: Mapping[str, str]) -> Place | None:
    hosts = max(len(env.get(name, "").split(",")) for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    if hosts * slices == 1:
        return None
    return Place(rule="TPU pod", num_processes=hosts * slices, process_id=int(env.get("TPU_WORKER_ID") or 0))


def _tpu_vm(env: Mapping[str, str], chips: str = "accel[0-9]*,vfio/[0-9]*") -> Place | None:
    """Machines of a slice tell neither their number nor each other's addresses in any variable."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in chips.split(",")):
        return None
    host = env.get("GCE_METADATA_HOST", "metadata.google.internal")
    known = []
    for name in ("worker-network-endpoints", "agent-worker-number"):
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
            ) as f:
                known.append(f.read(100_000).decode())
        except OSError:  # not Google's cloud, or a single machine
            return None
    addresses = [endpoint.rpartition(":")[2] for endpoint in known[0].split(",")]  # NAME:PORT:ADDRESS,...
    if len(addresses) == 1:
        return None
    names = {
        "address": f"{addresses[0]}:8476",
        "machines": str(len(addresses)),
        "agent-worker-number": known[1].strip(),
    }
    return _explicit("TPU VM", names)


def _slurm(env: Mapping[str, str]) -> Place | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in env for name in names) or env["SLURM_NTASKS"] == "1":
        return None
    job, nodes, tasks, task, local = (env[name] for name in names)
    one_node = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    host = "127.0.0.1" if one_node else first_host(nodes)
    # Jobs that share a node get ports of their own.
    address = f"{host}:{61440 + _number('SLURM_JOB_ID', job) % 4096}"
    on_node = env.get("SLURM_STEP_TASKS_PER_NODE", tasks)  # such as 4 or 4(x2): that of the first node
    share = _local_share(_number("SLURM_LOCALID", local), _number("SLURM_STEP_TASKS_PER_NODE", on_node), env)
    return _explicit("Slurm", {"address": address, "SLURM_NTASKS": tasks, "SLURM_PROCID": task}, share)


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: `a[03-07,9],b` -> `a03`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if not found:
        raise UsageError(f"SLURM_STEP_NODELIST={nodes} does not begin with a host; give --coordinator and the others")
    return found[1] + (found[2] or "")


def _number(name: str, text: str) -> int:
    """The number that a variable begins with."""
    found = re.match(r"\d+", text)
    if not found:
        raise UsageError(
            f"{name}={text} must be a number; unset it, or give --coordinator, --num-processes, --process-id"
        )
    return int(found[0])


def _open_mpi(env: Mapping[str, str]) -> Place | None:
    size, rank = env.get("OMPI_COMM_WORLD_SIZE"), env.get("OMPI_COMM_WORLD_RANK")
    if size is None or rank is None or size == "1":
        return None
    on_node = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    # Open MPI 4 tells where mpirun runs: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    uri = re.search(r"tcp6?://\[?([^,:\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if on_node == size else uri[1] if uri else env.get("MASTER_ADDR")
    if host is None:
        raise UsageError(
            "this Open MPI does not say where process 0 runs; export MASTER_ADDR with its host name (mpirun -x "
            "MASTER_ADDR=...) or give --coordinator, --num-processes and --process-id"
        )
    local = env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    share = _local_share(
        _number("OMPI_COMM_WORLD_LOCAL_RANK", local), _number("OMPI_COMM_WORLD_LOCAL_SIZE", on_node), env
    )
    names = {"address": host, "OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_RANK": rank}
    return _explicit("Open MPI", names, share)


def _torch(env: Mapping[str, str]) -> Place | None:
    if not {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= set(env) or env["WORLD_SIZE"] == "1":
        return None
    # torchrun itself listens at MASTER_PORT; the next one is ours.
    address = f"{env['MASTER_ADDR']}:{_number('MASTER_PORT', env.get('MASTER_PORT', str(PORT))) + 1}"
    local, on_node = env.get("LOCAL_RANK", "0"), env.get("LOCAL_WORLD_SIZE", "1")
    share = _local_share(_number("LOCAL_RANK", local), _number("LOCAL_WORLD_SIZE", on_node), env)
    return _explicit("torch", {"MASTER_ADDR": address, "WORLD_SIZE": env["WORLD_SIZE"], "RANK": env["RANK"]}, share)


def _local_share(local: int, on_node: int, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPU of one of `on_node` processes that share a node; None: all that it can see."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    return (local,) if on_node > 1 and gpus >= on_node else None


def join(place: Place) -> Connections:
    """Meets the other processes and starts JAX's distributed runtime; to be called before any device is touched.

    Returns the connections that the processes keep; none for a process alone, and on a TPU pod.

    Raises:
      UsageError: a process is missing after a minute, two have the same id, or the port is taken.
    """
    if place.num_processes == 1:
        return {}
    import jax

    faults.process = place.process_id
    # Its handler would swallow SIGTERM, which this project answers itself.
    jax.config.update("jax_enable_preemption_service", False)
    if place.coordinator is None:
        jax.distributed.initialize()
        return {}
    bind = f"{own_address(place.coordinator)}:{place.coordinator.rpartition(':')[2]}"
    patience = os.environ.get("MAEJAX_ARRIVAL_SECONDS", str(ARRIVAL_SECONDS))
    if not re.fullmatch(r"\d+(\.\d+)?", patience):
        raise UsageError(f"MAEJAX_ARRIVAL_SECONDS={patience} must be a number of seconds")
    peers.heartbeat_seconds()  # a mistake in it comes out before anybody waits
    watchdog.phase("start", extra=float(patience))
    connections = call_roll(place.coordinator, bind, place.num_processes, place.process_id, seconds=float(patience))
    leave_deaths_to_the_line()
    jax.distributed.initialize(
        place.coordinator, place.num_processes, place.process_id, place.local_devices,
        cluster_detection_method="deactivate", coordinator_bind_address=bind,
        initialization_timeout=int(ARRIVAL_SECONDS), heartbeat_timeout_seconds=NEVER,
    )  # fmt: skip
    return connections


def own_address(coordinator: str) -> str:
    """The address at which process 0 listens: the coordinator's own and no other.

    Many systems map a host's own name to loopback, where no other node would reach it; then it is the address of the
    interface that leads outwards.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        raise UsageError(f"the coordinator's host {host!r} is not known here; give its address") from None
    if address.startswith("127.") and host != "localhost" and not host.startswith("127."):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            try:
                probe.connect(("192.0.2.1", 9))
                return str(probe.getsockname()[0])
            except OSError:
                return address
    return f"[{address}]" if ":" in address else address
