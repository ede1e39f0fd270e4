"""A tiny HTTP server process that misbehaves on demand: what fleets are tested with.

Every request is answered with 200, except where a switch says otherwise. Standard library only, so that it starts
quickly: ``python -I -S engine_stub.py --port 0 --announce``.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    options = parse()
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.tell_sigterm:
        signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"stub: heard SIGTERM\n"))
    print("stub: begins", flush=True)
    if options.exit_code is not None:
        print("stub: cannot load the model: out of luck", file=sys.stderr, flush=True)
        return int(options.exit_code)
    if options.grandchild:
        start_grandchild(Path(options.grandchild), own_session=options.grandchild_session)
    for number in range(options.log_lines):
        print(f"stub: line {number} {'x' * 80}")
    time.sleep(options.start_delay)
    server = socket.create_server(("127.0.0.1", options.port))
    if options.environment:
        names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "STUB")
        Path(options.environment).write_text(",".join(f"{name}={os.environ.get(name)}" for name in names))
    if options.announce:
        print(f"chiron-engine ready port={server.getsockname()[1]}", flush=True)
    end = time.monotonic() + options.life if options.life else None
    answered = 0
    while True:
        server.settimeout(None if end is None else max(0.001, end - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return 3
        answer(connection, options)
        answered += 1
        if answered == options.crash_after:
            os.abort()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--announce", action="store_true", help="print the ready line")
    parser.add_argument("--start-delay", type=float, default=0.0)
    parser.add_argument("--life", type=float, default=0.0, help="exit with status 3 after so many seconds")
    parser.add_argument("--crash-after", type=int, default=0, help="abort after so many requests")
    parser.add_argument("--exit-code", type=int, help="fail at once")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--tell-sigterm", action="store_true", help="print that it came, and go on")
    parser.add_argument("--sick", help="answer 503 while this file exists")
    parser.add_argument("--deaf", help="accept but do not answer while this file exists")
    parser.add_argument("--unknown", default="", help="answer 404 on this path")
    parser.add_argument("--sleeps", action="store_true", help="speak vLLM's sleep mode")
    parser.add_argument("--insomnia", help="say the opposite of whether it sleeps while this file exists")
    parser.add_argument("--answer", nargs=2, action="append", default=[], metavar=("PATH", "BODY"))
    parser.add_argument("--heard", help="write the method, path and body of requests that have one to this file")
    parser.add_argument("--authorization", default="", help="answer 401 without this header")
    parser.add_argument("--log-lines", type=int, default=0)
    parser.add_argument("--grandchild", help="start a process that sleeps; its id goes into this file")
    parser.add_argument("--grandchild-session", action="store_true", help="it leaves the process group")
    parser.add_argument("--environment", help="write what the fleet put into the environment to this file")
    return parser.parse_args()


def start_grandchild(path: Path, *, own_session: bool) -> None:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"], start_new_session=own_session
    )
    path.write_text(str(child.pid))


def answer(connection: socket.socket, options: argparse.Namespace) -> None:
    with connection:
        connection.settimeout(10.0)
        try:
            head = connection.recv(65536).decode()
            if options.deaf and os.path.exists(options.deaf):
                time.sleep(60.0)
                return
            method, path = head.split(" ")[:2] if " " in head else ("", "")
            if options.heard and (body := body_of(connection, head)):
                with open(options.heard, "a") as file:
                    file.write(f"{method} {path} {body}\n")
            said = dict(options.answer).get(path, sleep_mode(method, path, options) or "{}")
            status = "200 OK"
            if options.sick and os.path.exists(options.sick):
                status = "503 Sick"
            elif options.authorization and f"authorization: {options.authorization}" not in head.lower():
                status = "401 Unauthorized"
            elif options.unknown and path == options.unknown:
                status = "404 Not Found"
            head = f"HTTP/1.1 {status}\r\ncontent-length: {len(said)}\r\nconnection: close\r\n\r\n"
            connection.sendall((head + said).encode())
        except OSError:
            return


def sleep_mode(method: str, path: str, options: argparse.Namespace) -> str:
    if method == "POST" and options.sleeps:
        options.asleep = path.startswith("/sleep") or (getattr(options, "asleep", False) and path != "/wake_up")
    if path != "/is_sleeping" or not options.sleeps:
        return ""
    lies = bool(options.insomnia) and os.path.exists(options.insomnia)
    return '{"is_sleeping": true}' if getattr(options, "asleep", False) != lies else '{"is_sleeping": false}'


def body_of(connection: socket.socket, text: str) -> str:
    head, _, body = text.partition("\r\n\r\n")
    _, _, rest = head.lower().partition("content-length:")
    length = int(rest.split()[0]) if rest else 0
    while len(body) < length and (more := connection.recv(65536).decode()):
        body += more
    return body


if __name__ == "__main__":
    sys.exit(main())
