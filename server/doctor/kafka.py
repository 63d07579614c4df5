"""Kafka as the log: its client, and what the brokers say now."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from server.doctor.base import Context, Finding, fail, ok, warn
from server.errors import ConfigError

ANSWER_WITHIN_S = 1.5
_QUIET = logging.Logger("librdkafka of the doctor")
"""The client writes a line for every try; a finding says it once."""
_QUIET.addHandler(logging.NullHandler())


def kafka(context: Context) -> Iterator[Finding]:
    """Whether a start would get its topic; nothing with another log."""
    settings = context.settings
    if settings.log.kind != "kafka":
        return
    brokers, topic = settings.log.kafka.bootstrap_servers, settings.log.kafka.topic
    try:
        from confluent_kafka import Consumer, KafkaException

        from server.log.kafka import client_options
    except ImportError as error:
        yield fail("kafka.client", f"confluent_kafka cannot be imported: {error}", "pip install 'liverank[kafka]'")
        return
    try:
        consumer = Consumer(
            client_options(settings, **{"group.id": "liverank-doctor", "enable.auto.commit": False}),
            logger=_QUIET,
        )
    except (ConfigError, KafkaException) as error:
        yield fail("kafka.client", f"log.kafka.options: {error}", "Correct log.kafka.options; see librdkafka's list.")
        return
    yield ok("kafka.client", "confluent_kafka")
    try:
        found = consumer.list_topics(topic, timeout=ANSWER_WITHIN_S).topics[topic]
    except KafkaException as error:
        yield warn(
            "kafka.brokers",
            f"{brokers} did not answer within {ANSWER_WITHIN_S} s: {error.args[0].str()}; a start waits for them",
            "Check log.kafka.bootstrap_servers, log.kafka.options (TLS, SASL), the brokers, and what lies between.",
        )
        return
    finally:
        consumer.close()
    yield ok("kafka.brokers", f"{brokers} answer")
    if found.error is not None:
        told = f"{topic!r} cannot be used: {found.error.str()}"
        yield fail("kafka.topic", told, "Make it as docs/operations.md says.")
    elif len(found.partitions) != 1:
        yield fail(
            "kafka.topic",
            f"{topic!r} has {len(found.partitions)} partitions; exactly one is wanted",
            "Make a topic with one partition, and name it in log.kafka.topic.",
        )
    else:
        yield ok("kafka.topic", f"{topic!r}, one partition")
