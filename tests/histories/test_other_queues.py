"""What a worker's process consumes beside its jobs is none of delivery's business."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kombu import Connection

from tests.histories.world import World

REPLIES = "an-id.reply.celery.pidbox"


def test_a_reply_of_another_worker_reaches_who_asked_for_it(new_world: Callable[[], World]):
    """As Celery's *mingle* asks, which was told that it is alone: its replies were dead-lettered as no jobs."""
    world = new_world()
    world.start("a")
    process, got = world.workers["a"], list[Any]()
    reply = {
        "body": json.dumps({"revoked": {}}), "content-encoding": "utf-8", "content-type": "application/json",
        "headers": {}, "properties": {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": REPLIES}},
    }  # fmt: skip
    world.client.lpush(REPLIES, json.dumps(reply))

    def ask() -> None:
        connection = Connection("redis://", transport=process._transport)
        channel = connection.transport.create_channel(connection.transport.establish_connection())
        channel.client.connection = channel.client.connection_pool.get_connection()  # as kombu's poller does
        channel.basic_consume(REPLIES, True, got.append, "tag")
        channel._brpop_start()
        channel._brpop_read()
        channel._disconnect_pools()

    process._spawn("mingle", ask)
    world.run("a", "mingle", 100)
    world.close()
    assert [message.payload for message in got] == [{"revoked": {}}]
    assert not world.client.exists("sdtpu:dead", "sdtpu:unacked")
