"""Publishes from Python, by one statement in the application's own transaction."""

import json
import os

import psycopg


def place_order(connection, order_id, cents):
    """Inserts the order and publishes it in one transaction. If the order is
    refused, its event is rolled back."""
    with connection.transaction():
        connection.execute(
            "INSERT INTO outbox_events (event_type, event_context) VALUES (%s, %s)",
            ["order_placed", json.dumps({"order_id": order_id, "cents": cents})],
        )
        connection.execute("INSERT INTO orders (id, cents) VALUES (%s, %s)", [order_id, cents])


with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
    # The table accepts the first order and refuses the second.
    for order_id, cents in [(1, 4200), (2, -1)]:
        try:
            place_order(connection, order_id, cents)
        except psycopg.Error as error:
            print("order", order_id, "was refused:", error)
