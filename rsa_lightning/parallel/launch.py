"""What torchrun or SLURM say in the environment, before anything heavy is imported."""

import os


def launched() -> tuple[int, int]:
    """(processes of this node, nodes), as torchrun or SLURM has started them; (1, 1) for a process by itself.

    Raises:
        ValueError: SLURM's tasks are not equally many on every node, or are not said per node.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return local, max(1, int(environment.get("WORLD_SIZE", "1")) // local)
    if not by_slurm():
        return 1, 1
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
    if tasks > 1 and int(environment.get("SLURM_NTASKS_PER_NODE", "0")) * nodes != tasks:
        raise ValueError(
            f"SLURM has started {tasks} tasks on {nodes} nodes, not equally many on each: give --nodes and "
            "--ntasks-per-node, and leave --ntasks out"
        )
    return tasks // nodes, nodes


def by_slurm() -> bool:
    """Whether this process is a task of SLURM's, and not a shell's or torchrun's."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not interactive and "TORCHELASTIC_RUN_ID" not in os.environ


def is_first() -> bool:
    """Whether this is the process that speaks, before any are joined; those that Lightning starts know no RANK."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
