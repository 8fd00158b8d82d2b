"""Decode image files of any size, mode and orientation to upright images of one shape, on all cores.

Run as a program, this file is the worker that `decode_all` starts. It imports nothing of the package, so that it starts fast.
"""

import contextlib
import errno
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHUNK_FILES, CHUNK_BYTES = 64, 4 * 2**20  # maximum number of files, and of decoded bytes, per task of a worker

ORIENTATION = 0x0112  # EXIF 2.32, section 4.6.4
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_PIXELS = 2**28
"""The largest image that is decoded, 16,384 x 16,384 pixels, in 0.8 GB: a file of a few KB can claim to have more."""

# Pillow's own limit is smaller, and does not know that a JPEG is decoded at a part of its size.
Image.MAX_IMAGE_PIXELS = None


class DecodeError(ValueError):
    """A file is not a usable image; the message says why."""


ImageShape = tuple[int, int, int]
"""Channels (1 or 3), height and width."""


def decode(path: str | os.PathLike[str], image_shape: ImageShape) -> NDArray[np.uint8]:
    """Return (H, W, C) for `image_shape` (C, H, W): the image is resized to cover H x W, and the center is cropped.

    It is rotated as its EXIF data say. 16-bit grayscale is scaled to 8 bits, transparency becomes white, and an
    animation is reduced to its first frame. Raises `DecodeError` if the file cannot be decoded or its values have an
    unknown range, and `OSError` if it exists but cannot be read (no permission, disk error).
    """
    try:
        with Image.open(path) as image:
            # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is still twice the needed size
            whole = image.size
            channels, height, width = image_shape
            side = 2 * max(height, width)  # of a square, because the image may be rotated
            image.draft(None, (side, side))
            _check_size(image, whole)
            upright = _to_rgb(_upright(image), image.format)
            if channels == 1:
                upright = upright.convert("L")
            center = _center(upright.size, height, width)
            resized = upright.resize((width, height), Image.Resampling.BILINEAR, box=center)
            return np.asarray(resized).reshape(height, width, channels)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Pillow and Python add the file name to the message, and so does the caller
        for name in (f" {os.fspath(path)!r}", f": {os.fspath(path)!r}"):
            reason = reason.replace(name, "")
        raise DecodeError(reason.strip(":")) from error


def _check_size(image: Image.Image, whole: tuple[int, int]) -> None:
    """Raise `DecodeError` if decoding needs too much memory. A progressive JPEG is decoded as a `whole`, then reduced."""
    width, height = whole if image.info.get("progressive") else image.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"it has {whole[0]:,} x {whole[1]:,} pixels, the limit is {MAX_PIXELS:,} pixels")


def _center(size: tuple[int, int], height: int, width: int) -> tuple[float, float, float, float]:
    """Return the largest box (left, top, right, bottom) in the middle of an image of `size` with the aspect of H x W."""
    found_width, found_height = size
    if found_width * height > found_height * width:
        box_width, box_height = found_height * width / height, float(found_height)
    else:
        box_width, box_height = float(found_width), found_width * height / width
    left, top = (found_width - box_width) / 2, (found_height - box_height) / 2
    return left, top, left + box_width, top + box_height


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF orientation says. If Pillow cannot read the metadata, return the image as it is."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many types for broken metadata
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    # Pillow uses mode I for 16 bits in some formats, but I;16 for a TIFF's 16 bits
    if image.mode == "F" or (image.mode == "I" and file_format == "TIFF"):
        raise DecodeError("it has 32-bit values of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's conversion would clip values at 255
        values: NDArray[Any] = np.asarray(image)
        return Image.fromarray((values // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(on_white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


Decoded = bytes | str | OSError
"""The pixels of a file; or why they cannot be decoded; or the error if the file exists but cannot be read."""


def decode_all(paths: Sequence[str], image_shape: ImageShape, num_workers: int) -> Generator[Decoded, None, None]:
    """Decode each file, in order, ahead of the consumer, in up to `num_workers` processes; with one, in this process.

    It uses processes because most of the work on a small file holds Python's GIL.
    """
    size = max(1, min(CHUNK_FILES, CHUNK_BYTES // math.prod(image_shape)))
    chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
    num_workers = min(num_workers, len(chunks))
    if num_workers < 2:
        for chunk in chunks:
            yield from _decode_chunk(chunk, image_shape)
        return
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def decode_chunk(chunk: Sequence[str]) -> list[Decoded]:
        worker = idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            pickle.dump(chunk, worker.stdin)
            worker.stdin.flush()
            answer: list[Decoded] | MemoryError = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a worker process exited while decoding {chunk[0]} ... {chunk[-1]}: out of memory?"
            ) from error
        finally:
            idle.put(worker)
        if isinstance(answer, MemoryError):
            raise answer
        return answer

    with contextlib.ExitStack() as stack:
        command = [sys.executable, __file__, *map(str, image_shape)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # otherwise numpy starts one thread per core in each process
            "PYTHONSAFEPATH": "1",  # do not search this file's folder for modules; Python 3.10 still does
        }
        for _ in range(num_workers):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            stack.callback(_end, worker)
            idle.put(worker)
        pool = ThreadPoolExecutor(num_workers)  # one thread per process, which waits for it
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error or Ctrl-C, do not decode the rest
        pending: deque[Future[list[Decoded]]] = deque()
        for chunk in chunks:
            if len(pending) == 2 * num_workers:  # limits memory if the consumer is slow
                yield from pending.popleft().result()
            pending.append(pool.submit(decode_chunk, chunk))
        while pending:
            yield from pending.popleft().result()


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Stop a worker by closing its pipes."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # it has already exited
        worker.stdin.close()
    worker.wait()


def _decode_chunk(paths: Sequence[str], image_shape: ImageShape) -> list[Decoded]:
    found: list[Decoded] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that it can read
        for path in paths:
            try:
                found.append(decode(path, image_shape).tobytes())
            except DecodeError as error:
                found.append(str(error))
            except OSError as error:
                found.append(OSError(error.errno, error.strerror))  # without the traceback, and safe to pickle
    return found


def _serve(image_shape: ImageShape) -> None:
    """Answer each pickled list of paths on stdin with the pickled list of `Decoded` on stdout, until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which then closes stdin
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            paths = pickle.load(sys.stdin.buffer)
            answer: list[Decoded] | MemoryError
            try:
                answer = _decode_chunk(paths, image_shape)
            except MemoryError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve((int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
