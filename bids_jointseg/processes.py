"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """See to it that this process ends once its parent is gone, even where that was killed.

    Otherwise it would wait for work for ever, or write into the folders of the next run.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
