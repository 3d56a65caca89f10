"""`maejax launch`: rendered files against golden copies, the files themselves run with stand-ins, mistakes.

`python tests/test_launch.py` writes the golden copies in `tests/data/launch/` again.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from maejax import launcher
from maejax.cli import main
from maejax.commands import launch

GOLDEN = Path(__file__).parent / "data" / "launch"
RECIPE = ["pretrain", "--config=pretrain_vit_b16_imagenet", "--config.data.dir=it's here"]
TPU = ["--accelerator=v5e-32"]
CASES = {  # golden file: options, folder of the run
    "slurm.sbatch": (["--on=slurm", "--nodes=4", "--gpus=8", "--time=2-00:00:00", "--partition=a100"], "runs/b16"),
    "local.sh": (["--on=local"], "runs/b16"),
    "tpu-vm.sh": (["--on=tpu-vm", *TPU, "--zone=us-west4-a", "--storage=10.0.0.2:/runs"], "/mnt/runs/b16"),
    "jobset.yaml": (
        ["--on=jobset", "--nodes=4", "--gpus=8", "--image=example.com/maejax:1", "--storage=claim"],
        "/mnt/runs/b16",
    ),
    "jobset-tpu.yaml": (["--on=jobset", *TPU, "--image=example.com/maejax:1", "--storage=claim"], "/mnt/runs/b16"),
    "skypilot.yaml": (["--on=skypilot", "--nodes=2", "--accelerator=H100:8", "--storage=s3://runs"], "/mnt/runs/b16"),
    "skypilot-tpu.yaml": (["--on=skypilot", *TPU, "--storage=gs://runs"], "/mnt/runs/b16"),
}


def rendered(case: str) -> str:
    """What `maejax launch` writes for a case, as of version 0.1.0 with /usr/bin/python3, in the current folder."""
    options, workdir = CASES[case]
    assert main(["launch", *options, f"--out={case}", *RECIPE, f"--workdir={workdir}"]) == 0
    return Path(case).read_text()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(launch, "__version__", "0.1.0")


# ---- The files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_copies(case):
    text = rendered(case)
    assert text == (GOLDEN / case).read_text()
    assert "@{" not in text and "None" not in text
    if case.endswith(".yaml"):
        yaml.safe_load(text)
    else:
        subprocess.run(["bash", "-n", case], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=bash", case], check=True)


def test_every_template_is_that_of_a_target():
    there = {path.name for path in launcher.templates_folder().iterdir()} - {"README.md"}
    assert there == {target.template for target in launcher.TARGETS.values()}
    assert set(launcher.TARGETS) == {options[0].removeprefix("--on=") for options, _ in CASES.values()}


def test_jobset_says_what_restarts_and_what_ends(monkeypatch):
    spec = yaml.safe_load(rendered("jobset.yaml"))["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 100
    assert spec["failurePolicy"]["rules"][0] | {"name": ""} == {
        "name": "", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"],
    }  # fmt: skip
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 and job["backoffLimit"] == 0
    fails = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert fails == [{"containerName": "run", "operator": "NotIn", "values": [75, 124]}]
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    tpu = yaml.safe_load(rendered("jobset-tpu.yaml"))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert tpu["completions"] == 8  # 32 chips, 4 a host
    assert tpu["template"]["spec"]["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert tpu["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"


# ---- The files, run with stand-ins for the programs that they call --------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes programs that come first on the PATH; each appends its name and arguments to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(folder / "python3"))

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{script}\n')
        path.chmod(0o755)

    return make


def calls(name: str) -> list[str]:
    return [line for line in Path("calls").read_text().splitlines() if line.startswith(f"{name} ")]


def ends_with(*codes: int) -> str:
    """A script that ends with the first code, then with the second, ..., and with the last one from then on."""
    return f'codes=({" ".join(map(str, codes))}); n=$(grep -c "^python3 " calls); exit "${{codes[n-1]:-{codes[-1]}}}"'


@pytest.mark.parametrize("codes, starts", [((0,), 1), ((75, 124, 0), 3), ((75, 70, 0), 2), ((75, 75, 75, 75), 3)])
def test_the_local_script_starts_again_after_75_and_124(stand_in, codes, starts):
    stand_in("python3", ends_with(*codes))
    assert main(["launch", "--on=local", "--restarts=2", *RECIPE, "--workdir=runs/b16"]) == 0
    done = subprocess.run(["bash", "runs/b16/launch/local.sh"])
    assert done.returncode == codes[starts - 1]
    assert calls("python3") == [f"python3 -m maejax {' '.join(RECIPE)} --workdir=runs/b16"] * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_local_script_is_passed_on_once_and_starts_nothing_again(stand_in, number):
    script = 'trap "echo python3 stopped >>calls; exit 75" TERM; touch up; for i in {1..99}; do sleep 0.1; done'
    stand_in("python3", script)
    assert main(["launch", "--on=local", *RECIPE, "--workdir=runs/b16"]) == 0
    with subprocess.Popen(["bash", "runs/b16/launch/local.sh"]) as script:
        while not Path("up").exists():
            time.sleep(0.01)
        script.send_signal(number)
        assert script.wait() == 75
    assert len(calls("python3")) == 2 and calls("python3")[1] == "python3 stopped"


@pytest.mark.parametrize(
    "code, before, requeued", [(75, "", True), (124, "", True), (75, "99", True), (75, "100", False), (70, "", False)]
)
def test_slurm_requeues_after_75_and_124_until_the_limit(stand_in, code, before, requeued):
    stand_in("srun", f"exit {code}")
    stand_in("scontrol", "")
    rendered("slurm.sbatch")
    env = os.environ | {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": before} if before else {})
    assert subprocess.run(["bash", "slurm.sbatch"], env=env).returncode == code
    assert calls("scontrol") == ["scontrol requeue 7"] * requeued
    assert calls("srun")[0].endswith(f"python3 -m maejax {' '.join(RECIPE)} --workdir=runs/b16")


GCLOUD = """
case $4 in
  describe) cat state 2>/dev/null || exit 1 ;;
  create) echo READY >state ;;
  delete) rm state ;;
  ssh) for last; do :; done; bash -c "${last#--command=}" ;;
esac
"""


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("codes, code", [((0,), 0), ((75, 124, 0), 0), ((70,), 1)])
def test_the_tpu_script_makes_the_machine_and_makes_it_again(stand_in, tmp_path, codes, code, taken):
    stand_in("gcloud", GCLOUD)
    stand_in("mountpoint", "")
    if taken:  # the first start ends with the machine
        codes = (255, *codes)
    stand_in("python3", ("mkdir lost 2>/dev/null && echo PREEMPTED >state\n" if taken else "") + ends_with(*codes))
    options = [*CASES["tpu-vm.sh"][0], "--install=true", "--out=tpu.sh"]
    assert main(["launch", *options, *RECIPE, f"--workdir={tmp_path}/runs/b16"]) == 0
    assert subprocess.run(["bash", "tpu.sh"]).returncode == code
    made = [call.split()[4] for call in calls("gcloud") if call.split()[4] in ("create", "delete")]
    assert made == (["create", "delete", "create"] if taken else ["create"])
    assert len(calls("python3")) == len(codes)
    create = next(call for call in calls("gcloud") if "create" in call)
    assert "--accelerator-type=v5litepod-32" in create and "--zone=us-west4-a" in create


def container_script() -> str:
    spec = yaml.safe_load(rendered("jobset.yaml"))["spec"]["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]["containers"][0]["command"][2]


MEETING = 'echo "$MAEJAX_COORDINATOR $MAEJAX_NUM_PROCESSES $MAEJAX_PROCESS_ID" >>met; exit 75'


def test_pods_know_where_they_meet(stand_in):
    stand_in("python3", MEETING)
    stand_in("getent", "[ -e known ] || { touch known; exit 2; }")  # not at first
    done = subprocess.run(["bash", "-c", container_script()], env=os.environ | {"JOB_COMPLETION_INDEX": "3"})
    assert done.returncode == 75
    assert Path("met").read_text() == "b16-node-0-0.b16:8476 4 3\n"
    assert calls("python3") == [f"python3 -m maejax {' '.join(RECIPE)} --workdir=/mnt/runs/b16"]
    assert calls("getent") == ["getent hosts b16-node-0-0.b16"] * 2


def test_skypilot_nodes_know_where_they_meet_and_count_their_starts(stand_in, tmp_path):
    stand_in("python3", MEETING)
    options = [*CASES["skypilot.yaml"][0], "--restarts=1"]
    assert main(["launch", *options, "--out=sky.yaml", *RECIPE, f"--workdir={tmp_path}/runs/b16"]) == 0
    task = yaml.safe_load(Path("sky.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 124]
    assert task["file_mounts"] == {f"{tmp_path}/runs": {"source": "s3://runs", "mode": "MOUNT"}}
    env = os.environ | {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_TASK_ID": "t"}
    for rank, code in (("0", 75), ("1", 75), ("0", 75), ("0", 1), ("1", 75)):
        done = subprocess.run(["bash", "-c", task["run"]], env=env | {"SKYPILOT_NODE_RANK": rank}, capture_output=True)
        assert done.returncode == code, done.stderr
    assert Path("met").read_text().split("\n")[:2] == ["10.0.0.5:8476 2 0", "10.0.0.5:8476 2 1"]


# ---- Mistakes -------------------------------------------------------------------------------------------------------

ON_SLURM, DIGITS = ["--on=slurm"], ["pretrain", "--config=pretrain_digits"]
ON_JOBSET = ["--on=jobset", "--image=i", "--storage=s"]
MISTAKES = [
    ([], "--on"),
    (["--on=slrum", *DIGITS], "did you mean slurm?"),
    (ON_SLURM, "say what to launch"),
    ([*ON_SLURM, "evaluate", "runs/x"], "'evaluate' is not one of pretrain, finetune"),
    ([*ON_SLURM, "pretrain"], "say what to train on"),
    ([*ON_SLURM, "pretrain", "--config=nosuch"], "shipped recipes:"),
    ([*ON_SLURM, *DIGITS, "--config.mask.raito=0.5"], "did you mean --config.mask.ratio?"),
    ([*ON_SLURM, *DIGITS, "--config.mask.ratio=1.5"], "must lie between 0 and 1"),
    ([*ON_SLURM, *DIGITS, "--config.model.size=XXL"], "model.size='XXL' is not one of"),
    ([*ON_SLURM, *DIGITS, "--workdir=foreign"], "is not empty and not a run of maejax"),
    ([*ON_SLURM, *DIGITS, "--workdir=my runs/x"], "may hold letters, digits"),
    ([*ON_SLURM, *DIGITS, "--nodes=2"], "unknown argument '--nodes=2'"),
    ([*ON_SLURM, *DIGITS, "--keys"], "--keys is not for a launched run"),
    ([*ON_SLURM, *DIGITS, "--config.evals=knn\nrm"], "control character"),
    ([*ON_SLURM, "--nodes=2", "pretrain", "digits"], "several processes need --config=RECIPE"),
    ([*ON_SLURM, "finetune", "--from=nosuch"], "is not a run of maejax"),
    ([*ON_SLURM, "--nodes=0", *DIGITS], "--nodes=0 must be at least 1"),
    ([*ON_SLURM, "--nodes=two", *DIGITS], "invalid int value: 'two'"),
    ([*ON_SLURM, "--restarts=-1", *DIGITS], "--restarts=-1 must be at least 0"),
    ([*ON_SLURM, "--time=soon", *DIGITS], "--time=soon must be minutes"),
    ([*ON_SLURM, "--partition=a b", *DIGITS], "may hold letters, digits"),
    ([*ON_SLURM, "--gpus=8", "--tasks-per-node=4", *DIGITS], "one process for all of its GPUs, or one for each"),
    ([*ON_SLURM, "--zone=z", *DIGITS], "--zone is for tpu-vm, not for --on=slurm"),
    ([*ON_SLURM, "--nodse=2", *DIGITS], "--nodse=2"),
    ([*ON_SLURM, "--name=B 16", *DIGITS], "must be at most 40 small letters"),
    ([*ON_SLURM, "--submit", *DIGITS], "--submit needs sbatch, which is not installed"),
    ([*ON_SLURM, "--out=nosuch/f", *DIGITS], "nosuch/f cannot be written: No such file or directory"),
    ([*ON_SLURM, "--out=edited", *DIGITS], "edited exists with other content; remove it"),
    (["--on=tpu-vm", *DIGITS], "--on=tpu-vm needs --accelerator"),
    (["--on=tpu-vm", "--accelerator=v9-8", "--zone=z", "--storage=s", *DIGITS], "'v9' is not one of v5e, v6e"),
    (["--on=tpu-vm", "--accelerator=v5e-7", "--zone=z", "--storage=s", *DIGITS], "a v5e slice has 1, 4, 8, 16,"),
    ([*ON_JOBSET, "--submit", *DIGITS, "--workdir=/mnt/r/x"], "--submit needs kubectl"),
    ([*ON_JOBSET, *DIGITS], "must be a folder of the storage that all machines share"),
    ([*ON_JOBSET, *DIGITS, "--workdir=/x"], "must be a folder of the storage that all machines share"),
    ([*ON_JOBSET, "--accelerator=v5e-8", "--gpus=1", *DIGITS], "keep one of them"),
    ([*ON_JOBSET, "--accelerator=v5e-8", "--nodes=1", *DIGITS], "says how many hosts there are"),
    (["--on=skypilot", "--accelerator=H100", "--storage=s", *DIGITS], "must be NAME:NUMBER, as in H100:8"),
    (["--on=local", "--nodes=1", *DIGITS], "--nodes is for slurm, jobset, skypilot"),
]


@pytest.mark.parametrize("arguments, says", MISTAKES, ids=[" ".join(m[0])[:60] for m in MISTAKES])
def test_mistakes_are_one_line_and_leave_nothing(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").write_text("precious")
    Path("edited").write_text("by hand")
    assert main(["launch", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("maejax: ") and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - {"runs"} == {"foreign", "edited"}
    assert Path("edited").read_text() == "by hand"


def test_the_same_file_again_and_a_recipe_of_ones_own(capsys, tmp_path):
    Path("mine.py").write_text("from maejax import config\n\n\ndef get_config():\n    return config.default()\n")
    command = ["launch", "--on=jobset", "--image=i", "--storage=s", "pretrain", "--config=mine.py", "--config.steps=9"]
    for _ in range(2):
        assert main([*command, "--workdir=/mnt/runs/My_Run.2"]) == 0
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[0] == "wrote   my-run-2.jobset.yaml" and said[2] == "submit  kubectl apply -f my-run-2.jobset.yaml"
    assert "mine.py is a recipe of this machine" in said[1]


def test_the_workdir_is_written_out_and_may_be_launched_into_again():
    assert main(["launch", "--on=local", *DIGITS]) == 0
    assert "--workdir=runs/pretrain_digits" in Path("runs/pretrain_digits/launch/local.sh").read_text()
    assert main(["launch", "--on=local", *DIGITS]) == 0  # its folder is no foreign one


def write_golden() -> None:
    sys.executable, launch.__version__ = "/usr/bin/python3", "0.1.0"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    os.chdir(GOLDEN)
    for case in CASES:
        Path(case).unlink(missing_ok=True)
        rendered(case)
    shutil.rmtree("runs")


if __name__ == "__main__":
    write_golden()
