"""What workers report of themselves once a second, the newest of each."""

from collections.abc import Collection

from common.messages import Load, ModelEntry


class Loads:
    """By worker. `now_s` is seconds on any one clock."""

    def __init__(self) -> None:
        self._newest: dict[str, Load] = {}
        self._stepped_s: dict[str, float] = {}  # when each was last seen to step, or to have nothing to do

    def take(self, worker: str, load: Load, now_s: float) -> None:
        before = self.of_worker(worker)
        if before is None or before.steps != load.steps or not load.running:
            self._stepped_s[worker] = now_s
        self._newest[worker] = load

    def keep(self, workers: Collection[str]) -> None:
        """Forget all others."""
        self._newest = {worker: load for worker, load in self._newest.items() if worker in workers}
        self._stepped_s = {worker: at for worker, at in self._stepped_s.items() if worker in workers}

    def of_worker(self, worker: str) -> Load | None:
        return self._newest.get(worker)

    def of_model(self, model: ModelEntry) -> list[Load]:
        """Those of its present workers that have reported."""
        return [load for worker in model.workers if (load := self.of_worker(worker.identity))]

    def step_age_s(self, model: ModelEntry, now_s: float) -> float | None:
        """How long the slowest worker of `model` has not been seen to step; None without any."""
        return max((now_s - at for w in model.workers if (at := self._stepped_s.get(w.identity))), default=None)
