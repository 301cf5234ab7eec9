"""What TensorBoard and Trackio show of training, beside the numbers that transformers' `report_to` sends them.

Each fit is a run of its own there, under the fit's name, and its range test and its rates are images in it. Every
other tracker gets the numbers alone.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback
from transformers.trainer_callback import CallbackHandler
from typing_extensions import override

from hf_sgdr.optim.range_test import LRRangeResult


class TrackedFits(TrainerCallback):
    """Gives every fit a run of its own in TensorBoard and Trackio, and sends them images.

    Args:
        handler (`CallbackHandler`): the Trainer's, among whose callbacks the trackers are.
        plot_rates (`Callable[[], Axes]`): draws the rates of the training that ends.
    """

    def __init__(self, handler: CallbackHandler, plot_rates: Callable[[], Axes]) -> None:
        self._handler, self._plot_rates = handler, plot_rates
        self._range_test: LRRangeResult | None = None
        self._began = time.strftime("%Y%m%d-%H%M%S")
        self._tensorboard_folder: Path | None = None

    def range_test_done(self, result: LRRangeResult) -> None:
        """Keep a range test for the training that follows it: there is no run for its image before."""
        self._range_test = result

    def name_fit(self, args: TrainingArguments, output_dir: str, name: str) -> None:
        """Call the fit's run by the fit's name.

        In TensorBoard it is a folder below `TENSORBOARD_LOGGING_DIR`, or `output_dir/runs` and the time; in Trackio it
        is called `<run_name>-<fit>`, or by the output folder and the time where `args.run_name` says nothing.
        """
        for tracker in self._handler.callbacks:
            if isinstance(tracker, TensorBoardCallback):
                if self._tensorboard_folder is None:
                    self._tensorboard_folder = Path(tracker.logging_dir or Path(output_dir, "runs", self._began))
                tracker.logging_dir = str(self._tensorboard_folder / name)
            elif isinstance(tracker, TrackioCallback):
                args.run_name = f"{args.run_name or f'{Path(output_dir).name}-{self._began}'}-{name}"

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trackers have begun a run: show the range test that was before it."""
        result, self._range_test = self._range_test, None
        if result is not None:
            self._send("range_test", result.plot, state)

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With the last log, that of the whole training, show the rates; `on_train_end` finds the runs closed."""
        if "train_runtime" in kwargs["logs"]:
            self._send("learning_rates", self._plot_rates, state)

    def _send(self, name: str, plot: Callable[[], Axes], state: TrainerState) -> None:
        kinds = TensorBoardCallback | TrackioCallback
        trackers = [callback for callback in self._handler.callbacks if isinstance(callback, kinds)]
        if not trackers or not state.is_world_process_zero:
            return
        image = pixels(plot())
        for tracker in trackers:
            if isinstance(tracker, TrackioCallback):
                import trackio  # an optional package; its callback is here, so it is too

                trackio.log({name: trackio.Image(image)})
            elif tracker.tb_writer is not None:
                tracker.tb_writer.add_image(name, image, state.global_step, dataformats="HWC")


def pixels(axes: Axes) -> NDArray[np.uint8]:
    """A plot's image, uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(axes.get_figure(root=True))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
