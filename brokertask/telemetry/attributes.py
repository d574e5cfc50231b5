"""The names of every span attribute, event, metric attribute and value brokertask emits.

Messaging names follow the OpenTelemetry semantic conventions stated by `SCHEMA_URL`; there are
none yet for retries and dead letters, so those are below `brokertask.`.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from opentelemetry.util.types import AttributeValue

Attributes: TypeAlias = dict[str, AttributeValue]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

SYSTEM: Final = "messaging.system"
RABBITMQ: Final = "rabbitmq"
DESTINATION: Final = "messaging.destination.name"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
ROUTING_KEY: Final = "messaging.rabbitmq.destination.routing_key"
MESSAGE_ID: Final = "messaging.message.id"
BATCH_COUNT: Final = "messaging.batch.message_count"
ERROR_TYPE: Final = "error.type"
EXCEPTION: Final = "exception"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"

RUN_ID: Final = "brokertask.run.id"
RUN_STATUS: Final = "brokertask.run.status"
"""Only on the span that ends the run: tail sampling and searches key on it."""
TASK: Final = "brokertask.task"
QUEUE: Final = "brokertask.queue"
WORKER: Final = "brokertask.worker.id"
PARENT_RUN: Final = "brokertask.parent_run.id"
ROOT_RUN: Final = "brokertask.root_run.id"
REDRIVES: Final = "brokertask.redrives"
ATTEMPT: Final = "brokertask.attempt.number"
MAX_ATTEMPTS: Final = "brokertask.attempt.max"
OUTCOME: Final = "brokertask.attempt.outcome"
LOST_ATTEMPTS: Final = "brokertask.attempts.lost"
"""Attempts before this one whose workers died, so that their spans never came."""
WORKER_LOST: Final = "worker_lost"
STEP: Final = "brokertask.step.name"
STEP_OUTCOME: Final = "brokertask.step.outcome"
REMEMBERED_STEPS: Final = "brokertask.steps.remembered"
QUEUE_WAIT: Final = "brokertask.queue.wait_ms"
RETRY_DELAY: Final = "brokertask.retry.delay_ms"
REASON: Final = "brokertask.reason"
STATE: Final = "brokertask.state"
VERSION: Final = "brokertask.version"

LINK: Final = "brokertask.link"
"""On a link: what it means. Jaeger shows no link attributes, so the span says it as well, as
`brokertask.<meaning>.trace_id` and `.span_id`, which also makes it searchable from both ends."""
TRIGGERED_BY: Final = "triggered_by"
PREVIOUS_ATTEMPT: Final = "previous_attempt"
PREVIOUS_SEGMENT: Final = "previous_segment"
RUN_ORIGIN: Final = "run_origin"
ORIGIN: Final = "origin"

RETRY_SCHEDULED: Final = "retry.scheduled"
RUN_SUSPENDED: Final = "run.suspended"
STEP_RETRY: Final = "step.retry"
STEP_REMEMBERED: Final = "step.remembered"
DEAD_LETTERED: Final = "run.dead_lettered"
FINGERPRINT: Final = "error.fingerprint"

COMPLETED: Final = "completed"
DEAD: Final = "dead"
EXPIRED: Final = "expired"
CANCELLED: Final = "cancelled"
