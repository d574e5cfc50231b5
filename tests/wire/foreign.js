'use strict';
// A publisher and a listener that know nothing of brokertask but its wire format.
//
//   foreign.js publish URL          publishes the messages on stdin, confirmed
//   foreign.js listen URL KEY       prints "ready", then the first event for KEY, as JSON
//
// stdin is a JSON list of {key, payload, properties}. `payload` is the name of one below, encoded
// with @msgpack/msgpack, or {"json": value}, or {"base64": bytes}.

const amqp = require('amqplib');
const { decode, encode } = require('@msgpack/msgpack');

const payloads = {
  report: { title: 'Überschrift 📄', pages: 3 },
  rich: {
    at: new Date('2026-01-02T03:04:05.678Z'),
    before: new Date('1969-07-20T20:17:40Z'),
    largest: 2n ** 64n - 1n,
    smallest: -(2n ** 63n),
    number: 2 ** 40,
    fraction: 0.1,
    bytes: new Uint8Array([0, 128, 255]),
    nothing: null,
    missing: undefined,
    list: [1, 'two', [true]],
  },
};

function body(payload) {
  if (payload.json !== undefined) return Buffer.from(JSON.stringify(payload.json));
  if (payload.base64 !== undefined) return Buffer.from(payload.base64, 'base64');
  return Buffer.from(encode(payloads[payload], { useBigInt64: true }));
}

async function stdin() {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  return JSON.parse(Buffer.concat(chunks).toString());
}

async function publish(connection) {
  const channel = await connection.createConfirmChannel();
  channel.on('return', (message) => {
    console.error(`no queue for ${message.fields.routingKey}`);
    process.exitCode = 1;
  });
  for (const { key, payload, properties } of await stdin()) {
    channel.publish('bt.tasks', key, body(payload), { mandatory: true, ...properties });
  }
  await channel.waitForConfirms();
}

async function listen(connection, key) {
  const channel = await connection.createChannel();
  const { queue } = await channel.assertQueue('', { exclusive: true });
  await channel.bindQueue(queue, 'bt.events', key);
  const heard = new Promise((resolve) => {
    channel.consume(queue, resolve, { noAck: true }).then(() => console.log('ready'));
  });
  const { content, fields, properties } = await heard;
  const event = decode(content);
  event.result = decode(event.result);
  const { contentType, correlationId, type } = properties;
  console.log(
    JSON.stringify({ key: fields.routingKey, properties: { contentType, correlationId, type }, event }),
  );
}

async function main([command, url, ...rest]) {
  const connection = await amqp.connect(url);
  await { publish, listen }[command](connection, ...rest);
  await connection.close();
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
