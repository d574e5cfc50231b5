"""What was declared over a transport, to be made anew when somebody or a crash unmade it."""

from __future__ import annotations

from brokertask.topology import Binding, Exchange, Queue, Topology


class Declared:
    """A topology that grows with each declaration; of two for one thing the later one holds."""

    def __init__(self) -> None:
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, Queue] = {}
        self._bindings: dict[Binding, bool] = {}

    @property
    def topology(self) -> Topology:
        """All of it."""
        return Topology(
            tuple(self._exchanges.values()),
            tuple(self._queues.values()),
            tuple(binding for binding, bound in self._bindings.items() if bound),
            tuple(binding for binding, bound in self._bindings.items() if not bound),
        )

    def remember(self, topology: Topology) -> None:
        """Add what was declared."""
        self._exchanges |= {exchange.name: exchange for exchange in topology.exchanges}
        self._queues |= {queue.name: queue for queue in topology.queues}
        self._bindings |= dict.fromkeys(topology.absent_bindings, False)
        self._bindings |= dict.fromkeys(topology.bindings, True)

    def forget(self, queue: str) -> None:
        """Leave out a queue and its bindings."""
        self._queues.pop(queue, None)
        self._bindings = {
            binding: bound for binding, bound in self._bindings.items() if binding.queue != queue
        }
