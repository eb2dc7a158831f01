"""Runs an EngineCore behind a socket: reads commands, steps while there is work, writes events."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from service.engines.errors import EngineError
from service.engines.local.engine import EngineCore
from service.engines.local.messages import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Cancel,
    Command,
    Event,
    Ready,
    Register,
    Registered,
    Release,
    Score,
    Shutdown,
    StartFailed,
    Submit,
    decode_command,
    frame,
)

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 18


class _Inbox:
    """Commands from a socket, whole frames only."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._selector = selectors.DefaultSelector()  # not select(): descriptors may be above its limit of 1024
        self._selector.register(connection, selectors.EVENT_READ)
        self._buffer = bytearray()

    def take(self, *, wait: bool) -> list[Command]:
        """Every command that has arrived; with `wait`, at least one. Raises EOFError when the other side is gone."""
        commands: list[Command] = []
        while True:
            timeout = None if wait and not commands else 0
            if not self._selector.select(timeout):
                return commands
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
            commands += self._whole()

    def _whole(self) -> list[Command]:
        commands: list[Command] = []
        at = 0
        while len(self._buffer) - at >= LENGTH_BYTES:
            size = int.from_bytes(self._buffer[at : at + LENGTH_BYTES], "little")
            if size > MAX_FRAME_BYTES:
                raise EOFError
            end = at + LENGTH_BYTES + size
            if len(self._buffer) < end:
                break
            commands.append(decode_command(bytes(self._buffer[at + LENGTH_BYTES : end])))
            at = end
        del self._buffer[:at]
        return commands


def serve(connection: socket.socket, load: Callable[[], EngineCore]) -> None:
    """Load the engine, say Ready, and work until Shutdown or until the other side closes the socket."""

    def send(event: Event) -> None:
        connection.sendall(frame(event))

    try:
        try:
            core = load()
        except EngineError as error:
            send(StartFailed(str(error), permanent=True))
            return
        except Exception as error:  # whatever the libraries raise while they load, the service must be told
            log.exception("the engine could not be loaded")
            send(StartFailed(f"the engine could not be loaded: {type(error).__name__}: {error}", permanent=False))
            return
        send(Ready(core.stats(), core.run_as))
        inbox = _Inbox(connection)
        while True:
            for command in inbox.take(wait=not core.has_work):
                if isinstance(command, Shutdown):
                    return
                reply = _apply(core, command)
                if reply is not None:
                    send(reply)
            if core.has_work:
                send(core.step())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.info("the service closed the connection; the engine stops")
    finally:
        connection.close()


def _apply(core: EngineCore, command: Command) -> Event | None:
    match command:
        case Submit():
            core.submit(command)
        case Score():
            core.score(command)
        case Cancel():
            core.cancel(command.id)
            return core.step() if not core.has_work else None
        case Register():
            try:
                return core.register(command)
            except (ValueError, RuntimeError) as error:
                core.release(command.digest)
                return Registered(command.digest, str(error), core.stats())
        case Release():
            core.release(command.digest)
    return None
