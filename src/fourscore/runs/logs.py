"""What a command shows of the log."""

import logging
import sys
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging


def set_up_logging(training_args: Any) -> None:
    """Apply `log_level`; left at passive, fourscore's own messages are shown and transformers' level stays.

    Bars for loading and writing files are for terminals only, as the one of the run is.

    Args:
        training_args: `PPOConfig`.
    """
    logging.basicConfig(format="%(message)s")
    level = training_args.get_process_log_level()
    transformers_logging.set_verbosity(level)
    if training_args.disable_tqdm or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    passive = training_args.log_level == "passive" and training_args.process_index == 0
    logging.getLogger("fourscore").setLevel(logging.INFO if passive else level)
