"""`python -m tests.e2e.loris PORT COUNT`: so many connections that send their request's head a byte a second.

A connection that the server closes is opened again. Says "ready" when all have been open once; ends when its stdin
does.
"""

import asyncio
import contextlib
import random
import sys

HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


async def _crawl(port: int, has_opened: asyncio.Semaphore) -> None:
    is_first = True
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD)
            if is_first:
                is_first = False
                has_opened.release()
            while not reader.at_eof():
                await asyncio.sleep(1)
                writer.write(b"x")
            writer.close()
        await asyncio.sleep(random.random())


async def _main(port: int, count: int) -> None:
    opened = asyncio.Semaphore(0)
    crawlers = [asyncio.create_task(_crawl(port, opened)) for _ in range(count)]
    for _ in range(count):
        await opened.acquire()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for crawler in crawlers:
        crawler.cancel()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
