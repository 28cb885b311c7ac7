"""One rank of a training: what each task of `srun` runs in a batch script of your own (train.sbatch).

    srun python rank.py --mode train --config-yml CONFIG [the options of fairchem's command]

The host's command starts several ranks on one machine (`--num-gpus`) or submits itself to SLURM (`--submit`), but it
cannot be a task of a job. This file can, on any number of nodes, on CPUs as well (`--cpu`). There are as many ranks as
the job has tasks. MASTER_ADDR and MASTER_PORT must say where rank 0 can be reached.

SIGUSR2 or SIGTERM makes rank 0 store checkpoint.pt, of the state after the last whole step, and end with status 75. The
other ranks go on, as rank 0 may need them to get that far; `srun --kill-on-bad-exit=1` ends them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from fairchem.core.common.flags import flags
from fairchem.core.common.utils import build_config, new_trainer_context, setup_logging

STOPPED = 75  # EX_TEMPFAIL: a failure that passes
SIGNALS = signal.SIGUSR2, signal.SIGTERM  # NCCL may use USR1


def main() -> None:
    """Train as one of the job's ranks."""
    setup_logging()
    training: list[Any] = []
    for number in SIGNALS:
        signal.signal(number, lambda *_: _stop(training))
    arguments, overrides = flags.get_parser().parse_known_args()
    if arguments.submit or arguments.num_gpus * arguments.num_nodes > 1:
        sys.exit("--submit, --num-gpus, --num-nodes: not for this file; give sbatch --nodes and --ntasks-per-node")
    config = build_config(arguments, overrides)
    config["world_size"] = int(os.environ["SLURM_NTASKS"])
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    with new_trainer_context(config=config) as context:
        context.task.setup(context.trainer)
        # Not earlier: before its checkpoint is loaded, a trainer must not overwrite it.
        training.append(context.trainer)
        context.task.run()


def _stop(training: list[Any]) -> None:
    if os.environ["SLURM_PROCID"] != "0":
        return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for trainer in training:
        trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
    # The logger needs a clean end. That also waits for the other ranks, which wait for this one; so not for long.
    deadline = threading.Timer(20, os._exit, (STOPPED,))
    deadline.daemon = True
    deadline.start()
    sys.exit(STOPPED)


if __name__ == "__main__":
    main()
