"""The Dockerfile and the examples for Kubernetes and Slurm parse, and start jobs that the launcher and planner accept.

Programs on PATH are replaced by ones that write down how they were called; no image, cluster or NPU is involved.
"""
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from research.telechat.commands import plan as plan_command
from research.telechat.plan.plan import chip_faults, read_plan
from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples/cluster"
TRAIN = "examples/cluster/train.sh"
# name: what it does besides recording its arguments; resolves m0 as the headless service of a job would
PROGRAMS = {"python": "", "bash": "", "srun": "", "scontrol": "echo m0; echo m1",
            "getent": 'case "$2" in m0) echo "10.0.0.9 STREAM m0" ;; lo) echo "127.0.1.1 STREAM lo" ;; esac',
            "sleep": ""}


def dockerfile():
    """(instruction, rest) of docker/Dockerfile, continued lines joined."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_versions_of_the_image_belong_together():
    steps = dockerfile()
    assert [name for name, _ in steps[:2]] == ["ARG", "FROM"] and steps[1][1] == "${BASE}"
    values = dict(rest.split("=", 1) for name, rest in steps if name == "ARG")
    cann, chip, _, python = re.fullmatch(r"quay\.io/ascend/cann:([\w.]+)-(\w+)-(\w+[\d.]+)-py([\d.]+)",
                                         values["BASE"]).groups()
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {values['MINDFORMERS']} \| {values['MINDSPORE']} \| ([\w.]+) \| ~=", page,
                    re.MULTILINE)
    assert row and row[1].lower() == cann and chip == "910b"
    assert f"| {values['MINDFORMERS']} | {values['MINDSPORE']} | {python} | passed |" in page
    assert values["BASE"] in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def test_steps_of_the_image(tmp_path):
    """Sources exist, shell parses, extras are known; and the last step runs on what was copied, without CANN."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    steps = dockerfile()
    assert {name for name, _ in steps} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY"}
    for name, rest in steps:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], check=False).returncode == 0, rest
            for extras in re.findall(r'-e "\.\[([\w,]+)\]"', rest):
                assert all(extra in setup["options.extras_require"] for extra in extras.split(","))
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = tmp_path / target / (source if target == "./" else "")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
    (command,) = [rest.split("&&")[1] for name, rest in steps if name == "RUN" and "plan.py" in rest]
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
                          timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def start(tmp_path):
    """start(words, variables): (calls of the replaced programs as lists of words, finished process)."""
    programs, log = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    for name, action in PROGRAMS.items():
        path = programs / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" "" >>"{log}"\nprintf "\\n" >>"{log}"\n{action}\n')
        path.chmod(0o755)

    def run(words, **variables):
        log.write_text("")
        words = [shutil.which("bash") if word == "bash" else word for word in words]
        done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False, timeout=60,
                              env={"PATH": f"{programs}:{os.environ['PATH']}", **variables})
        return [line.split("\0") for line in log.read_text().split("\0\0\n") if line], done
    return run


def check_job(calls, done, machines, rank, recipe, log_dir):
    """doctor first, on this machine's cards; then the launcher under the supervisor, with a command that fits."""
    assert done.returncode == 0, done.stderr
    doctor, supervisor = [call for call in calls if call[0] in ("bash", "python")]
    assert doctor[:3] == ["bash", "scripts/msrun_launcher.sh", "python -m research.telechat doctor"]
    assert doctor[3:] == ["8", "8119", f"{log_dir}/machine_{rank}/doctor", "True", "600"]
    at = supervisor.index("--")
    own, launcher = supervisor[:at], supervisor[at + 1:]
    assert own == ["python", "scripts/supervise.py", "--max_restarts", "3", "--hang_timeout", "1800", "--log_dir",
                   f"{log_dir}/machine_{rank}"]
    assert launcher[:2] == ["bash", "scripts/msrun_launcher.sh"]
    tail = [f"{log_dir}/machine_{rank}", "True", "7200"]
    expected = (["8", "8118"] if machines == 1 else [str(8 * machines), "8", "10.0.0.9", "8118", str(rank)])
    assert launcher[3:] == expected + tail
    command = launcher[2]
    assert recipe in command and "--resume_training True" in command
    assert plan_command.main(["--command", command, "--ranks", str(8 * machines), "--check"]) == 0


def container(name):
    """(job, container, pod) of an example for Kubernetes."""
    job = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    spec = job["spec"]["tasks"][0]["template"]["spec"] if "tasks" in job["spec"] else job["spec"]["template"]["spec"]
    (one,) = spec["containers"]
    names = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in one["volumeMounts"]} == names
    assert one["resources"]["limits"] == one["resources"]["requests"]
    assert one["resources"]["limits"]["huawei.com/Ascend910"] == 8
    assert spec["restartPolicy"] == "Never" and one["workingDir"] == "/opt/telechat"
    assert ("WORKDIR", "/opt/telechat") in dockerfile()
    return job, one, {entry["name"]: entry["value"] for entry in one["env"]}


def test_one_machine_on_kubernetes(start):
    job, one, variables = container("one_machine.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    calls, done = start(one["command"], **variables)
    check_job(calls, done, 1, 0, "finetune_telechat_7b.yaml", variables["LOG_DIR"])


def test_eight_machines_on_kubernetes(start):
    job, one, variables = container("eight_machines.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    (task,) = job["spec"]["tasks"]
    assert task["name"] == "worker" and task["replicas"] == job["spec"]["minAvailable"] == 8
    assert {"svc", "env"} <= set(job["spec"]["plugins"])
    for rank in (0, 7):
        calls, done = start(one["command"], **variables, VC_WORKER_HOSTS=",".join(f"m{n}" for n in range(8)),
                            VC_WORKER_NUM="8", VC_TASK_INDEX=str(rank))
        check_job(calls, done, 8, rank, "finetune_telechat2_115b.yaml", variables["LOG_DIR"])


def test_slurm(start):
    script = EXAMPLES / "slurm.sh"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gres"]) == ("8", "1", "npu:8")
    calls, done = start(["bash", str(script)], DATA="/shared/x")
    assert done.returncode == 0 and len(calls) == 1
    words = calls[0][2:]
    assert calls[0][:2] == ["srun", "--kill-on-bad-exit=1"] and words[:2] == ["bash", TRAIN]
    calls, done = start(words, SLURM_JOB_NODELIST="m[0-7]", SLURM_JOB_NUM_NODES="8", SLURM_NODEID="3",
                        LOG_DIR="/shared/x/log")
    assert ["scontrol", "show", "hostnames", "m[0-7]"] in calls
    check_job(calls, done, 8, 3, "finetune_telechat2_115b.yaml", "/shared/x/log")


@pytest.mark.parametrize(("variables", "words"), [
    ({"MACHINES": "2", "MASTER_IP": "m0"}, "NODE_RANK is not set: set it to 0 ... 1"),
    ({"MACHINES": "2", "NODE_RANK": "1"}, "MASTER_IP is not set"),
    ({"MACHINES": "2", "NODE_RANK": "1", "MASTER_IP": "m9"}, "the name m9 does not resolve"),
    ({"MACHINES": "2", "NODE_RANK": "1", "MASTER_IP": "lo"}, "lo resolves to 127.0.1.1 here"),
])
def test_what_a_machine_lacks_is_said(start, variables, words):
    calls, done = start(["bash", TRAIN, "--config", "x.yaml"], **variables)
    assert done.returncode == 1 and re.fullmatch(rf"error: .*{re.escape(words)}.*\n", done.stderr)
    assert not [call for call in calls if call[0] in ("bash", "python")]


def test_the_check_of_the_cards_can_be_left_out(start):
    calls, done = start(["bash", TRAIN, "--config", "x.yaml"], DOCTOR="False")
    assert done.returncode == 0 and [call[:2] for call in calls] == [["python", "scripts/supervise.py"]]


@pytest.mark.skipif(not (ROOT / "research/telechat/commands/doctor.py").exists(), reason="this version has no doctor")
def test_the_check_of_the_cards_exists():
    done = subprocess.run([sys.executable, "-m", "research.telechat", "doctor", "--help"], cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=120)
    assert done.returncode == 0 and "doctor" in done.stdout


def test_the_recipe_for_910a(tmp_path):
    """The one of docs/cluster.md, over the published recipe: what the page says of it is what the planner reads."""
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(base_config.*?)```", page, re.DOTALL)
    path = tmp_path / "own.yaml"
    path.write_text(text.replace("base_config: ", f"base_config: {ROOT}/research/telechat/"))
    recipe = read_recipe(path)
    assert recipe["runner_wrapper"]["scale_sense"]["type"] == "DynamicLossScaleUpdateCell"
    assert chip_faults(read_plan({**recipe, "planned_for": "910A", "context": {"max_device_memory": "29GB"}})) == []


def test_scripts_parse():
    for path in sorted(EXAMPLES.glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert {path.name for path in EXAMPLES.iterdir()} == {"eight_machines.yaml", "one_machine.yaml", "slurm.sh",
                                                          "train.sh"}
