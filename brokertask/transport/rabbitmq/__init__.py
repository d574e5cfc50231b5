"""RabbitMQ over AMQP 0-9-1: the only package that knows aio-pika.

    transport  `RabbitTransport`, the adapter made of these
    publisher  confirmed publishes, over a lane that is opened again when it has ended
    consumer   a subscription that resumes with a new session
    session    one channel's life as a consumer, and the deliveries on it
    declarer   the topology: making it, and comparing it
    link       a connection that is made again whenever it is lost
    lane       the messages of one channel, both ways:
      direct     by their own frames  (acks, confirms, frames, properties; tap, on the socket)
      plain      by aiormq's methods  (codec)
    failures   what each way in which a publish fails means
    waiting    what aiormq raises and how it waits, made bearable

aio-pika connects, authenticates, keeps the heartbeat, and speaks all of the protocol that carries
no messages. Recovery is ours, because only we know what is to be resumed, and the data plane, as
that is where the time goes: docs/decisions/0002-own-recovery.md and 0012-data-plane.md.
"""

from brokertask.transport.rabbitmq.transport import RabbitTransport

__all__ = ["RabbitTransport"]
