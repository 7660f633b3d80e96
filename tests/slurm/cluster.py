"""A throw-away SLURM on this machine: one controller, two virtual nodes of eight alleged cores."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import LIMIT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """
ClusterName=toy
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=2
MinJobAge=3600
ReturnToService=2
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """Its daemons, and the commands that talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = [_free_port() for _ in range(3)]
        conf = CONF.format(folder=folder, ports=ports, user=getpass.getuser())
        (folder / "slurm.conf").write_text(conf)
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        munge = [f"--key-file={key}", f"--socket={folder}/munge.sock"]
        munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
        self._start(
            "munged", ["munged", "--foreground", "--force", f"--seed-file={folder}/seed", *munge]
        )
        self.wait(lambda: (folder / "munge.sock").exists(), "munged")
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.nodes() == {"n1": "IDLE", "n2": "IDLE"}, "two idle nodes")

    def _start(self, name: str, words: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        with log:
            self.daemons[name] = subprocess.Popen(
                words, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """The node dies with all that runs on it."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        here = f"SLURMD_NODENAME={node}\0".encode()
        running = [pid for pid in _processes() if here in _environment(pid)]
        # What watches over them first: it would tell the controller.
        watching = {_parent(pid) for pid in running} - {*running, 1}
        for pid in [*watching, *running]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.call("scancel", "--full", f"--user={getpass.getuser()}", check=False)
        time.sleep(1)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *words: str, check: bool = True, **more: str) -> str:
        """A command of SLURM's; what it printed."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.environment | more, timeout=LIMIT
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """State by node."""
        lines = self.call("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return {line.split()[0]: line.split()[1].upper() for line in lines}

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` tells; of an array, of the task ``ARRAY_TASK``."""
        told = self.call("scontrol", "-o", "show", "job", number).splitlines()[0]
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait_for(self, number: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of some states."""
        self.wait(lambda: self.state(number) in states, f"job {number} {states}")
        return self.job(number)

    def wait_for_restart(self, number: str, restarts: int) -> None:
        """Wait until a job runs for the so-and-so-many-th time after its first start."""

        def there() -> bool:
            told = self.job(number)
            if told["JobState"] in ("FAILED", "TIMEOUT"):
                raise RuntimeError(f"job {number} ended: {told}; {self.last_words()}")
            return (told["Restarts"], told["JobState"]) == (str(restarts), "RUNNING")

        self.wait(there, f"restart {restarts} of job {number}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.3)
        raise TimeoutError(f"{what} did not come; {self.last_words()}")

    def last_words(self) -> str:
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return json.dumps(
            {log.name: log.read_text(errors="replace")[-1500:] for log in logs}, indent=1
        )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _processes() -> list[int]:
    return [int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()]


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 1
