"""RabbitMQ over AMQP 0-9-1: the only package that knows aio-pika.

    link       a connection that is made again whenever it is lost
    codec      `Message` to and from AMQP properties and headers
    publisher  one confirmed publish, and what each way of failing means
    consumer   a subscription that resumes, and the deliveries it hands out
    declarer   the topology: making it, and comparing it
    transport  `RabbitTransport`, the adapter made of these

aio-pika connects, authenticates, keeps the heartbeat and speaks the protocol. Recovery is ours,
because only we know what is to be resumed; docs/decisions/0002-own-recovery.md says more.
"""

from brokertask.transport.rabbitmq.transport import RabbitTransport

__all__ = ["RabbitTransport"]
