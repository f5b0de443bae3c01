"""In the fork: a program is loaded and asked, and what it answers is written down; nothing here is trusted afterwards."""

from __future__ import annotations

import builtins
import marshal
import os
import time
from contextlib import suppress

from sandbox import wire
from sandbox.wire import HEAD, MAX_ITEMS, encode

TYPE_CHECKING = False  # by hand, as in wire.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def read_job(fd: int) -> dict[str, Any]:
    """The job that the caller has written to the run's own socket."""
    job = marshal.loads(b"".join(iter(lambda: os.read(fd, 1 << 20), b"")))
    # The benchmark runs setup, response and tests as one text: statements around the response make the same programs
    # syntax errors here (a __future__ import after other code, a text that ends in the middle of a statement).
    job["source"] = ("0\n\n" if job["has_setup"] else "") + job["source"] + "\n\n0\n"
    return job


def run_unheard(job: dict[str, Any], names: dict[str, Any], flush: Callable[[], None]) -> int:
    """Load the program and make the calls, for what is seen of that from outside. Returns the process's exit code, 0 only where
    the program asked for it: one that goes on to be tested has not ended by itself.

    flush: that of standard output, taken before the program could put another in its place."""
    try:
        exec(compile(job["source"], "response.py", "exec", dont_inherit=True), names)
        for call in job["calls"]:
            eval(call, names)
    except SystemExit as error:
        code = 0 if error.code is None else error.code
        return int(code) & 0xFF if type(code) is int or type(code) is bool else 1  # a subclass would say what it is
    except BaseException:
        return 1
    finally:
        with suppress(BaseException):
            flush()
    return 1


def run_program(fd: int, job: dict[str, Any], namespace: dict[str, Any]) -> None:
    """Run the job and write frames. The caller ends the process afterwards, whatever happened here."""
    outbox = bytearray()

    def send(kind: bytes, body: bytes = b"", write: Any = os.write, pack: Any = HEAD.pack) -> None:
        outbox.extend(pack(kind, len(body)) + body)
        while outbox:
            del outbox[: write(fd, outbox)]

    def fail(error: BaseException) -> None:
        send(wire.ERROR, type(error).__name__[:100].encode("ascii", "replace"))

    try:
        code = compile(job["source"], "response.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return fail(error)
    send(wire.COMPILED)
    try:
        exec(code, namespace)
    except BaseException as error:
        return fail(error)
    name = job["probe"]
    bound = name is not None and (name in namespace or hasattr(builtins, name))
    send(wire.LOADED, b"1" if bound else b"0")
    try:
        if job["decoys"] or job["claim"]:
            _require(job, namespace)
            send(wire.RETURNED)
        elif job["returns"]:
            eval(job["calls"][0], namespace)
            send(wire.RETURNED)
        else:
            _answer(job, namespace, outbox, send)
    except BaseException as error:
        fail(error)


def _answer(
    job: dict[str, Any], names: dict[str, Any], outbox: bytearray, send: Any, clock: Any = time.monotonic, pack: Any = HEAD.pack
) -> None:
    """Write each call's value; after 1, 2, 4, ... calls and every 20 ms, so that the caller can stop a wrong program."""
    flushed, calls = clock(), job["calls"]
    for number, (call, shape) in enumerate(zip(calls, job["shape"], strict=True), 1):
        value = eval(call, names)
        body = encode(_SHAPES[shape](value))
        if number & (number - 1) == 0 or number == len(calls) or clock() - flushed > 0.02:
            send(wire.ANSWER, body)
            flushed = clock()
        else:
            outbox.extend(pack(wire.ANSWER, len(body)) + body)


def _require(job: dict[str, Any], names: dict[str, Any]) -> None:
    """Make the calls; raises unless each answer says that it equals every decoy, and the claim is True. With a claim a call may
    fail: it is about what loading or calling left behind."""
    for call in job["calls"]:
        try:
            answer = eval(call, names)
        except Exception:
            if not job["claim"]:
                raise
            continue
        for decoy in job["decoys"]:
            if (answer == decoy) is not True:
                raise ValueError("differs")
    if job["claim"] and eval(job["claim"], names) is not True:
        raise ValueError("not so")


def _linked_values(node: Any) -> list[Any]:
    """The values of a singly linked list."""
    values: list[Any] = []
    while node is not None and len(values) < MAX_ITEMS:
        values.append(node.val)
        node = node.next
    return values


def _tree_values(root: Any) -> list[Any]:
    """Values in preorder, None where a child is missing: it determines the tree."""
    values: list[Any] = []
    stack = [root]
    while stack and len(values) < MAX_ITEMS:
        node = stack.pop()
        if node is None:
            values.append(None)
        else:
            values.append([node.val])
            stack += [node.right, node.left]
    return values


_SHAPES: dict[str, Callable[[Any], Any]] = {"value": lambda value: value, "linked": _linked_values, "tree": _tree_values}
