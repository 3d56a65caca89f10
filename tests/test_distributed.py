"""Finding the other processes: which rule fires, what it says, and what is told when somebody is missing."""

import http.server
import socket
import threading
import time

import pytest

from maejax import distributed
from maejax.distributed import Place, find_place, first_host, own_address
from maejax.errors import UsageError
from maejax.rollcall import call_roll

SLURM = {
    "SLURM_JOB_ID": "100007", "SLURM_STEP_NODELIST": "gpu[012-013,20]", "SLURM_NTASKS": "24", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x3)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
TORCH = {
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_PROCESS_COUNT": "3", "JAX_PROCESS_ID": "2"}
MAEJAX = {"MAEJAX_COORDINATOR": "10.0.0.3", "MAEJAX_NUM_PROCESSES": "5", "MAEJAX_PROCESS_ID": "0"}


def place(rule, coordinator, num_processes, process_id, local=None):
    return Place(
        rule=rule, coordinator=coordinator, num_processes=num_processes, process_id=process_id, local_devices=local
    )


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, Place(rule="alone")),
        (TORCH, place("torch", "node0:29501", 4, 3, (1,))),
        (TORCH | OMPI, place("Open MPI", "10.96.0.1:37373", 4, 2, (0,))),
        # The port is 61440 + 100007 % 4096.
        (TORCH | OMPI | SLURM, place("Slurm", "gpu012:63143", 24, 9, (1,))),
        (SLURM | JAX, place("JAX_*", "10.0.0.2:1234", 3, 2)),
        (SLURM | JAX | MAEJAX, place("MAEJAX_*", "10.0.0.3:37373", 5, 0)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234"}, place("Slurm", "gpu012:63143", 24, 9, (1,))),
        # One process a node takes all of its devices; where Slurm has given each its own, there is nothing to choose.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x24)"}, place("Slurm", "gpu012:63143", 24, 9)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, place("Slurm", "gpu012:63143", 24, 9)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, place("Slurm", "127.0.0.1:63143", 24, 9, (1,))),
        (SLURM | {"SLURM_NTASKS": "1"}, Place(rule="alone")),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, place("Open MPI", "127.0.0.1:37373", 4, 2)),
        (TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, Place(rule="alone")),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, place("TPU pod", None, 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Place(rule="alone")),
    ],
)
def test_the_first_rule_that_applies(env, expected):
    assert find_place(env=env) == expected


def test_flags_come_first():
    found = find_place(coordinator="[::1]:99", num_processes=2, process_id=1, env=SLURM | MAEJAX)
    assert found == place("flags", "[::1]:99", 2, 1)
    assert str(found) == "processes 2, found by flags, coordinator [::1]:99; this is 1"
    assert str(Place(rule="alone")) == "processes 1 (alone)"


@pytest.mark.parametrize(
    "flags, env, message",
    [
        ({"process_id": 1}, {}, r"--process-id=1 needs --coordinator and --num-processes beside it"),
        ({}, {"MAEJAX_COORDINATOR": "a:1"}, "MAEJAX_COORDINATOR=a:1 needs MAEJAX_NUM_PROCESSES and MAEJAX_PROCESS_ID"),
        ({}, MAEJAX | {"MAEJAX_PROCESS_ID": "5"}, "MAEJAX_PROCESS_ID=5 must be a number from 0 to 4"),
        ({}, MAEJAX | {"MAEJAX_NUM_PROCESSES": "x"}, "MAEJAX_NUM_PROCESSES=x must be a number of processes"),
        ({}, MAEJAX | {"MAEJAX_COORDINATOR": "a:99999"}, "MAEJAX_COORDINATOR=a:99999 must be HOST:PORT"),
        ({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE=x must be a number"),
        ({}, SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST= does not begin with a host"),
        ({}, TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT=http must be a number"),
        ({}, {name: OMPI[name] for name in OMPI if "MCA" not in name}, "does not say where process 0 runs"),
    ],
)
def test_what_is_incomplete_is_refused(flags, env, message):
    with pytest.raises(UsageError, match=message):
        find_place(**flags, env=env)


@pytest.mark.parametrize("nodes, first", [("a", "a"), ("a,b", "a"), ("n[3-7]", "n3"), ("n[01,05-9],m", "n01")])
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_a_tpu_vm_asks_the_metadata_server():
    told = {"worker-network-endpoints": "unknown:8470:10.1.0.7,unknown:8470:10.1.0.9", "agent-worker-number": "1"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = name in told and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(told[name].encode() if known else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        # /dev/null stands for a chip.
        assert distributed._tpu_vm(env, chips="null") == place("TPU VM", "10.1.0.7:8476", 2, 1)
        assert distributed._tpu_vm(env, chips="no-chip-of-this-name") is None
        told["worker-network-endpoints"] = "unknown:8470:10.1.0.7"
        assert distributed._tpu_vm(env, chips="null") is None
        del told["worker-network-endpoints"]
        assert distributed._tpu_vm(env, chips="null") is None
        server.shutdown()


def test_process_0_listens_at_its_own_address_alone(monkeypatch):
    assert own_address("127.0.0.1:5") == "127.0.0.1"
    assert own_address("localhost:5") in ("127.0.0.1", "[::1]")
    assert own_address("[::1]:5") == "[::1]"
    # A host that knows itself by a loopback address alone is asked for the way out.
    monkeypatch.setattr(distributed.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("127.0.1.1", 0))])
    assert own_address("node7:5") != "0.0.0.0"
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the coordinator's host 'no.such.host.invalid' is not known here"):
        own_address("no.such.host.invalid:5")


# ---- The roll call --------------------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(*members, seconds=20.0):
    """What each of `members`, (process, number of processes), is told: "" or an error."""
    address, told = f"127.0.0.1:{free_port()}", {}

    def come(place, process, count):
        try:
            connections = call_roll(address, address, count, process, seconds=seconds)
            expected = set(range(1, count)) if process == 0 else {0}
            told[place] = "" if set(connections) == expected else f"connections to {sorted(connections)}"
            for connection, _ in connections.values():
                connection.close()
        except UsageError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=come, args=(place, *member)) for place, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[place] for place in range(len(members))]


def test_all_are_there():
    assert meet((2, 4), (0, 4), (3, 4), (1, 4)) == [""] * 4
    assert meet((0, 1)) == [""]


def test_the_missing_are_named_to_everybody():
    start = time.monotonic()
    message = "2 of 5 processes did not come within 1.5 s: 2, 4; see their logs"
    assert meet((0, 5), (1, 5), (3, 5), seconds=1.5) == [message] * 3
    assert time.monotonic() - start < 10


def test_process_0_is_missing():
    (told,) = meet((1, 2), seconds=0.5)
    assert "process 0 did not answer at 127.0.0.1:" in told and "process 1 of 2 gives up" in told


def test_two_of_the_same_number():
    told = meet((0, 3), (1, 3), (1, 3))
    assert told == ["two processes call themselves process 1; each needs an id of its own"] * 3


def test_another_number_of_processes():
    assert meet((0, 2), (1, 3)) == ["process 1 expects 3 processes, process 0 expects 2"] * 2


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"process 0 cannot listen at {address} .*is another run using that port"):
            call_roll(address, address, 2, 0, seconds=1)


def test_strangers_do_not_disturb():
    address = f"127.0.0.1:{free_port()}"
    told = []
    host = threading.Thread(target=lambda: told.append(call_roll(address, address, 2, 0, seconds=20)[1][0]))
    host.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    (mine, _) = call_roll(address, address, 2, 1, seconds=20)[0]
    host.join()
    # What stays is a connection between the two, and the port is free for JAX.
    told[0].sendall(b"hello")
    assert mine.recv(100) == b"hello"
    mine.close()
    told[0].close()
