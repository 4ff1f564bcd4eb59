"""The progress line of a training run."""

import atexit
import logging
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging


class PPOProgress(TrainerCallback):
    """Shows how far a run is: the update, the score, the KL, the speed and the time left.

    On a terminal it is one live line under whatever else is printed:

        update 12/60 ━━━━━━━━╺━━━━━━ score 1.23 kl 4.56 812 tok/s 0:01:20 left

    Elsewhere (a file, a pipe, or with `disable_tqdm`) the same facts are one plain line each time metrics are logged.
    It goes to stderr, from the main process only. Meanwhile transformers shows no bars of its own, of which each
    checkpoint would leave some behind.

    The score and the KL are `objective/scores`, with `objective/token_rewards` where there are any, and `objective/kl`
    of the last logged update. The speed counts prompt and completion tokens over all of the update's seconds, training
    included: (`tokens/prompt` + `tokens/completion`) / `time/total_s`. The time left is that of the remaining updates
    at the mean wall-clock time of those done since the process started, evaluation and saving included. `eval/scores`
    and `eval/kl` of an evaluation get their own line.
    """

    def __init__(self, console: Console | None = None):
        """Make the callback.

        Args:
            console: Where to draw; stderr if None.
        """
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step = 0
        self._started = 0.0
        self._moved_handlers: list[tuple[logging.StreamHandler[Any], TextIO]] = []
        self._silenced_bars = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the line at `state.global_step` (above 0 in a resumed run) of `state.max_steps` updates."""
        if not state.is_world_process_zero:
            return
        self.stop()  # one that an interrupted train() left
        self._started = time.monotonic()
        self._first_step = state.global_step
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            self._silenced_bars = True
        console = self._console or Console(stderr=True)
        if not console.is_interactive or args.disable_tqdm:
            return
        self._bar = Progress(
            TextColumn("update {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            _TimeColumn(),
            console=console,
            expand=True,
            # What others print to a stdout that is a file must stay in that file.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, facts="", seconds_left=None, as_of=self._started
        )
        streams = (sys.stdout, sys.stderr)
        self._bar.start()
        self._move_handlers(streams)
        atexit.register(self.stop)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance to `state.global_step`."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=state.global_step,
                seconds_left=self._seconds_left(state),
                as_of=time.monotonic(),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the metrics of an update, or of an evaluation; other logs are not for this line."""
        if not state.is_world_process_zero or logs is None:
            return
        if "eval/scores" in logs:
            self._print(f"evaluation after update {state.global_step}: {_facts(logs, 'eval')}")
        if "objective/scores" not in logs:
            return
        facts = _facts(logs, "objective")
        if self._bar is not None:
            self._bar.update(self._task, facts=facts)
            return
        left = self._seconds_left(state)
        ending = "" if left is None else f" {_clock(left)} left"
        self._print(f"update {state.global_step}/{state.max_steps} {facts}{ending}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last line as it is and give the terminal back."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back. For a training loop that ends by an exception; a second call does nothing."""
        if self._silenced_bars:
            transformers_logging.enable_progress_bar()
            self._silenced_bars = False
        if self._bar is None:
            return
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._moved_handlers.clear()
        self._bar.stop()
        self._bar = None
        atexit.unregister(self.stop)

    def _print(self, line: str) -> None:
        console = self._bar.console if self._bar is not None else self._console or Console(stderr=True)
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _seconds_left(self, state: TrainerState) -> float | None:
        done = state.global_step - self._first_step
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)

    def _move_handlers(self, streams: tuple[TextIO, TextIO]) -> None:
        """Send log records over the live line too.

        While the line is live, rich stands in for sys.stdout and sys.stderr; a log handler made earlier holds the real
        stream and would write into the line.
        """
        stand_ins = dict(zip(map(id, streams), (sys.stdout, sys.stderr), strict=True))
        named = (logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger))
        for logger in (logging.getLogger(), *named):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler) and id(handler.stream) in stand_ins:
                    self._moved_handlers.append((handler, handler.stream))
                    handler.setStream(stand_ins[id(handler.stream)])


class _TimeColumn(ProgressColumn):
    """Time left, counting down; until the first update is done, and after the last, the time since the start."""

    max_refresh = None

    def render(self, task: Task) -> Text:
        left = task.fields["seconds_left"]
        if left is None or task.finished:
            return Text(f"{_clock(task.elapsed or 0.0)} so far" if not task.finished else f"in {_clock(task.elapsed)}")
        return Text(f"{_clock(left - (time.monotonic() - task.fields['as_of']))} left")


def _facts(logs: Mapping[str, Any], group: str) -> str:
    parts = [f"score {_short(logs[f'{group}/scores'] + logs.get(f'{group}/token_rewards', 0))}"]
    if f"{group}/kl" in logs:
        parts.append(f"kl {_short(logs[f'{group}/kl'])}")
    seconds = logs.get("time/total_s")
    if seconds and "tokens/prompt" in logs and "tokens/completion" in logs:
        parts.append(f"{(logs['tokens/prompt'] + logs['tokens/completion']) / seconds:,.0f} tok/s")
    return " ".join(parts)


def _short(value: float | None) -> str:
    """Three significant digits, and no exponent for what is usual."""
    if value is None or not math.isfinite(value):
        return "nan"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}"


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=max(0, round(seconds or 0.0))))
