"""Durable background tasks for Python on RabbitMQ.

A task is a typed async function, a trigger one confirmed message; a run is retried, delayed,
dead-lettered and traced by way of the broker alone. `App` is where to begin.
"""

import logging

from brokertask.admission import Debounce, Singleton
from brokertask.app import App
from brokertask.client import Client
from brokertask.context import Context
from brokertask.errors import (
    Abort,
    AccessDenied,
    BatchError,
    BrokerBlocked,
    BrokertaskError,
    BrokerUnavailable,
    ChildFailed,
    ConfigurationError,
    DuplicateTask,
    EnvelopeError,
    IdempotencyConflict,
    InvalidOption,
    InvalidPayload,
    MemoryFull,
    NoServer,
    PayloadError,
    PayloadTooLarge,
    PayloadUnavailable,
    PublishError,
    PublishUnknown,
    QueueFull,
    ResultTimeout,
    ResultUnavailable,
    RetryAfter,
    RunCancelled,
    RunError,
    RunExpired,
    RunFailed,
    StepMismatch,
    StoreOutdated,
    StoreUnavailable,
    TopologyMismatch,
    Unroutable,
    UnsupportedType,
)
from brokertask.events import Event
from brokertask.retry import Retry
from brokertask.run import Run
from brokertask.schedule import Schedule, Tick
from brokertask.settings import Settings
from brokertask.task import CallNext, Task
from brokertask.topology import QueueOptions as Queue
from brokertask.version import __version__ as __version__
from brokertask.waitable import Failure, First, Rejected, TimedOut, Token
from brokertask.worker import Worker

logging.getLogger("brokertask").addHandler(logging.NullHandler())
__all__ = [
    "Abort",
    "AccessDenied",
    "App",
    "BatchError",
    "BrokerBlocked",
    "BrokerUnavailable",
    "BrokertaskError",
    "CallNext",
    "ChildFailed",
    "Client",
    "ConfigurationError",
    "Context",
    "Debounce",
    "DuplicateTask",
    "EnvelopeError",
    "Event",
    "Failure",
    "First",
    "IdempotencyConflict",
    "InvalidOption",
    "InvalidPayload",
    "MemoryFull",
    "NoServer",
    "PayloadError",
    "PayloadTooLarge",
    "PayloadUnavailable",
    "PublishError",
    "PublishUnknown",
    "Queue",
    "QueueFull",
    "Rejected",
    "ResultTimeout",
    "ResultUnavailable",
    "Retry",
    "RetryAfter",
    "Run",
    "RunCancelled",
    "RunError",
    "RunExpired",
    "RunFailed",
    "Schedule",
    "Settings",
    "Singleton",
    "StepMismatch",
    "StoreOutdated",
    "StoreUnavailable",
    "Task",
    "Tick",
    "TimedOut",
    "Token",
    "TopologyMismatch",
    "Unroutable",
    "UnsupportedType",
    "Worker",
]
