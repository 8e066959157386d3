#!/usr/bin/env python3
"""A database that refuses transactions by holders of the past.

    guard_sql.py jobs/stock stock.db apples 5      # 5 more apples in stock, under the lock

The lock makes many such programs on many nodes take turns; the token, checked in the transaction
itself, makes sure that one which was stopped in the middle cannot finish later.
"""

import sqlite3
import sys
from contextlib import closing

from dlmfs.client import DlmfsError, Lock
from dlmfs.client.guard import SqlGuard


def main(name: str, database: str, item: str, count: int) -> int:
    guard = SqlGuard()
    try:
        with Lock(name) as lock, closing(sqlite3.connect(database)) as connection:
            guard.create(connection)
            connection.execute("CREATE TABLE IF NOT EXISTS stock (item PRIMARY KEY, count)")
            with guard.transaction(connection, name, lock.token) as cursor:
                cursor.execute("INSERT OR IGNORE INTO stock VALUES (?, 0)", (item,))
                cursor.execute("UPDATE stock SET count=count+? WHERE item=?", (count, item))
    except DlmfsError as error:  # LockLost too, and the guard's word for it, StaleToken
        print(error, file=sys.stderr)
        return error.exit
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: guard_sql.py DOMAIN/LOCK DATABASE ITEM COUNT")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
