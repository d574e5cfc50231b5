"""The embedded broker: the part of AMQP that brokertask uses, in one process.

    queues      exchanges and queues, driven by the arguments RabbitMQ gets
    broker      `MemoryBroker`: routing, the topology, and faults for tests
    connection  a connection to it, in its event loop
    transport   `MemoryTransport`, the port; from the loops of other threads too

Retries, delays and dead letters follow from the same topology, so they behave alike. What differs:
nothing is on a disk, every queue counts lost deliveries as a quorum queue does, and a dead letter
without a target waits without holding up those behind it.
"""

from brokertask.transport.memory.broker import MemoryBroker
from brokertask.transport.memory.transport import MemoryTransport

__all__ = ["MemoryBroker", "MemoryTransport"]
