"""The processes of a script, as it asks for them by `trainer.accelerator`."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from dpo_dist.tools.convert.arguments import TrainerArguments, refused
from dpo_dist.trl.callbacks import AbsentError


class Processes:
    """What scripts ask of an `Accelerator`, without one: the processes join when a run starts."""

    def __init__(self, args: TrainerArguments) -> None:
        self._args, self.state = args, args.distributed_state
        self.num_processes, self.process_index = args.world_size, args.process_index
        self.local_process_index = args.local_process_index
        self.is_main_process, self.is_local_main_process = (
            not self.process_index,
            not self.local_process_index,
        )
        self.use_distributed = self.num_processes > 1

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self._args.device
        return device

    def print(self, *values: Any, **options: Any) -> None:
        """Print on the main process."""
        if self.is_main_process:
            print(*values, **options)  # noqa: T201  (as the script asks)

    def wait_for_everyone(self) -> None:
        """Wait for the other processes, if the script has joined them."""
        if dist.is_initialized():
            dist.barrier()

    def gather(self, tensor: Any) -> Any:
        """Return a tensor of all processes, equally large in each, as one."""
        if not self.use_distributed:
            return tensor
        if not dist.is_initialized():
            remedy = "call accelerate.PartialState() first: here the processes join when a run starts"
            raise refused("accelerator.gather", f"{self.num_processes} processes", remedy)
        every = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        dist.all_gather(every, tensor)
        return torch.cat([one.reshape(1) if one.ndim == 0 else one for one in every])

    gather_for_metrics = gather

    def unwrap_model(self, model: Any, *_: Any, **__: Any) -> Any:
        """Return the model, which nothing has wrapped."""
        return model

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on the main process before the others, if the script has joined them."""
        return self._goes_first(self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on the first process of each node before the others."""
        return self._goes_first(self.is_local_main_process)

    @contextlib.contextmanager
    def _goes_first(self, is_first: bool) -> Iterator[None]:
        if not is_first:
            self.wait_for_everyone()
        try:
            yield
        finally:
            if is_first:
                self.wait_for_everyone()

    def __getattr__(self, name: str) -> Any:
        """Raise an error that lists what there is."""
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(entry for entry in {*vars(self), *dir(type(self))} if entry[0] != "_"))
        remedy = f"here there are {known}; of any other a script can make an Accelerator of its own"
        raise AbsentError("dpo_dist trains without this", where=f"trainer.accelerator.{name}", remedy=remedy)
