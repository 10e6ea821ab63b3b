"""Pieces of work, each done once among all processes that share a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from evaluation.claims import Claims


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Args:
        name: Of its claim, a path below the folder of claims; the same in every process.
        look: Whether it is done, by whichever process; called again and again until it says so. What is wanted of the
            piece is taken in here.
        make: Do it. It must write what `look` finds whole or not at all, and the same wherever it runs; or say that
            it is settled by `Claims.mark`, which `look` then asks for. `look` is not called afterwards.
        ready: Whether all that it needs is there; asked before `make`.
    """

    name: str
    look: Callable[[], bool]
    make: Callable[[], None]
    ready: Callable[[], bool] = _always


def settled(name: str, make: Callable[[], object], claims: Claims) -> Piece:
    """A piece that one process of those at work does anew in each run, whatever files are there."""

    def make_and_mark() -> None:
        make()
        claims.mark(name)

    return Piece(name, lambda: claims.marked(name), make_and_mark)


def walk(pieces: Iterable[Piece], claims: Claims) -> None:
    """See every piece done, by this process or by another; return when all are.

    Pieces are tried in their order. What another process has in work, or what waits for another piece, is looked at
    again after each piece that this process makes and, when nothing else is left, every moment.

    Args:
        pieces: What is to be done; asked for one at a time.
        claims: Who does what.

    Raises:
        Exception: Whatever `look` and `make` raise; a piece that was being made is given back.
    """
    waiting: list[Piece] = []
    for piece in pieces:
        if piece.look():
            continue
        if _made(piece, claims):
            waiting = _left(waiting, claims)
        else:
            waiting.append(piece)
    while waiting:
        left = _left(waiting, claims)
        if len(left) == len(waiting):
            claims.wait()
        waiting = left


def once(piece: Piece, claims: Claims) -> None:
    """See one piece done, by this process or by another."""
    walk([piece], claims)


def _left(waiting: list[Piece], claims: Claims) -> list[Piece]:
    return [piece for piece in waiting if not (piece.look() or _made(piece, claims))]


def _made(piece: Piece, claims: Claims) -> bool:
    """Whether it is done now, because no other process has it; else it is that one's, or not ready."""
    if not piece.ready() or not claims.take(piece.name):
        return False
    try:
        # it may have been finished, and given back, since the last look
        if not piece.look():
            piece.make()
    finally:
        claims.release(piece.name)
    return True
