"""RabbitMQ over AMQP 0-9-1: the only package that knows aio-pika.

    link       a connection that is made again whenever it is lost
    codec      `Message` to and from AMQP properties and headers
    publisher  one confirmed publish, and what each way of failing means
    session    one channel's life as a consumer, and the deliveries on it
    consumer   a subscription that resumes with a new session
    declarer   the topology: making it, and comparing it
    transport  `RabbitTransport`, the adapter made of these

aio-pika connects, authenticates, keeps the heartbeat and speaks the protocol. Recovery is ours,
because only we know what is to be resumed; docs/decisions/0002-own-recovery.md says more.
"""

from brokertask.transport.rabbitmq.transport import RabbitTransport

__all__ = ["RabbitTransport"]
