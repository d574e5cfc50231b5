/* The limit: the same work in C, with librabbitmq.
 *
 *   client work     mark and ack each delivery, one by one
 *   client produce  publish persistent messages, confirmed, as told on standard input
 *
 * A body is the task's number in 8 bytes, then text. An order is a line "MODE FIRST COUNT SIZE":
 * one waits for each confirm, many has 100 in flight, batch 1000. An answer is the seconds it took.
 */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

static const char *const QUEUE = "bench";

static void die(const char *what) {
    fprintf(stderr, "client: %s\n", what);
    exit(1);
}

static void check(amqp_rpc_reply_t reply, const char *what) {
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) die(what);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static amqp_connection_state_t connected(int port, const char *vhost, const char *kind) {
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (!socket || amqp_socket_open(socket, "127.0.0.1", port)) die("no connection");
    check(amqp_login(connection, vhost, 0, AMQP_DEFAULT_FRAME_SIZE, 0, AMQP_SASL_METHOD_PLAIN,
                     "guest", "guest"), "login");
    amqp_channel_open(connection, 1);
    check(amqp_get_rpc_reply(connection), "channel");
    amqp_table_entry_t type = {
        .key = amqp_cstring_bytes("x-queue-type"),
        .value = {.kind = AMQP_FIELD_KIND_UTF8, .value.bytes = amqp_cstring_bytes(kind)},
    };
    amqp_table_t arguments = {.num_entries = 1, .entries = &type};
    amqp_queue_declare(connection, 1, amqp_cstring_bytes(QUEUE), 0, 1, 0, 0, arguments);
    check(amqp_get_rpc_reply(connection), "queue");
    return connection;
}

static void work(amqp_connection_state_t connection, uint16_t prefetch, const char *path) {
    struct stat size;
    int file = open(path, O_RDWR);
    if (file < 0 || fstat(file, &size)) die("no marks");
    uint64_t *started = mmap(NULL, (size_t)size.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (started == MAP_FAILED) die("no marks");
    amqp_basic_qos(connection, 1, 0, prefetch, 0);
    amqp_basic_consume(connection, 1, amqp_cstring_bytes(QUEUE), amqp_empty_bytes, 0, 0, 0,
                       amqp_empty_table);
    check(amqp_get_rpc_reply(connection), "consume");
    for (;;) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        check(amqp_consume_message(connection, &envelope, NULL, 0), "delivery");
        uint64_t number;
        memcpy(&number, envelope.message.body.bytes, sizeof number);
        if ((number + 1) * sizeof number > (uint64_t)size.st_size) die("a strange message");
        started[number] = now_ns();
        if (amqp_basic_ack(connection, 1, envelope.delivery_tag, 0)) die("ack");
        amqp_destroy_envelope(&envelope);
    }
}

/* Returns the number of the last publish of this channel. Confirms come in any order, each for one
 * publish or for a range; the window counts those that are missing. */
static uint64_t produce(amqp_connection_state_t connection, uint64_t published, uint64_t window,
                        uint64_t first, uint64_t count, size_t size) {
    amqp_basic_properties_t properties = {
        ._flags = AMQP_BASIC_DELIVERY_MODE_FLAG, .delivery_mode = AMQP_DELIVERY_PERSISTENT};
    uint64_t begin = published, end = published + count, missing = 0, below = published;
    unsigned char *open = calloc(count + 1, 1);
    char *body = calloc(1, sizeof first + size);
    if (!open || !body) die("memory");
    memset(body + sizeof first, 'n', size);
    while (published < end || missing) {
        if (published < end && missing < window) {
            uint64_t number = first + (published - begin);
            memcpy(body, &number, sizeof number);
            amqp_bytes_t bytes = {.len = sizeof number + size, .bytes = body};
            if (amqp_basic_publish(connection, 1, amqp_empty_bytes, amqp_cstring_bytes(QUEUE), 1, 0,
                                   &properties, bytes)) die("publish");
            open[++published - begin] = 1;
            missing++;
            continue;
        }
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        if (amqp_simple_wait_frame(connection, &frame)) die("confirm");
        if (frame.frame_type != AMQP_FRAME_METHOD ||
            frame.payload.method.id != AMQP_BASIC_ACK_METHOD) die("not confirmed");
        amqp_basic_ack_t *ack = frame.payload.method.decoded;
        uint64_t from = ack->multiple ? below + 1 : ack->delivery_tag;
        for (uint64_t tag = from; tag <= ack->delivery_tag; tag++)
            if (open[tag - begin]) open[tag - begin] = 0, missing--;
        if (ack->multiple) below = ack->delivery_tag;
    }
    free(open);
    free(body);
    return published;
}

static void follow_orders(amqp_connection_state_t connection) {
    char mode[16], line[256];
    unsigned long long first, count, size;
    uint64_t published = 0;
    amqp_confirm_select(connection, 1);
    check(amqp_get_rpc_reply(connection), "confirms");
    printf("null\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%15s %llu %llu %llu", mode, &first, &count, &size) != 4) die("an order");
        uint64_t window = !strcmp(mode, "one") ? 1 : !strcmp(mode, "many") ? 100 : 1000;
        uint64_t begun = now_ns();
        published = produce(connection, published, window, first, count, size);
        printf("%.6f\n", (double)(now_ns() - begun) / 1e9);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    if (argc != 7) die("usage: client MODE PORT VHOST KIND PREFETCH STARTED");
    amqp_connection_state_t connection = connected(atoi(argv[2]), argv[3], argv[4]);
    if (!strcmp(argv[1], "work"))
        work(connection, (uint16_t)atoi(argv[5]), argv[6]);
    else
        follow_orders(connection);
    return 0;
}
