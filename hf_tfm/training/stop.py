"""A polite end: SIGTERM, a cluster's notice that the job ends soon."""

import signal
import threading
from typing import Any


class StopRequest:
    """``with StopRequest() as request:`` sets ``request.set`` on SIGTERM instead of ending the process."""

    def __init__(self):
        self.set = False

    def __enter__(self) -> "StopRequest":
        self.main_thread = threading.current_thread() is threading.main_thread()
        if self.main_thread:  # Python delivers signals nowhere else
            self.before = signal.signal(signal.SIGTERM, self.notice)
        return self

    def notice(self, *_: Any) -> None:
        self.set = True

    def __exit__(self, *_: Any) -> None:
        if self.main_thread:
            signal.signal(signal.SIGTERM, self.before)
