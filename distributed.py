"""Several processes that share the work of one command, each with a GPU of its own. `torchrun`
starts them; without it there is one, and everything here is as good as not there.

    torchrun --nproc_per_node 4 train_stepwise.py --model dit256 --beta 4e-8

The items of a task (chunks of a batch, batches of images) are dealt out like cards: the process
of rank r takes the items r, r + size, r + 2 size, ... What came of them is put together in the
order of the items, the same on every process. So every item is worked on as one process alone
would do it, and routers and images are equal to the last bit. (Metrics differ by rounding.)
"""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed

import command

# For a process that the others wait for, as it downloads or encodes. One that dies is noticed at
# once, by its connection.
PATIENCE = datetime.timedelta(days=7)


def started():
    return distributed.is_available() and distributed.is_initialized()


def rank():
    """The number of this process, from 0 to size() - 1."""
    return distributed.get_rank() if started() else 0


def size():
    """The number of processes."""
    return distributed.get_world_size() if started() else 1


def join(device):
    """Call once, before any work: joins the processes that torchrun started, if it did. From then
    on only the process of rank 0 prints. -> this process's device.
    Raises ValueError for processes on several machines, which may not see the same files, for more
    than there are GPUs, and for other devices than cuda and cpu."""
    count = command.processes()
    if count == 1:
        return device
    if os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        raise ValueError(f"{count} processes, not all started by torchrun on this machine: use "
                         "torchrun --nproc_per_node, on one machine")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"several processes need --device cuda, of which each takes one, or cpu, "
                         f"not {device}")
    if device == "cuda":
        if count > torch.cuda.device_count():
            raise ValueError(f"{count} processes need as many GPUs, and this machine has "
                             f"{torch.cuda.device_count()}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
                                   timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    else:
        print(f"{size()} processes", file=sys.stderr)
    return device


def check_enough(count, words):
    """Raises ValueError if there are fewer items than processes; `words` say what to do."""
    if count < size():
        raise ValueError(f"{size()} processes for {count} {words}")


def mine(count, group=1):
    """The numbers of this process's items, of 0 to count - 1. `group` of them are dealt out at a
    time."""
    if size() == 1:
        return range(count)
    return [j for j in range(count) if j // group % size() == rank()]


def together(part, count, group=1):
    """`part` (n, ...), a tensor with what came of the items `mine(count, group)` -> (count, ...),
    that of all items, in their order, on every process."""
    if size() == 1:
        return part
    rows = part.new_zeros(count, *part.shape[1:])
    rows[mine(count, group)] = part
    distributed.all_reduce(rows)  # every row has one process's numbers and zeros: the sum is exact
    return rows


def wait():
    """Waits until every process is here."""
    if started():
        distributed.barrier()


@contextlib.contextmanager
def first_process_first():
    """`with first_process_first():` the first process goes through the block, then all others, who
    find the files that it left. If it fails, torchrun ends the others."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()
