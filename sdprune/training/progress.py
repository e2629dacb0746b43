"""What a person sees of a training: a progress bar, and a Ctrl-C that loses nothing."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import distributed
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(ProgressCallback):
    """A bar over the optimizer steps with the sparsity, the parts of the loss, the last score and the time left."""

    training_bar: Any

    def __init__(self, description: str = "pruning") -> None:
        super().__init__()
        self.description = description
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step where the training begins."""
        self.close()  # of an attempt that ran out of memory
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            bar, self.current_step = self.training_bar, state.global_step
            bar.unit = "step"
            bar.initial = bar.n = bar.last_print_n = state.global_step
            bar.set_description(self.description)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Show what the log row says."""
        for name, value in (logs or {}).items():
            if name == "sparsity":
                self.shown["sparsity"] = f"{value:.1%}"
            elif name.startswith("loss_") or name == "eval_accuracy":
                self.shown[name.removeprefix("loss_")] = f"{value:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Draw no second bar over the batches of an evaluation."""

    def close(self) -> None:
        """Close the bar where the training broke off."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class TrainingInterrupted(KeyboardInterrupt):
    """The training was interrupted after a whole step and saved.

    Args:
        checkpoint: the checkpoint from which it goes on.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; saved {checkpoint}")
        self.checkpoint = checkpoint


class FinishStepOnInterrupt(TrainerCallback):
    """Inside its `with` block Ctrl-C finishes the step, saves a checkpoint and raises `TrainingInterrupted`.

    Processes that train together leave together, whichever of them was interrupted. A second Ctrl-C interrupts at once.
    Must come after `MarkComplete` in the list of callbacks.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        # signal handlers belong to the main thread; elsewhere Ctrl-C keeps its usual meaning
        self.previous = (
            signal.signal(signal.SIGINT, self._request)
            if threading.current_thread() is threading.main_thread()
            else None
        )
        return self

    def __exit__(self, *error: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, args: TrainingArguments) -> bool:
        """Tell whether any process was interrupted. All of them must ask at the same point."""
        if distributed.is_available() and distributed.is_initialized():
            requests = torch.tensor(int(self.requested), device=args.device)
            distributed.all_reduce(requests)
            self.requested = bool(requests)
        return self.requested

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        if self.agreed(args):
            control.should_save = True  # after an evaluation that is due: it draws random numbers

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave, now that the checkpoint is whole."""
        if self.agreed(args):
            raise TrainingInterrupted(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
