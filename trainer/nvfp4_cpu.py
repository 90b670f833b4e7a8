"""The fast NVFP4 path for CPUs: numpy over pieces that stay in the caches, from a few threads.

Promises: the results of the plain path in `trainer.nvfp4_plain`, bit for bit, whatever the number of threads. Why it
looks as it does:

- A piece is transposed to [16, blocks], so that a block's scale lies along the long axis: every operation is then a
  plain vector loop, and a sum over a block is four additions of halves, in an order that no library chooses for us.
- numpy, not torch: its dispatch costs a third as much, it drops the GIL for every operation, and calling it from
  threads disturbs no thread setting of torch. The few torch calls here stay below the size from which torch itself uses
  threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 16
PIECE = 16384
"""Blocks in a piece: six buffers of a megabyte each. Measured on two Zen 5 cores, quantising: 4,096 blocks gave 94
million weights a second (threads waited for each other at the GIL), 8,192 136, 16,384 179, 65,536 146 (out of the
caches).
"""
SERIAL = 2048
"""Blocks in one torch call: 32,768 elements, the most for which torch starts no threads of its own."""
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STEPS = {"amax": (0,), "mse": (0, -1, 1, 2, 3, 4, 5)}
"""Candidates for the scale, as steps in E4M3 code from amax / 6 rounded; on equal errors the first one counts."""
ORDER_BITS = 3
"""The last bits of an error make room for the candidate's place in `STEPS`: one integer minimum then finds both."""

_F = np.float32
_EXPONENT, _SHIFT22 = np.int32(0x7F800000), np.int32(22 << 23)
# Row by row instead of as a scalar: numpy's minimum and maximum only use vector instructions for arrays.
_ONE, _SIX = np.full(PIECE, 1, _F), np.full(PIECE, 6, _F)
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""The value of each E4M3 byte."""
_E4M3: NDArray[np.float32] = E4M3.numpy()
CODES = np.stack([np.clip(np.arange(128) + step, 1, 126) for step in STEPS["mse"]]).astype(np.uint8)
"""[place in STEPS, code of amax / 6] -> code of the candidate: at least 2^-9, so that nothing divides by zero; at
most 448."""
_SCALES: NDArray[np.float32] = _E4M3[CODES]
_LEVEL_PAIRS: NDArray[np.complex64] = np.array(
    [
        [v * sign for sign in (1, -1) for v in LEVELS][nibble]
        for byte in range(256)
        for nibble in (byte & 15, byte >> 4)
    ],
    _F,
).view(np.complex64)
"""The two levels of each byte of codes, as one 8-byte element."""


class NonFiniteError(ValueError):
    """Weights or scales hold an infinity or NaN."""


class Piece:
    """Buffers for up to `PIECE` blocks and the steps on them; one a thread, used again for every piece of a tensor."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.rows = np.empty((blocks, BLOCK), _F)  # as in the tensor
        self.w, self.a, self.y, self.r, self.p = (np.empty((BLOCK, blocks), _F) for _ in range(5))
        self.amax, self.scale, self.error, self.best = (np.empty(blocks, _F) for _ in range(4))
        self.least, self.place = (np.empty(blocks, np.int32) for _ in range(2))
        self.codes = np.empty((blocks, BLOCK // 2), np.uint8)
        self.scale8 = torch.empty(blocks, dtype=torch.float8_e4m3fn)
        self.halves = [(self.p[:n], self.p[n : 2 * n]) for n in (8, 4, 2)]
        self.one, self.six = _ONE[:blocks], _SIX[:blocks]

    def load(self, blocks: Tensor) -> None:
        """Take in blocks [blocks, 16] of any float type."""
        if blocks.dtype == torch.float32:
            np.copyto(self.w, blocks.numpy().T)
        else:
            for start in range(0, self.blocks, SERIAL):
                torch.from_numpy(self.rows[start : start + SERIAL]).copy_(blocks[start : start + SERIAL])
            np.copyto(self.w, self.rows.T)
        np.abs(self.w, out=self.a)
        np.maximum.reduce(self.a, axis=0, out=self.amax)
        self.finite = bool(np.isfinite(self.amax).all())

    def refuse_nan(self) -> None:
        """Raise `NonFiniteError` if what was loaded holds an infinity or NaN."""
        if not self.finite:
            raise NonFiniteError

    def choose(self, rule: str) -> None:
        """Choose every block's scale: into `best` never 0, into `scale` and `scale8` 0 for zeros and NaN for non-
        finite ones.
        """
        np.divide(self.amax, _F(6), out=self.best)
        # What becomes of a number beyond 448 differs between versions of torch: 2.11 makes it NaN, 2.13 does not.
        np.minimum(self.best, _F(448), out=self.best)
        self.scale8.copy_(torch.from_numpy(self.best))
        code = self.scale8.view(torch.uint8).numpy()
        if rule == "amax":
            np.take(CODES[0], code, out=code, mode="clip")
        else:
            self._compare(code)
            np.bitwise_and(self.least, np.int32((1 << ORDER_BITS) - 1), out=self.place)
            np.left_shift(self.place, np.int32(7), out=self.place)
            np.add(self.place, code, out=self.place)
            np.take(CODES.reshape(-1), self.place, out=code, mode="clip")
        np.take(_E4M3, code, out=self.best, mode="clip")
        np.multiply(code, (self.amax > 0).view(np.uint8), out=code)
        if not self.finite:
            code[~np.isfinite(self.amax)] = 0x7F
        np.take(_E4M3, code, out=self.scale, mode="clip")

    def _compare(self, code: NDArray[np.uint8]) -> None:
        """least <- the smallest error of every block, its last bits replaced by the place of the candidate in
        `STEPS`.
        """
        saturated = bool(self.amax.max() > 6 * 448)
        index = code.astype(np.intp)  # once: `take` would convert every time
        for place, step in enumerate(STEPS["mse"]):
            np.take(_SCALES[place], index, out=self.scale, mode="clip")
            # A scale above amax / 6 clips nothing.
            self._errors(self.scale, clip=step <= 0 or saturated)
            key = self.error.view(np.int32)
            np.bitwise_and(key, np.int32(-1 << ORDER_BITS), out=key)
            if place == 0:
                np.copyto(self.least, key)
            else:
                np.bitwise_or(key, np.int32(place), out=key)
                np.minimum(self.least, key, out=self.least)

    def take_scales(self, scale: Tensor) -> None:
        """Use given scales [blocks]: their values into `scale`, and into `best` with infinity in the place of 0."""
        if scale.dtype == torch.float8_e4m3fn:
            np.take(_E4M3, scale.view(torch.uint8).numpy(), out=self.scale, mode="clip")
        else:
            torch.from_numpy(self.scale).copy_(scale)  # no more than PIECE elements: torch stays in this thread
        if not np.isfinite(self.scale).all():
            raise NonFiniteError
        np.copyto(self.best, self.scale)
        self.best[self.scale == 0] = np.inf

    def outgrown(self) -> NDArray[np.intp]:
        """The blocks that hold a value above 6 x the scale taken."""
        return np.flatnonzero(self.amax > 6 * self.scale)

    def copy_of(self, blocks: NDArray[np.intp]) -> Tensor:
        """The given blocks of what was loaded, float32 [n, 16]."""
        return torch.from_numpy(self.w.T[blocks])

    def encode(self) -> None:
        """The codes of the blocks under the scales in `best`, two a byte, into `codes`."""
        y, p = self.y, self.p
        np.divide(self.w, self.best, out=y)
        np.abs(y, out=self.r)
        np.minimum(self.r, self.six, out=self.r)
        self._add_magic(self.r, self.r)
        # Behind the magic addition the last bits count steps of half a level, full level or two levels from 0: 0-4, 2-4
        # or 2-3. Adding twice the exponent, which starts at 2 x 149 = 42 (mod 256), gives the code's index in the
        # lowest byte.
        bits, extra, sign = self.r.view(np.int32), p.view(np.int32), y.view(np.int32)
        np.right_shift(bits, np.int32(22), out=extra)
        np.add(bits, extra, out=bits)
        np.right_shift(sign, np.int32(28), out=sign)
        np.bitwise_and(sign, np.int32(8), out=sign)
        np.add(bits, sign, out=bits)
        low, high = bits[0::2], bits[1::2]
        np.left_shift(high, np.int32(4), out=extra[:8])
        np.add(extra[:8], low, out=extra[:8])
        np.subtract(extra[:8], np.int32(42 * 17), out=extra[:8])
        np.copyto(self.codes, extra[:8].T, casting="unsafe")

    def decode(self, codes: NDArray[np.uint8], out: Tensor) -> None:
        """out [blocks, 16] <- the values of codes [blocks, 8] under the scales in `scale`."""
        np.take(_LEVEL_PAIRS, codes, out=self.rows.view(np.complex64), mode="clip")
        rows, scale = torch.from_numpy(self.rows), torch.from_numpy(self.scale)[:, None]
        for start in range(0, self.blocks, SERIAL):
            part = slice(start, start + SERIAL)
            if out.dtype == torch.float32:
                torch.mul(rows[part], scale[part], out=out[part])
            else:
                out[part].copy_(rows[part].mul_(scale[part]))

    def _add_magic(self, y: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """out <- y + p, where p makes the last bit of the sum worth the distance of the levels around y: exact
        rounding.
        """
        p = self.p.view(np.int32)
        np.maximum(y, self.one, out=self.p)
        np.bitwise_and(p, _EXPONENT, out=p)
        np.add(p, _SHIFT22, out=p)
        np.add(y, self.p, out=out)

    def _errors(self, scale: NDArray[np.float32], *, clip: bool) -> None:
        """error <- the squared error of every block under a scale."""
        y, r, p = self.y, self.r, self.p
        np.divide(self.a, scale, out=y)
        if clip:
            np.minimum(y, self.six, out=r)
        self._add_magic(r if clip else y, r)
        np.subtract(r, p, out=r)
        np.subtract(y, r, out=y)
        np.multiply(y, y, out=p)
        for first, second in self.halves:
            np.add(first, second, out=first)
        np.add(p[0], p[1], out=self.error)
        np.multiply(self.error, scale, out=self.error)
        np.multiply(self.error, scale, out=self.error)


def each_piece(blocks: int, work: Callable[[Piece, slice], None]) -> None:
    """Call work(piece, which blocks) for all blocks, from as many threads as torch uses. Re-raises the first error."""
    inference = torch.is_inference_mode_enabled()  # a thread's own: what was made in it can be written in it alone
    starts = iter(range(0, blocks, PIECE))  # shared: `next` on it is atomic, so each start is taken once

    def worker() -> None:
        pieces: dict[int, Piece] = {}
        with torch.inference_mode(inference), np.errstate(all="ignore"):  # overflow and NaN are dealt with by value
            for start in starts:
                size = min(PIECE, blocks - start)
                if size not in pieces:
                    pieces[size] = Piece(size)
                work(pieces[size], slice(start, start + size))

    threads = min(torch.get_num_threads(), -(-blocks // PIECE))
    if threads <= 1:
        worker()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(worker) for _ in range(threads)]:
            done.result()
