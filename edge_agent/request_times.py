"""How fast the tokens of one request come, as its client sees it. No I/O."""

from fedhlm.telemetry import Counters


class RequestTimes:
    """Observes the latencies of one request. `began_s` is when its prompt came; all times are in seconds on one clock."""

    def __init__(self, counters: Counters, began_s: float) -> None:
        self._counters = counters
        self._began_s = began_s
        self._last_s: float | None = None

    def committed(self, count: int, now_s: float) -> None:
        """Observe that `count` tokens were committed together. They share the time since those before them evenly."""
        if not count:
            return
        if self._last_s is None:
            self._counters.observe("time_to_first_token_seconds", now_s - self._began_s)
        else:
            self._counters.observe("inter_token_latency_seconds", (now_s - self._last_s) / count, count)
        self._last_s = now_s

    def ended(self, now_s: float, *, prompt_tokens: int) -> None:
        """Observe the end of the text."""
        self._counters.observe("e2e_request_latency_seconds", now_s - self._began_s)
        self._counters.add("prompt_tokens", prompt_tokens)
